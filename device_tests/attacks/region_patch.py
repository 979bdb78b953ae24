"""One given patch, pasted inside one region of every image: how a universal patch meets the five-region protocol.

The patch is fitted once, by :meth:`~device_tests.attacks.patch.UniversalPatch.fit`, on training images and over
random places; here it is only pasted. Its place inside the region is drawn for each image from the seed, and it is the
same for the grey control of that size, region and seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.patch import GREY, pasted, places
from device_tests.attacks.regions import Region
from device_tests.images import LEVELS
from device_tests.perturbation import Norm, Perturbation
from keys.errors import InputError


@dataclass(frozen=True, eq=False)
class RegionPatch:
    """``patch`` (float C×s×s in [0, 1]) pasted inside ``region`` of every image; ``title`` says what patch it is.

    Raises :class:`InputError` for values that are no square patch in [0, 1].
    """

    patch: torch.Tensor
    region: Region
    title: str = "patch"

    def __post_init__(self) -> None:
        shape = tuple(self.patch.shape)
        if len(shape) != 3 or shape[1] != shape[2] or not bool(((self.patch >= 0) & (self.patch <= 1)).all()):
            raise InputError(f"A patch is float C×s×s in [0, 1], not {shape}; take one from UniversalPatch.fit.")

    @classmethod
    def grey(cls, channels: int, side: int, region: Region) -> RegionPatch:
        """The control: mid-grey, C×side×side."""
        return cls(torch.full((channels, side, side), GREY), region, "grey-patch")

    @property
    def norm(self) -> Norm:
        """One square patch."""
        return Norm.PATCH

    @property
    def name(self) -> str:
        """``"patch-top-left"``, ``"grey-patch-centre"``."""
        return f"{self.title}-{self.region.value}"

    @property
    def description(self) -> str:
        """The region, and the patch by the digest of its 8-bit levels."""
        levels = torch.round(self.patch * LEVELS).to(torch.uint8).cpu().contiguous().numpy()
        digest = hashlib.sha256(f"{levels.shape}\0".encode() + levels.tobytes()).hexdigest()[:16]
        return f"{self.title} {digest} of side {self.patch.shape[-1]} inside the {self.region.value} region"

    @property
    def gradients_per_image(self) -> int:
        """None: the patch was fitted before."""
        return 0

    def generate(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        epsilon: float,
        seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. Neither model nor labels are looked at.

        Raises :class:`InputError` if the patch is larger than ``epsilon`` allows, or has other channels.
        """
        height, width = images.shape[-2:]
        side = int(self.patch.shape[-1])
        if side > Perturbation(Norm.PATCH, epsilon).side(height, width) or self.patch.shape[0] != images.shape[1]:
            raise InputError(
                f"A patch of {tuple(self.patch.shape)} does not fit the set {Perturbation(Norm.PATCH, epsilon)} of "
                f"images {tuple(images.shape[1:])}; fit one of the right side."
            )
        box = self.region.holding_square(height, width, side)
        spots = places(len(images), box.height, box.width, side, self.region.seed(seed))
        return pasted(images, self.patch, spots + torch.tensor([box.top, box.left]))
