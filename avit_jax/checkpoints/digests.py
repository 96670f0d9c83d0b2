"""SHA-256 digests of saved arrays and JSON, which show that what is read back is what was written."""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avit_jax.runtime.files import read_json

NO_DIGESTS = "it was written without digests, so damage cannot be detected"
HEX = re.compile("[0-9a-f]{64}")


def tree_digests(tree: Any) -> dict[str, str]:
    """The digest of every array in nested dicts, by its name: the keys joined by dots.

    A digest covers the array's name, dtype, shape and little-endian bytes. It does not depend on how the array is laid
    out over devices. Arrays that are split over processes are gathered, so all processes must call this together.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in leaves}
    # hashlib lets other threads run. The gathers stay in this thread, because all processes need the same order.
    with ThreadPoolExecutor(4) as pool:
        pending = {name: pool.submit(_array_digest, name, _on_host(leaf)) for name, leaf in named.items()}
        return {name: future.result() for name, future in pending.items()}


def json_digest(content: Any) -> str:
    """The digest of JSON content. It does not depend on spacing or the order of keys."""
    plain = json.loads(json.dumps(content))  # tuples become lists, and keys strings, as in a file
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_digests(path: Path) -> dict[str, Any] | None:
    """The digests in a file; None if there are none, as in old checkpoints.

    Raises ValueError, naming the file, if it is damaged.
    """
    if not (path if path.name == "digests.json" else path.parent).exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no digests")
    return content


def check_digests(where: Path, found: Mapping[str, str], written: Any) -> None:
    """Raises ValueError, naming the first parameter that differs, unless what was read is what was written.

    where: what the message names. found: the digests of what was read. written: the digests stored beside the data,
    which may be damaged themselves.
    """
    if not isinstance(written, dict):
        raise ValueError(f"the checkpoint {where} is damaged: its digests are missing")
    for name in sorted(found.keys() | written.keys()):
        digest = written.get(name)
        if name not in found or not isinstance(digest, str) or not HEX.fullmatch(digest):
            raise ValueError(f"the checkpoint {where} is damaged: its digests do not match it, see {name[:100]!r}")
        if digest != found[name]:
            raise ValueError(
                f"the checkpoint {where} is damaged: {name} is not what was written (its SHA-256 digest differs)"
            )


def _array_digest(name: str, array: np.ndarray) -> str:
    if sys.byteorder == "big":
        array = array.byteswap()
    digest = hashlib.sha256(f"{name} {array.dtype.name} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        assert isinstance(leaf.sharding, NamedSharding)
        leaf = _gather(leaf.sharding.mesh)(leaf)
    if leaf.is_fully_replicated:
        # A new handle to the buffer: the array itself would keep its host copy, and with it a buffer to be donated.
        leaf = leaf.addressable_data(0)
    return np.asarray(leaf)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))
