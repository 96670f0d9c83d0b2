"""Private names of JAX that have no public counterpart, neither in jax 0.10.2 nor in 0.12; only this file uses them.

`jax.distributed` has initialize, is_initialized and shutdown, and nothing else.
"""

from jax._src import distributed
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster


def coordinator_address() -> str | None:
    """HOST:PORT of process 0 as the cluster gave it to jax.distributed.initialize; None before that call."""
    return distributed.global_state.coordinator_address


def on_tpu_pod() -> bool:
    """Whether this process is one of several on a TPU pod (Kubernetes or Compute Engine)."""
    return any(pod.is_env_present() and pod.get_process_count() > 1 for pod in (GkeTpuCluster, GceTpuCluster))
