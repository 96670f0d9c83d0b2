"""What the compiled executions share: images are checked and padded to the batch, outputs cut to their number."""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from avit_jax.execution.work import Executed
from avit_jax.model.check_images import check_images
from avit_jax.model.config import AViTConfig
from avit_jax.model.output import IMAGES_SECOND, AViTOutput
from avit_jax.model.vit import AViT
from avit_jax.runtime.mesh import data_devices, replicated


@runtime_checkable
class Program(Protocol):
    """A model compiled for up to `batch_size` images. jitted(*abstract_arguments) can be lowered and exported.

    execution: masked, packed, planned or shrinking. reason: why `compile` took it; empty if `compile` was not asked.
    """

    execution: str
    reason: str
    config: AViTConfig
    batch_size: int
    params: Any  # plain dicts of arrays
    jitted: Any
    abstract_arguments: tuple[Any, ...]

    def __call__(self, images: Shaped[Array | np.ndarray, "..."]) -> AViTOutput:
        """The output for each image. Raises ValueError for images that the model does not take, or too many."""
        ...

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int, output: AViTOutput | None = None) -> Executed:
        """The work done for the first `images` of a batch.

        token_depth: by the rule, in layers; 0 for padding. output: of this batch; only packed execution of gates needs
        it.
        """
        ...


# A module-level function, so that equal models find the program that is already compiled.
Forward = Callable[[AViT, Array], AViTOutput]


# Few: each program holds hundreds of memory maps, and without one of Linux's 65,530 for a process LLVM ends it.
@functools.lru_cache(maxsize=16)
def _jitted(graphdef: nnx.GraphDef, forward: Forward) -> Any:
    """(params, images) -> forward(model, images); models of the same configuration share the program."""
    return jax.jit(lambda params, images: forward(nnx.merge(graphdef, params), images))


def predict(model: AViT, images: Float[Array | np.ndarray, "b h w c"]) -> AViTOutput:
    """model(images), jit-compiled for each number of images."""
    graphdef, params = split_model(model, None)
    return _jitted(graphdef, AViT.__call__)(params, images)


def split_model(model: AViT, mesh: Mesh | None) -> tuple[nnx.GraphDef, Any]:
    """The model's structure, and its parameters as plain dicts of JAX arrays, on all devices of the mesh."""
    graphdef, state = nnx.split(model)
    # Plain dicts can be exported. NumPy arrays are copied, because their owner may change them.
    params = jax.tree.map(lambda p: p if isinstance(p, jax.Array) else jnp.array(p), nnx.to_pure_dict(state))
    return graphdef, jax.device_put(params, replicated(mesh)) if mesh is not None else params


def check_batch_size(batch_size: Any) -> None:
    """Raises ValueError unless batch_size is a whole number from 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral):
        raise ValueError(f"batch_size is {batch_size!r}: it must be a whole number")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")


class CompiledModel:
    """A jitted program of (params, images, ...), compiled for up to `batch_size` images.

    The weights are fixed at this point: later changes to the model have no effect.
    """

    made_by: ClassVar[str] = "compile"  # the function that a user calls
    execution: str = ""  # set by each kind
    reason: str = ""  # set by `compile`

    def __init__(
        self,
        config: AViTConfig,
        batch_size: int,
        jitted: Any,
        params: Any,
        mesh: Mesh | None = None,
    ) -> None:
        """mesh: the images are split over its axis `data`; None: on the device that JAX chooses."""
        self.config = config
        self.batch_size = batch_size
        self.params = params
        self.jitted = jitted
        self._devices = data_devices(mesh)
        self._images = NamedSharding(mesh, PartitionSpec("data")) if mesh is not None else None
        self._rows = -(-batch_size // self._devices) * self._devices
        shape = (self._rows, *config.image_shape, config.in_channels)
        abstract = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._images)
        self.abstract_arguments = (params, abstract, *map(jnp.asarray, self._arguments(batch_size)))
        self.compiled = jitted.lower(*self.abstract_arguments).compile()

    def _arguments(self, count: int) -> tuple[Any, ...]:
        """The program's arguments after params and images, for `count` images."""
        return ()

    def __call__(self, images: Shaped[Array | np.ndarray, "..."]) -> AViTOutput:
        """The output for each image. Raises ValueError for images that the model does not take, or too many."""
        check_images(images, self.config)
        count = len(images)
        if count > self.batch_size:
            raise ValueError(
                f"{count} images for a program compiled for {self.batch_size}: use {self.made_by}(model, {count})"
            )
        if count < self._rows:
            pad = np.pad if isinstance(images, np.ndarray) else jnp.pad
            images = pad(images, ((0, self._rows - count), (0, 0), (0, 0), (0, 0)))
        if self._images is not None:
            images = jax.device_put(images, self._images)
        # A compiled program cannot take tracers, and cannot run while jit is disabled.
        no_jit = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        as_function = no_jit or isinstance(images, jax.core.Tracer)
        arguments = images, *self._arguments(count)
        if as_function:
            output = self._output(self.jitted(self.params, *map(jnp.asarray, arguments)))
        else:
            output = self._output(self.compiled(self.params, *arguments))
        if count < self._rows:
            output = _first_images(output, count)
        if count and not as_function:
            self._seen(output)
        return output

    def _output(self, result: Any) -> AViTOutput:
        """The output, from what the program returns."""
        return result

    def _seen(self, output: AViTOutput) -> None:
        """Called with every output that is not a tracer."""


def _first_images(output: AViTOutput, count: int) -> AViTOutput:
    first = {
        name: values[:, :count] if name in IMAGES_SECOND else values[:count] for name, values in vars(output).items()
    }
    return type(output)(**first)


def on_one_device(output: AViTOutput) -> AViTOutput:
    """The output by way of the host, for operations outside jit.

    On arrays that are split over several CPU devices these join the parts, and once the two devices of a machine with
    two cores have waited for each other until JAX ended the process.
    """
    return jax.tree.map(lambda values: jnp.asarray(np.asarray(values)), output)


class CountedModel(CompiledModel):
    """A compiled program of (params, images, number of images that count); each device computes its own images."""

    def _arguments(self, count: int) -> tuple[np.int32]:
        return (np.int32(count),)

    def _by_device(self, loads: Int[np.ndarray, "l b"]) -> Int[np.ndarray, "devices l _"]:
        """The loads of each device's images, from those of a batch."""
        missing = self._rows - loads.shape[1]  # rows that only make the devices' parts equal
        return np.stack(np.split(np.pad(loads, ((0, 0), (0, missing))), self._devices, axis=1))


# (params, images, number of images that count) -> the output, and more arrays with a first axis to join.
Local = Callable[[Any, Array, Array], tuple[AViTOutput, tuple[Array, ...]]]


def on_each_device(local: Local, mesh: Mesh | None, kind: type[AViTOutput] = AViTOutput) -> Local:
    """The function with which every device computes its own images, without communication. kind: of its output."""
    if mesh is None:
        return local
    names = [field.name for field in dataclasses.fields(kind)]

    def shard(params: Any, images: Array, count: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        first = jax.lax.axis_index("data") * len(images)
        output, more = local(params, images, jnp.clip(count - first, 0, len(images)))
        return tuple(getattr(output, name) for name in names), more

    rows, second = PartitionSpec("data"), PartitionSpec(None, "data")
    fields = tuple(second if name in IMAGES_SECOND else rows for name in names)
    sharded = jax.shard_map(
        shard, mesh=mesh, in_specs=(PartitionSpec(), rows, PartitionSpec()), out_specs=(fields, rows), check_vma=False
    )

    def split(params: Any, images: Array, count: Array) -> tuple[AViTOutput, tuple[Array, ...]]:
        values, more = sharded(params, images, count)
        return kind(**dict(zip(names, values, strict=True))), more

    return split


class CompiledForward(CompiledModel):
    """forward(model, images), compiled for up to `batch_size` images."""

    def __init__(self, model: AViT, batch_size: int, forward: Forward, mesh: Mesh | None = None) -> None:
        graphdef, params = split_model(model, mesh)
        super().__init__(model.config, batch_size, _jitted(graphdef, forward), params, mesh)
