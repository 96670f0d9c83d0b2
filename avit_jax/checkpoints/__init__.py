from avit_jax.checkpoints.model_folder import add_digests

__all__ = ["add_digests"]
