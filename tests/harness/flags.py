"""XLA's flags for the tests; imports nothing, because they must be set before JAX is imported."""

import importlib.metadata

# Its older code generator compiles the tests' tiny programs for the CPU in half the time. XLA ends the process for a
# flag that it does not know, so that only versions that have it get it.
COMPILE_SOONER = (
    "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
)
