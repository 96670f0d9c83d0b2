"""Evaluate a checkpoint where the package is installed: python -m avit_jax.eval --checkpoint=runs/mnist_avit"""

from avit_jax.commands.eval import main

if __name__ == "__main__":
    main()
