"""Seconds and memory to load a DeiT-Base .pth: avit_jax.load, which needs no torch, and torch.load itself.

    python benchmarks/convert.py                        one minute; Linux, needs torch (requirements-peers.txt)

Each load runs in its own process, in turn; medians are reported. Memory is the process's peak above its memory before
the load, in multiples of the file's size. Writes runs/benchmarks/convert.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

PRESET = "deit_base_patch16_224"


def load_with(reader: str, path: str) -> dict[str, float]:
    """Load once in this process; returns seconds and bytes of peak memory."""
    if reader == "torch.load":
        import torch

        torch.zeros(1)
    else:
        import avit_jax

        jax.block_until_ready(jax.numpy.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = _memory("VmRSS")
    began = time.perf_counter()
    if reader == "torch.load":
        content = torch.load(path, weights_only=True)
    else:
        content = avit_jax.load(path, PRESET)
        jax.block_until_ready(content.pos_embed[...])
    return {"seconds": time.perf_counter() - began, "bytes": _memory("VmHWM") - before}


def _memory(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load_with(*options.child)))
        return
    import avit_jax

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deit_base.pth"
        avit_jax.save_torch(avit_jax.create(PRESET), path)
        size = path.stat().st_size
        found: dict[str, list[dict[str, float]]] = {"torch.load": [], "avit_jax.load": []}
        for _ in range(options.rounds):
            for reader, runs in found.items():
                command = [sys.executable, __file__, "--child", reader, str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    result = {
        reader: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "bytes")}
        for reader, runs in found.items()
    }
    print(f"{PRESET}.pth, {size / 1e6:.0f} MB; {platform.processor() or platform.machine()}")
    for reader, row in result.items():
        print(f"{reader:14} {row['seconds']:6.2f} s  peak memory {row['bytes'] / size:5.2f} x the file")
    ratio = result["avit_jax.load"]["seconds"] / result["torch.load"]["seconds"]
    print(f"avit_jax.load / torch.load: {ratio:.2f}")
    out = Path("runs/benchmarks/convert.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"file_bytes": size, "rounds": options.rounds, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
