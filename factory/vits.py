"""Which Vision Transformers can be keyed, and their parts that the recipes adapt.

A keyed base embeds patches by one convolution of the image (the shuffle is folded into it), projects tokens to
queries, keys and values by linear layers that LoRA can wrap, and ends in linear heads. timm's plain ViTs (DeiT,
DeiT III, DINOv2 and distilled DeiT among them), its Eva (EVA, EVA-02 and ViTs with rotary positions) and its Beit
(BEiT, BEiT v2) are built so.
"""

from __future__ import annotations

from typing import Any

from timm.layers.patch_embed import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from keys.errors import InputError

KeyedVit = VisionTransformer | Eva | Beit

_FUSED, _SEPARATE = ("qkv",), ("q_proj", "k_proj", "v_proj")


def checked_vit(name: str, model: nn.Module) -> KeyedVit:
    """``model``, if it has what the keyed recipes adapt.

    Raises InputError that names what is missing for anything else (a ResNet, a Swin, a hybrid).
    """
    missing = _missing(model)
    if missing is not None or not isinstance(model, KeyedVit):
        raise InputError(
            f"Base {name!r} is not a plain Vision Transformer: {missing}. Keyed recipes need a patch embedding by one "
            "convolution of the image, and linear layers for queries, keys and values in every block."
        )
    _call_projections(model)
    return model


def attention_projections(vit: KeyedVit) -> tuple[str, ...]:
    """Names, inside each block's ``attn``, of the linear layers that make queries, keys and values."""
    return _FUSED if isinstance(getattr(vit.blocks[0].attn, "qkv", None), nn.Linear) else _SEPARATE


def heads(vit: KeyedVit) -> tuple[str, ...]:
    """Names of the linear layers that give logits: ``head``, and ``head_dist`` where a DeiT was distilled."""
    return ("head", "head_dist") if isinstance(getattr(vit, "head_dist", None), nn.Linear) else ("head",)


def _missing(model: nn.Module) -> str | None:
    """What a keyed base has and ``model`` lacks, or None."""
    if not isinstance(model, KeyedVit):
        return f"it is a {type(model).__name__}, not one of timm's VisionTransformer, Eva and Beit"
    # Any, because timm builds it by a function that is handed in: a hybrid ViT has a network there.
    embedding: Any = model.patch_embed
    if not isinstance(embedding, PatchEmbed) or not isinstance(getattr(embedding, "proj", None), nn.Conv2d):
        return f"its patch embedding is a {type(embedding).__name__}, not one convolution of the image"
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if not any(
            all(isinstance(getattr(attention, part, None), nn.Linear) for part in parts)
            for parts in (_FUSED, _SEPARATE)
        ):
            return f"block {index} has neither attn.qkv nor attn.q_proj, attn.k_proj and attn.v_proj as linear layers"
    if not all(isinstance(getattr(model, head), nn.Linear) for head in heads(model)):
        return f"its head is a {type(model.head).__name__}, not one linear layer"
    return None


def _call_projections(model: KeyedVit) -> None:
    """Have every block call its ``qkv``; Eva and Beit with biases else read its weight, past LoRA and every hook."""
    for block in model.blocks:
        attention: Any = block.attn
        if getattr(attention, "q_bias", None) is not None:
            attention.qkv_bias_separate = True
