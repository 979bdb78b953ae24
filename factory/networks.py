"""What kinds of network can be a base, and what each has that the parts of a recipe may need."""

from __future__ import annotations

from torch import nn

from factory.recipes.part import Trait
from factory.vits import KeyedVit


def traits(network: nn.Module) -> frozenset[Trait]:
    """What ``network`` has of all that parts may need."""
    found = {Trait.IMAGES}
    if isinstance(network, KeyedVit):
        found |= {Trait.PATCH_EMBEDDING, Trait.ATTENTION}
    return frozenset(found)
