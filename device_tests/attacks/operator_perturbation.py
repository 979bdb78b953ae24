"""OPS: momentum over gradients near the image, seen through random chains of operators (Guo et al., CVPR 2025).

After the paper, with the operators of its authors' code: each gradient is taken at the image plus uniform noise of
a random radius, after two to four random operators. They are flips, rolls, rotations, dimming and resizing with
padding. Noise is drawn anew for every gradient, operators for a whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from device_tests.attacks.ascent import Gradient
from device_tests.attacks.gradients import loss_gradient
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.attacks.resampling import resize_and_pad, rotate

_ANGLES = (5, -5, 15, -15, 45, -45, 90, -90, 180)
_DIMMING = (2, 3, 4, 5, 6, 7, 8)
_RESIZING = (1.1, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5, 2.7, 2.9)
_OPERATORS: tuple[tuple[str, float], ...] = (
    ("same", 0), ("flip", -2), ("flip", -1), ("roll", -2), ("roll", -1),
    *(("turn", angle) for angle in _ANGLES), *(("dim", factor) for factor in _DIMMING),
    *(("shrink", 1 / ratio) for ratio in _RESIZING),
)  # fmt: skip
_CHAINS = (2, 3, 4)
_RADII = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class OperatorPerturbation(MomentumFGSM):
    """MI-FGSM with the mean gradient over the image itself and ``samples`` noisy, transformed neighbours.

    ``noise``: β, the noise's radius is β·ε times ¼ to 1½. The paper takes 10 neighbours through 20 operators each
    (200 samples) over 10 steps, with β = 2.
    """

    samples: int = 20
    noise: float = 2.0

    _SHORT: ClassVar[str] = "mi-ops"
    _TITLE: ClassVar[str] = "OPS"

    def _details(self) -> tuple[str, ...]:
        words = f"noise to {1.5 * self.noise:g}·ε through two to four operators"
        return (f"{self.samples} neighbours with {words}",)

    def _gradients_per_step(self) -> int:
        return self.samples + 1

    def _gradient(self, model: nn.Module, epsilon: float, generator: torch.Generator) -> Gradient:
        def neighbour(x: torch.Tensor) -> torch.Tensor:
            radius = self.noise * epsilon * _RADII[_drawn(len(_RADII), generator)]
            noise = torch.rand(x.shape, generator=generator).mul_(2).sub_(1).to(x)
            x = torch.add(x, noise, alpha=radius)
            for _ in range(_CHAINS[_drawn(len(_CHAINS), generator)]):
                x = _operate(x, *_OPERATORS[_drawn(len(_OPERATORS), generator)], generator)
            return x

        def gradient(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            total = loss_gradient(model, x, truth, bf16=self.bf16)
            for _ in range(self.samples):
                total += loss_gradient(model, x, truth, transform=neighbour, bf16=self.bf16)
            return total

        return gradient


def _operate(x: torch.Tensor, operator: str, value: float, generator: torch.Generator) -> torch.Tensor:
    if operator == "flip":
        return x.flip(int(value))
    if operator == "roll":
        return x.roll(_drawn(x.shape[int(value)], generator), int(value))
    if operator == "turn":
        return rotate(x, value)
    if operator == "dim":
        return x / value
    if operator == "shrink":
        return resize_and_pad(x, value, 1.0, generator)
    return x


def _drawn(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator).item())
