"""Architectures that AViT does not have, recognised by the names of their tensors."""

import re
from collections.abc import Iterable

# The first pattern that matches at the start of a name, or after a dot or slash in it, identifies the architecture.
_FOREIGN: list[tuple[str, str]] = [
    (
        r"vision_model\.head\.probe|visual\.trunk\.attn_pool\.|logit_bias$",
        "it is SigLIP: its head pools with attention",
    ),
    (r"visual\.trunk\.|visual\.head\.", "it is an OpenCLIP model, image and text: AViT classifies images"),
    (
        r"visual\.(?:class_embedding|conv1|transformer\.resblocks)|transformer\.resblocks\.|logit_scale$",
        "it is CLIP (OpenAI's and OpenCLIP's names): it has a LayerNorm before the first block, which AViT lacks",
    ),
    (
        r"vision_model\.|text_model\.|visual_projection\.",
        "it is CLIP or SigLIP (Hugging Face's names): its stem and pooling are not AViT's",
    ),
    (r"attn_pool\.|MAPHead_0/", "its head pools with attention (as in SigLIP), which AViT lacks"),
    (
        r"swinv?2?\.|layers\.[0-9]+\.blocks\.[0-9]+\.|features\.[0-9]+\.[0-9]+\.attn\.relative_position",
        "it is a Swin transformer: windows of attention and merged patches, which AViT lacks",
    ),
    (
        r"beit\.|relative_position_bias_table$|rel_pos_bias\.|relative_position_bias\.",
        "it is BEiT, or another model with relative position bias, which AViT lacks",
    ),
    (
        r"convnextv?2?\.|stages\.[0-9]+\.blocks\.[0-9]+\.conv_dw|downsample_layers\.|stages\.[0-9]+\.[0-9]+\.dwconv",
        "it is a ConvNeXt: convolutions without tokens",
    ),
    (r"blocks_token_only\.", "it is CaiT: its class token joins only in the last blocks"),
    (
        r"rope(?:_embed|_embeddings)?\.|embeddings\.patch_embeddings\.weight$",
        "it has rotary positions (DINOv3, EVA-02), which AViT lacks",
    ),
    (
        r"mlp\.(?:w1|w2|w3|w12|weights_in|weights_out|fc1_g|fc1_x)\.",
        "its MLP is gated (SwiGLU, as in DINOv2-giant), which AViT lacks",
    ),
    (r"(?:q_norm|k_norm)\.", "it normalises queries and keys (qk-norm), which AViT lacks"),
    (r"(?:attn|mlp)\.norm\.", "it has a LayerNorm inside attention or MLP, which AViT lacks"),
    (r"norm_pre\.", "it has a LayerNorm before the first block, which AViT lacks"),
    (r"tokens_to_token\.", "its tokens come from a tokens-to-token stem (T2T-ViT), which AViT lacks"),
    (r"patch_embed\.norm\.", "it has a LayerNorm on the patches, which AViT lacks"),
    (
        r"patch_embed\.backbone\.|conv_root/|conv_proj\.conv_|patch_embed\.proj\.[0-9]",
        "its patches come from convolutions (a hybrid), which AViT lacks",
    ),
    (r"blocks\.[0-9]+\.(?:in_proj|attns\.|mlps\.)", "its attention and MLP run side by side, which AViT lacks"),
    (r"blocks\.[0-9]+\.act_mlp\.", "its halting has its own MLP (act_mode 1), AViT's reads channel 0 of each token"),
    (r"Transformer/encoderblock/", "its blocks are stacked in one array (big_vision's scan): save it unrolled"),
]
_PATTERNS = [(re.compile(rf"^(?:.*[./])?({pattern})", re.MULTILINE), what) for pattern, what in _FOREIGN]


def refuse_foreign_architectures(names: Iterable[str]) -> None:
    """Raises ValueError, naming the architecture and one tensor, if the names belong to one that AViT does not have."""
    names = list(names)
    for pattern, what in _PATTERNS:
        for name in names:
            if len(name) < 300 and pattern.match(name):
                raise ValueError(f"its architecture is unsupported ({name}): {what}")
