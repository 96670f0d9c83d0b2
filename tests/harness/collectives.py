"""The collectives of a compiled program, read from its text: which ones, how often they run, and how many bytes."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all|collective-broadcast"
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_COLLECTIVE = re.compile(rf"({KINDS})(?:-start)?")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|\w+_computations?)=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)")

Shape = tuple[int, ...]
Array = tuple[str, Shape]  # element type and shape


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str
    arrays: tuple[tuple[Array, Array], ...]  # before and after, on one device
    times: int  # how often it runs in a call; 0: in a loop whose length depends on the data


def collectives(text: str) -> list[Collective]:
    """All collectives of a program.

    text: compiled.as_text(), from XLA for CPU, GPU or TPU. Raises ValueError if it has no ENTRY.
    """
    bodies, entry = _computations(text)
    found, seen = [], set()
    for name, times in _runs(bodies, entry).items():
        shapes: dict[str, str] = {}
        for line in bodies[name]:
            if not (parts := _INSTRUCTION.match(line)):
                continue
            shapes[parts[1]] = parts[2]
            if not (kind := _COLLECTIVE.fullmatch(parts[3])):
                continue
            operands, _, attributes = re.sub(r"/\*.*?\*/", "", parts[4]).partition(")")
            before = [shape for operand in operands.split(", ") for shape in _shapes(shapes[operand.split(" ")[-1]])]
            after = _shapes(parts[2])[-len(before) :]  # the result of a -start begins with its operands
            # TPU: a collective that overlaps with other work appears in several fusions, with the same number.
            channel = re.search(r"channel_id=(\d+)", attributes)
            key = (kind[1], parts[2], channel and channel[1], "fus" in name or name)
            if key in seen:
                continue
            seen.add(key)
            # TPU: a reduce-scatter is an all-reduce in a fusion that keeps only a part.
            scatters = "reduce-scatter" in name
            arrays = tuple(zip(before, after, strict=True))
            found.append(Collective("reduce-scatter" if scatters else kind[1], arrays, times))
    return found


def _shapes(text: str) -> list[Array]:
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _SHAPE.findall(_plain(text))]


def _plain(text: str) -> str:
    """The text without layouts, which contain brackets too."""
    return re.sub(r"\{[^}]*\}|/\*.*?\*/", "", text)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and which one is the program."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?(%[\w.-]+) \(", line)):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in a call of the program; 0 if that depends on the data."""
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in bodies[name]:
            inner = times * _loop_length(line, bodies) if " while(" in line else times
            for group in _CALLED.findall(line):
                for called in group.replace(" ", "").split(","):
                    visit(called, inner)

    visit(entry, 1)
    return runs


def _loop_length(line: str, bodies: dict[str, list[str]]) -> int:
    """The number of iterations, from XLA's annotation or a condition `index < constant`; 0 for another condition."""
    if known := re.search(r'known_trip_count":?\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=(%[\w.-]+)", line)
    lines = bodies[condition[1]] if condition else []
    constants = [found[1] for one in lines if (found := re.search(r"= s32\[\]\S* constant\((\d+)\)", one))]
    counts = any("ROOT" in one and " compare(" in one and "direction=LT" in one for one in lines)
    return int(constants[0]) if counts and len(constants) == 1 else 0


def what_crosses(
    found: Iterable[Collective], parameters: Sequence[tuple[str, Shape]], layers: int, fsdp: int
) -> dict[str, Counter[str]]:
    """The collectives by what they carry: {what: {"count", "bytes"}} for one call on one device, of whole arrays.

    "gradients" are sums with as many elements as a parameter, one layer of it, or a device's part of it. "parameters"
    are gathers of these, "statistics" have one number per layer, "counts" are whole numbers for each layer, from which
    shapes are planned, and "scalars" are single numbers. Everything else, and a gather along the layers, is "other".
    "in loops" counts collectives in loops whose length depends on the data; they do not add to "count" and "bytes".
    parameters: names and shapes; with "blocks" in its name, a parameter is stacked, the layer axis first. layers: how
    many. fsdp: over how many devices parameters are split. Raises ValueError if sizes do not distinguish one layer's
    parameters from those of all layers.
    """
    stacked = {math.prod(shape) for name, shape in parameters if "blocks" in name}
    single = {math.prod(shape[1:] if "blocks" in name else shape) for name, shape in parameters}
    whole = stacked | single
    sums = whole | {size // fsdp for size in whole if size % fsdp == 0}
    if stacked & single:
        raise ValueError(
            f"some parameters are as large as others of {layers} layers together: choose another width or depth"
        )
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for one in found:
        kinds = set()
        for before, after in one.arrays:
            what = _what(one.kind, before, after, whole, sums, stacked, layers)
            size = max(BYTES[dtype] * math.prod(shape) for dtype, shape in (before, after))
            total[what]["bytes"] += one.times * size
            kinds.add(what)
        for what in kinds:
            total[what]["count" if one.times else "in loops"] += max(1, one.times)
    return dict(total)


def _what(
    kind: str, before: Array, after: Array, whole: set[int], sums: set[int], stacked: set[int], layers: int
) -> str:
    dtype, shape = before
    size = math.prod(shape)
    if kind in ("all-reduce", "reduce-scatter"):
        if dtype == "s32" and shape[:1] == (layers,):
            return "counts"
        if size == 1:
            return "scalars"
        if size == layers:
            return "statistics"
        return "gradients" if size in sums else "other"
    gathered = math.prod(after[1])
    along_layers = gathered in stacked and layers not in shape
    return "parameters" if kind == "all-gather" and gathered in whole and not along_layers else "other"


def said(crossing: dict[str, Counter[str]]) -> str:
    """The result of what_crosses as text, for a table."""
    parts = []
    for what in sorted(crossing):
        count = crossing[what]
        size = f" of {count['bytes'] / 1e6:.2f} MB" if count["bytes"] >= 1e4 else ""
        loops = f" and {count['in loops']} in loops whose length depends on the data" if count["in loops"] else ""
        parts.append(f"{count['count']} {what}{size}{loops}")
    return ", ".join(parts) or "nothing"
