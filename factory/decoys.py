"""Decoys: attacks made once on models that an attacker could make, and mixed into every device's training.

The public base and models under public decoy keys are attacked on training images; every device of the fleet then
sees these images with their true labels, as in training against public models (PubDef). The pool is shared: what it
costs is divided by the number of devices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from keys.errors import InputError
from keys.files import write_atomic


@dataclass(frozen=True, eq=False)
class DecoyPool:
    """Attacked training images uint8 S×C×H×W with their true labels int64 S, of which a batch gets ``share``."""

    images: Tensor
    labels: Tensor
    share: float

    def mix(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The batch (uint8 N×C×H×W, labels N) with ``share`` of it, at its end, replaced by decoys.

        The batch is in a random order already; decoys are drawn from ``generator``.
        """
        count = round(self.share * len(images))
        drawn = torch.randint(0, len(self.images), (count,), generator=generator)
        kept = len(images) - count
        return torch.cat([images[:kept], self.images[drawn]]), torch.cat([labels[:kept], self.labels[drawn]])


@dataclass(frozen=True)
class PoolOrigin:
    """What a pool was made from: digests of the base and of the data, and the settings that made it."""

    base: str
    data: str
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def text(self) -> str:
        """The same as canonical JSON."""
        return json.dumps([self.base, self.data, self.settings], sort_keys=True)


def save_pool(path: Path, origin: PoolOrigin, images: Iterable[Tensor], labels: Iterable[Tensor]) -> None:
    """Write the images and labels of all sources, and what they were made from."""
    tensors = {"images": torch.cat(list(images)), "labels": torch.cat(list(labels))}
    write_atomic(path, save(tensors, {"origin": origin.text}))


def load_pool(path: Path, origin: PoolOrigin, share: float, *, shape: tuple[int, ...], classes: int) -> DecoyPool:
    """Read a pool of images of ``shape`` (C, H, W) with labels below ``classes``.

    Raises InputError if it is missing, damaged, or was made from anything else than ``origin``.
    """
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {})["origin"]
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
            made_of = json.loads(text)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"The decoys {path} are missing or damaged; delete the file to make them anew.") from error
    for place, what in enumerate(("base", "data set")):
        if not isinstance(made_of, list) or len(made_of) != 3 or made_of[place] != json.loads(origin.text)[place]:
            raise InputError(f"The decoys {path} were made from another {what}; delete the file to make them anew.")
    if text != origin.text:
        raise InputError(f"The decoys {path} were made by another recipe; delete the file to make them anew.")
    if images.dtype != torch.uint8 or images.shape[1:] != shape or not len(images):
        raise InputError(
            f"The decoys {path} hold no 8-bit images of the model's size; delete the file to make them anew."
        )
    named = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
    if not (named and int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise InputError(f"The decoys {path} hold labels of no class; delete the file to make them anew.")
    return DecoyPool(images, labels, share)
