"""The paper's keyed transform (Section III-D): one permutation of the c·M·M values of every M×M block.

>>> import numpy as np, torch
>>> shuffle = BlockShuffle(np.array([3, 2, 1, 0]), channels=1, block_size=2)
>>> shuffle(torch.tensor([[[[1., 2., 5., 6.], [3., 4., 7., 8.]]]]))
tensor([[[[4., 3., 8., 7.],
          [2., 1., 6., 5.]]]])
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from keys.errors import InputError


class BlockShuffle(nn.Module):
    """Permute the values inside every block: ``out[j] = in[permutation[j]]`` (Eq. 2).

    A block is flattened channel by channel, then row by row (c, y, x); all blocks and all images share the
    permutation, as in the paper. ``permutation`` is an int array of c·M·M values.
    """

    permutation: Tensor

    def __init__(self, permutation: np.ndarray, *, channels: int, block_size: int) -> None:
        super().__init__()
        if sorted(permutation.tolist()) != list(range(channels * block_size**2)):
            raise InputError(f"A shuffle of {channels}×{block_size}×{block_size} blocks needs a permutation of "
                             f"{channels * block_size**2} values.")  # fmt: skip
        self.channels, self.block_size = channels, block_size
        self.register_buffer("permutation", torch.from_numpy(permutation.astype(np.int64)))

    def forward(self, images: Tensor) -> Tensor:
        """Shuffle images N×C×H×W; H and W must be multiples of the block size."""
        # Unshuffling pixels lays each block's c·M·M values, in the order (c, y, x), along the channels; as one
        # gather between two layout changes it also exports to three operators.
        blocks = functional.pixel_unshuffle(images, self.block_size)
        return functional.pixel_shuffle(blocks.index_select(1, self.permutation), self.block_size)


def check_block_size(block_size: int, height: int, width: int) -> None:
    """Raise InputError unless blocks of ``block_size`` tile the image."""
    if height % block_size or width % block_size:
        divisors = ", ".join(str(d) for d in range(2, min(height, width) + 1) if not height % d and not width % d)
        raise InputError(
            f"Block size {block_size} does not divide the image of {height}×{width} pixels; choose one of {divisors}."
        )
