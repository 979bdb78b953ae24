"""The plain objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from factory.recipes.part import ObjectivePart

if TYPE_CHECKING:
    from torch import nn

    from factory.objective import Objective


class CrossEntropyPart(ObjectivePart):
    """Cross-entropy of the logits."""

    kind: Literal["cross-entropy"] = "cross-entropy"

    def build(self, network: nn.Module, classes: int, label_smoothing: float, base: nn.Module) -> Objective:
        """The mean over the batch."""
        from factory.objective import CrossEntropy

        return CrossEntropy(label_smoothing)
