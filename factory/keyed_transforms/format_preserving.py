"""Format-preserving encryption of half of a block's values, as a lookup table.

MaungMaung and Kiya (IEEE TIFS 16, 2021, arXiv 2010.00801) encrypt the values at the places that the key picks with FFX,
a cipher whose ciphertexts have as many decimal digits as its plaintexts. AES, of which FFX is made, has no place in a
graph, and need not: under one key, FFX on 8-bit values *is* a table of 256 entries. The table here comes from a
key-derived permutation of 0 … 255 instead (:mod:`keys.permutation`, under a subkey of its own), or, as in the authors'
program with its three decimal digits, of 0 … 999, of which 256 entries are used and the rest of the image is scaled
along. FFX is a pseudo-random permutation of the same set, so that nobody without the key can tell the two apart.

The transform is piecewise constant: its gradient would be zero at the encrypted places. That would hide gradients from
attackers and protect from none of them, because whoever holds the model holds the table: from the gradient g behind it,
the best level v′ near v is that of the largest g·T[v′], exact to first order. So this is the gradient that the module
hands out, in place of zero (BPDA; Athalye, Carlini and Wagner, ICML 2018, section 4.1): towards that level, as steep as
what it gains. Every attack here, the canaries and adversarial training get it without knowing of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from keys.errors import InputError

LEVELS = 256
REACH = 8
"""How many 8-bit levels the handed-out gradient looks to either side; most attacks have 8/255."""


class FormatPreserving(nn.Module):
    """Values at ``encrypted`` places of every M×M block go through a table, the others are kept.

    ``encrypted``: int array, distinct places 0 … c·M·M − 1; ``codes``: int array, a permutation of 0 … D − 1 with D of
    256 or 1000; ``permutation``: of the c·M·M values, a shuffle that is done afterwards. With k = round(255·x) a value
    becomes codes[k] / (D − 1); one that is not encrypted 255·x / (D − 1), which is x itself for D = 256. All blocks
    and images share one table. Raises InputError for what is no such array.

    In a template everything that the key decides is a permutation or a float tensor: the places are two gathers, one
    that lays the encrypted values in front and one that lays them back (and shuffles).
    """

    front: Tensor
    back: Tensor
    table: Tensor

    def __init__(
        self, encrypted: np.ndarray, codes: np.ndarray, *, channels: int, block_size: int,
        permutation: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        values, size = channels * block_size**2, len(codes)
        order = np.arange(values) if permutation is None else permutation
        if size not in (LEVELS, 1000) or sorted(codes.tolist()) != list(range(size)):
            raise InputError("A table of format-preserving encryption is a permutation of 256 or of 1000 numbers.")
        if sorted(order.tolist()) != list(range(values)):
            raise InputError(f"The shuffle of {channels}×{block_size}×{block_size} blocks needs {values} values.")
        places = encrypted.astype(np.int64)
        rest = np.setdiff1d(np.arange(values), places)
        front = np.concatenate([places, rest])
        if len(front) != values or len(np.unique(front)) != values:
            raise InputError(f"The places to encrypt must be different numbers from 0 to {values - 1}.")
        self.channels, self.block_size, self.encrypted = channels, block_size, len(places)
        self.kept_scale = (LEVELS - 1) / (size - 1)
        self.register_buffer("front", torch.from_numpy(front))
        self.register_buffer("back", torch.from_numpy(np.argsort(front)[order].astype(np.int64)))
        self.register_buffer("table", torch.from_numpy((codes[:LEVELS] / (size - 1)).astype(np.float32)))

    def extra_repr(self) -> str:
        """What the tensors do not tell: models of other numbers are not written from one template."""
        return f"block_size={self.block_size}, encrypted={self.encrypted}, kept_scale={self.kept_scale}"

    def forward(self, images: Tensor) -> Tensor:
        """Images N×C×H×W in [0, 1] to the same shape and range; H and W must be multiples of the block size."""
        blocks = functional.pixel_unshuffle(images, self.block_size).index_select(1, self.front)
        plain, kept = blocks[:, : self.encrypted], blocks[:, self.encrypted :]
        # floor(v + ½) and not round(v), which goes to even numbers: no image of 8 bits has such values.
        level = torch.floor(plain.clamp(0, 1) * (LEVELS - 1) + 0.5).to(torch.int64)
        # Only for who differentiates in the image: exporters trace the lookup itself.
        attacked = torch.is_grad_enabled() and images.requires_grad
        secret = _Lookup.apply(plain, level, self.table) if attacked else self.table[level]
        if self.kept_scale != 1:
            kept = kept * self.kept_scale
        mixed = torch.cat([secret, kept], 1).index_select(1, self.back)
        return functional.pixel_shuffle(mixed, self.block_size)


class _Lookup(torch.autograd.Function):
    """``table[level]``, with the slope towards the best level within reach as its gradient."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, level: Tensor, table: Tensor) -> Tensor:
        """``plain`` is what ``level`` was rounded from, and what the gradient is for."""
        ctx.save_for_backward(level, table)
        return table[level].to(plain.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Of the levels within reach, the one that gains most: its gain per unit, with the sign of the way there."""
        (gradient,) = gradients
        level, table = ctx.saved_tensors
        best, slope = torch.zeros_like(gradient), torch.zeros_like(gradient)
        for offset in (*range(-REACH, 0), *range(1, REACH + 1)):
            reached = level + offset
            change = table[reached.clamp(0, LEVELS - 1)] - table[level]
            gain = torch.where((reached >= 0) & (reached < LEVELS), gradient * change, 0.0)
            better = gain > best
            best = torch.where(better, gain, best)
            slope = torch.where(better, gain * ((LEVELS - 1) / offset), slope)
        return slope, None, None
