"""The volumization paper's loss: every patch is asked for the class of the whole image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from factory.recipes.part import ObjectivePart, Trait

if TYPE_CHECKING:
    from torch import nn

    from factory.objective import Objective


class PatchAggregatePart(ObjectivePart):
    """The patch aggregate loss: cross-entropy of every patch's logits, summed (Eq. 10)."""

    kind: Literal["patch-aggregate"] = "patch-aggregate"
    needs = frozenset({Trait.PATCH_LOGITS})

    def build(self, network: nn.Module, classes: int, label_smoothing: float, base: nn.Module) -> Objective:
        """The mean over the batch; it smooths no labels."""
        from factory.volumization.patch_loss import PatchAggregate

        return PatchAggregate()
