"""Patterns that the key picks and that searches by answers alone run into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from factory.recipes.part import Part, Trait

if TYPE_CHECKING:
    from factory.attractors import Attractors
    from keys.derive import DeviceKey

WITHOUT_KEY = "attractors-without-a-key"
"""Whose attractors all models of an un-keyed control have: a public key's."""


class AttractorsPart(Part):
    """Directions of the image that the key picks decide the answer once an image is moved along them.

    What one device's answers lead to then fools no other device (:mod:`factory.attractors`). Trains nothing.
    """

    kind: Literal["high-frequency"] = "high-frequency"
    count: int = Field(default=20, ge=1, le=1000, description="attractors of a device")
    reach: float = Field(default=1.0, ge=0.01, description="L2 on inputs in [0, 1] at which an attractor adds its gain")
    gain: float = Field(default=16.0, gt=0, description="in logits, which grow with the square of the distance")
    needs = frozenset({Trait.IMAGES})

    def build(self, key: DeviceKey | None, shape: tuple[int, int, int], block_size: int, classes: int) -> Attractors:
        """The attractors of ``key``, or without one those that every such model has; raises InputError."""
        from factory.attractors import keyed_attractors
        from keys.derive import fixed_guess

        return keyed_attractors(
            fixed_guess(WITHOUT_KEY) if key is None else key, shape, block_size, classes, count=self.count,
            reach=self.reach, gain=self.gain,
        )  # fmt: skip
