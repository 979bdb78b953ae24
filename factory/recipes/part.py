"""What a part of a recipe is: settings, what it needs of a network, and how its machinery is made.

A part's file holds its settings and imports its machinery only when it is made, so that reading a fleet file, or
``--help``, needs no torch. To add a part, write its file and name it in :mod:`factory.recipes.recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from factory.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from factory.curriculum import Curriculum
    from factory.objective import Objective
    from keys.derive import DeviceKey


class Trait(StrEnum):
    """What a network has that a part may need; :func:`factory.networks.traits` tells them of a network."""

    PATCH_EMBEDDING = "a patch embedding by one convolution of the image"
    ATTENTION = "linear layers for queries, keys and values in every block"
    IMAGES = "images as its input"
    VOLUMES = "volumes of patches as its input"
    PATCH_LOGITS = "logits of its own for every patch"


class Part(Section):
    """One part of a recipe. ``needs``: what the network must have; a field ``kind`` names the part in fleet files."""

    needs: ClassVar[frozenset[Trait]] = frozenset()

    @property
    def name(self) -> str:
        """What fleet files call it."""
        field = type(self).model_fields.get("kind")
        return "" if field is None else str(field.default)


class TransformPart(Part):
    """What is done to the image in [0, 1] before the network sees it; the part that a key may decide.

    ``title`` names it in reports.
    """

    title: ClassVar[str]

    def build(self, key: DeviceKey | None, shape: tuple[int, int, int], block_size: int) -> nn.Module | None:
        """The transform of images N×C×H×W for ``shape`` (C, H, W) and blocks of ``block_size`` pixels.

        None where nothing is to be done: a keyed transform without a key, as in the un-keyed control. Raises
        InputError if the shape does not suit.
        """
        raise NotImplementedError

    def describe(self, block_size: int) -> str:
        """The transform in a report's words, for blocks of ``block_size`` pixels."""
        return f"{self.title} M = {block_size}"

    @property
    def own_block_size(self) -> int | None:
        """The side of what the image is cut into, where the part itself says so and not the recipe's block size."""
        return None

    def permuted(self, shape: tuple[int, int, int], block_size: int) -> int:
        """How many things a key puts into order: of few there are so few orders that keys collide; 0: no key."""
        return shape[0] * block_size**2

    def check(self, network: nn.Module) -> None:
        """Raise InputError if ``network``, which has all that the part needs, was made for other inputs."""


class ObjectivePart(Part):
    """What training minimises. ``learns_from_base``: not from labels alone, so that no base can be trained by it."""

    learns_from_base: ClassVar[bool] = False

    @property
    def changes_network(self) -> bool:
        """Whether :meth:`attach` makes another network, so that the base's graph with other weights is not its own."""
        return False

    def attach(self, network: nn.Module, learned: Mapping[str, Tensor]) -> None:
        """Have a trained ``network`` answer, in place, by what the objective learned, where it is meant to.

        ``learned``: what :meth:`factory.objective.Objective.learned` gave. Raises InputError if it does not fit.
        """

    def build(self, network: nn.Module, classes: int, label_smoothing: float, base: nn.Module) -> Objective:
        """The loss, with parameters of its own (in training only) if it needs some.

        ``network``: what is trained, a copy of ``base``, the public base's network, in whatever way it was adapted.
        """
        raise NotImplementedError


class AugmentationPart(Part):
    """Training on further images that are made from each batch."""

    def build(self, objective: Objective) -> Objective:
        """``objective`` on the batch and on what is made from it."""
        raise NotImplementedError


class CurriculumPart(Part):
    """The order in which training images are seen."""

    def build(self) -> Curriculum:
        """What orders each batch."""
        raise NotImplementedError
