"""Evaluate a checkpoint on a test set: python eval.py --checkpoint=runs/mnist_avit"""

from avit_jax.commands.eval import main

if __name__ == "__main__":
    main()
