"""A bench for models of one data set: each is evaluated and timed by the same program, beside the static model."""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from avit_jax.data.pipeline import evaluation_batches, evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Images
from avit_jax.evaluate.position_share import explained_by_position
from avit_jax.evaluate.rows import STATIC, Row, as_bits
from avit_jax.evaluate.timing import Timed, ratios_in_turn, sample_in_turn
from avit_jax.execution.compiled import CompiledModel, on_one_device
from avit_jax.execution.program import AUTO, compile
from avit_jax.execution.work import image_gmacs, output_gmacs, shrinking_gmacs
from avit_jax.model.config import NO_RULE, AViTConfig, changed
from avit_jax.model.vit import AViT, model_of_shapes
from avit_jax.rules import rule_to_json
from avit_jax.runtime.machine import machine
from avit_jax.runtime.memory import program_memory
from avit_jax.runtime.mesh import batch_sharding, data_mesh

ROUNDS = 11
BATCHES = (50, 200)  # candidates for the batch at which a program is fastest
_SAMPLE_SECONDS = 0.2  # a sample repeats shorter runs
_TRIAL_ROUNDS = 3  # to choose a batch
_ALONE = 64  # images that a sample at batch 1 runs through
_BINS = 24  # of the histogram of GMACs


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says of each image, in the data's order; bad images that were skipped are left out."""

    outputs: Float[np.ndarray, "n c"]  # logits; the features that a head would read if there is none
    label: Int[np.ndarray, " n"]  # -1: no labels
    token_depth: Int[np.ndarray, "n t"]
    executed_gmacs: float  # mean for an image
    # Of a model with gates, whose work does not follow from depths:
    gmacs: Float[np.ndarray, " n"] | None = None  # of each image, last layer short
    tokens: Float[np.ndarray, " l"] | None = None  # mean number that each layer computes


class Bench:
    """The test images, the static model's answers to them, and its programs, which every other program is timed with.

    model: static, or with a rule that is left out. test: the images that rows are about, at least one. batches: the
    candidates among which each method's best batch is chosen. rounds: in which programs are timed in turn.
    """

    def __init__(
        self,
        model: AViT,
        test: Images,
        *,
        data: str,
        batches: Sequence[int] = BATCHES,
        rounds: int = ROUNDS,
    ) -> None:
        self.static = model.with_config(**NO_RULE)
        self.test, self.data, self.rounds = test, data, rounds
        self.batches = sorted({min(batch, len(test)) for batch in batches})
        self._seconds: dict[tuple[AViTConfig, int, bool], float] = {}  # of the first time, because JAX keeps programs
        programs = {batch: self._compiled(self.static, batch) for batch in {1, *self.batches}}
        self.batch = self._fastest({batch: programs[batch] for batch in self.batches})
        self._programs = {batch: programs[batch] for batch in (1, self.batch)}
        self.answers = answers(programs[self.batch], self.test)
        labelled = self.static.config.num_classes > 0 and bool((self.answers.label >= 0).all())
        self._features = None if labelled else features(self.static, self.batch, self.test)

    def best_batch(self, model: AViT, test: Images | None = None) -> int:
        """The candidate at which the model's program runs most images in a second. test: see `row`."""
        if len(self.batches) == 1:
            return self.batches[0]
        return self._fastest({batch: self._compiled(model, batch) for batch in self.batches}, test)

    def row(
        self,
        model: AViT,
        *,
        method: str,
        group: str,
        batch: int,
        budget: float | None = None,
        seed: int | None = None,
        settings: dict[str, Any] | None = None,
        test: Images | None = None,
    ) -> Row:
        """The row of a model (evaluate/rows.py), evaluated and timed by the program that removes tokens.

        method: "static" computes the whole last layer; every other method only what the logits read. batch: at which it
        is timed, besides 1. settings: of the measurement, kept in the row. test: the same images at another size.
        """
        whole = method == STATIC
        program, alone = (self._compiled(model, size, whole) for size in (batch, 1))
        images = test or self.test
        found = answers(program, images)
        depth = found.token_depth
        if not whole and not _by_the_rule(depth, model.config):
            exact = compile(model, batch, image_exit=False, mesh=data_mesh(batch))
            depth = answers(exact, images).token_depth
        rule = model.config.rule_in_force
        return {
            "data": self.data,
            "group": group,
            "method": method,
            "rule": None if rule is None else rule_to_json(rule),
            "budget": budget,
            "seed": seed,
            "images": len(found.label),
            "static_gmacs": shrinking_gmacs(self.static.config, short_last_layer=False),
            **self._accuracy(found),
            "cosine": self._cosine(model, batch, images),
            "executed_gmacs": found.executed_gmacs,
            **_work(model.config, depth, found, short_last_layer=not whole),
            "speed": self._speed({1: alone, batch: program}, images),
            "memory_mb": program_memory(program.compiled) / 1e6,
            "compile_seconds": self._seconds[model.config, batch, whole],
            "machine": machine(),
            "settings": settings or {},
        }

    def _compiled(self, model: AViT, batch: int, whole: bool = False) -> Any:
        """The program that removes tokens; whole: masked execution, which computes the whole last layer."""
        began = time.perf_counter()
        mesh = data_mesh(batch)
        program = compile(model, batch, execution="masked", mesh=mesh) if whole else removing(model, batch)
        self._seconds.setdefault((model.config, batch, whole), time.perf_counter() - began)
        return program

    def _accuracy(self, found: Answers) -> dict[str, Any]:
        ours, theirs = found.outputs, self.answers.outputs
        has_head = self.static.config.num_classes > 0
        labelled = has_head and bool((found.label >= 0).all())
        right = ours.argmax(1) == found.label
        shifted = ours - ours.max(1, keepdims=True)
        losses = (
            np.log(np.exp(shifted).sum(1)) - np.take_along_axis(shifted, np.maximum(found.label, 0)[:, None], 1)[:, 0]
        )
        return {
            "top1": float(right.mean()) if labelled else None,
            "loss": float(losses.mean()) if labelled else None,
            "agreement": float((ours.argmax(1) == theirs.argmax(1)).mean()) if has_head else None,
            "correct": as_bits(right) if labelled else None,
        }

    def _cosine(self, model: AViT, batch: int, images: Images) -> float | None:
        """The mean cosine of what the heads read in the two models; None with labels, or if there are no features."""
        ours = None if self._features is None else features(model, batch, images)
        if ours is None or self._features is None:
            return None
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(self._features, axis=1)
        return float(((ours * self._features).sum(1) / np.maximum(lengths, np.finfo(np.float32).tiny)).mean())

    def _speed(self, programs: dict[int, CompiledModel], images: Images) -> dict[str, Any]:
        """Images/s of the programs by batch, all in turn with the static model's at batch 1 and at its best one."""
        ours = {batch: _timed(program, images) for batch, program in programs.items()}
        static = {batch: _timed(program, self.test) for batch, program in self._programs.items()}
        beside = {batch: static[1 if batch == 1 else self.batch] for batch in ours}
        return ratios_in_turn(ours, beside, self.rounds)

    def _fastest(self, programs: dict[int, CompiledModel], test: Images | None = None) -> int:
        timed = {batch: _timed(program, test or self.test) for batch, program in programs.items()}
        for _ in range(_TRIAL_ROUNDS):
            sample_in_turn(timed.values())
        return max(timed, key=lambda batch: statistics.median(timed[batch].rates))


def removing(model: AViT, batch: int) -> Any:
    """The program of the model that computes nothing in vain: tokens are removed and the last layer is short."""
    execution = "shrinking" if model.config.rule_in_force is None else AUTO
    return compile(model, batch, execution=execution, mesh=data_mesh(batch))


def features(model: AViT, batch: int, images: Images) -> Float[np.ndarray, "n d"] | None:
    """What the model's head reads of every image: the class token after the last norm, or the mean of patches.

    None if the rule cannot do without a head.
    """
    try:
        config = changed(model.config, num_classes=0)
    except ValueError:
        return None
    graphdef, state = nnx.split(model_of_shapes(config))
    arrays = nnx.to_pure_dict(nnx.state(model))
    nnx.replace_by_pure_dict(state, {name: value for name, value in arrays.items() if name in nnx.to_pure_dict(state)})
    return answers(removing(nnx.merge(graphdef, state), batch), images).outputs


def answers(program: Any, images: Images) -> Answers:
    """What a compiled program says of every image."""
    config, size = program.config, program.batch_size
    outputs, labels, depths, own, tokens, work = [], [], [], [], [], 0.0
    for batch in evaluation_batches(images, config, size):
        real = np.asarray(batch["weight"]) > 0
        pixels = batch["image"]
        output = program(normalize(pixels, config) if pixels.dtype == np.uint8 else pixels)
        depth = np.asarray(output.token_depth)
        count = int(real.sum())
        if not count:
            continue
        work += count * program.executed(np.where(real[:, None], depth, 0), count, output).gmacs
        if config.gates is not None:
            gmacs = output_gmacs(config, on_one_device(output), short_last_layer=True)
            own.append(np.asarray(gmacs, np.float64)[real])
            tokens.append(np.asarray(output.computed)[:, real])
        outputs.append(np.asarray(output.logits)[real])
        labels.append(np.asarray(batch["label"])[real])
        depths.append(depth[real].astype(np.int16))
    label = np.concatenate(labels)
    of_gates = (np.concatenate(own), np.concatenate(tokens, axis=1).mean(1)) if own else (None, None)
    return Answers(np.concatenate(outputs), label, np.concatenate(depths), work / len(label), *of_gates)


def _by_the_rule(depth: Int[np.ndarray, "n t"], config: AViTConfig) -> bool:
    """Whether depths with image exit are those without: only whole images stopped before the last layer."""
    if config.halting is None:
        return True
    ended = depth[:, np.array(config.tokens_read)].max(1, keepdims=True)
    return bool(((ended == config.depth) | (depth == ended).all(1, keepdims=True)).all())


def _work(
    config: AViTConfig, depth: Int[np.ndarray, "n t"], found: Answers, *, short_last_layer: bool
) -> dict[str, Any]:
    """GMACs by the rule and tokens of each layer; for a halting rule how they differ between images."""
    gmacs = found.gmacs
    if gmacs is None:
        gmacs = _of_depths(config, depth, short_last_layer)
    share = explained_by_position(depth[:, config.num_special :])
    row: dict[str, Any] = {"gmacs": float(gmacs.mean()), "tokens": _tokens(config, depth)}
    if found.tokens is not None:
        row["tokens"] = found.tokens.tolist()
    row |= {"explained_by_position": None if math.isnan(share) else share, "deciles": [], "histogram": None}
    if config.halting is None and config.gates is None:
        return row
    right = found.outputs.argmax(1) == found.label
    labelled = bool(config.num_classes and (found.label >= 0).all())
    for part in np.array_split(np.argsort(gmacs, kind="stable"), min(10, len(gmacs))):
        own = gmacs[part]
        row["deciles"].append(
            {
                "images": len(part),
                "low": float(own.min()),
                "high": float(own.max()),
                "gmacs": float(own.mean()),
                "top1": float(right[part].mean()) if labelled else None,
            }
        )
    counts, edges = np.histogram(gmacs, _BINS)
    row["histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return row


def _of_depths(config: AViTConfig, depth: Int[np.ndarray, "n t"], short_last_layer: bool) -> Float[np.ndarray, " n"]:
    return np.concatenate(
        [
            np.asarray(image_gmacs(config, jnp.asarray(part, jnp.int32), short_last_layer=short_last_layer), np.float64)
            for part in np.array_split(depth, -(-len(depth) // 1000))
        ]
    )


def _tokens(config: AViTConfig, depth: Int[np.ndarray, "n t"]) -> list[float]:
    """The mean number of tokens that each layer computes by the rule."""
    rule = config.reduction
    if rule is None:
        return [float((depth > layer).sum(1).mean()) for layer in range(config.depth)]
    counts = rule.counts(config)
    return list(map(float, counts if rule.place == "before the layer" else (config.num_tokens, *counts[:-1])))


def _timed(program: Any, images: Images) -> Timed:
    """The program, warm, with images in the same random order for every program.

    Data may be sorted by class, and a batch costs what its mix of images costs.
    """
    config, size = program.config, program.batch_size
    count = min(len(images), _ALONE if size == 1 else max(size, 4 * size if size < 100 else 2 * size))
    count -= count % size
    chosen = np.random.default_rng(0).permutation(len(images))[:count].tolist()
    pixels = normalize(evaluation_images(images, chosen, config), config)
    place = batch_sharding(data_mesh(size))
    batches: list[Array] = [jax.device_put(pixels[start : start + size], place) for start in range(0, count, size)]
    jax.block_until_ready(program(batches[0]))
    began = time.perf_counter()
    for batch in batches:
        jax.block_until_ready(program(batch))
    took = time.perf_counter() - began
    return Timed(program, batches, len(batches) * math.ceil(_SAMPLE_SECONDS / took))
