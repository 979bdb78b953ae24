"""HopSkipJump: from labels alone, along the decision boundary (Chen, Jordan and Wainwright, IEEE S&P 2020).

Two things differ from the paper, whose goal is the smallest distance: unless that is asked for, the search for an image
stops as soon as an 8-bit image inside the set is fooled; and the number of queries is a hard limit for every image by
itself.
Queries are float images, as published: its probes are smaller than one 8-bit level, so that the attacker is taken
to feed the model directly. What it proposes was seen to fool the target after rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from device_tests.attacks.answers import Queries
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest
from device_tests.images import LEVELS
from device_tests.perturbation import Norm, Perturbation
from keys.errors import InputError

NOISE_STARTS = 10
"""Uniform noise images tried as a start before other images of the set are."""

OTHER_STARTS = 10
"""Images of other classes tried as a start when noise is always given the true class."""

OUTWARD = (1.0, 1.02, 1.05, 1.1)
"""How far an image of the smallest distance goes beyond the boundary, from the clean image, to fool when rounded."""

SMALLEST_PROBE = 1e-5
"""Root mean square of a probe per value: below it, float32 images in [0, 1] no longer hold its direction."""


@dataclass(frozen=True)
class HopSkipJump:
    """HopSkipJump in L2 or L∞ with at most ``queries`` labels per image.

    ``first_estimate``: probes of the first gradient estimate, B₀ of the paper; the t-th takes B₀·√t. ``smallest``: go
    on to ever smaller distances until the queries are spent, as the paper does; else any image inside the set will do.
    An image for which nothing is found is proposed as it was. Raises :class:`InputError` for another norm or less than
    one gradient estimate.
    """

    norm: Norm = Norm.L2
    queries: int = 1000
    first_estimate: int = 100
    smallest: bool = False

    def __post_init__(self) -> None:
        if self.norm not in (Norm.LINF, Norm.L2):
            raise InputError(f"HopSkipJump is made for L2 and L∞, not {self.norm.value}; choose one of them.")
        if not 2 <= self.first_estimate < self.queries:
            raise InputError(
                f"HopSkipJump needs at least 2 probes and more queries than them, not {self.first_estimate} probes "
                f"and {self.queries} queries; 100 and 1000 are usual."
            )

    @property
    def name(self) -> str:
        """``"hop-skip-jump"`` (L2) or ``"hop-skip-jump-linf"``."""
        return "hop-skip-jump" if self.norm is Norm.L2 else "hop-skip-jump-linf"

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        norm = "L∞" if self.norm is Norm.LINF else "L2"
        goal = ", smallest distance" if self.smallest else ""
        probes = f"{self.first_estimate}·√t probes in step t"
        return f"HopSkipJump, {norm}{goal}, at most {self.queries} label queries, {probes}"

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
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`.

        Images are attacked one by one, the probes of a gradient estimate in one batch: a candidate depends on the
        other images only where one of them was its start.
        """
        generator = torch.Generator().manual_seed(seed)
        candidates = images.clone()
        with at_rest(model):
            for index in range(len(images)):
                target = _Target(Queries(model, progress), labels[index], self.queries)
                others = torch.nonzero(labels != labels[index])[:, 0].cpu()
                others = others[torch.randperm(len(others), generator=generator)[:OTHER_STARTS]]
                try:
                    self._walk(target, images[index], images[others], epsilon, generator, candidates[index].copy_)
                except _SpentError:
                    continue
        return candidates

    def _walk(
        self,
        target: _Target,
        clean: torch.Tensor,
        others: torch.Tensor,
        epsilon: float,
        generator: torch.Generator,
        found: Callable[[torch.Tensor], object],
    ) -> None:
        """Walk along the boundary until an image inside the set is ``found``, or on to nearer ones; every one is told.

        Raises :class:`_SpentError`.
        """
        if target.fooled_by(clean):
            return
        start = _start(target, clean, others, generator)
        if start is None:
            return
        x = self._to_boundary(target, clean, start)
        step = 0
        while True:
            distance = self._distance(x, clean)
            if distance <= epsilon:
                # Deeper than the boundary first: the whole radius is the attacker's, and rounding undoes less there.
                scales = OUTWARD if self.smallest else (epsilon / max(distance, 1e-12), 1.0)
                for scale in scales:
                    rounded = self._rounded(clean + scale * (x - clean), clean, epsilon)
                    if target.fooled_by(rounded):
                        found(rounded)
                        if not self.smallest:
                            return
                        epsilon = self._distance(rounded, clean)
                        break
            step += 1
            direction = self._direction(target, x, distance, step, generator)
            length = distance / math.sqrt(step)
            while not target.fooled_by(moved := (x + length * direction).clamp(0, 1)):
                length /= 2
                if length < distance * 1e-6:
                    moved = x
                    break
            x = self._to_boundary(target, clean, moved)

    def _direction(
        self, target: _Target, x: torch.Tensor, distance: float, step: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Monte Carlo estimate of the boundary's normal with its baseline subtracted (eq. 9, 16 and 17)."""
        d = x.numel()
        # In the first step the image is still far off, and the paper's δ is then a tenth of the range.
        radius = 0.1 if step == 1 else max(distance / d, SMALLEST_PROBE * math.sqrt(d))
        count = min(int(self.first_estimate * math.sqrt(step)), target.left)
        if count < 2:
            raise _SpentError
        shape = (count, *x.shape)
        if self.norm is Norm.L2:
            noise = torch.randn(shape, generator=generator)
        else:
            noise = torch.rand(shape, generator=generator) * 2 - 1
        noise = (noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).to(x)
        probes = (x + radius * noise).clamp(0, 1)
        signs = target.fooled(probes).to(x) * 2 - 1
        mean = signs.mean()
        weights = signs if abs(float(mean)) == 1 else signs - mean
        normal = torch.einsum("n,nchw->chw", weights, (probes - x) / radius)
        return normal / normal.norm().clamp(min=1e-12) if self.norm is Norm.L2 else normal.sign()

    def _to_boundary(self, target: _Target, clean: torch.Tensor, fooling: torch.Tensor) -> torch.Tensor:
        """Bisect between the clean image and a fooling one; the result fools (algorithm 1).

        L2 moves along the line between the two, L∞ shrinks the box around the clean image.
        """
        high = 1.0 if self.norm is Norm.L2 else self._distance(fooling, clean)
        low, d = 0.0, clean.numel()
        tolerance = high * max(d**-1.5 if self.norm is Norm.L2 else d**-2, SMALLEST_PROBE)
        best = fooling
        while high - low > tolerance:
            middle = (low + high) / 2
            if self.norm is Norm.L2:
                trial = clean + middle * (fooling - clean)
            else:
                trial = clean + (fooling - clean).clamp(-middle, middle)
            if target.fooled_by(trial):
                high, best = middle, trial
            else:
                low = middle
        return best

    def _distance(self, x: torch.Tensor, clean: torch.Tensor) -> float:
        return float((x - clean).norm() if self.norm is Norm.L2 else (x - clean).abs().max())

    def _rounded(self, x: torch.Tensor, clean: torch.Tensor, epsilon: float) -> torch.Tensor:
        """The 8-bit image inside the set that a judge would make of ``x``, as floats."""
        origin = torch.round(clean * LEVELS).to(torch.uint8)[None].cpu().numpy()
        levels = Perturbation(self.norm, epsilon).to_8bit(x[None].cpu().numpy(), origin)[0]
        return torch.from_numpy(levels.astype(np.float32) / LEVELS).to(clean)


class _SpentError(Exception):
    """No queries are left for this image."""


class _Target:
    """One image's label queries, with a hard limit."""

    def __init__(self, queries: Queries, label: torch.Tensor, limit: int) -> None:
        self._queries, self._label, self._limit = queries, label, limit

    @property
    def left(self) -> int:
        return self._limit - self._queries.asked

    def fooled(self, images: torch.Tensor) -> torch.Tensor:
        """Which of n images get another label: bool n; raises :class:`_SpentError` instead of going over the limit."""
        if len(images) > self.left:
            raise _SpentError
        return self._queries.logits(images).argmax(dim=1) != self._label

    def fooled_by(self, image: torch.Tensor) -> bool:
        return bool(self.fooled(image[None]))


def _start(
    target: _Target, clean: torch.Tensor, others: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | None:
    """Any image that the target gives another label: noise, or else one of ``others``; ``None`` if there is none."""
    for _ in range(NOISE_STARTS):
        noise = torch.rand(clean.shape, generator=generator).to(clean)
        if target.fooled_by(noise):
            return noise
    for other in others:
        if target.fooled_by(other):
            return other
    return None
