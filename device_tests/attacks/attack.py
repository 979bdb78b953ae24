"""What every attack is: a name, a cost, and candidates inside the ε-ball.

Rules: an attack is a frozen value that holds its budget; it proposes and never judges; all of its randomness
comes from the seed it is given. A new attack is one new file with one class that fits :class:`Attack`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

Progress = Callable[[int], None]
"""Called with the number of images whose gradient was just computed."""


class Attack(Protocol):
    """Proposes adversarial candidates for one source model."""

    @property
    def name(self) -> str:
        """Short and unique among the attacks of a run, e.g. ``"pgd"``."""
        ...

    @property
    def description(self) -> str:
        """Norm and whole budget in words; two attacks with equal descriptions propose equal candidates."""
        ...

    @property
    def gradients_per_image(self) -> int:
        """Gradients computed for each image: the attack's cost."""
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

        Returns a tensor of the images' shape, within ``epsilon`` (on [0, 1]) of them and within [0, 1].
        The model gives logits N×K, is used in evaluation mode and left as it was.
        """
        ...
