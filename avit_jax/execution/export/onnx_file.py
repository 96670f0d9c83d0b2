"""A model as an ONNX file: the graph with its inputs, outputs and metadata."""

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from avit_jax.execution.export.graph import Graph
from avit_jax.execution.export.halting import Compaction, run_gate
from avit_jax.execution.export.metadata import check_targets, metadata
from avit_jax.execution.export.pixels import check_channels, preprocessed
from avit_jax.execution.export.reduction import REDUCTIONS, run_reduction
from avit_jax.execution.export.vit import Layers
from avit_jax.halting.avit import AViTGate
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.reduction.dynamicvit import DynamicViT
from avit_jax.reduction.tome import ToMe
from avit_jax.reduction.topk import TopK
from avit_jax.runtime.files import writing

if TYPE_CHECKING:
    import onnx

OPSET = 18  # the first in which Resize smooths as Pillow does
IR_VERSION = 8  # the first that has this opset
LARGEST_FILE = 2**31 - 2**20  # bytes of weights in one protobuf file, which must end below 2 GiB


def write_onnx(
    model: AViT, path: Path, batch_size: int | None, how: Compaction, *, preprocess: bool, opset: int, overwrite: bool
) -> None:
    """Write the model in ONNX; see export. Weights above 2 GiB go to a second file beside it, of the name + ".data"."""
    check_exportable(model.config)
    if preprocess:
        check_channels(model.config)
    if importlib.util.find_spec("onnx") is None:
        raise ValueError("writing ONNX needs the package onnx, which is not there: pip install onnx")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise ValueError(
            f"opset {opset} is too {'old' if opset < OPSET else 'new'}: the graph needs {OPSET} "
            f"(for a Resize that smooths), and the package onnx {onnx.__version__} knows up to {newest}"
        )
    size = sum(param.nbytes for param in jax.tree.leaves(nnx.state(model, nnx.Param)))
    names = [path.name + ".data", path.name] if size > LARGEST_FILE else [path.name]
    check_targets(path, names, overwrite)
    content = onnx_model(model, batch_size, how, preprocess, opset)
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder, path.name)
        if size > LARGEST_FILE:
            for tensor in content.graph.initializer:
                if len(tensor.raw_data) > 1024:
                    onnx.external_data_helper.set_external_data(tensor, names[0])
        onnx.save_model(content, partial, format="protobuf")
        onnx.checker.check_model(partial, full_check=True)
        for name in names:
            os.replace(Path(folder, name), path.with_name(name))


def check_exportable(config: AViTConfig) -> None:
    """Raises ValueError for a rule that has no form in ONNX."""
    rule = config.rule_in_force
    if rule is not None and type(rule) not in (AViTGate, *REDUCTIONS):
        raise ValueError(
            f"the rule {rule.name!r} cannot be exported to ONNX: choose avit, topk, evit, tome or dynamicvit, "
            "or export the plain ViT of the same weights, model.with_config(**avit_jax.model.config.NO_RULE)"
        )
    if rule is not None and config.pool != "token":
        raise ValueError(
            f"a model with a rule whose head reads patches (pool={config.pool!r}) cannot be exported to ONNX: export "
            "the plain ViT of the same weights, model.with_config(**avit_jax.model.config.NO_RULE)"
        )


def onnx_model(model: AViT, batch_size: int | None, how: Compaction, preprocess: bool, opset: int) -> "onnx.ModelProto":
    """The model in ONNX; see export."""
    import onnx

    config = model.config
    graph = Graph()
    batch: Any = "batch" if batch_size is None else batch_size
    if preprocess:
        pictures = graph.input("pictures", "uint8", [batch, "height", "width", config.in_channels])
        images = preprocessed(graph, pictures, config)
    else:
        images = graph.input("images", "float32", [batch, *config.image_shape, config.in_channels])
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    layers = Layers(graph, config, weights)
    x = layers.embed(images)
    rule = config.rule_in_force
    if isinstance(rule, AViTGate):
        x, token_depth = run_gate(layers, x, rule, how)
    elif isinstance(rule, TopK | ToMe | DynamicViT):
        x, token_depth = run_reduction(layers, x, rule)
    else:
        x, token_depth = _run_all(layers, x)
    graph.output(layers.logits(x), "logits", "float32", [batch, config.num_classes or config.head_inputs])
    graph.output(token_depth, "token_depth", "int32", [batch, config.num_tokens])
    content = onnx.helper.make_graph(
        graph.nodes, "avit_jax", graph.inputs, graph.outputs, initializer=list(graph.constants.values())
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    version = IR_VERSION if opset == OPSET else onnx.helper.find_min_ir_version_for(imports)
    result = onnx.helper.make_model(content, opset_imports=imports, ir_version=version, producer_name="avit_jax")
    about = metadata(config, preprocess)
    onnx.helper.set_model_props(result, {name: json.dumps(part) for name, part in about.items()})
    return result


def _run_all(layers: Layers, x: str) -> tuple[str, str]:
    """The final values of the tokens with a head, and token_depth, if every token runs through all layers."""
    graph, config = layers.graph, layers.config
    shape = graph.op("Concat", graph.op("Shape", x, start=0, end=1), [config.num_tokens], axis=0)
    for layer in range(config.depth):
        last = layer == config.depth - 1
        x = layers.block(x, None, layer, queries=config.num_outputs if last and config.pool == "token" else None)
    return x, graph.op("Expand", np.array(config.depth, np.int32), shape)
