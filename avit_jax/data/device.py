"""Batches that are copied to the devices ahead of time."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from avit_jax.data.pipeline import Batch, TrainingBatches


class DeviceBatches(Iterator[Batch]):
    """The stream of `batches`, with `ahead` batches placed on the devices in advance. Its state is exact too.

    place: copies a batch to the devices, for instance jax.device_put with a sharding, or on several hosts
    jax.make_array_from_process_local_data. JAX copies in the background, so the running step hides the copy.
    """

    def __init__(self, batches: TrainingBatches, place: Callable[[Batch], Batch], ahead: int = 2) -> None:
        self._batches, self._place, self._ahead = batches, place, ahead
        self._placed: deque[tuple[Batch, dict[str, Any]]] = deque()
        self._state = batches.get_state()

    def __next__(self) -> Batch:
        while len(self._placed) < self._ahead:
            self._placed.append((self._place(next(self._batches)), self._batches.get_state()))
        batch, self._state = self._placed.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        """The state after the last batch that was returned; batches placed in advance do not count."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from where get_state returned `state`."""
        self._placed.clear()
        self._batches.set_state(state)
        self._state = self._batches.get_state()

    def close(self) -> None:
        """Stop the workers."""
        self._placed.clear()
        self._batches.close()
