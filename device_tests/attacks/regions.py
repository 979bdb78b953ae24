"""The five places of the volumization paper's attack protocol: four quadrants and the centre (BMVC 2023, section 5).

Rules: an attack stays inside one region's box; what does not fit into a quadrant goes to the centre, whichever of
the five regions was asked for, into the smallest centred box that holds it. So there are five attacked images of
every image at every size of the attack.

>>> Region.TOP_RIGHT.holding(32, 32, 16)
Box(top=0, left=16, height=16, width=16)
>>> Region.TOP_RIGHT.holding(32, 32, 257)
Box(top=7, left=7, height=17, width=17)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from keys.errors import InputError


@dataclass(frozen=True)
class Box:
    """Rows ``top`` to ``top + height`` and columns ``left`` to ``left + width`` of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        """Pixels inside."""
        return self.height * self.width

    def mask(self, height: int, width: int) -> torch.Tensor:
        """Which pixels of a height × width image lie inside: bool height × width."""
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[self.top : self.top + self.height, self.left : self.left + self.width] = True
        return inside


class Region(Enum):
    """Where a localized attack may change an image."""

    TOP_LEFT = "top-left"
    TOP_RIGHT = "top-right"
    BOTTOM_LEFT = "bottom-left"
    BOTTOM_RIGHT = "bottom-right"
    CENTRE = "centre"

    def seed(self, seed: int) -> int:
        """The seed of this region's draws, so that five attacks in one centred box are not one attack five times."""
        return seed * len(Region) + list(Region).index(self)

    def box(self, height: int, width: int) -> Box:
        """This region of a height × width image: a quadrant, or the box of half the height and width in the middle.

        The lower and right quadrants take an odd row or column. Raises :class:`InputError` below 2×2 pixels.
        """
        if min(height, width) < 2:
            raise InputError(f"An image of {height}×{width} pixels has no quadrants; 2×2 is the smallest.")
        up, across = height // 2, width // 2
        if self is Region.CENTRE:
            return Box((height - up) // 2, (width - across) // 2, up, across)
        top, left = self.value.startswith("top"), self.value.endswith("left")
        return Box(
            0 if top else up, 0 if left else across, up if top else height - up, across if left else width - across
        )

    def holding(self, height: int, width: int, pixels: int) -> Box:
        """The box in which ``pixels`` ≥ 1 single pixels are attacked: this region, or the centre if they do not fit.

        The centred box keeps the image's shape as far as whole pixels allow, and ends at the whole image.
        """
        own = self.box(height, width)
        if pixels <= min(region.box(height, width).area for region in Region):
            return own
        scale = math.sqrt(min(pixels, height * width) / (height * width))
        tall, wide = min(height, math.ceil(scale * height)), min(width, math.ceil(scale * width))
        return Box((height - tall) // 2, (width - wide) // 2, tall, wide)

    def holding_square(self, height: int, width: int, side: int) -> Box:
        """The box in which a square patch of ``side`` pixels lies: this region, or the centre if it does not fit.

        Raises :class:`InputError` for a side that is larger than the image.
        """
        if not 1 <= side <= min(height, width):
            raise InputError(f"A patch of side {side} does not fit into an image of {height}×{width} pixels.")
        if side <= min(height, width) // 2:
            return self.box(height, width)
        return Box((height - side) // 2, (width - side) // 2, side, side)
