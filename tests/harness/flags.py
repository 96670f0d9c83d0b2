"""XLA's flags for the tests; imports nothing, because they must be set before JAX is imported."""

import importlib.metadata

# Its older code generator compiles the tests' tiny programs for the CPU in half the time, and one LLVM module a program
# saves another quarter. XLA ends the process for a flag that it does not know, so that only versions that have them get
# them.
COMPILE_SOONER = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)
