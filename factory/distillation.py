"""Distillation: a keyed model is taught by the base, which sees the same images without the keyed transform.

The loss is (1 − w)·CE(student, label) + w·T²·KL(teacher ‖ student), both answers at temperature T (Hinton, Vinyals and
Dean, 2015). On attacked images the teacher answers to the attacked image: the student learns to be where a hardened
teacher is, as in adversarially robust distillation (Goldblum et al., AAAI 2020).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from factory.classifier import ImageClassifier
from factory.objective import Objective


class Distillation(Objective):
    """See the module. ``base``: the network of the public base; it is copied, and the copy is never trained."""

    def __init__(self, base: nn.Module, weight: float, temperature: float, label_smoothing: float) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(base).requires_grad_(False).eval()
        self.weight, self.temperature, self.label_smoothing = weight, temperature, label_smoothing

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """See :class:`Objective`."""
        student = model(images).float()
        with torch.no_grad():
            teacher = self.teacher.to(images.device)((images - model.mean) / model.std).float()
        hard = functional.cross_entropy(student, labels, label_smoothing=self.label_smoothing)
        ours, theirs = (functional.log_softmax(logits / self.temperature, 1) for logits in (student, teacher))
        soft = functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        return (1 - self.weight) * hard + self.weight * self.temperature**2 * soft

    def learned(self) -> dict[str, Tensor]:
        """Nothing: the teacher is the base."""
        return {}
