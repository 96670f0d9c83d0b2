"""The gates in checkpoints of Meng et al.'s code (MengLcool/AdaViT), whose other names are timm's."""

import re
from typing import Any

import numpy as np

from avit_jax.checkpoints.convert.names import LAYER

# Their name of each linear map, ours, and the first layer that has one.
_MAPS = {
    "attn.token_select": ("tokens", 0),
    "head_select": ("heads", 1),
    "layer_select": ("sublayers", 1),
}
_NAME = re.compile(rf"blocks\.({LAYER})\.(attn\.token_select|head_select|layer_select)\.mlp_head\.(weight|bias)")


def take_gates(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """The gates' parameters under our names, stacked on a layer axis; they are removed from the state.

    state: timm's names, other layers' too. Returns {} if there is no gate. The first layer has no maps of heads and
    sublayers: ours are zero there. Raises ValueError if a layer lacks its map, or has one of another shape.
    """
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name in list(state):
        if match := _NAME.fullmatch(name):
            found.setdefault((match[2], match[3]), {})[int(match[1])] = np.asarray(state.pop(name))
    if not found:
        return {}
    depth = 1 + max(layer for layers in found.values() for layer in layers)
    gates: dict[str, np.ndarray] = {}
    for theirs, (ours, first) in _MAPS.items():
        for kind in ("weight", "bias"):
            layers = found.get((theirs, kind), {})
            if sorted(layers) != list(range(first, depth)):
                raise ValueError(
                    f"its gates {theirs}.mlp_head.{kind} are there for layers {sorted(layers)[:20]}: there must be one "
                    f"for each layer from {first} to {depth - 1}"
                )
            shapes = {value.shape for value in layers.values()}
            if len(shapes) > 1 or len(min(shapes)) != (2 if kind == "weight" else 1):
                raise ValueError(
                    f"its gates {theirs}.mlp_head.{kind} have the shapes {sorted(shapes)[:5]}: every layer must have "
                    f"one {'matrix' if kind == 'weight' else 'vector'} of the same shape"
                )
            turned = [layers[layer].T for layer in range(first, depth)]  # PyTorch stores weights transposed
            name = f"rule_module.{ours}.{'kernel' if kind == 'weight' else 'bias'}"
            gates[name] = np.stack([np.zeros_like(turned[0])] * first + turned)
    return gates
