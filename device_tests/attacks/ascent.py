"""The loop that iterative gradient attacks share: steps up the loss inside a ball, with or without momentum.

An attack is this loop with a start, step lengths, a momentum and its own way to a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import Ball
from device_tests.attacks.gradients import at_rest, batches
from device_tests.perturbation import Norm

Gradient = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Images in [0, 1] and their labels → the direction to climb, of the images' shape."""


@torch.no_grad()
def ascend(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    gradient: Gradient,
    *,
    norm: Norm,
    epsilon: float,
    lengths: Sequence[float],
    momentum: float = 0.0,
    random_start: torch.Generator | None = None,
    gradients_per_step: int = 1,
    progress: Progress | None = None,
) -> torch.Tensor:
    """The last iterate of one step per entry of ``lengths`` (in multiples of ``epsilon``), batch by batch.

    It starts at the clean images, or at random ones of the balls. With ``momentum`` μ the direction is the
    accumulated gradient of Dong et al. (CVPR 2018), eq. 6: each gradient at L1 length 1, what came before times μ.
    """
    candidates = torch.empty_like(images)
    with at_rest(model):
        for part in batches(images):
            clean, truth = images[part], labels[part]
            ball = Ball(norm, clean, epsilon)
            x = clean if random_start is None else ball.random(random_start)
            velocity = torch.zeros_like(clean)
            for length in lengths:
                direction = gradient(x, truth)
                if momentum:
                    direction = velocity = velocity.mul_(momentum).add_(_at_l1_length_1(direction))
                x = ball.step(x, direction, length * epsilon)
                if progress is not None:
                    progress(len(truth) * gradients_per_step)
            candidates[part] = x
    return candidates


def _at_l1_length_1(gradient: torch.Tensor) -> torch.Tensor:
    size = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
    # A zero gradient adds nothing instead of dividing by zero.
    return torch.where(size > 0, gradient / size, torch.zeros_like(gradient))
