"""A model as an ONNX file: the graph with its inputs, outputs and metadata."""

import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from avit_jax.execution.export.graph import Graph
from avit_jax.execution.export.halting import Compaction, run_gate
from avit_jax.execution.export.vit import Layers
from avit_jax.halting.avit import AViTGate
from avit_jax.model.vit import AViT

if TYPE_CHECKING:
    import onnx

OPSET = 20
IR_VERSION = 9  # the first that has opset 20


def onnx_model(model: AViT, batch_size: int | None, image_exit: bool, step: int) -> "onnx.ModelProto":
    """The model in ONNX; see export."""
    import onnx

    config = model.config
    graph = Graph()
    batch: Any = "batch" if batch_size is None else batch_size
    images = graph.input("images", "float32", [batch, *config.image_shape, config.in_channels])
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    layers = Layers(graph, config, weights)
    x = layers.embed(images)
    rule = config.halting
    if isinstance(rule, AViTGate):
        x, token_depth = run_gate(layers, x, rule, Compaction(image_exit, batch_size == 1, step))
    else:
        x, token_depth = _run_all(layers, x)
    graph.output(layers.logits(x), "logits", "float32", [batch, config.num_classes or config.head_inputs])
    graph.output(token_depth, "token_depth", "int32", [batch, config.num_tokens])
    content = onnx.helper.make_graph(
        graph.nodes, "avit_jax", graph.inputs, graph.outputs, initializer=list(graph.constants.values())
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    result = onnx.helper.make_model(content, opset_imports=opset, ir_version=IR_VERSION, producer_name="avit_jax")
    onnx.helper.set_model_props(result, {name: json.dumps(part) for name, part in config.to_json().items()})
    return result


def _run_all(layers: Layers, x: str) -> tuple[str, str]:
    """The final values of the tokens with a head, and token_depth, if every token runs through all layers."""
    graph, config = layers.graph, layers.config
    shape = graph.op("Concat", graph.op("Shape", x, start=0, end=1), [config.num_tokens], axis=0)
    for layer in range(config.depth):
        last = layer == config.depth - 1
        x = layers.block(x, None, layer, queries=config.num_outputs if last and config.pool == "token" else None)
    return x, graph.op("Expand", np.array(config.depth, np.int32), shape)
