"""Progress of long work on stderr, with the time left: a bar on a terminal, else a plain line every few seconds."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

EVERY = 5.0  # seconds between two lines
_Item = TypeVar("_Item")


def counted(items: Iterable[_Item], text: str, total: int, unit: str) -> Iterator[_Item]:
    """The items, with a display of progress after two seconds.

    text: what is done with the items. total: how many there are. unit: what they are called.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=text, total=total, unit=unit, delay=2, leave=False)
        return
    began = told = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - told >= EVERY:
            told = now
            left = seconds((now - began) / done * (total - done))
            print(f"{text}: {done} of {total} {unit}, about {left} left", file=sys.stderr, flush=True)
        yield item


class Steps:
    """Progress over steps of several kinds. The time left is estimated from the finished steps of each kind.

    name: what the work is called. counts: how many steps there are of each kind. guesses: seconds of a step of each
    kind, used until the first one is done.
    """

    def __init__(self, name: str, counts: Mapping[str, int], guesses: Mapping[str, float]) -> None:
        self._name, self._left, self._guesses = name, dict(counts), guesses
        self._total = sum(counts.values())
        self._took: dict[str, list[float]] = {kind: [] for kind in counts}
        self._began, self._told = time.perf_counter(), -EVERY
        form = "{desc} |{bar}| {n_fmt} of {total_fmt}{postfix}"
        self._bar = tqdm(total=self._total, desc=name, bar_format=form, leave=False, disable=not sys.stderr.isatty())

    @contextlib.contextmanager
    def step(self, kind: str, text: str) -> Iterator[None]:
        """One step of this kind; text: what it does."""
        self._show(text)
        began = time.perf_counter()
        yield
        self._took[kind].append(time.perf_counter() - began)
        self._left[kind] -= 1
        self._bar.update()

    def leave_out(self, kind: str) -> None:
        """Drop the remaining steps of this kind."""
        self._total -= self._left[kind]
        self._bar.total = self._total
        self._left[kind] = 0

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def seconds_left(self) -> float:
        """Seconds for the remaining steps, at the average of their kind so far, or else as guessed."""
        found = 0.0
        for kind, count in self._left.items():
            took = self._took[kind] or [self._guesses[kind]]
            found += count * sum(took) / len(took)
        return found

    def _show(self, text: str) -> None:
        left = f"about {seconds(self.seconds_left())} left"
        now = time.perf_counter() - self._began
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{text}, {left}")
        elif now - self._told >= EVERY:
            self._told = now
            done = sum(map(len, self._took.values()))
            print(f"{self._name}: {done} of {self._total} steps, {text}; {left}", file=sys.stderr, flush=True)


def seconds(value: float) -> str:
    """Seconds as text: 40 s, or 3 min 20 s."""
    whole = round(value)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"
