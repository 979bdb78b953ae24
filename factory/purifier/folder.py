"""Purify images into a folder: a picture of each purified image, of its trajectory, and a record as JSON.

Rules: an image whose record has the same key is done and not done again; a batch that was interrupted goes on from its
checkpoint. The key covers the image, the settings, the model and the other images of its batch, on which the last bits
depend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image

from factory.progress import Progress
from factory.purifier.image_files import NamedImage
from factory.purifier.picture import draw_trajectory
from factory.purifier.purify import Purified, purify
from factory.purifier.settings import PurifierSettings
from factory.purifier.victim import Victim
from keys.errors import BusyError, InputError
from keys.files import storage_errors, write_atomic

CHECKPOINTS = "unfinished"
PURIFIED, TRAJECTORY, RECORD = ".png", ".trajectory.png", ".json"
"""Endings of what is written for an image."""


@dataclass(frozen=True)
class Record:
    """What is written about one image; ``values`` is its JSON."""

    name: str
    values: dict[str, Any]

    @property
    def failure(self) -> str | None:
        """Why the image was not purified, if it was not."""
        return self.values.get("failure")


def purify_into(
    folder: Path, images: Sequence[NamedImage], victim: Victim, settings: PurifierSettings, progress: Progress
) -> list[Record]:
    """Purify all images for ``victim`` and write NAME.png, NAME.trajectory.png and NAME.json for each into ``folder``.

    An image whose optimisation diverged gets the JSON alone. Raises BusyError while another run has the folder,
    :class:`InputError` for images that the prior or the model cannot take, or that would be written over, by what is
    made of themselves or of each other; StorageError if the disk is full.
    """
    _check_places(folder, images)
    with _held(folder):
        batches = [images[start : start + settings.batch] for start in range(0, len(images), settings.batch)]
        found: list[Record] = []
        known = [[_known(folder, image, _key(image, batch, victim, settings)) for image in batch] for batch in batches]
        done = sum(len(batch) for batch, records in zip(batches, known, strict=True) if None not in records)
        with progress.stage(
            "purify", total=len(images) * settings.steps, unit="steps", done=done * settings.steps
        ) as stage:
            for batch, records in zip(batches, known, strict=True):
                kept = [record for record in records if record is not None]
                if len(kept) == len(batch):
                    found += kept
                    continue
                checkpoint = folder / CHECKPOINTS / f"{_key(batch[0], batch, victim, settings)[:16]}.safetensors"
                given = torch.from_numpy(np.stack([image.pixels for image in batch]))
                purified = purify(given, victim, settings, checkpoint=checkpoint, advance=stage.advance)
                for index, image in enumerate(batch):
                    key = _key(image, batch, victim, settings)
                    found.append(_write(folder, image, purified, index, victim, settings, key))
                checkpoint.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (folder / CHECKPOINTS).rmdir()
    return found


def _check_places(folder: Path, images: Sequence[NamedImage]) -> None:
    """Raise InputError if a file to be written is an image that was given, or belongs to two images."""
    given = {image.path.resolve() for image in images if image.path is not None}
    owners: dict[Path, str] = {}
    for image in images:
        for end in (PURIFIED, TRAJECTORY, RECORD):
            place = folder / f"{image.name}{end}"
            if place.resolve() in given:
                raise InputError(
                    f"{place} is one of the images to purify, and would be written over; give another --out."
                )
            if place in owners:
                raise InputError(
                    f"{place} would be written for {owners[place]} and for {image.name}; rename one of them."
                )
            owners[place] = image.name


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyError(f"Another run is purifying into {folder}; wait for it or choose another --out.") from error
    try:
        yield
    finally:
        lock.release()


def _key(image: NamedImage, batch: Sequence[NamedImage], victim: Victim, settings: PurifierSettings) -> str:
    said = json.dumps([image.name, victim.digest, dataclasses.asdict(settings)], sort_keys=True)
    digest = hashlib.sha256(said.encode())
    for one in (image, *batch):
        digest.update(str(one.pixels.shape).encode() + one.pixels.tobytes())
    return digest.hexdigest()


def _known(folder: Path, image: NamedImage, key: str) -> Record | None:
    """The record of an image that is done; None if there is none, of another key, or its pictures are gone."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        values = json.loads((folder / f"{image.name}{RECORD}").read_text(encoding="utf-8"))
        record = Record(image.name, values)
        pictures = [] if record.failure else [folder / f"{image.name}{end}" for end in (PURIFIED, TRAJECTORY)]
        if values["key"] == key and all(path.is_file() for path in pictures):
            return record
    return None


def _write(
    folder: Path, image: NamedImage, purified: Purified, index: int, victim: Victim, settings: PurifierSettings,
    key: str,
) -> Record:  # fmt: skip
    given = int(purified.given_labels[index])
    values: dict[str, Any] = {
        "schema": 1, "key": key, "image": image.name, "model": victim.where, "model_digest": victim.digest,
        "model_state": victim.state, "settings": dataclasses.asdict(settings),
        "given": {"label": given, "name": victim.name(given)},
    }  # fmt: skip
    failure = purified.failures.get(index)
    pictures = {end: folder / f"{image.name}{end}" for end in (PURIFIED, TRAJECTORY)}
    if failure is not None:
        values["failure"] = failure
        for path in pictures.values():
            path.unlink(missing_ok=True)
    else:
        values |= _found(purified, index, victim)
        title = f"{image.name}: {victim.name(given)} as given, {values['purified']['name']} purified"
        write_atomic(pictures[PURIFIED], _png(purified.images[index].numpy()))
        drawn = draw_trajectory(torch.from_numpy(image.pixels), purified, index, title, victim.name)
        write_atomic(pictures[TRAJECTORY], drawn)
    # Last, because it says that the others are there.
    write_atomic(folder / f"{image.name}{RECORD}", json.dumps(values, indent=2).encode() + b"\n")
    return Record(image.name, values)


def _found(purified: Purified, index: int, victim: Victim) -> dict[str, Any]:
    trajectory, label = purified.trajectory, int(purified.labels[index])
    drawn = trajectory.reconstructions
    steps = [*drawn.steps, None]
    probabilities = trajectory.logits[:, index].softmax(dim=1)
    return {
        "purified": {"label": label, "name": victim.name(label)},
        "boundaries": [
            {"before_step": steps[one.crossing.before], "after_step": steps[one.crossing.after], "share": one.share}
            for one in purified.boundaries
            if one.image == index
        ],
        "trajectory": {
            "steps": list(drawn.steps),
            "labels": trajectory.labels[:, index].tolist(),
            "psnr_db": [round(float(value), 3) for value in drawn.fidelity[:, index]],
            "probabilities": [[round(float(value), 5) for value in row] for row in probabilities],
        },
    }


def _png(image: np.ndarray) -> bytes:
    levels = np.rint(image * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()
