"""MI-FGSM: iterative FGSM with momentum, made to transfer (Dong et al., CVPR 2018); other attacks extend it.

As published. Its steps only just reach the edge of the ball, so that it is weaker than PGD on its own source
(up to 15 points at ε = 8/255) while its images often transfer better: run it beside PGD, not instead.
An attack that differs in the gradient alone is a subclass with a short name, a title, and its own ``_gradient``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from device_tests.attacks.ascent import Gradient, ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, check_ball, named
from device_tests.attacks.gradients import gradients_in, loss_gradient
from device_tests.perturbation import Norm


@dataclass(frozen=True)
class MomentumFGSM:
    """MI-FGSM: ``steps`` steps of ``reach``·ε/``steps`` along the accumulated gradient (in L∞ along its sign).

    It starts at the clean image. ``momentum`` is the paper's decay factor μ; 1.0 adds up all gradients, its best
    setting. ``reach`` = 1 is the paper's step, with which the ball's edge is reached at the last step only.
    """

    steps: int = 10
    momentum: float = 1.0
    reach: float = 1.0
    norm: Norm = Norm.LINF
    bf16: bool = False

    _SHORT: ClassVar[str] = "mi-fgsm"
    _TITLE: ClassVar[str] = "MI-FGSM"

    def __post_init__(self) -> None:
        check_ball(self.norm)

    @property
    def name(self) -> str:
        """The short name, e.g. ``"mi-fgsm"``, with ``-l2`` in L2."""
        return named(self._SHORT, self.norm)

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        words = f"{self.steps} steps of {self.reach:g}·ε/{self.steps}, momentum {self.momentum:g}"
        details = "".join(f", {detail}" for detail in self._details())
        return f"{self._TITLE}, {WORDS[self.norm]}, {words}{details}" + gradients_in(self.bf16)

    @property
    def gradients_per_image(self) -> int:
        """One or more gradients per step."""
        return self.steps * self._gradients_per_step()

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
        """Candidates by Dong et al., eq. 6 and 7; see :class:`~device_tests.attacks.attack.Attack`.

        What is drawn at random, if anything, is drawn from ``seed``.
        """
        return ascend(
            model,
            images,
            labels,
            self._gradient(model, epsilon, torch.Generator().manual_seed(seed)),
            norm=self.norm,
            epsilon=epsilon,
            lengths=[self.reach / self.steps] * self.steps,
            momentum=self.momentum,
            gradients_per_step=self._gradients_per_step(),
            progress=progress,
        )

    def _details(self) -> tuple[str, ...]:
        """What the description says beside steps and momentum."""
        return ()

    def _gradients_per_step(self) -> int:
        return 1

    def _gradient(self, model: nn.Module, epsilon: float, generator: torch.Generator) -> Gradient:
        """The direction that is accumulated, one function for one run; ``generator``: of all its randomness."""
        return partial(loss_gradient, model, bf16=self.bf16)
