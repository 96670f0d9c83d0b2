"""Arrays from untrusted files (.npz and idx), and checks of their labels."""

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
# An archive may unpack to this many bytes, or to this many times its own size. Pictures of digits reach 10 times.
UNPACKED_BYTES, UNPACKED_TIMES = 100_000_000, 20
_MAX_ENTRIES = 10_000


def read_npz(path: Path, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """The wanted arrays of an .npz file, and an empty array in place of every other one that it holds.

    wanted: the names of arrays; those that the file lacks are missing from the result. Raises ValueError, naming the
    file, if it is damaged, holds Python objects or unpacks to far more than its size.
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
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds of error for damaged files
        reason = (shown(str(error), 200).strip() or type(error).__name__).split("\\n")[0]
        raise ValueError(f"{shown(path)} cannot be read as .npz: {reason}") from error
    if len(entries) > _MAX_ENTRIES:
        raise ValueError(f"{shown(path)} cannot be read as .npz: it holds {len(entries)} arrays")
    raise ValueError(
        f"{shown(path)} cannot be read as .npz: its arrays take {unpacked / 1e6:,.0f} MB and the file "
        f"{path.stat().st_size / 1e6:,.1f} MB, which may be a decompression bomb: write it with np.savez, uncompressed"
    )


def read_idx(path: Path, axes: int) -> UInt8[np.ndarray, "..."]:
    """The array in a file of MNIST's idx format, gzipped or not.

    The format: 00 00 08, the number of axes, their lengths as big-endian int32, the bytes. axes: how many are expected.
    Raises ValueError, naming the file, if it is damaged or its lengths do not match its content.
    """
    packed, size = path.suffix == ".gz", path.stat().st_size
    limit = max(UNPACKED_BYTES, UNPACKED_TIMES * size) if packed else size
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            if head[:4] != bytes([0, 0, 8, axes]) or len(head) < 4 + 4 * axes:
                raise ValueError(
                    f"{shown(path)} is not an idx file of bytes with {axes} axes: it begins with {head[:4].hex()}"
                )
            shape = tuple(np.frombuffer(head, ">i4", axes, 4).tolist())
            count = math.prod(shape)
            if min(shape) < 0 or count > limit:
                raise ValueError(
                    f"{shown(path)} declares the shape {shape} and has {size} bytes: it is truncated or damaged"
                )
            data = stream.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{shown(path)} cannot be read: {error}") from error
    if len(data) != count:
        held = f"{len(data)}" if len(data) < count else f"more than {count}"
        raise ValueError(
            f"{shown(path)} declares the shape {shape} and holds {held} values: it is truncated or damaged"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def named_classes(labels: Integer[np.ndarray, " n"], names: Sequence[str], what: str) -> tuple[str, ...]:
    """The name of every class: `names`, or if there are none, the numbers from 0 to the largest label.

    what: what messages call the labels. Prints a line if some classes have no example. Raises ValueError for labels
    that are negative, too large, or counted from 1.
    """
    least, largest = int(labels.min()), int(labels.max())
    count = len(names) or largest + 1
    if least < 0 or (names and largest >= count):
        hint = ", so write labels - 1" if (least, largest) == (1, count) else ""
        raise ValueError(f"{what} go from {least} to {largest} for {count} classes: they must be 0..{count - 1}{hint}")
    if count > MAX_CLASSES or (not names and largest >= len(labels)):
        raise ValueError(
            f"{what} go up to {largest} for {len(labels)} images: classes must be numbered from 0 without gaps, and "
            f"there can be at most {MAX_CLASSES:,}; np.unique(labels, return_inverse=True)[1] renumbers them"
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
    """Raises ValueError unless all labels are in 0..count - 1; what: what the message calls them."""
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(
            f"{what} go from {labels.min()} to {labels.max()} for {count} classes: they must be 0..{count - 1}"
        )
