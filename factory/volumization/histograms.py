"""Intensities of patches as 8-bit levels, and how often they occur: exact integers, the same in every runtime.

A level is round(255·x), which is what a device receives; a cell is one of ``bins`` equal ranges of levels. Channels are
counted together: a patch of C×h×w has C·h·w values. All results are whole numbers, so that the order made of them is
the same in torch, onnxruntime and Core ML, whatever the precision of a graph's floats: levels are kept as floats, which
is faster, and survive float16 (three roundings move 255 by less than 0.4).

Counting is written twice, with equal results: by addresses for speed, and by comparisons where the graph is recorded,
since neither ONNX nor Core ML can count at addresses that are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keys.errors import InputError

LEVELS = 256
BINS = 16
"""Default number of cells: 16 levels each, so that a patch of a few dozen pixels fills more than one value each."""


def check_bins(bins: int) -> None:
    """Raise :class:`InputError` unless ``bins`` is a power of two from 2 to 256, so that cells hold whole levels."""
    if bins < 2 or bins > LEVELS or LEVELS % bins:
        raise InputError(f"Histograms have 2, 4, 8, 16, 32, 64, 128 or 256 bins, not {bins}; choose one of these.")


def levels(patches: Tensor) -> Tensor:
    """8-bit levels (B, N, P) of float patches (B, N, C, h, w) in [0, 1], P = C·h·w; what lies outside is cut.

    Whole numbers from 0 to 255 in the patches' own type.
    """
    values = patches.detach().flatten(2) * (LEVELS - 1)
    return values.add_(0.5).floor_().clamp_(0, LEVELS - 1)  # in place: new memory costs more than the arithmetic


def cells(of: Tensor, bins: int) -> Tensor:
    """Cells int32 0 … bins − 1 of ``levels`` (any shape)."""
    check_bins(bins)
    # Exact: the factor is a power of two.
    return (of * (bins / LEVELS)).floor().to(torch.int32)


def counts(of: Tensor, bins: int) -> Tensor:
    """How many of the P values of each patch lie in each cell: int32 (B, N, bins) of cells (B, N, P)."""
    if recorded():
        return _one_hot(of, bins).to(torch.int32).sum(2, dtype=torch.int32)
    return _addressed(of, bins)


def joint_counts(of: Tensor, reference: Tensor, bins: int) -> Tensor:
    """How many of the P places of a patch have cell i there and cell j in the reference: int32 (B, N, bins²).

    ``of`` is (B, N, P) and ``reference`` (B, 1, P), both cells; the place of (i, j) is i·bins + j. In a recorded graph
    the counts are a product of matrices in floats, exact in float16 for patches of up to 2,048 values.
    """
    if not recorded():
        return _addressed(of * bins + reference, bins * bins)
    first, second = (_one_hot(part, bins).to(torch.float32) for part in (of, reference))
    return torch.matmul(first.transpose(2, 3), second).flatten(2).to(torch.int32)


def _addressed(of: Tensor, size: int) -> Tensor:
    batch, number, _ = of.shape
    starts = torch.arange(batch * number, dtype=torch.int32, device=of.device).view(batch, number, 1) * size
    found = torch.bincount((of + starts).flatten(), minlength=batch * number * size)
    return found.to(torch.int32).view(batch, number, size)


def _one_hot(of: Tensor, bins: int) -> Tensor:
    return of.unsqueeze(-1) == torch.arange(bins, dtype=torch.int32, device=of.device)


def recorded() -> bool:
    """Whether a graph is being recorded for an exporter."""
    tracing: bool = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return torch.compiler.is_compiling() or tracing
