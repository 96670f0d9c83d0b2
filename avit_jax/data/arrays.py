"""Arrays from files that strangers made: .npz archives, and the labels in them."""

import gzip
import math
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8

from avit_jax.runtime.files import shown

MAX_CLASSES = 100_000
# What an archive may unpack to: so many bytes, or so many times its own size. Pictures of digits reach a tenth.
UNPACKED_BYTES, UNPACKED_TIMES = 100_000_000, 20
_MAX_ENTRIES = 10_000


def read_npz(path: Path, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """The wanted arrays of an .npz file, and an empty array for every other that it holds.

    Raises ValueError, naming the file, where it is damaged, holds Python objects or unpacks to far more than its size.
    """
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            members = {entry.filename.removesuffix(".npy"): entry for entry in entries}
            limit = max(UNPACKED_BYTES, UNPACKED_TIMES * path.stat().st_size)
            unpacked = sum(members[name].file_size for name in wanted if name in members)
            if unpacked <= limit and len(entries) <= _MAX_ENTRIES:
                arrays = dict.fromkeys(members, np.empty(0))
                for name in wanted:
                    if name in members:
                        with archive.open(members[name]) as member:
                            arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                return arrays
    except Exception as error:  # zipfile, zlib and NumPy have a dozen kinds for what can be wrong
        reason = (shown(str(error), 200).strip() or type(error).__name__).split("\\n")[0]
        raise ValueError(f"{shown(path)} cannot be read as .npz: {reason}") from error
    if len(entries) > _MAX_ENTRIES:
        raise ValueError(f"{shown(path)} cannot be read as .npz: it holds {len(entries)} arrays")
    raise ValueError(
        f"{shown(path)} cannot be read as .npz: its arrays have {unpacked / 1e6:,.0f} MB and the file "
        f"{path.stat().st_size / 1e6:,.1f} MB, which may be a decompression bomb: write it with np.savez, uncompressed"
    )


def read_idx(path: Path, axes: int) -> UInt8[np.ndarray, "..."]:
    """MNIST's format, gzipped or not: 00 00 08, the number of axes, their lengths as big-endian int32, the bytes.

    Raises ValueError, naming the file, where it is damaged or says other lengths than it holds.
    """
    packed, size = path.suffix == ".gz", path.stat().st_size
    limit = max(UNPACKED_BYTES, UNPACKED_TIMES * size) if packed else size
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            if head[:4] != bytes([0, 0, 8, axes]) or len(head) < 4 + 4 * axes:
                raise ValueError(
                    f"{shown(path)} is no idx file of bytes with {axes} axes: it begins with {head[:4].hex()}"
                )
            shape = tuple(np.frombuffer(head, ">i4", axes, 4).tolist())
            count = math.prod(shape)
            if min(shape) < 0 or count > limit:
                raise ValueError(f"{shown(path)} says {shape} and has {size} bytes: it is cut or damaged")
            data = stream.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{shown(path)} cannot be read: {error}") from error
    if len(data) != count:
        held = f"{len(data)}" if len(data) < count else f"more than {count}"
        raise ValueError(f"{shown(path)} says {shape} and holds {held} values: it is cut or damaged")
    return np.frombuffer(data, np.uint8).reshape(shape)


def named_classes(labels: Integer[np.ndarray, " n"], names: Sequence[str], what: str) -> tuple[str, ...]:
    """The name of every class: `names`, or without them the numbers from 0 to the largest label.

    what: what an error calls the labels. Prints a line where a class has no example. Raises ValueError for labels that
    are negative, too large, or counted from 1.
    """
    least, largest = int(labels.min()), int(labels.max())
    count = len(names) or largest + 1
    if least < 0 or (names and largest >= count):
        hint = ", so write labels - 1" if (least, largest) == (1, count) else ""
        raise ValueError(f"{what} {least} to {largest} for {count} classes: they must be 0..{count - 1}{hint}")
    if count > MAX_CLASSES or (not names and largest >= len(labels)):
        raise ValueError(
            f"{what} go up to {largest}, for {len(labels)} images: they must number the classes from 0, without gaps, "
            f"and there can be {MAX_CLASSES:,}; np.unique(labels, return_inverse=True)[1] renumbers them"
        )
    examples = np.bincount(labels.astype(np.int64), minlength=count)
    if not names and not examples[0] and examples[1:].all():
        raise ValueError(
            f"{what} count from 1 to {largest}: they must start at 0, so write labels - 1 (or give class_names, "
            f"{count} of them, to keep a class 0 without examples)"
        )
    names = tuple(names) or tuple(map(str, range(count)))
    missing = np.flatnonzero(examples == 0)
    if len(missing):
        first = ", ".join(shown(names[label], 50) for label in missing[:5])
        print(
            f"{what}: {len(missing)} of {count} classes have no example: {first}{', ...' if len(missing) > 5 else ''}"
        )
    return names


def check_labels(labels: Integer[np.ndarray, " n"], count: int, what: str) -> None:
    """Raises ValueError unless all labels are 0..count - 1."""
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"{what} {labels.min()} to {labels.max()} for {count} classes: they must be 0..{count - 1}")
