"""What the purifier is asked to do: one frozen value, checked when it is made.

The defaults were chosen on validation images of the shipped sample; docs/purifier.md has the figures.

>>> PurifierSettings(steps=100, every=10).kept_steps
(10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from keys.errors import InputError

FASTEST = 1e30
"""Largest learning rate that float32 holds with room; far below it every optimisation has diverged."""


@dataclass(frozen=True)
class PurifierSettings:
    """How images are purified.

    The prior: ``steps`` of Adam at ``learning_rate`` for a network of ``width`` features on ``scales`` halvings of the
    size, from codes and first weights drawn from ``seed``; a reconstruction is kept ``every`` so many steps.

    The decision: reconstructions count from ``recognisable`` dB of PSNR against the given image on; a label that
    ``stable`` of them in a row agree on, and that the given image does not have, is taken for what was there before the
    noise. The boundary is localised by so many ``bisections``; images on it are pushed ``push`` times their way to the
    given image away from it; stitched are, from patches of ``patch`` pixels, those images and ``neighbours``
    reconstructions before each.

    ``batch``: images optimised at once. Raises :class:`InputError` for values that cannot work.
    """

    # Read by pydantic where a study's spec holds these settings: no unknown name.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    steps: int = 150
    learning_rate: float = 0.01
    width: int = 8
    scales: int = 2
    every: int = 10
    seed: int = 0
    recognisable: float = 22.0
    stable: int = 2
    bisections: int = 8
    push: float = 0.5
    neighbours: int = 1
    patch: int = 8
    batch: int = 16

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1, "width": 1, "scales": 1, "every": 1, "seed": 0, "stable": 1, "bisections": 0, "neighbours": 0,
            "patch": 2, "batch": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"The purifier's {name} must be a whole number of at least {least}, not {value!r}.")
        if self.every > self.steps:
            raise InputError(f"The purifier keeps nothing of {self.steps} steps every {self.every}; lower 'every'.")
        for name, low in (("learning_rate", 0.0), ("recognisable", 0.0), ("push", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= low):
                raise InputError(f"The purifier's {name} must be a finite number of at least {low:g}, not {value!r}.")
        if not 0 < self.learning_rate <= FASTEST:
            raise InputError(
                f"The purifier's learning_rate must be above 0 and at most {FASTEST:g}, not {self.learning_rate!r}; "
                "with 0 nothing is ever reconstructed."
            )

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """The steps after which a reconstruction is kept, counted from 1; the last step is always one of them."""
        regular = range(self.every, self.steps + 1, self.every)
        return tuple(dict.fromkeys((*regular, self.steps)))
