"""A keyed transform of the same form that changes nothing: what the public base has where a device has its key's."""

from __future__ import annotations

import numpy as np
from torch import nn

from factory.block_shuffle import BlockShuffle
from factory.keyed_transforms.bit_flip import BitFlip
from factory.keyed_transforms.format_preserving import LEVELS, FormatPreserving
from keys.errors import InputError


def neutral(transform: nn.Module) -> nn.Module:
    """A module with the tensors of ``transform``, name by name and shape by shape, that gives the images as they are.

    It takes 8-bit images: format-preserving encryption rounds to their levels. Raises InputError for a transform that
    no setting of its tensors makes the identity, which no adapter package can hold then.
    """
    if isinstance(transform, BlockShuffle):
        identity = np.arange(len(transform.permutation))
        return BlockShuffle(identity, channels=transform.channels, block_size=transform.block_size)
    if isinstance(transform, BitFlip):
        shuffle = None if transform.shuffle is None else np.arange(len(transform.sign))
        return BitFlip(np.arange(0), channels=transform.channels, block_size=transform.block_size, permutation=shuffle)
    if isinstance(transform, FormatPreserving) and transform.kept_scale == 1:
        return FormatPreserving(
            np.arange(transform.encrypted), np.arange(LEVELS), channels=transform.channels,
            block_size=transform.block_size,
        )  # fmt: skip
    raise InputError(
        "LoRA-only packages need a transform that can be left out of the base: a block shuffle, bit flips, or "
        "format-preserving encryption of 256 values; send full packages."
    )
