"""Train a model and show what it does: python train.py --config=configs/mnist_avit.py"""

import time

BEGAN = time.perf_counter()  # before the imports, which the user waits for too

from avit_jax.commands.train import main  # noqa: E402

if __name__ == "__main__":
    main(BEGAN)
