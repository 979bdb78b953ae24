"""Format-preserving encryption of half of a block's values, as a lookup table.

MaungMaung and Kiya (IEEE TIFS 16, 2021, arXiv 2010.00801) encrypt the values at the places that the key picks with FFX,
a cipher whose ciphertexts have as many decimal digits as its plaintexts. AES, of which FFX is made, has no place in a
graph, and need not: under one key, FFX on 8-bit values *is* a table of 256 entries. The table here comes from a
key-derived permutation of 0 … 255 instead (:mod:`keys.permutation`, under a subkey of its own), or, as in the authors'
program with its three decimal digits, of 0 … 999, of which 256 entries are used and the rest of the image is scaled
along. FFX is a pseudo-random permutation of the same set, so that nobody without the key can tell the two apart.

The transform is piecewise constant: its gradient is zero at the encrypted places. That hides gradients from white-box
attacks and protects from none of them; attack it through :func:`with_straight_through`, or better through the table
itself (docs/key-based-defence.md).
"""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from keys.errors import InputError

LEVELS = 256
Codes = Literal[256, 1000]


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
        self.straight_through = False
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
        secret = self.table[level]
        if self.straight_through:
            secret = plain * self.kept_scale + (secret - plain * self.kept_scale).detach()
        if self.kept_scale != 1:
            kept = kept * self.kept_scale
        mixed = torch.cat([secret, kept], 1).index_select(1, self.back)
        return functional.pixel_shuffle(mixed, self.block_size)


def with_straight_through(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for white-box attackers: forward the same, backward as if nothing were encrypted.

    This is BPDA with the identity in place of the table (Athalye, Carlini and Wagner, ICML 2018). Its gradient is not
    zero, but a random table keeps no neighbours: it says where a change matters, hardly in which direction.
    """
    attacked = copy.deepcopy(model)
    for module in attacked.modules():
        if isinstance(module, FormatPreserving):
            module.straight_through = True
    return attacked
