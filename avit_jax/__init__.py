"""Adaptive-token vision transformers (A-ViT, arXiv 2112.07658) in JAX."""
