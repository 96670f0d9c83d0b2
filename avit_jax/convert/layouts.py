"""Checkpoint layouts, told by their names, and brought to timm's names: Hugging Face, AugReg, timm's own variants."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

State = dict[str, np.ndarray]

_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")  # DataParallel, torch.compile, training frameworks

# Applied one after the other, each to the whole name.
_Table = list[tuple[str, str | Callable[[re.Match[str]], str]]]

_HUGGING_FACE: _Table = [
    (r"(?:vit|deit|dinov2)\.(.*)", r"\1"),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"(?:encoder\.)?layers?\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (r"(.*)\.(?:attention\.)?attention\.(?:(query|key|value)|([qkv])_proj)\.(.*)", r"\1.attn.\2\3.\4"),
    (r"(.*)\.attention\.(?:output\.dense|o_proj)\.(.*)", r"\1.attn.proj.\2"),
    (r"(.*)\.layernorm_before\.(.*)", r"\1.norm1.\2"),
    (r"(.*)\.layernorm_after\.(.*)", r"\1.norm2.\2"),
    (r"(.*)\.intermediate\.dense\.(.*)", r"\1.mlp.fc1.\2"),
    (r"(.*\.\d+)\.output\.dense\.(.*)", r"\1.mlp.fc2.\2"),
    (r"(.*)\.layer_scale([12])\.lambda1", r"\1.ls\2.gamma"),
    (r"layernorm\.(.*)", r"norm.\1"),
    (r"distillation_classifier\.(.*)", r"head_dist.\1"),
    (r"(?:cls_)?classifier\.(.*)", r"head.\1"),
]
_AUGREG: _Table = [
    (r"(?:opt/target/|params/)(.*)", r"\1"),
    (r"cls", "cls_token"),
    (r"Transformer/posembed_input/pos_embedding", "pos_embed"),
    (r"embedding/(.*)", r"patch_embed.proj.\1"),
    (r"Transformer/encoderblock_(\d+)/(.*)", r"blocks.\1.\2"),
    (r"(.*)\.MultiHeadDotProductAttention_1/(query|key|value)/(.*)", r"\1.attn.\2.\3"),
    (r"(.*)\.MultiHeadDotProductAttention_1/out/(.*)", r"\1.attn.proj.\2"),
    (r"(.*)\.LayerNorm_0/(.*)", r"\1.norm1.\2"),
    (r"(.*)\.LayerNorm_2/(.*)", r"\1.norm2.\2"),
    (r"(.*)\.MlpBlock_3/Dense_([01])/(.*)", lambda m: f"{m[1]}.mlp.fc{int(m[2]) + 1}.{m[3]}"),
    (r"Transformer/encoder_norm/(.*)", r"norm.\1"),
    (r"(head|pre_logits)/(.*)", r"\1.\2"),
    (r"(.*)\.(?:kernel|scale)", r"\1.weight"),
]
_TIMM: _Table = [
    (r"(.*)\.gamma_([12])", r"\1.ls\2.gamma"),  # DeiT III as its authors published it
    (r"pre_logits\.fc\.(.*)", r"pre_logits.\1"),
]
# No part of what a classifier computes from an image.
_EXTRAS = re.compile(r"(.*\.)?(mask_token|position_ids|pooler\.dense\.(weight|bias)|pooler\..*)")


@dataclasses.dataclass
class Recognised:
    """A checkpoint under timm's names."""

    layout: str
    state: State
    num_heads: int | None  # where the layout's shapes tell it
    extras: list[str]  # source names that were left out
    notes: list[str]  # what was changed besides names


def recognise(source: State) -> Recognised:
    """timm's names and shapes, one query-key-value matrix, LayerScale folded in; source is emptied.

    Raises ValueError, with some of the names, for a layout that is none of timm's, Hugging Face's and AugReg's, and for
    an architecture that this project has not (average pooling, register tokens, a tanh layer before a trained head).
    """
    state = _without_wrappers(source)
    names = list(state)
    if any("encoderblock_0/" in name for name in names):
        layout, table = "AugReg (google-research/vision_transformer)", _AUGREG
    elif any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        layout, table = "Hugging Face", _HUGGING_FACE
    elif "patch_embed.proj.weight" in state:
        layout, table = "timm", _TIMM
    else:
        raise ValueError(
            "its names are of no layout known here (timm, published DeiT and A-ViT, Hugging Face ViT and DeiT, "
            f"AugReg .npz): {', '.join(sorted(names)[:5]) or 'it has no tensors'}"
        )
    single_head = layout == "Hugging Face" and any("distillation_token" in name for name in names)
    single_head = single_head and "classifier.weight" in state
    extras = [name for name in names if _EXTRAS.fullmatch(name)]
    renamed: State = {}
    for name in names:
        if name not in extras:
            new = _renamed(name, table)
            if new in renamed:
                raise ValueError(f"two of its tensors mean {new}, one of them {name}")
            renamed[new] = state.pop(name)
    num_heads = None
    if table is _AUGREG:
        renamed, num_heads = _from_augreg(renamed)
    result = Recognised(layout, _joined_query_key_value(renamed), num_heads, extras, [])
    _fold_layer_scale(result)
    if single_head:
        _split_single_head(result)
    _refuse_other_architectures(result.state)
    return result


def _without_wrappers(state: State) -> State:
    while state:
        wrapper = next((w for w in _WRAPPERS if all(name.startswith(w) for name in state)), None)
        if wrapper is None:
            break
        state = {name.removeprefix(wrapper): state.pop(name) for name in list(state)}
    return state


def _renamed(name: str, table: _Table) -> str:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            name = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
    return name


def _from_augreg(state: State) -> tuple[State, int | None]:
    """Kernels turned from [in, out] to [out, in], heads joined; the head count."""
    heads = [value.shape[0] for name, value in state.items() if name.endswith("attn.query.bias") and value.ndim == 2]
    result: State = {}
    for name, value in state.items():
        if name == "patch_embed.proj.weight" and value.ndim == 4:  # [p, p, C, D] -> [D, C, p, p]
            value = value.transpose(3, 2, 0, 1)
        elif name.endswith("attn.proj.weight") and value.ndim == 3:  # [heads, d, D] -> [D, heads * d]
            value = value.reshape(-1, value.shape[-1]).T
        elif re.search(r"attn\.(query|key|value)\.weight", name) and value.ndim == 3:  # [D, heads, d]
            value = value.reshape(value.shape[0], -1).T
        elif re.search(r"attn\.(query|key|value)\.bias", name):
            value = value.reshape(-1)
        elif name.endswith(".weight") and value.ndim == 2:
            value = value.T
        result[name] = value
    return result, heads[0] if heads else None


def _joined_query_key_value(state: State) -> State:
    result: State = {}
    for name in list(state):
        match = re.fullmatch(r"(blocks\.\d+\.attn)\.(q|k|v|query|key|value)\.(weight|bias)", name)
        if match is None:
            result[name] = state.pop(name)
            continue
        stem, _, kind = match.groups()
        joined = f"{stem}.qkv.{kind}"
        if joined in result:
            continue
        names = [[f"{stem}.{part}.{kind}", f"{stem}.{part[0]}.{kind}"] for part in ("query", "key", "value")]
        parts = [state.pop(name) for both in names for name in both if name in state]
        if len(parts) != 3:
            raise ValueError(f"{stem} has not all of query, key and value ({kind})")
        result[joined] = np.concatenate(parts)
    return result


def _fold_layer_scale(result: Recognised) -> None:
    """x + gamma * (W y + b) = x + (gamma W) y + gamma b."""
    state, folded = result.state, 0
    for name in [name for name in state if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        gamma = np.asarray(state.pop(name), np.float32)
        block = name.rsplit(".", 2)[0]
        layer = f"{block}.{'attn.proj' if '.ls1.' in name else 'mlp.fc2'}"
        for parameter, scale in ((f"{layer}.weight", gamma[:, None]), (f"{layer}.bias", gamma)):
            if parameter not in state or state[parameter].shape[:1] != gamma.shape:
                raise ValueError(f"{name} of shape {gamma.shape} scales {parameter}: missing or of another width")
            state[parameter] = np.asarray(state[parameter], np.float32) * scale
        folded += 1
    if folded:
        result.notes.append(f"LayerScale of {folded} branches was folded into attn.proj and mlp.fc2")


def _split_single_head(result: Recognised) -> None:
    """A distillation token but one head, on the class token: our logits are the mean of two heads."""
    for kind in ("weight", "bias"):
        head = np.asarray(result.state[f"head.{kind}"], np.float32)
        result.state[f"head.{kind}"], result.state[f"head_dist.{kind}"] = 2 * head, np.zeros_like(head)
    result.notes.append(
        "it has a distillation token and one head: head is twice that, head_dist zero, their mean is its logits"
    )


def _refuse_other_architectures(state: State) -> None:
    for name, what in (
        ("fc_norm.weight", "its head reads the mean of the patches, here the class token is read"),
        ("reg_token", "it has register tokens, which AViT has not"),
        ("register_tokens", "it has register tokens, which AViT has not"),
        ("norm_pre.weight", "it has a LayerNorm before the first block, which AViT has not"),
    ):
        if name in state:
            raise ValueError(f"its architecture is another one ({name}): {what}")
