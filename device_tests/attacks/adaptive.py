"""Attacks on a loss that the attacker chooses: whoever knows how a model was trained attacks what it was trained on.

The conformity paper's adaptive setting (Mustafa et al., ICCV 2019, Table 3): its attacks climb the joint loss, with
the learned prototypes, instead of the cross-entropy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from device_tests.attacks.ascent import ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, check_ball, named
from device_tests.perturbation import Norm
from keys.errors import InputError

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""Model, images N×C×H×W in [0, 1], labels int64 N → a scalar, differentiable in the images, that rises as the model
fails. An image's gradient must not depend on the other images but for its length."""

Method = Literal["fgsm", "bim", "mi-fgsm", "pgd"]


@dataclass(frozen=True)
class AdaptiveAttack:
    """FGSM, BIM, MI-FGSM or PGD on ``loss``, each as its own class here runs it on the cross-entropy.

    ``loss_name``: what the loss is, in words, and everything that it depends on beside the model: attacks with equal
    descriptions propose equal candidates. ``steps``: of all but FGSM.
    """

    method: Method
    loss: Loss
    loss_name: str
    steps: int = 20
    norm: Norm = Norm.LINF

    def __post_init__(self) -> None:
        check_ball(self.norm)

    @property
    def name(self) -> str:
        """``"adaptive-pgd"`` and so on, with ``-l2`` in L2."""
        return named(f"adaptive-{self.method}", self.norm)

    @property
    def description(self) -> str:
        """Norm, budget and loss in words."""
        return f"{self.method} on {self.loss_name}, {WORDS[self.norm]}, {self.gradients_per_image} steps"

    @property
    def gradients_per_image(self) -> int:
        """One gradient per step."""
        return 1 if self.method == "fgsm" else self.steps

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
        """Candidates up the loss; see :class:`~device_tests.attacks.attack.Attack`.

        Raises :class:`InputError` for a loss without a finite gradient.
        """

        def gradient(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(True)
                (found,) = torch.autograd.grad(self.loss(model, leaf, truth), leaf)
            if not torch.isfinite(found).all():
                raise InputError(f"{self.loss_name} of a source has no finite gradient; train that model again.")
            return found

        return ascend(
            model,
            images,
            labels,
            gradient,
            norm=self.norm,
            epsilon=epsilon,
            lengths=self._lengths(),
            momentum=1.0 if self.method == "mi-fgsm" else 0.0,
            random_start=torch.Generator().manual_seed(seed) if self.method == "pgd" else None,
            progress=progress,
        )

    def _lengths(self) -> list[float]:
        if self.method == "fgsm":
            return [1.0]
        if self.method == "pgd":
            return [1 + math.cos(math.pi * index / self.steps) for index in range(self.steps)]
        return [(1.25 if self.method == "bim" else 2.0) / self.steps] * self.steps
