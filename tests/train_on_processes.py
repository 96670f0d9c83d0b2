"""Run by test_processes: one of several processes of a small training run.

python -m tests.train_on_processes FOLDER COORDINATOR PROCESSES PROCESS
"""

import sys
from pathlib import Path

from avit_jax.distributed import start_distributed
from avit_jax.experiment import run
from tests.builders import tiny_experiment

folder, coordinator, processes, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if processes > 1:
    start_distributed(True, coordinator, processes, process)
config = tiny_experiment(folder / f"data{process}.npz")
config.data.path = str(folder / "data0.npz")
config.name = "tiny"
if "other" in folder.name and process == 1:
    config.loss.ponder_weight = 0.5
run(config, folder / "run")
