"""Random flips, shifts and erasing on a whole batch of uint8 images at once, before any shuffle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from factory.recipes.training import TrainingSettings


def augment(images: Tensor, settings: TrainingSettings, generator: torch.Generator) -> Tensor:
    """Augment a batch uint8 N×C×H×W; all randomness comes from ``generator``."""
    count, channels, height, width = images.shape
    if settings.flip:
        flip = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
    if settings.shift:
        reach = settings.shift
        padded = functional.pad(images, (reach, reach, reach, reach))
        offset = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
        rows = (offset[0][:, None] + torch.arange(height))[:, None, :, None]
        columns = (offset[1][:, None] + torch.arange(width))[:, None, None, :]
        images = padded[
            torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None], rows, columns
        ]
    if settings.erase:
        chosen = torch.rand(count, generator=generator) < settings.erase
        centre = torch.rand(2, count, generator=generator) * torch.tensor([[height], [width]])
        half = (torch.rand(2, count, generator=generator) * 0.15 + 0.1) * torch.tensor([[height], [width]])
        inside = ((torch.arange(height) - centre[0][:, None]).abs() < half[0][:, None])[:, None, :, None] & (
            (torch.arange(width) - centre[1][:, None]).abs() < half[1][:, None]
        )[:, None, None, :]
        noise = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
        images = torch.where(inside & chosen[:, None, None, None], noise, images)
    return images
