"""Several keys in one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from factory.recipes.part import Part

if TYPE_CHECKING:
    from torch import nn

    from factory.keyed_transforms.key_ensemble import KeyEnsemble
    from keys.derive import DeviceKey


class KeyEnsemblePart(Part):
    """``count`` models with keys derived from the device's, whose logits are averaged, or one of which answers.

    Training, package and latency cost ``count`` times as much. The choice of one member for an image is a keyed hash of
    the image (see :mod:`factory.keyed_transforms.key_ensemble`).
    """

    kind: Literal["key-ensemble"] = "key-ensemble"
    count: int = Field(default=2, ge=2, le=16, description="keys in one device")
    combine: Literal["average", "random"] = Field(default="average", description="of the members' logits")

    def member_keys(self, key: DeviceKey | None) -> list[DeviceKey | None]:
        """One key for each member, bound to its number; None for all in an un-keyed control."""
        from keys.derive import DeviceKey

        if key is None:
            return [None] * self.count
        purposes = [f"key ensemble: member {number}" for number in range(1, self.count + 1)]
        return [DeviceKey(key.device_id, key.generation, key.subkey(purpose)) for purpose in purposes]

    def build(self, members: Sequence[nn.Module], key: DeviceKey | None, shape: tuple[int, int, int]) -> KeyEnsemble:
        """The ``members`` as one module for images of ``shape`` (C, H, W); without a key the choice is public."""
        import numpy as np

        from factory.keyed_transforms.key_ensemble import KeyEnsemble
        from factory.keyed_transforms.places import CHOICE_OF_MEMBER, keyed_order

        if self.combine == "average":
            return KeyEnsemble(members)
        values = shape[0] * shape[1] * shape[2]
        return KeyEnsemble(members, np.arange(values) if key is None else keyed_order(key, values, CHOICE_OF_MEMBER))
