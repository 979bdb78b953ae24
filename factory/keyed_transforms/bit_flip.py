"""Bit flipping, or negative/positive transform: the key picks half of a block's values and turns them into negatives.

MaungMaung and Kiya, "Block-wise image transformation with secret key for adversarially robust defense" (IEEE TIFS 16,
2021, arXiv 2010.00801). All bits of an 8-bit value flipped are v → 255 − v, in [0, 1] x → 1 − x. With a sign s of −1
and an offset o of 1 at the picked places, 1 and 0 elsewhere, and the permutation p of a shuffle that may go before,

    out[j] = s[j] · in[p[j]] + o[j]

is affine: where patches are made of whole blocks it folds into the patch embedding (:meth:`BitFlip.folded`).

>>> import numpy as np, torch
>>> flip = BitFlip(np.array([1, 2]), channels=1, block_size=2)
>>> flip(torch.tensor([[[[0.0, 0.25], [1.0, 0.75]]]]))
tensor([[[[0.0000, 0.7500],
          [0.0000, 0.7500]]]])
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from factory.block_shuffle import BlockShuffle
from keys.errors import InputError


class BitFlip(nn.Module):
    """x → 1 − x at ``flipped`` places of every M×M block, after a shuffle if a ``permutation`` is given.

    ``flipped``: int array, distinct places 0 … c·M·M − 1 of a block flattened as for
    :class:`~factory.block_shuffle.BlockShuffle`; ``permutation``: int array of c·M·M values. All blocks and images
    share them. Sign and offset are float32 tensors, exact in float16 too, so that a template can hold any key's.
    Raises InputError for places outside of a block or named twice, and for what is no permutation.
    """

    sign: Tensor
    offset: Tensor

    def __init__(
        self, flipped: np.ndarray, *, channels: int, block_size: int, permutation: np.ndarray | None = None
    ) -> None:
        super().__init__()
        values = channels * block_size**2
        places = flipped.astype(np.int64)
        if len(np.unique(places)) < len(places) or (len(places) and not 0 <= places.min() <= places.max() < values):
            raise InputError(f"The places to flip must be different numbers from 0 to {values - 1}.")
        self.channels, self.block_size = channels, block_size
        self.shuffle = (
            None if permutation is None else BlockShuffle(permutation, channels=channels, block_size=block_size)
        )
        mask = torch.zeros(values)
        mask[torch.from_numpy(places)] = 1
        # Two tensors instead of one mask: what a converter computes from constants, no template could fill in.
        self.register_buffer("sign", (1 - 2 * mask).view(-1, 1, 1))
        self.register_buffer("offset", mask.view(-1, 1, 1))

    def extra_repr(self) -> str:
        """What the tensors do not tell: models of other numbers are not written from one template."""
        return f"block_size={self.block_size}"

    def forward(self, images: Tensor) -> Tensor:
        """Images N×C×H×W in [0, 1] to the same shape and range; H and W must be multiples of the block size."""
        blocks = functional.pixel_unshuffle(images, self.block_size)
        if self.shuffle is not None:
            blocks = blocks.index_select(1, self.shuffle.permutation)
        return functional.pixel_shuffle(blocks * self.sign + self.offset, self.block_size)

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight D×C×P×P and bias D of the projection of unflipped patches that gives what these give of flipped ones.

        P must be a multiple of the block size. Σ_j w[j]·(s[j]·x[j] + o[j]) + b = Σ_j (w[j]·s[j])·x[j] + (b + Σ_j
        w[j]·o[j]) for the flip alone. A shuffle before it is left to the caller (``self.shuffle``), who folds it next.
        """
        sign, offset = (self._tiled(values, weight) for values in (self.sign, self.offset))
        return weight * sign, bias + (weight * offset).sum((1, 2, 3))

    def _tiled(self, values: Tensor, weight: Tensor) -> Tensor:
        """One block's values at every block of a patch of ``weight``'s size: 1×C×P×P."""
        rows, columns = (side // self.block_size for side in weight.shape[2:])
        return functional.pixel_shuffle(values.to(weight).expand(-1, rows, columns).unsqueeze(0), self.block_size)
