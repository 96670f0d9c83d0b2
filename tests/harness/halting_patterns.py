"""Models whose images say at which layers tokens stop, and what executions that remove tokens must give."""

import dataclasses

import numpy as np
from flax import nnx

from avit_jax import AViT, AViTConfig, AViTOutput
from tests.harness.builders import spread_gate


def drawn_model(model_config: AViTConfig) -> AViT:
    """Channel 0 is the patch's mean plus the layer: an image draws the depths of its own patches; class token: layer 3.

    A patch of mean 1 - d stops at layer d.
    """
    model = spread_gate(dataclasses.replace(model_config, gate_scale=40.0, gate_center=20.0))
    for name, param in nnx.to_flat_state(nnx.state(model)):
        if any(part in name for part in ("patch_embed", "cls_token", "dist_token", "pos_embed", "proj", "fc2")):
            param[...] = param[...].at[..., 0].set(0.0)
    model.patch_embed.proj.kernel[...] = model.patch_embed.proj.kernel[...].at[:, 0].set(1 / 32)
    model.blocks.mlp.fc2.bias[...] = model.blocks.mlp.fc2.bias[...].at[:, 0].set(1.0)
    model.cls_token[...] = model.cls_token[...].at[..., 0].set(-2.0)
    if model_config.distilled:
        model.dist_token[...] = model.dist_token[...].at[..., 0].set(-1.0)
    return model


def drawn_images(depths: np.ndarray) -> np.ndarray:
    """Images whose six patches stop at these layers; the rest of their content is noise of mean 0 in every patch."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(len(depths), 3, 2, 4, 4, 2))
    patches += (1 - depths).reshape(-1, 3, 2, 1, 1, 1) - patches.mean((3, 4, 5), keepdims=True)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 12, 8, 2).astype(np.float32)


def assert_same(masked: AViTOutput, found: AViTOutput) -> None:
    """What removing tokens leaves: everything."""
    scale = max(1.0, float(np.abs(masked.logits).max()))
    np.testing.assert_allclose(found.head_logits, masked.head_logits, atol=1e-5 * scale)
    np.testing.assert_allclose(found.logits, masked.logits, atol=1e-5 * scale)
    np.testing.assert_array_equal(found.token_depth, masked.token_depth)
    np.testing.assert_allclose(found.ponder_cost, masked.ponder_cost, atol=1e-5)
    np.testing.assert_allclose(found.halting_scores, masked.halting_scores, atol=1e-5)


def assert_exited(masked: AViTOutput, found: AViTOutput, num_special: int) -> None:
    """What image exit leaves: the same logits, and depths up to the layer where the last special token stopped."""
    scale = max(1.0, float(np.abs(masked.logits).max()))
    np.testing.assert_allclose(found.head_logits, masked.head_logits, atol=1e-5 * scale)
    end = np.asarray(masked.token_depth[:, :num_special]).max(1, keepdims=True)
    np.testing.assert_array_equal(found.token_depth, np.minimum(masked.token_depth, end))
    layers = np.arange(1, len(masked.halting_scores) + 1)[:, None, None]
    scores = np.where(layers <= end, masked.halting_scores, 0)
    scores[-1, :, num_special:] = 0  # not computed there
    np.testing.assert_allclose(found.halting_scores, scores, atol=1e-5)
    cut = np.asarray(masked.token_depth) > end
    cost = np.where(cut, found.token_depth + 1 - scores.sum(0), masked.ponder_cost)
    np.testing.assert_allclose(found.ponder_cost, cost, atol=1e-5)
