"""TGR: momentum over gradients whose extreme tokens are left out inside the ViT (Zhang et al., CVPR 2023).

After the paper, with the factors of its authors' code. On the way back through every block the gradient is scaled
at three places (attention ¼, qkv ¾, MLP ½), and per image and channel the tokens with the largest and the smallest
value get zero; in the attention these are whole rows and columns of each head. As in the authors' code, the
attention's gradient is taken where it enters the softmax's input.

A ViT's blocks are found by their shape (``attn.qkv``, ``attn.attn_drop``, ``mlp``), wherever they lie in a module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.ensemble import members_of
from keys.errors import InputError

ATTENTION, QKV, MLP = 0.25, 0.75, 0.5


@dataclass(frozen=True)
class TokenGradient(MomentumFGSM):
    """MI-FGSM with token gradient regularisation; only for Vision Transformers and ensembles of them."""

    _SHORT: ClassVar[str] = "mi-tgr"
    _TITLE: ClassVar[str] = "TGR"

    def generate(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        epsilon: float,
        seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Candidates after Zhang et al.; see :class:`~device_tests.attacks.attack.Attack`.

        Nothing is drawn at random: ``seed`` changes nothing. Raises :class:`InputError` for a model, or a member of
        an ensemble, without ViT blocks.
        """
        with regularised(model):
            return super().generate(model, images, labels, epsilon=epsilon, seed=seed, progress=progress)


@contextlib.contextmanager
def regularised(model: nn.Module) -> Iterator[None]:
    """While this lasts, gradients through the ViT blocks of ``model`` are regularised; the forward pass is the same.

    Fused attention is off meanwhile, because it hides the attention map. Raises :class:`InputError` as above.
    """
    blocks = [block for member in members_of(model) for block in _blocks(member)]
    fused = [(block.attn, block.attn.fused_attn) for block in blocks if hasattr(block.attn, "fused_attn")]
    handles: list[Any] = []
    try:
        for attention, _ in fused:
            attention.fused_attn = False
        for block in blocks:
            handles += [
                block.attn.attn_drop.register_forward_hook(_on_attention),
                block.attn.qkv.register_forward_hook(_on_tokens(QKV)),
                block.mlp.register_forward_hook(_on_tokens(MLP)),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention, was in fused:
            attention.fused_attn = was


def without_extreme_tokens(gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor``·``gradient`` (N×tokens×channels), zero at each channel's largest and smallest token."""
    out = gradient * factor
    out.scatter_(1, gradient.argmax(1, keepdim=True), 0.0)
    return out.scatter_(1, gradient.argmin(1, keepdim=True), 0.0)


def without_extreme_pairs(gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor``·``gradient`` (N×heads×tokens×tokens), zero in each head's row and column of its two extremes."""
    side = gradient.shape[-1]
    flat = gradient.flatten(2)
    extremes = torch.stack([flat.argmax(2), flat.argmin(2)], dim=-1)
    keep_rows = torch.ones(gradient.shape[:3], dtype=gradient.dtype, device=gradient.device)
    keep_columns = torch.ones_like(flat[..., :side])
    keep_rows.scatter_(2, extremes // side, 0.0)
    keep_columns.scatter_(2, extremes % side, 0.0)
    return gradient * (factor * keep_rows)[..., None] * keep_columns[..., None, :]


def without_blocks(model: nn.Module) -> str | None:
    """Why the attack cannot be run on ``model``: it, or a member of it, has no ViT blocks; None if all have some."""
    for member in members_of(model):
        if not any(_is_block(module) for module in member.modules()):
            return (
                "Token gradient regularisation needs a Vision Transformer with blocks like timm's, and "
                f"{type(member).__name__} has none; attack it with another attack."
            )
    return None


def _blocks(model: nn.Module) -> list[Any]:
    fault = without_blocks(model)
    if fault is not None:
        raise InputError(fault)
    return [module for module in model.modules() if _is_block(module)]


def _is_block(module: nn.Module) -> bool:
    attention = getattr(module, "attn", None)
    parts = (getattr(attention, "qkv", None), getattr(attention, "attn_drop", None), getattr(module, "mlp", None))
    return all(isinstance(part, nn.Module) for part in parts)


def _on_tokens(factor: float) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: without_extreme_tokens(gradient, factor))

    return hook


def _on_attention(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    # In evaluation mode dropout hands on the softmax's output itself, so that its node is the softmax.
    if output.grad_fn is not None:
        output.grad_fn.register_hook(
            lambda gradients, _: (without_extreme_pairs(gradients[0], ATTENTION), *gradients[1:])
        )
