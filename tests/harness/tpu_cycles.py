"""The cycles of a compiled TPU program by the compiler's own account, from the text of the program.

libtpu writes `estimated_cycles` beside most operations. A fusion has one figure for all that is fused. The body of a
loop counts once for each trip, and the branch of a conditional by the share of times that it is taken.
Gathers and sorts have no figure. They are charged by the schedules that libtpu 0.0.42.1 writes for them when
LIBTPU_INIT_ARGS has --xla_jf_dump_to and --xla_jf_dump_llo_text: see GATHERED_ROW, GATHERED_ELEMENT and SORTED_TILE.
Copies between memories run beside the computation; they, scatters, and a few reshapes have no figure and do not count.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

GATHERED_ROW = 4  # cycles: 940 bundles of instructions for 256 rows of 192 float32
GATHERED_ELEMENT = 14  # cycles: 880 bundles for 64 elements of a [256, 197] array
SORTED_TILE = 2.6  # cycles for 8 x 128 values in each step of the network: 30,000 bundles for 5 arrays of [256, 197]

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"(body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a compiled program."""

    name: str
    code: str  # such as fusion, while or conditional
    shape: str  # of the result
    text: str  # the whole line
    estimate: int | None  # cycles by the compiler

    @property
    def source(self) -> str:
        """The JAX operations that it comes from."""
        found = _SOURCE.search(self.text)
        return found.group(1) if found else ""

    def called(self) -> dict[str, str]:
        """The computations that it calls, by role."""
        return dict(_CALLED.findall(self.text))

    def branches(self) -> list[str]:
        """The computations of a conditional, that of 0 or False first."""
        if found := _BRANCHES.search(self.text):
            return [name.strip().lstrip("%") for name in found.group(1).split(",")]
        called = self.called()
        return [called["false_computation"], called["true_computation"]]

    def charge(self) -> float:
        """Cycles of a gather or sort, which the compiler does not estimate; 0 for other operations."""
        shapes = [[int(n) for n in found.split(",") if n] for found in _SHAPE.findall(self.shape)]
        if self.code == "sort":
            (axis,) = (int(n) for n in re.findall(r"dimensions=\{(\d+)\}", self.text))
            steps = math.ceil(math.log2(max(shapes[0][axis], 2)))
            return sum(_tiles(shape) for shape in shapes) * steps * (steps + 1) / 2 * SORTED_TILE
        if self.code == "gather" or (self.code == "fusion" and "kind=kCustom" in self.text and "gather" in self.source):
            (shape,) = shapes
            rows = len(shape) > 1
            return math.prod(shape[:-1] if rows else shape) * (GATHERED_ROW if rows else GATHERED_ELEMENT)
        return 0.0


@dataclasses.dataclass(frozen=True)
class Counted:
    """An operation and how often a run of the program executes it, on average."""

    operation: Operation
    times: float

    @property
    def estimated(self) -> float:
        """Cycles in a run by the compiler's estimate."""
        return self.times * (self.operation.estimate or 0)

    @property
    def charged(self) -> float:
        """Cycles in a run of a gather or sort that has no estimate."""
        return self.times * self.operation.charge() if self.operation.estimate is None else 0.0


def counted(text: str, shares: Callable[[int, float], Sequence[float]]) -> list[Counted]:
    """Every operation that a run executes.

    text: of the compiled program. shares(branches, times): the share of times that each branch of a conditional with
    so many branches is taken, if it is met so often in a run. Raises ValueError for a loop whose trips are not in the
    text.
    """
    programs, entry = _programs(text)
    found: list[Counted] = []

    def visit(name: str, times: float) -> None:
        for operation in programs[name]:
            found.append(Counted(operation, times))
            called = operation.called()
            if operation.code == "while":
                visit(called["body"], times * trips(programs[called["condition"]]))
            elif operation.code == "conditional":
                branches = operation.branches()
                for branch, share in zip(branches, shares(len(branches), times), strict=True):
                    visit(branch, times * share)
            elif operation.code == "call":
                visit(called["to_apply"], times)

    visit(entry, 1.0)
    return found


def trips(condition: Sequence[Operation]) -> int:
    """The trips of a loop that counts from 0, from its condition. Raises ValueError if it is another loop."""
    constants = [operation.text for operation in condition if operation.code == "constant"]
    bounds = [re.search(r"constant\((\d+)\)", text) for text in constants]
    compares = [operation for operation in condition if operation.code == "compare"]
    if len(bounds) != 1 or bounds[0] is None or len(compares) != 1 or "direction=LT" not in compares[0].text:
        raise ValueError(f"a loop does not count up to a constant: {[operation.text for operation in condition]}")
    return int(bounds[0].group(1))


def _programs(text: str) -> tuple[dict[str, list[Operation]], str]:
    """The operations of each computation, and the name of the one that runs first."""
    programs: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = programs.setdefault(begins.group(2), [])
            entry = begins.group(2) if begins.group(1) else entry
        elif current is not None and (found := _OPERATION.match(line)):
            current.append(_operation(found.group(1), found.group(2), line))
    if not entry:
        raise ValueError("the text has no ENTRY computation: give compiled.as_text()")
    return programs, entry


def _operation(name: str, rest: str, line: str) -> Operation:
    end = _end_of_shape(rest)
    code = re.match(r"\s*([\w\-]+)\(", rest[end:])
    assert code is not None, line
    cycles = _CYCLES.search(line)
    return Operation(name, code.group(1), rest[:end], line.strip(), int(cycles.group(1)) if cycles else None)


def _end_of_shape(rest: str) -> int:
    """Where the shape ends, which comes first; that of a tuple is in parentheses."""
    if not rest.startswith("("):
        return rest.index(" ")
    depth = 0
    for at, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return at + 1
    raise ValueError(f"parentheses do not match: {rest[:200]}")


def _tiles(shape: Sequence[int]) -> int:
    """Tiles of 8 x 128 values."""
    *_, rows, columns = (1, 1, *shape)
    return math.prod(shape[:-2]) * math.ceil(rows / 8) * math.ceil(columns / 128)
