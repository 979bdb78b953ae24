"""How much an attacker may change an image: a norm and a size, and what 8-bit images lie within it.

Rules: adversarial images are 8-bit before anyone judges them, and an image outside its set is never judged.
A pixel is one position with all its channels. No torch: a device and a report read this file too.

>>> Perturbation.parse("linf:8/255")
Perturbation(norm=<Norm.LINF: 'linf'>, size=0.03137254901960784)
>>> str(Perturbation(Norm.LINF, 8 / 255)), str(Perturbation(Norm.L2, 0.5)), str(Perturbation(Norm.PATCH, 0.25))
('L∞ 8/255', 'L2 0.5', 'patch 25 %')
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

import numpy as np

from device_tests.images import LEVELS
from keys.errors import InputError


class Norm(Enum):
    """The field's perturbation sets: two balls, a number of pixels, one square patch."""

    LINF = "linf"
    L2 = "l2"
    L0 = "l0"
    PATCH = "patch"


@dataclass(frozen=True)
class Perturbation:
    """A perturbation set around every image.

    ``size``: radius on inputs in [0, 1] for L∞ and L2 (over the whole image), number of pixels for L0, share of the
    image's area for a square patch. Raises :class:`InputError` for a size that reaches nothing.
    """

    norm: Norm
    size: float

    def __post_init__(self) -> None:
        usable = math.isfinite(self.size) and self.size > 0
        if self.norm is Norm.LINF:
            usable = usable and self.size <= 1 and math.floor(self.size * LEVELS + 1e-6) >= 1
        elif self.norm is Norm.L2:
            usable = usable and self.size * LEVELS >= 1
        elif self.norm is Norm.L0:
            usable = usable and float(self.size).is_integer()
        else:
            usable = usable and self.size <= 1
        if not usable:
            raise InputError(
                f"No perturbation of {self.norm.value} {self.size}: L∞ takes 1/255 to 1, L2 at least 1/255, L0 a whole "
                "number of pixels, a patch a share of the area up to 1."
            )

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """Read ``"linf:8/255"``, ``"l2:0.5"``, ``"l0:4"``, ``"patch:0.25"``; raises :class:`InputError`."""
        name, _, size = text.partition(":")
        try:
            return cls(Norm(name.strip().lower()), float(Fraction(size.strip())))
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(f"{text!r} is no perturbation; write linf:8/255, l2:0.5, l0:4 or patch:0.25.") from error

    @property
    def code(self) -> str:
        """The text that :meth:`parse` reads, the same for equal sizes."""
        return f"{self.norm.value}:{self.size!r}"

    def __str__(self) -> str:
        """For people: L∞ in 255ths where it is a whole number of them."""
        if self.norm is Norm.LINF:
            levels = self.size * LEVELS
            return f"L∞ {round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"L∞ {self.size:g}"
        if self.norm is Norm.PATCH:
            return f"patch {100 * self.size:g} %"
        return f"L2 {self.size:g}" if self.norm is Norm.L2 else f"L0 {self.size:g} pixels"

    @property
    def radius(self) -> float:
        """What an attack may use: for L∞ the whole 8-bit levels within the size, else the size itself."""
        return math.floor(self.size * LEVELS + 1e-6) / LEVELS if self.norm is Norm.LINF else self.size

    def side(self, height: int, width: int) -> int:
        """Side in pixels of the largest square patch of at most this share of a height × width image.

        Raises :class:`InputError` if not even one pixel fits, ``ValueError`` for another norm.
        """
        if self.norm is not Norm.PATCH:
            raise ValueError(f"{self} has no side")
        side = min(height, width, math.isqrt(math.floor(self.size * height * width + 1e-9)))
        if side < 1:
            raise InputError(f"A {self} of {height}×{width} pixels is smaller than one pixel.")
        return side

    def to_8bit(self, candidates: np.ndarray, clean: np.ndarray) -> np.ndarray:
        """Round float candidates N×C×H×W to the 8-bit images (uint8) that are judged, all inside the set.

        ``clean``: uint8 of the same shape. L∞ candidates are clipped into the ball's levels; of an L2 candidate the
        rounded difference is shrunk until it fits; of an L0 candidate the pixels that changed most are kept; patch
        candidates are rounded. Raises :class:`InputError` for values that are not finite and ``ValueError`` for a
        patch candidate that changes more than one square of the patch's side.
        """
        if candidates.shape != clean.shape:
            raise ValueError(f"candidates {candidates.shape} for images {clean.shape}")
        if not np.isfinite(candidates).all():
            raise InputError("An attack gave values that are not finite, so its source is not usable; train it again.")
        levels = np.clip(candidates.astype(np.float64), 0, 1) * LEVELS
        origin = clean.astype(np.float64)
        if self.norm is Norm.LINF:
            reach = math.floor(self.size * LEVELS + 1e-6)
            return np.rint(np.clip(levels, origin - reach, origin + reach)).astype(np.uint8)
        rounded = np.rint(levels).astype(np.uint8)
        if self.norm is Norm.L2:
            return _within_l2(levels - origin, clean, self.size * LEVELS)
        if self.norm is Norm.L0:
            return _most_changed_pixels(rounded, clean, int(self.size))
        if not self.contains(rounded, clean).all():
            raise ValueError(f"an attack changed more than one {self}")
        return rounded

    def contains(self, attacked: np.ndarray, clean: np.ndarray) -> np.ndarray:
        """Which uint8 images N×C×H×W lie within the set around their clean ones: bool N."""
        difference = attacked.astype(np.int32) - clean.astype(np.int32)
        flat = difference.reshape(len(clean), -1)
        if self.norm is Norm.LINF:
            return np.abs(flat).max(axis=1) <= math.floor(self.size * LEVELS + 1e-6)
        if self.norm is Norm.L2:
            return np.sqrt((flat.astype(np.float64) ** 2).sum(axis=1)) <= self.size * LEVELS + 1e-6
        changed = (difference != 0).any(axis=1)
        if self.norm is Norm.L0:
            return changed.sum(axis=(1, 2)) <= int(self.size)
        side = self.side(*clean.shape[-2:])
        return (_extent(changed.any(axis=2)) <= side) & (_extent(changed.any(axis=1)) <= side)


def _within_l2(difference: np.ndarray, clean: np.ndarray, radius: float) -> np.ndarray:
    """Round clean + difference (in levels), shrinking an image's difference until what is left after rounding fits."""
    origin = clean.astype(np.float64)
    out = clean.copy()
    scale = np.ones(len(clean))
    pending = np.arange(len(clean))
    while len(pending):
        part = np.rint(np.clip(origin[pending] + scale[pending, None, None, None] * difference[pending], 0, LEVELS))
        size = np.sqrt(((part - origin[pending]) ** 2).reshape(len(pending), -1).sum(axis=1))
        fits = size <= radius + 1e-9
        out[pending[fits]] = part[fits].astype(np.uint8)
        # At least a percent a time: rounding can keep the size where it is for a while, but not down to zero.
        scale[pending] *= np.where(fits, 1.0, np.minimum(0.99, radius / np.maximum(size, 1e-9)))
        pending = pending[~fits]
    return out


def _most_changed_pixels(rounded: np.ndarray, clean: np.ndarray, pixels: int) -> np.ndarray:
    n, _, height, width = clean.shape
    change = np.abs(rounded.astype(np.int32) - clean.astype(np.int32)).sum(axis=1).reshape(n, -1)
    kept = np.zeros((n, height * width), dtype=bool)
    strongest = np.argsort(-change, axis=1, kind="stable")[:, :pixels]
    np.put_along_axis(kept, strongest, True, axis=1)
    return np.where(kept.reshape(n, 1, height, width), rounded, clean)


def _extent(occupied: np.ndarray) -> np.ndarray:
    """Length of the shortest run of positions that covers all occupied ones: N×L bool → int N, 0 where none is."""
    length = occupied.shape[1]
    first = occupied.argmax(axis=1)
    last = length - 1 - occupied[:, ::-1].argmax(axis=1)
    return np.where(occupied.any(axis=1), last - first + 1, 0)
