"""Bit flipping: half of every block's values become their negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from factory.recipes.part import Trait, TransformPart

if TYPE_CHECKING:
    from factory.keyed_transforms.bit_flip import BitFlip
    from keys.derive import DeviceKey


class BitFlipPart(TransformPart):
    """x → 1 − x at the places of a block that the key picks (MaungMaung and Kiya, IEEE TIFS 16, 2021).

    The source picks half of the places. Its published program flips those where a random permutation of 0 … n − 1 is
    above n/2, one fewer than half for even n; here it is ⌊n/2⌋, every subset equally likely. With ``shuffle`` the
    values are permuted first, as the block shuffle does it under the same key.
    """

    kind: Literal["bit-flip"] = "bit-flip"
    shuffle: bool = Field(default=False, description="permute the values of a block, too")
    title = "bit flip"
    needs = frozenset({Trait.IMAGES})

    def build(self, key: DeviceKey | None, shape: tuple[int, int, int], block_size: int) -> BitFlip | None:
        """The flip that ``key`` stands for, of c·M·M values a block."""
        if key is None:
            return None
        from factory.block_shuffle import check_block_size
        from factory.keyed_transforms.bit_flip import BitFlip
        from factory.keyed_transforms.places import FLIPPED_PLACES, keyed_half
        from keys.permutation import permutation

        channels, height, width = shape
        check_block_size(block_size, height, width)
        values = channels * block_size**2
        return BitFlip(
            keyed_half(key, values, FLIPPED_PLACES), channels=channels, block_size=block_size,
            permutation=permutation(key, values) if self.shuffle else None,
        )  # fmt: skip
