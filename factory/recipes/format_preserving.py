"""Format-preserving encryption: half of every block's values go through a secret table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from factory.recipes.part import Trait, TransformPart

if TYPE_CHECKING:
    from factory.keyed_transforms.format_preserving import FormatPreserving
    from keys.derive import DeviceKey


class FormatPreservingPart(TransformPart):
    """v → table[v] at the places of a block that the key picks (MaungMaung and Kiya, IEEE TIFS 16, 2021).

    ``codes``: how many numbers the cipher permutes. 256 keeps images of 8 bits; 1000, three decimal digits, is what
    the source's published program does: it then scales the whole image by 255/999.
    """

    kind: Literal["format-preserving"] = "format-preserving"
    codes: Literal[256, 1000] = Field(default=256, description="numbers that the cipher permutes")
    shuffle: bool = Field(default=False, description="permute the values of a block, too")
    title = "format-preserving encryption"
    needs = frozenset({Trait.IMAGES})

    def build(self, key: DeviceKey | None, shape: tuple[int, int, int], block_size: int) -> FormatPreserving | None:
        """The encryption that ``key`` stands for, of c·M·M values a block."""
        if key is None:
            return None
        from factory.block_shuffle import check_block_size
        from factory.keyed_transforms.format_preserving import FormatPreserving
        from factory.keyed_transforms.places import ENCRYPTED_PLACES, ENCRYPTION_TABLE, keyed_half, keyed_order
        from keys.permutation import permutation

        channels, height, width = shape
        check_block_size(block_size, height, width)
        values = channels * block_size**2
        return FormatPreserving(
            keyed_half(key, values, ENCRYPTED_PLACES), keyed_order(key, self.codes, ENCRYPTION_TABLE),
            channels=channels, block_size=block_size,
            permutation=permutation(key, values) if self.shuffle else None,
        )  # fmt: skip
