"""Patterns of the frequencies that attractors are made of, drawn without a key, a model or a gradient.

Attractors make a device answer by these frequencies, so that now and then a pattern of them fools it by chance. Who
knows the recipe can try that on any device. Sources of T0 to T2 are attacked without attractors, so that their attacks
do not show it: the judge of a device with attractors tries such patterns as a source of its own, which counts with the
public base's. Blocks are drawn one by one; patterns of the carriers of made-up keys, not tried by the judge, do a
little better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from device_tests.attacks.attack import Progress
from device_tests.perturbation import Norm
from device_tests.threats import Source, Threat
from factory.attractors import highest_frequencies

PATTERNS = "keyless-patterns"
"""Id of the source."""

TRIES = 10
"""Patterns that are tried on every image."""


def draw_patterns(shape: tuple[int, int, int], block_size: int, count: int, seed: int) -> Tensor:
    """``count`` images of random signs, float n×C×H×W of ±1, made of the frequencies that carriers are made of."""
    waves = torch.from_numpy(highest_frequencies(block_size).astype(np.float32)).unsqueeze(1)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[1] // block_size, shape[2] // block_size
    drawn = torch.randn(count * shape[0], len(waves), rows, columns, generator=generator)
    return functional.conv_transpose2d(drawn, waves, stride=block_size).view(count, *shape).sign()


@dataclass(frozen=True)
class KeylessPattern:
    """The pattern ``number`` (from 1) of :data:`TRIES`, ±ε on every image alike; it looks at no model and no label."""

    number: int
    block_size: int
    norm: Norm = Norm.LINF
    gradients_per_image: int = 0

    @property
    def name(self) -> str:
        """``pattern-01`` and so on."""
        return f"pattern-{self.number:02}"

    @property
    def description(self) -> str:
        """See :class:`~device_tests.attacks.attack.Attack`."""
        count, size = len(highest_frequencies(self.block_size)), self.block_size
        return f"L∞, random signs of the {count} highest of {size}×{size} frequencies of each block, draw {self.number}"

    def generate(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, seed: int,
        progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """See :class:`~device_tests.attacks.attack.Attack`."""
        shape = (images.shape[1], images.shape[2], images.shape[3])
        pattern = draw_patterns(shape, self.block_size, TRIES, seed)[self.number - 1]
        return (images + epsilon * pattern.to(images)).clamp(0, 1)


def keyless_patterns(base: nn.Module, block_size: int) -> tuple[Source, tuple[KeylessPattern, ...]]:
    """The source and its attacks; ``base``: the public base, which they do not look at."""
    words = f"{TRIES} patterns of the attractors' frequencies, made without a key or a model"
    source = Source(PATTERNS, Threat.PUBLIC_BASE, base, words, differentiable=False)
    return source, tuple(KeylessPattern(number, block_size) for number in range(1, TRIES + 1))
