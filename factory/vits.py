"""What LoRA needs to know of Vision Transformers: where they make queries, keys and values, and their heads.

timm's plain ViTs (DeiT, DeiT III, DINOv2 and distilled DeiT among them), its Eva (EVA, EVA-02 and ViTs with rotary
positions) and its Beit (BEiT, BEiT v2) project tokens by linear layers that LoRA can wrap, and end in linear heads.
"""

from __future__ import annotations

from typing import Any

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

KeyedVit = VisionTransformer | Eva | Beit

_FUSED, _SEPARATE = ("qkv",), ("q_proj", "k_proj", "v_proj")


def has_projections(vit: KeyedVit) -> bool:
    """Whether every block has linear layers for queries, keys and values, and the heads are linear layers."""
    blocks = all(
        any(
            all(isinstance(getattr(getattr(block, "attn", None), part, None), nn.Linear) for part in parts)
            for parts in (_FUSED, _SEPARATE)
        )
        for block in vit.blocks
    )
    return blocks and all(isinstance(getattr(vit, head), nn.Linear) for head in heads(vit))


def attention_projections(vit: KeyedVit) -> tuple[str, ...]:
    """Names, inside each block's ``attn``, of the linear layers that make queries, keys and values."""
    return _FUSED if isinstance(getattr(vit.blocks[0].attn, "qkv", None), nn.Linear) else _SEPARATE


def heads(network: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers that give logits: ``head``, and ``head_dist`` where a DeiT was distilled."""
    return ("head", "head_dist") if isinstance(getattr(network, "head_dist", None), nn.Linear) else ("head",)


def call_projections(model: KeyedVit) -> None:
    """Have every block call its ``qkv``; Eva and Beit with biases else read its weight, past LoRA and every hook."""
    for block in model.blocks:
        attention: Any = getattr(block, "attn", None)
        if getattr(attention, "q_bias", None) is not None:
            attention.qkv_bias_separate = True
