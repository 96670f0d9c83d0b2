"""How each family of checkpoints names its parameters: a tensor that identifies it, and rules to get timm's names."""

import dataclasses
import re
from collections.abc import Callable

# Applied one after the other, each to the whole name.
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]

LAYER = "[0-9]{1,5}"  # longer numbers are not layers


@dataclasses.dataclass(frozen=True)
class Family:
    """Checkpoints whose parameters have the same names."""

    name: str
    anchor: str  # the tensor that only this family has, as a pattern of its whole name
    rules: Rules


HUGGING_FACE = Family(
    "Hugging Face",
    r"(?:(?:vit|deit|dinov2|dinov2_with_registers)\.)?embeddings\.patch_embeddings\.projection\.weight",
    [
        (r"(?:vit|deit|dinov2|dinov2_with_registers)\.(.*)", r"\1"),
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
        # Files say encoder.layer.0.attention.attention.query; transformers 5 says layers.0.attention.q_proj in memory.
        (rf"(?:encoder\.)?layers?\.({LAYER})\.(.*)", r"blocks.\1.\2"),
        (rf"(blocks\.{LAYER})\.attention\.(?:attention\.)?(query|key|value)\.(.*)", r"\1.attn.\2.\3"),
        (rf"(blocks\.{LAYER})\.attention\.([qkv])_proj\.(.*)", r"\1.attn.\2.\3"),
        (rf"(blocks\.{LAYER})\.attention\.(?:output\.dense|o_proj)\.(.*)", r"\1.attn.proj.\2"),
        (rf"(blocks\.{LAYER})\.layernorm_before\.(.*)", r"\1.norm1.\2"),
        (rf"(blocks\.{LAYER})\.layernorm_after\.(.*)", r"\1.norm2.\2"),
        (rf"(blocks\.{LAYER})\.intermediate\.dense\.(.*)", r"\1.mlp.fc1.\2"),
        (rf"(blocks\.{LAYER})\.output\.dense\.(.*)", r"\1.mlp.fc2.\2"),
        (rf"(blocks\.{LAYER})\.layer_scale([12])\.lambda1", r"\1.ls\2.gamma"),
        (r"layernorm\.(.*)", r"norm.\1"),
        (r"distillation_classifier\.(.*)", r"head_dist.\1"),
        (r"(?:cls_)?classifier\.(.*)", r"head.\1"),
    ],
)
# google-research/vision_transformer numbers all of a block's layers together, big_vision each kind separately.
AUGREG = Family(
    "AugReg",
    r"(?:opt/target/|params/|params/img/)?embedding/kernel",
    [
        (r"(?:opt/target/|params/img/|params/)(.*)", r"\1"),
        (r"cls", "cls_token"),
        (r"(?:Transformer/posembed_input/)?pos_embedding", "pos_embed"),
        (r"embedding/(.*)", r"patch_embed.proj.\1"),
        (rf"Transformer/encoderblock_({LAYER})/(.*)", r"blocks.\1.\2"),
        (r"(.*)\.MultiHeadDotProductAttention_[01]/(query|key|value)/(.*)", r"\1.attn.\2.\3"),
        (r"(.*)\.MultiHeadDotProductAttention_[01]/out/(.*)", r"\1.attn.proj.\2"),
        (r"(.*)\.LayerNorm_0/(.*)", r"\1.norm1.\2"),
        (r"(.*)\.LayerNorm_[12]/(.*)", r"\1.norm2.\2"),
        (r"(.*)\.MlpBlock_[03]/Dense_([01])/(.*)", lambda m: f"{m[1]}.mlp.fc{int(m[2]) + 1}.{m[3]}"),
        (r"Transformer/encoder_norm/(.*)", r"norm.\1"),
        (r"(head|pre_logits)/(.*)", r"\1.\2"),
        (r"(.*)\.(?:kernel|scale)", r"\1.weight"),
    ],
)
TORCHVISION = Family(
    "torchvision",
    r"conv_proj\.weight",
    [
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (r"conv_proj\.(.*)", r"patch_embed.proj.\1"),
        (rf"encoder\.layers\.encoder_layer_({LAYER})\.(.*)", r"blocks.\1.\2"),
        (r"(.*)\.ln_([12])\.(.*)", r"\1.norm\2.\3"),
        (r"(.*)\.self_attention\.in_proj_(weight|bias)", r"\1.attn.qkv.\2"),
        (r"(.*)\.self_attention\.out_proj\.(.*)", r"\1.attn.proj.\2"),
        (r"(blocks\..*)\.mlp\.(?:0|linear_1)\.(.*)", r"\1.mlp.fc1.\2"),
        (r"(blocks\..*)\.mlp\.(?:3|linear_2)\.(.*)", r"\1.mlp.fc2.\2"),
        (r"encoder\.ln\.(.*)", r"norm.\1"),
        (r"heads\.(?:head\.|0\.)?(weight|bias)", r"head.\1"),  # people write heads = Linear(...) to fine-tune
        (r"heads\.pre_logits\.(.*)", r"pre_logits.\1"),
    ],
)
# Also published DeiT and A-ViT, DeiT III, MAE, DINO and DINOv2 as their authors published them.
TIMM = Family(
    "timm",
    r"patch_embed\.proj\.weight",
    [
        (rf"blocks\.{LAYER}\.({LAYER})\.(.*)", r"blocks.\1.\2"),  # DINOv2 trains in chunks of blocks
        (r"(.*)\.gamma_([12])", r"\1.ls\2.gamma"),  # DeiT III as its authors published it
        (r"pre_logits\.fc\.(.*)", r"pre_logits.\1"),
        (r"register_tokens", "reg_token"),
        (r"linear_head\.(.*)", r"head.\1"),  # DINOv2's classifiers
    ],
)
FAMILIES = (AUGREG, HUGGING_FACE, TORCHVISION, TIMM)

# Tensors that a classifier does not use.
EXTRAS = re.compile(
    r"(?:.*\.)?(?:mask_token|position_ids|pooler\..*)"
    r"|n_averaged"  # the counter of torch.optim.swa_utils.AveragedModel
    r"|(?:.*\.)?head\.(?:mlp|last_layer)\..*|(?:.*\.)?(?:dino_head|ibot_head)\..*"  # projection heads of DINO
    r"|(?:.*\.)?(?:decoder|decoder_(?:embed|blocks|norm|pred))\..*|(?:.*\.)?decoder_pos_embed"  # MAE's decoder
)


def renamed(name: str, rules: Rules) -> str:
    """The name after all rules have been applied."""
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            name = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
    return name
