"""What every attack is: a name, a norm, a cost, and candidates inside the perturbation set.

Rules: an attack is a frozen value that holds its budget; it proposes and never judges; all of its randomness
comes from the seed it is given. A new attack is one new file with one class that fits :class:`Attack`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from device_tests.perturbation import Norm

Progress = Callable[[int], None]
"""Called with the number of images whose gradient (or answer to a query) was just computed."""


class Attack(Protocol):
    """Proposes adversarial candidates for one source model."""

    @property
    def name(self) -> str:
        """Short and unique among the attacks of a run, e.g. ``"pgd"``."""
        ...

    @property
    def norm(self) -> Norm:
        """Which perturbations it makes; ``epsilon`` of :meth:`generate` is a radius of this norm."""
        ...

    @property
    def description(self) -> str:
        """Norm and whole budget in words; two attacks with equal descriptions propose equal candidates."""
        ...

    @property
    def gradients_per_image(self) -> int:
        """Cost: gradients computed for each image, at most; for an attack by queries its forward passes."""
        ...

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
        """Candidates for ``images`` (float32 N×C×H×W in [0, 1]) with true ``labels`` (int64 N).

        ``epsilon`` is a :attr:`~device_tests.perturbation.Perturbation.radius`: on [0, 1] for L∞ and L2, a number of
        pixels for L0, a share of the area for a patch. Returns a tensor of the images' shape inside that set and
        within [0, 1]; an image for which nothing is found may come back unchanged. The model gives logits N×K, is
        used in evaluation mode and left as it was.
        """
        ...
