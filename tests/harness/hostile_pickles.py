"""Pickles and files that a stranger might send, opcode by opcode; read_in_a_process says what reading them costs."""

import json
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

START = pickle.PROTO + b"\x02"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED = b"ccollections\nOrderedDict\n"


def number(value: int) -> bytes:
    return pickle.LONG1 + bytes([32]) + value.to_bytes(32, "little", signed=True)


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def numbers(values: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE


def storage(key: bytes = text("0"), size: bytes = number(1), kind: bytes = text("storage")) -> bytes:
    return pickle.MARK + kind + b"ctorch\nFloatStorage\n" + key + text("cpu") + size + pickle.TUPLE + pickle.BINPERSID


def tensor(shape: bytes, strides: bytes, stored: bytes = storage(), offset: bytes = number(0)) -> bytes:
    rest = pickle.NEWFALSE + pickle.EMPTY_DICT + pickle.TUPLE + pickle.REDUCE
    return REBUILD + pickle.MARK + stored + offset + shape + strides + rest


def state(*tensors: bytes) -> bytes:
    """{"w0": ..., "w1": ...} as a whole pickle."""
    items = b"".join(text(f"w{i}") + value for i, value in enumerate(tensors))
    return START + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def put(index: int) -> bytes:
    return pickle.LONG_BINPUT + struct.pack("<I", index)


def get(index: int) -> bytes:
    return pickle.LONG_BINGET + struct.pack("<I", index)


def doubled(times: int, container: str = "tuple") -> bytes:
    """A value of 2^times parts, of a few bytes for each doubling; leaves it on the stack."""
    program = pickle.NONE
    for index in range(times):
        keep, again = put(1000 + index), get(1000 + index)
        if container == "tuple":
            program += keep + again + pickle.TUPLE2
        elif container == "list":
            program = pickle.EMPTY_LIST + program + keep + pickle.APPEND + again + pickle.APPEND
        else:
            program = (
                pickle.EMPTY_DICT + text("a") + program + keep + pickle.SETITEM + text("b") + again + pickle.SETITEM
            )
    return program


def everywhere(value: bytes) -> dict[str, bytes]:
    """Pickles that give a value to everything that a pickle machine does with values."""
    call = {
        "calls it": value + pickle.EMPTY_TUPLE + pickle.REDUCE,
        "makes an object of it": value + pickle.EMPTY_TUPLE + pickle.NEWOBJ,
        "calls with it": ORDERED + value + pickle.REDUCE,
        "ordered": ORDERED + value + pickle.TUPLE1 + pickle.REDUCE,
        "ordered pair": ORDERED + pickle.EMPTY_LIST + value + pickle.NONE + pickle.TUPLE2 + pickle.APPEND
        + pickle.TUPLE1 + pickle.REDUCE,
        "parameter": b"ctorch._utils\n_rebuild_parameter\n" + value + pickle.TUPLE1 + pickle.REDUCE,
        "size": b"ctorch\nSize\n" + value + pickle.TUPLE1 + pickle.REDUCE,
        "device": b"ctorch\ndevice\n" + value + pickle.TUPLE1 + pickle.REDUCE,
        "set": b"cbuiltins\nset\n" + value + pickle.TUPLE1 + pickle.REDUCE,
    }  # fmt: skip
    other = {
        "is all": value,
        "key": pickle.EMPTY_DICT + value + pickle.NONE + pickle.SETITEM,
        "keys": pickle.EMPTY_DICT + pickle.MARK + value + pickle.NONE + pickle.SETITEMS,
        "value": pickle.EMPTY_DICT + text("a") + value + pickle.SETITEM,
        "item": pickle.EMPTY_LIST + value + pickle.APPEND,
        "set item": pickle.EMPTY_SET + pickle.MARK + value + pickle.ADDITEMS,
        "module": value + text("x") + pickle.STACK_GLOBAL,
        "name": text("torch") + value + pickle.STACK_GLOBAL,
        "state": ORDERED + pickle.EMPTY_TUPLE + pickle.REDUCE + value + pickle.BUILD,
        "gets state": value + pickle.NONE + pickle.BUILD,
        "is set to": value + text("a") + pickle.NONE + pickle.SETITEM,
        "is appended to": value + pickle.NONE + pickle.APPEND,
        "storage": value + pickle.BINPERSID,
        "storage kind": storage(kind=value),
        "storage key": storage(key=value),
        "storage size": storage(size=value),
        "two storages": pickle.EMPTY_LIST + pickle.MARK + 2 * storage(key=value) + pickle.APPENDS,
        "shape": tensor(value, numbers((1,))),
        "shape of it": tensor(value + pickle.TUPLE1, numbers((1,))),
        "strides": tensor(numbers((1,)), value),
        "strides of it": tensor(numbers((1,)), value + pickle.TUPLE1),
        "offset": tensor(numbers((1,)), numbers((1,)), offset=value),
        "tensor of it": tensor(numbers((1,)), numbers((1,)), stored=value),
    }
    wrapped = {
        "metadata": ORDERED + pickle.EMPTY_TUPLE + pickle.REDUCE + text("w") + tensor(numbers((1,)), numbers((1,)))
        + pickle.SETITEM + pickle.EMPTY_DICT + text("_metadata") + value + pickle.SETITEM + pickle.BUILD,
        "our metadata": ORDERED + pickle.EMPTY_TUPLE + pickle.REDUCE + text("w") + tensor(numbers((1,)), numbers((1,)))
        + pickle.SETITEM + pickle.EMPTY_DICT + text("_metadata") + pickle.EMPTY_DICT + text("avit_jax") + value
        + pickle.SETITEM + pickle.SETITEM + pickle.BUILD,
    }  # fmt: skip
    return {name: START + program + pickle.STOP for name, program in (call | other | wrapped).items()}


def legacy(*pickles: bytes) -> bytes:
    """The start of a file of the format before torch 1.6, then these."""
    return START + number(0x1950A86A20F9469CFC6C) + pickle.STOP + b"".join(pickles)


def write_zip(path: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED, **parts: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in parts.items():
            archive.writestr(f"archive/{name}", content)
    return path


def read_in_a_process(paths: list[Path], *, timeout: float) -> dict[str, dict[str, Any]]:
    """What becomes of each file in one process of limited memory: error, CPU seconds, growth of memory in bytes."""
    command = [sys.executable, "-m", "tests.harness.hostile_pickles", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 0, f"ended with {done.returncode} after {list(found)[-1:]}: {done.stderr[-500:]}"
    return found


def _memory(field: str) -> int:
    """Bytes of this process (Linux): VmSize mapped, VmRSS held now, VmHWM held at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _main() -> None:
    import avit_jax
    from avit_jax.checkpoints.convert.weight_files import read_config

    limit = _memory("VmSize") + 4 * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for path in map(Path, sys.argv[1:]):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
        began, before, error = time.process_time(), _memory("VmRSS"), ""
        try:
            read_config(path)
            avit_jax.load(path, num_heads=1)
        except ValueError as raised:
            error = str(raised)
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        cost = {"error": error, "seconds": time.process_time() - began, "bytes": _memory("VmHWM") - before}
        print(json.dumps([str(path), cost]), flush=True)


if __name__ == "__main__":
    _main()
