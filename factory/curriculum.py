"""In which order a batch is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Curriculum(Protocol):
    """Orders the images of a batch, and says in how many steps it is learnt."""

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        """Indices into ``images`` (uint8 N×C×H×W): one optimiser step each, in this order; each image once."""
        ...

    def steps(self, count: int) -> int:
        """How many parts a batch of ``count`` images becomes."""
        ...
