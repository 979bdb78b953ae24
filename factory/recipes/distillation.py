"""The public base as a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from factory.recipes.part import ObjectivePart, Trait

if TYPE_CHECKING:
    from torch import nn

    from factory.objective import Objective


class DistillationPart(ObjectivePart):
    """Cross-entropy, and nearness to the base's answers to the same images as they are without a key.

    A base that was hardened teaches its robustness too, where the images are attacked ones (adversarially robust
    distillation, Goldblum et al., AAAI 2020). The base answers every batch once more, without a backward pass.
    """

    kind: Literal["distillation"] = "distillation"
    needs = frozenset({Trait.IMAGES})
    learns_from_base = True
    weight: float = Field(default=0.5, gt=0, le=1, description="of the base's answers beside the labels")
    temperature: float = Field(default=1.0, gt=0, description="of both answers")

    def build(self, network: nn.Module, classes: int, label_smoothing: float, base: nn.Module) -> Objective:
        """The loss, with ``base`` as the teacher of images without a key's transform."""
        from factory.distillation import Distillation

        return Distillation(base, self.weight, self.temperature, label_smoothing)
