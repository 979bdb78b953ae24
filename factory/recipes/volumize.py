"""The volumization paper's transform: patches in order, stacked to a volume for a 3D network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from factory.recipes.part import Trait, TransformPart
from keys.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from factory.volumization.volumize import Volumize
    from keys.derive import DeviceKey


class VolumizePart(TransformPart):
    """An image's patches, ordered by a metric, by the key, or not at all, stacked to a volume (Eq. 3)."""

    kind: Literal["volumize"] = "volumize"
    patch_size: int = Field(default=7, ge=1, description="side of a patch in pixels; it must tile the image")
    order: Literal[
        "entropy", "mutual-information", "kl", "psnr", "max-norm", "joint-entropy", "mse", "raster", "key"
    ] = "mutual-information"
    bins: int = Field(default=16, ge=2, le=256, description="of the metrics' histograms: a power of two")
    title = "volumization"
    needs = frozenset({Trait.VOLUMES})

    def describe(self, block_size: int) -> str:
        """Its patches instead of blocks, and their order."""
        return f"{self.title}, patches of {self.patch_size}, order {self.order}"

    @property
    def own_block_size(self) -> int:
        """Patches are what it cuts."""
        return self.patch_size

    def permuted(self, shape: tuple[int, int, int], block_size: int) -> int:
        """Patches, where it is the key that orders them; else nothing."""
        if self.order != "key":
            return 0
        return (shape[1] // block_size) * (shape[2] // block_size)

    def check(self, network: nn.Module) -> None:
        """Refuse a network that was made for patches of another size."""
        made_for: tuple[int, int] | None = getattr(network, "volume", None)
        if made_for is not None and made_for[1] != self.patch_size:
            raise InputError(
                f"The base was made for patches of {made_for[1]} pixels, and the recipe's transform cuts patches of "
                f"{self.patch_size}; set its patch_size to {made_for[1]}, or pre-train a base with --model-arg "
                f"patch_size={self.patch_size}."
            )

    def build(self, key: DeviceKey | None, shape: tuple[int, int, int], block_size: int) -> Volumize:
        """The stack of patches; only the order ``key`` depends on the key, and is row by row without one."""
        from factory.volumization.volumize import Volumize, check_patches
        from keys.permutation import permutation

        _, height, width = shape
        check_patches(self.patch_size, height, width)
        if self.order != "key":
            return Volumize(self.patch_size, self.order, self.bins)
        if key is None:
            return Volumize(self.patch_size, "raster", self.bins)
        patches = (height // self.patch_size) * (width // self.patch_size)
        return Volumize(self.patch_size, "key", self.bins, permutation(key, patches))
