"""The key-based paper's transform: values are permuted inside every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from factory.recipes.part import Trait, TransformPart

if TYPE_CHECKING:
    from factory.block_shuffle import BlockShuffle
    from keys.derive import DeviceKey


class BlockShufflePart(TransformPart):
    """One permutation of the c·M·M values of every block, the same for all blocks (Section III-D)."""

    kind: Literal["block-shuffle"] = "block-shuffle"
    title = "block shuffle"
    needs = frozenset({Trait.IMAGES})

    def build(self, key: DeviceKey | None, shape: tuple[int, int, int], block_size: int) -> BlockShuffle | None:
        """The shuffle that ``key`` stands for, c·M·M values a block."""
        if key is None:
            return None
        from factory.block_shuffle import BlockShuffle, check_block_size
        from keys.permutation import permutation

        channels, height, width = shape
        check_block_size(block_size, height, width)
        return BlockShuffle(permutation(key, channels * block_size**2), channels=channels, block_size=block_size)
