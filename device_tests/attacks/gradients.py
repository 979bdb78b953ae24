"""What gradient attacks share: a model at rest, batches, and the gradient of the loss by the input.

Rule: a gradient never passes through a clamp. In torch 2.15 clamp's gradient is zero exactly at its bounds, and
many pixels of real images are exactly 0 or 1, so candidates are clipped outside the differentiated graph.

Gradients in bfloat16 leave results as they are: PGD, MI-FGSM and MI-DI-FGSM (ε = 8/255, validation images, three
sources) fooled exactly the same images of their source as in float32, and of 2,718 images shown to devices 8 were
fooled by float32 alone and 8 by bfloat16 alone, in 0.55 to 0.63 of the time on a CPU that has it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from keys.errors import InputError

BATCH_VALUES = 2_000_000
"""Input values per batch, which bounds what a graph may hold: 13 images of 3×224×224."""

LARGEST_BATCH = 128


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in evaluation mode with its parameters out of the graph; afterwards it is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def batches(images: torch.Tensor) -> Iterator[slice]:
    """Slices that cover all images, in order, sized so that a batch's graph fits in memory."""
    values = math.prod(images.shape[1:])
    size = max(1, min(LARGEST_BATCH, BATCH_VALUES // values))
    for start in range(0, len(images), size):
        yield slice(start, min(start + size, len(images)))


def gradients_in(bf16: bool) -> str:
    """What a description says of the arithmetic: nothing for float32."""
    return ", gradients in bfloat16" if bf16 else ""


def loss_gradient(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    bf16: bool = False,
) -> torch.Tensor:
    """Gradient of each image's cross-entropy by that image; N×C×H×W. No parameter receives one.

    ``transform``: what the images go through before the model, differentiable. ``bf16``: let the model multiply
    matrices in bfloat16 (torch's autocast), which is nearly twice as fast where the hardware can.
    Raises :class:`InputError` for a model that only answers, and for a gradient that is not finite: a sign would turn
    that into an attack that does nothing.
    """
    with torch.enable_grad():
        leaf = images.detach().requires_grad_(True)
        seen = leaf if transform is None else transform(leaf)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = model(seen)
        # The sum, not the mean: an image's gradient must not depend on the batch it is in.
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    if not loss.requires_grad:
        raise InputError(
            f"{type(model).__name__} only answers and has no gradient; attack it by queries, or through a stand-in."
        )
    gradient = torch.autograd.grad(loss, leaf)[0]
    if not torch.isfinite(gradient).all():
        raise InputError(
            "The loss of a model that attacks are made on has no finite gradient, so its weights are not usable; "
            "train that model again."
        )
    return gradient
