"""The plain ViT in eager PyTorch, with scaled_dot_product_attention, for the benchmarks to compare with."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from avit_jax import AViTConfig


def torch_vit(model_config: AViTConfig) -> Any:
    """A DeiT of this architecture with random weights, which takes images [B, C, H, W] and returns logits."""
    width, heads = model_config.embed_dim, model_config.num_heads

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, model_config.mlp_dim), nn.Linear(model_config.mlp_dim, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(mixed.transpose(1, 2).reshape(b, n, width))
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(model_config.in_channels, width, model_config.patch_size, model_config.patch_size)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, model_config.num_tokens, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(model_config.depth)))
            self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, model_config.num_classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.proj(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
            return self.head(self.norm(self.blocks(x)[:, 0]))

    return ViT()
