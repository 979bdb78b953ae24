"""A purifier that the server puts before the device model; it is recorded with the model, and trains nothing."""

from __future__ import annotations

from typing import Literal

from factory.purifier.settings import PurifierSettings
from factory.recipes.part import Part


class DeepImagePriorPart(Part):
    """Settings of the deep-image-prior purifier, for ``keyfoundry purify`` with the package; trains nothing."""

    kind: Literal["deep-image-prior"] = "deep-image-prior"
    settings: PurifierSettings = PurifierSettings()
