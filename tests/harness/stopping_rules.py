"""Rules that stop tokens by what a layer shows, in NumPy, for one image; and rules with settings of other types."""

from typing import Any

import numpy as np

from avit_jax import ATS, AttentionMass, Similarity
from tests.harness.numpy_removal import Goes, Layer


def ats(rule: ATS, patches: int) -> Goes:
    """Every height looks for the nearest level, one by one. patches: of the image, before any stopped."""
    count = patches if rule.samples is None else rule.samples

    def goes(layer: int, seen: Layer) -> np.ndarray:
        going = np.ones(len(seen.patch), bool)
        acts = layer >= 3 if rule.layers is None else layer in rule.layers
        mine = np.flatnonzero(seen.patch)
        if not acts or len(mine) == 1:
            return going
        score = (seen.class_attention * seen.value_norm)[mine]
        order = np.argsort(score, kind="stable")
        level = np.cumsum(score[order] / score.sum())
        level = (level - level[0]) / (level[-1] - level[0])
        first = level[level > 0].min()
        going[mine] = False
        for k in range(count):
            height = first + (1 - first) * k / (count - 1)
            going[mine[order[np.argmin(np.abs(height - level))]]] = True
        return going

    return goes


def mass(rule: AttentionMass) -> Goes:
    """Patches are taken one by one, the most attended first, until they have the share."""

    def goes(layer: int, seen: Layer) -> np.ndarray:
        going = np.ones(len(seen.patch), bool)
        if layer not in rule.layers or rule.share == 1:
            return going
        mine = np.flatnonzero(seen.patch)
        share = seen.class_attention[mine] / seen.class_attention[mine].sum()
        going[mine] = False
        taken = 0.0
        for place in sorted(range(len(mine)), key=lambda i: (-share[i], i)):
            going[mine[place]] = True
            taken += share[place]
            if taken >= rule.share:
                break
        return going

    return goes


def similarity(rule: Similarity) -> Goes:
    """The cosine token by token."""

    def goes(layer: int, seen: Layer) -> np.ndarray:
        limit = rule.thresholds[layer] if isinstance(rule.thresholds, tuple) else rule.thresholds
        cosines = []
        for a, b in zip(seen.after, seen.before, strict=True):
            a, b = a - a.mean(), b - b.mean()
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        above = np.array(cosines) > limit
        if layer == 0:
            return np.ones(len(above), bool)
        if rule.form == "token":
            return ~above | ~seen.patch
        return np.full(len(above), np.mean(np.array(cosines)[seen.patch]) <= limit)

    return goes


def in_numpy(rule: Any, patches: int) -> Goes:
    """The rule as remove_tokens takes it. patches: of an image."""
    if isinstance(rule, ATS):
        return ats(rule, patches)
    return mass(rule) if isinstance(rule, AttentionMass) else similarity(rule)


def untyped(kind: Any, **settings: Any) -> Any:
    """The rule after its own checks; the type check of its constructor in tests would come before them."""
    rule = object.__new__(kind)
    for name, value in settings.items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    return rule
