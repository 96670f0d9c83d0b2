"""Convert checkpoints from and to PyTorch: python -m avit_jax.convert IN OUT"""

import sys

import jax

from avit_jax.commands.convert import main

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # copying weights needs no accelerator
    sys.exit(main())
