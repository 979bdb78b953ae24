"""The parametric bypass: a differentiable stand-in for the keyed first stage, fitted to the target's answers.

After the authors of LINAC (ICML 2022), who broke a keyed transform in this way. The attacker has the public base and
its own images, asks the target once about each, and trains a map of image blocks in front of the base until the two
agree. What comes out is a model: attack it like any other source (threat T4).
Rules: the target only answers; every answer is counted; agreement is measured on images that were not fitted on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from device_tests.accuracy import predict
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest
from device_tests.evidence import Proportion
from device_tests.images import from_8bit
from exporters.run_torch import TorchRuntime
from exporters.runtime import Runtime
from keys.errors import InputError

BATCH = 64

HELD_OUT = 10
"""One image in so many is asked about but not fitted on: it measures the agreement."""


class StandIn(Enum):
    """What is trained in front of the base, and in it."""

    PERMUTATION = "a soft permutation of block positions"
    LINEAR = "a free linear map of blocks"
    DISTILLED = "a free linear map of blocks, and the base behind it"


class BlockMap(nn.Module):
    """One matrix applied to every block: D×D for the D = C·M·M values of a block, in the order (c, y, x).

    A block shuffle ``out[j] = in[permutation[j]]`` is the matrix with ones at (j, permutation[j]).
    """

    matrix: torch.Tensor
    shift: torch.Tensor

    def __init__(self, matrix: torch.Tensor, shift: torch.Tensor, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images N×C×H×W block by block."""
        return _mapped(images, self.matrix, self.shift, self.block_size)


@dataclass(frozen=True, eq=False)
class Bypass:
    """A fitted stand-in with what it cost and how well it fits.

    ``module``: images in [0, 1] → logits, the :class:`BlockMap` first and the base after it; usable as a source's
    model. ``agreement``: held-out images to which it gives the target's label. ``queries``: answers of the target
    used, the held-out ones included.
    """

    module: nn.Sequential
    agreement: Proportion
    queries: int
    description: str


def fit_bypass(
    base: nn.Module,
    target: Runtime,
    images: np.ndarray,
    *,
    block_size: int,
    kind: StandIn,
    scores: bool,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> Bypass:
    """Fit a stand-in for ``target`` in front of a copy of ``base``.

    ``base``: float N×C×H×W in [0, 1] → logits N×K; it is left as it was. ``images``: the attacker's own, uint8
    N×C×H×W, not the judged ones; the target is asked once about each. ``block_size``: M, which the recipe makes
    public. ``scores``: fit to the target's probabilities, else to its labels alone. ``steps`` of Adam with 64
    images each; ``progress`` hears of steps·64 gradients. Raises :class:`InputError` for images that blocks do not
    tile, for fewer than two batches of them, or if the fit diverges.
    """
    if images.shape[-2] % block_size or images.shape[-1] % block_size:
        raise InputError(
            f"Blocks of {block_size} pixels do not tile images of {images.shape[-2]}×{images.shape[-1]}; give the "
            "fleet's block size."
        )
    if len(images) < 2 * BATCH or steps < 1:
        raise InputError(
            f"A bypass is fitted on at least {2 * BATCH} images in at least one step, not {len(images)} and {steps}."
        )
    parameter = next(base.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    answers = torch.from_numpy(np.array(target.logits(from_8bit(images)), dtype=np.float32))
    if not torch.isfinite(answers).all():
        raise InputError("The target's answers are not all finite, so that nothing can be fitted to them.")
    wanted = answers.softmax(dim=1) if scores else F.one_hot(answers.argmax(dim=1), answers.shape[1]).float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out, fitted = order[: len(images) // HELD_OUT], order[len(images) // HELD_OUT :]

    values = images.shape[1] * block_size**2
    behind = copy.deepcopy(base)
    first = _Permutation(values, steps, generator) if kind is StandIn.PERMUTATION else _Linear(values)
    first.to(device)
    tuned = list(behind.parameters()) if kind is StandIn.DISTILLED else []

    def loss_of(chosen: torch.Tensor, step: int) -> torch.Tensor:
        x = torch.from_numpy(from_8bit(images[chosen.numpy()])).to(device)
        matrix, shift = first(step)
        logits = behind(_mapped(x, matrix, shift, block_size))
        return F.kl_div(logits.log_softmax(dim=1), wanted[chosen].to(device), reduction="batchmean")

    groups: list[dict[str, Any]] = [
        {"params": list(first.parameters()), "lr": first.rate},
        {"params": tuned, "lr": 3e-4},
    ]
    with at_rest(behind), torch.enable_grad():
        for parameter in tuned:
            parameter.requires_grad_(True)
        _descend(loss_of, [group for group in groups if group["params"]], fitted, steps, generator, progress)
    with torch.no_grad():
        matrix, shift = first(steps)
    module = nn.Sequential(BlockMap(matrix.detach(), shift.detach(), block_size), behind.eval())
    agreeing = predict(TorchRuntime(module), images[held_out.numpy()]) == answers[held_out].argmax(dim=1).numpy()
    return Bypass(
        module=module,
        agreement=Proportion(int(agreeing.sum()), len(held_out)),
        queries=len(images),
        description=(
            f"{kind.value} (block size {block_size}), fitted in {steps} steps to {len(images)} "
            f"{'score' if scores else 'label'} answers"
        ),
    )


class _First(nn.Module):
    """A first stage while it is fitted: its matrix D×D and shift D at a step, and its learning rate."""

    rate: float

    def forward(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class _Linear(_First):
    """Starts as the identity: the attacker's first guess is the public base itself."""

    rate = 2e-2

    def __init__(self, values: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(values))
        self.shift = nn.Parameter(torch.zeros(values))

    def forward(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.matrix, self.shift


class _Permutation(_First):
    """A doubly stochastic matrix by Sinkhorn's iteration (Mena et al., ICLR 2018, eq. 3); it knows nothing at first.

    The temperature falls from ``HOT`` to ``COLD`` over the steps, which hardens it towards one permutation.
    """

    rate = 0.1
    HOT, COLD, ITERATIONS = 1.0, 0.1, 20

    def __init__(self, values: int, steps: int, generator: torch.Generator) -> None:
        super().__init__()
        self.scores = nn.Parameter(0.01 * torch.randn((values, values), generator=generator))
        self._steps = steps

    def forward(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        temperature = self.HOT * (self.COLD / self.HOT) ** (step / self._steps)
        logs = self.scores / temperature
        for _ in range(self.ITERATIONS):
            logs = logs - logs.logsumexp(dim=1, keepdim=True)
            logs = logs - logs.logsumexp(dim=0, keepdim=True)
        return logs.exp(), torch.zeros_like(logs[0])


def _mapped(images: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor, block_size: int) -> torch.Tensor:
    # Unshuffling pixels lays a block's values, in the order (c, y, x), along the channels.
    blocks = F.pixel_unshuffle(images, block_size)
    return F.pixel_shuffle(F.conv2d(blocks, matrix[:, :, None, None], shift), block_size)


def _descend(
    loss_of: Callable[[torch.Tensor, int], torch.Tensor],
    groups: list[dict[str, Any]],
    fitted: torch.Tensor,
    steps: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> None:
    """Adam with a cosine to zero, over the fitted images in a new order every pass."""
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    queue = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(queue) < BATCH:
            queue = fitted[torch.randperm(len(fitted), generator=generator)]
        chosen, queue = queue[:BATCH], queue[BATCH:]
        optimizer.zero_grad()
        loss = loss_of(chosen, step)
        if not torch.isfinite(loss):
            raise InputError(f"The bypass's fit diverged in step {step}; its base is not usable, or train it again.")
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(len(chosen))
