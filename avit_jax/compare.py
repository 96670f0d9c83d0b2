"""Compare token-reduction and halting rules on a static checkpoint: python -m avit_jax.compare --checkpoint=PATH"""

from avit_jax.commands.compare import main

if __name__ == "__main__":
    main()
