"""The images that a gradient attack may reach, and its steps among them: an L∞ or L2 ball cut with [0, 1].

Rule: candidates are brought back into the ball here, outside any differentiated graph (see ``gradients.py``).
"""

from __future__ import annotations

import torch

from device_tests.perturbation import Norm
from keys.errors import InputError

WORDS = {Norm.LINF: "L∞", Norm.L2: "L2"}
"""What the two norms are called in descriptions."""


def check_ball(norm: Norm) -> None:
    """Raise :class:`InputError` for a norm whose set is no ball that gradient steps can follow."""
    if norm not in WORDS:
        raise InputError(
            f"Gradient attacks step in L∞ or L2 balls, not in {norm.value}; for {norm.value} use an attack made for it."
        )


def named(name: str, norm: Norm) -> str:
    """An attack's name: ``name`` in L∞, ``name-l2`` in L2."""
    return name if norm is Norm.LINF else f"{name}-{norm.value}"


class Ball:
    """All images within ``epsilon`` of ``clean`` (float32 N×C×H×W in [0, 1]) and within [0, 1]; one ball per image."""

    def __init__(self, norm: Norm, clean: torch.Tensor, epsilon: float) -> None:
        check_ball(norm)
        self._linf = norm is Norm.LINF
        self._clean = clean
        self._epsilon = epsilon
        self._low, self._high = (clean - epsilon).clamp_(min=0), (clean + epsilon).clamp_(max=1)

    def random(self, generator: torch.Generator) -> torch.Tensor:
        """One uniform point of every ball, then clipped to [0, 1]."""
        # Drawn on the CPU, so that the start is the same on every device.
        shape = self._clean.shape
        if self._linf:
            noise = torch.rand(shape, generator=generator).mul_(2).sub_(1).to(self._clean)
            return torch.add(self._clean, noise, alpha=self._epsilon).clamp_(self._low, self._high)
        direction = torch.randn(shape, generator=generator)
        share = torch.rand(len(self._clean), 1, 1, 1, generator=generator) ** (1 / direction[0].numel())
        noise = (unit(direction) * share).to(self._clean)
        return torch.add(self._clean, noise, alpha=self._epsilon).clamp_(0, 1)

    def step(self, images: torch.Tensor, direction: torch.Tensor, length: float) -> torch.Tensor:
        """``images`` moved by ``length`` along the steepest ascent for ``direction`` in this norm, and brought back.

        In L∞ that is the direction's sign, in L2 the direction at length 1. Where it is zero, nothing moves. In L2
        what lies outside is shortened onto the sphere and then clipped to [0, 1], which cannot lead out again.
        """
        if self._linf:
            return torch.add(images, direction.sign(), alpha=length).clamp_(self._low, self._high)
        away = torch.add(images, unit(direction), alpha=length).sub_(self._clean)
        size = away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return away.mul_(self._epsilon / size.clamp_(min=self._epsilon)).add_(self._clean).clamp_(0, 1)


def unit(direction: torch.Tensor) -> torch.Tensor:
    """``direction`` N×C×H×W at L2 length 1 per image; zero stays zero."""
    size = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.where(size > 0, direction / size, torch.zeros_like(direction))
