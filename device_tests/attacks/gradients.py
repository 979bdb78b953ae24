"""What gradient attacks share: a model at rest, batches, the L∞ ball, and the gradient of the loss by the input.

Rule: a gradient never passes through a clamp. In torch 2.15 clamp's gradient is zero exactly at its bounds, and
many pixels of real images are exactly 0 or 1, so candidates are clipped outside the differentiated graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

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


def linf_ball(images: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of each pixel: the L∞ ball of radius ``epsilon`` cut with [0, 1]."""
    return (images - epsilon).clamp_(min=0), (images + epsilon).clamp_(max=1)


def loss_gradient(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient of each image's cross-entropy by that image; N×C×H×W. No parameter receives one.

    Raises :class:`InputError` if it is not finite: a sign would turn that into an attack that does nothing.
    """
    with torch.enable_grad():
        leaf = images.detach().requires_grad_(True)
        # The sum, not the mean: an image's gradient must not depend on the batch it is in.
        loss = F.cross_entropy(model(leaf), labels, reduction="sum")
    gradient = torch.autograd.grad(loss, leaf)[0]
    if not torch.isfinite(gradient).all():
        raise InputError(
            "The loss of a model that attacks are made on has no finite gradient, so its weights are not usable; "
            "train that model again."
        )
    return gradient
