"""EOT: attacks on a model that draws at random, by gradients averaged over its draws (Athalye et al., ICML 2018).

Two ways in. :class:`ExpectedPGD` climbs the mean of the loss's gradients over the draws, which is the expectation
itself. :class:`Expectation` is a module that answers with the mean over its draws, so that every other attack (APGD,
a patch, a query attack) takes it as its model; its loss is that of the mean answer, not the mean loss.

Rule: a module draws from torch's global generator; here that is seeded before every draw and left as it was, so that
an attack on a randomised model is as repeatable as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from device_tests.attacks.ascent import ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import loss_gradient
from device_tests.attacks.pgd import PGD
from device_tests.perturbation import Norm
from keys.errors import InputError

_STRIDE = 1_000_003
"""Between the seeds of two attacks' draws, so that neighbouring seeds share none."""


class Expectation(nn.Module):
    """The mean answer (logits N×K) of ``model`` over ``draws`` of its randomness, fresh ones in every pass.

    ``seed``: of the first pass; :meth:`restart` goes back to it. Raises :class:`InputError` without a draw.
    """

    def __init__(self, model: nn.Module, draws: int, seed: int = 0) -> None:
        super().__init__()
        _check(draws)
        self.model, self.draws, self.seed = model, draws, seed
        self._drawn = 0

    def restart(self) -> None:
        """Draw the same again from here on."""
        self._drawn = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Mean logits N×K of images N×C×H×W in [0, 1]."""
        with torch.random.fork_rng(enabled=True):
            answers: list[torch.Tensor] = []
            for _ in range(self.draws):
                torch.manual_seed(_seed(self.seed, self._drawn))
                self._drawn += 1
                answers.append(self.model(images))
        return torch.stack(answers).mean(dim=0)

    def extra_repr(self) -> str:
        """The draws, which the answers depend on."""
        return f"draws={self.draws}, seed={self.seed}"


def expected_gradient(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, draws: int, seed: int
) -> torch.Tensor:
    """Mean over ``draws`` of the gradient of each image's cross-entropy by that image; N×C×H×W.

    Raises :class:`InputError` without a draw, and where
    :func:`~device_tests.attacks.gradients.loss_gradient` does.
    """
    _check(draws)
    total = torch.zeros_like(images)
    with torch.random.fork_rng(enabled=True):
        for number in range(draws):
            torch.manual_seed(_seed(seed, number))
            total += loss_gradient(model, images, labels)
    return total / draws


@dataclass(frozen=True)
class ExpectedPGD:
    """PGD on the expected loss: in each of ``steps`` steps the mean gradient over ``draws`` draws of the model.

    Everything else (start, step lengths, norm) as in :class:`~device_tests.attacks.pgd.PGD`, which it is for one draw
    of a model without randomness.
    """

    draws: int = 10
    steps: int = 20
    reach: float = 2.0
    norm: Norm = Norm.LINF

    def __post_init__(self) -> None:
        _check(self.draws)
        self._plain()

    @property
    def name(self) -> str:
        """``"eot-pgd"`` or ``"eot-pgd-l2"``."""
        return f"eot-{self._plain().name}"

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return f"{self._plain().description}, gradients averaged over {self.draws} draws of the model"

    @property
    def gradients_per_image(self) -> int:
        """One gradient per step and draw."""
        return self.steps * self.draws

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
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. Each step has draws of its own."""
        calls = 0

        def gradient(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return expected_gradient(model, x, truth, draws=self.draws, seed=_seed(seed, calls * self.draws))

        return ascend(
            model, images, labels, gradient, norm=self.norm, epsilon=epsilon, lengths=self._plain().lengths,
            random_start=torch.Generator().manual_seed(seed), gradients_per_step=self.draws, progress=progress,
        )  # fmt: skip

    def _plain(self) -> PGD:
        return PGD(steps=self.steps, reach=self.reach, norm=self.norm)


def _check(draws: int) -> None:
    if draws < 1:
        raise InputError(f"An expectation takes at least one draw, not {draws}; 10 is usual.")


def _seed(seed: int, number: int) -> int:
    return (seed * _STRIDE + number) % 2**63
