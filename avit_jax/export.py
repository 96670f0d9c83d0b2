"""Write a model as a file that runs without JAX: python -m avit_jax.export CHECKPOINT OUT.onnx"""

import sys

import jax

from avit_jax.commands.export import main
from avit_jax.execution.export.formats import export

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # writing weights needs no accelerator
    sys.exit(main())

# The package has a function of this module's name. Importing the module gives the function, so that neither hides the
# other.
sys.modules[__name__] = export  # type: ignore[assignment]
