"""Train a model where the package is installed: python -m avit_jax.train --config=mnist_avit"""

import time

BEGAN = time.perf_counter()  # before the imports, which the user waits for too

from avit_jax.commands.train import main  # noqa: E402

if __name__ == "__main__":
    main(BEGAN)
