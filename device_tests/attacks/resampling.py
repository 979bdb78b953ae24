"""Random linear changes of images that transfer attacks differentiate through: resized and padded, turned, cut up.

Rules: all randomness comes from a generator on the CPU; what lies outside an image is zero; shapes never change.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def resize_and_pad(images: torch.Tensor, smallest: float, share: float, generator: torch.Generator) -> torch.Tensor:
    """Shrink every image to a random size, pad it back with zeros at a random place (after Xie et al., CVPR 2019).

    Each side becomes ``smallest`` to 1 times as long, uniformly, the same factor for both; every image has its own
    size and place. A share of ``1 - share`` of the images is left alone. Bilinear, without antialiasing.
    """
    n, _, height, width = images.shape
    chosen, scale, down, right = torch.rand(4, n, generator=generator)
    scale = torch.where(chosen < share, smallest + (1 - smallest) * scale, torch.ones(n))
    rows = _resize_and_pad_matrices(height, scale, down).to(images)
    columns = _resize_and_pad_matrices(width, scale, right).to(images)
    return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)


def _resize_and_pad_matrices(side: int, scale: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Matrices N×side×side that act along one axis; two products per image cost next to nothing beside a model."""
    length = (side * scale).round().clamp_(min=1)[:, None]
    start = (place[:, None] * (side - length + 1)).floor().clamp_(max=side - length)
    pixels = torch.arange(side, dtype=scale.dtype)
    inside = (pixels >= start) & (pixels < start + length)
    # Where a pixel's centre lies in the image before it was resized: the convention of align_corners=False.
    source = ((pixels - start + 0.5) * side / length - 0.5).clamp_(0, side - 1)
    weights = (1 - (source[:, :, None] - pixels).abs()).clamp_(min=0)
    return weights * inside[:, :, None]


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turn all images about their centre; bilinear."""
    height, width = images.shape[-2:]
    rows, columns = _turned_rectangle(height, width, degrees)
    return _sample(images, rows + (height - 1) / 2, columns + (width - 1) / 2)


def shuffle_and_rotate_blocks(
    images: torch.Tensor, blocks: int, degrees: float, generator: torch.Generator
) -> torch.Tensor:
    """Cut the images into blocks×blocks rectangles, shuffle them and turn each about its centre; bilinear.

    Cuts, order and angles (uniform within ±``degrees``) are random, the same for all images of the call. Strips are
    cut and shuffled along one axis, then each strip along the other; which axis comes first is random.
    """
    if torch.rand(1, generator=generator).item() < 0.5:
        turned = _shuffle_strips(images.transpose(-1, -2), blocks, degrees, generator)
        return turned.transpose(-1, -2)
    return _shuffle_strips(images, blocks, degrees, generator)


def _shuffle_strips(images: torch.Tensor, blocks: int, degrees: float, generator: torch.Generator) -> torch.Tensor:
    """Cut into horizontal strips first."""
    height, width = images.shape[-2:]
    rows, columns = torch.full((height, width), -2.0), torch.full((height, width), -2.0)
    for row, source_row, tall in _shuffled_cuts(height, blocks, generator):
        for column, source_column, wide in _shuffled_cuts(width, blocks, generator):
            angle = degrees * (2 * torch.rand(1, generator=generator).item() - 1)
            across, along = _turned_rectangle(tall, wide, angle)
            # Half a pixel of slack keeps what rounding moved over the edge; beyond it lies another block.
            outside = (across.abs() > tall / 2) | (along.abs() > wide / 2)
            across += source_row + (tall - 1) / 2
            along += source_column + (wide - 1) / 2
            across[outside] = -2.0
            rows[row : row + tall, column : column + wide] = across
            columns[row : row + tall, column : column + wide] = along
    return _sample(images, rows, columns)


def _shuffled_cuts(side: int, pieces: int, generator: torch.Generator) -> list[tuple[int, int, int]]:
    """Random pieces of ``side`` pixels in random order: (where it goes, where it comes from, its length)."""
    shares = torch.rand(pieces, generator=generator).cumsum(0)
    ends = (shares / shares[-1] * side).round().int().tolist()
    starts = [0, *ends[:-1]]
    cuts: list[tuple[int, int, int]] = []
    to = 0
    for index in torch.randperm(pieces, generator=generator).tolist():
        length = ends[index] - starts[index]
        if length:
            cuts.append((to, starts[index], length))
            to += length
    return cuts


def _turned_rectangle(height: int, width: int, degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns, counted from the centre, that a turned rectangle's pixels come from; each height×width."""
    row = torch.arange(height, dtype=torch.float32)[:, None] - (height - 1) / 2
    column = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return cosine * row + sine * column, cosine * column - sine * row


def _sample(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The images at fractional pixel positions (each H×W); zero outside."""
    height, width = images.shape[-2:]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    grid = grid.to(images).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
