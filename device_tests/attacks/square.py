"""Square Attack: random search with squares, from scores alone (Andriushchenko et al., ECCV 2020).

Run through pyautoattack, the authors' code. It asks for 8-bit images, because a device can be given no others.
Its square's place and size are shared by a batch, as in that code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyautoattack.square import SquareAttack
from torch import nn

from device_tests.attacks.answers import Queries
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest, batches
from device_tests.images import LEVELS
from device_tests.perturbation import Norm
from keys.errors import InputError


@dataclass(frozen=True)
class Square:
    """Square Attack in L∞ or L2 with at most ``queries`` forward passes per image, its first and last look included.

    An image for which nothing is found is proposed as it was. Raises :class:`InputError` for another norm or
    fewer than four queries.
    """

    norm: Norm = Norm.LINF
    queries: int = 1000

    _NAMES: ClassVar[dict[Norm, str]] = {Norm.LINF: "Linf", Norm.L2: "L2"}
    _LOOKS: ClassVar[int] = 3
    """Queries besides the search's steps: the clean image, the first candidate and the result."""

    def __post_init__(self) -> None:
        if self.norm not in self._NAMES:
            raise InputError(f"Square Attack is made for L∞ and L2, not {self.norm.value}; choose one of them.")
        if self.queries <= self._LOOKS:
            raise InputError(f"Square Attack needs more than {self._LOOKS} queries, not {self.queries}; 1000 is usual.")

    @property
    def name(self) -> str:
        """``"square"`` or ``"square-l2"``."""
        return "square" if self.norm is Norm.LINF else "square-l2"

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        norm = "L∞" if self.norm is Norm.LINF else "L2"
        return f"Square Attack, {norm}, at most {self.queries} score queries of 8-bit images, margin loss, one restart"

    @property
    def gradients_per_image(self) -> int:
        """No gradients: forward passes, at most."""
        return self.queries

    @torch.no_grad()
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
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. The global random state is left as it was."""
        candidates = images.clone()
        radius = epsilon if self.norm is Norm.LINF else _before_rounding(epsilon, images[0].numel())
        with at_rest(model), torch.random.fork_rng(enabled=True):
            attack = SquareAttack(
                Queries(model, progress).logits_of_8bit, norm=self._NAMES[self.norm], eps=radius, seed=seed,
                n_queries=self.queries - self._LOOKS, device=images.device,
            )  # fmt: skip
            for part in batches(images):
                candidates[part] = attack.perturb(images[part], labels[part])
        return candidates


def _before_rounding(epsilon: float, values: int) -> float:
    """An L2 radius so much smaller that rounding ``values`` values to 8 bits leaves nearly no image outside ε.

    Rounding adds an error of variance 1/(12·255²) to each value: its expected square, and three standard deviations
    of its share along the perturbation. Otherwise the judge would have to shrink what only just fools.
    """
    spread = 1 / (LEVELS * math.sqrt(12))
    return max(math.sqrt(max(epsilon**2 - values * spread**2, 0.0)) - 3 * spread, epsilon / 2)
