"""One device model: base, key and recipe in, a trained classifier and its adapter folder out.

The same function makes the devices, the attacker's surrogates and the un-keyed control, so that they differ in
nothing but their key. It is idempotent: a finished adapter is loaded, an unfinished one is gone on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.manifest import parse_utc, utc_text
from factory.adaptation import (
    adapt,
    adapter_digest,
    load_adapter,
    read_learned,
    save_adapter,
    trainable_parameters,
)
from factory.base import Base
from factory.block_shuffle import check_block_size
from factory.classifier import ImageClassifier
from factory.data import Splits
from factory.decoys import DecoyPool
from factory.keyed_transforms.key_ensemble import DeviceClassifier
from factory.networks import traits
from factory.progress import Progress
from factory.recipes.key_ensemble import KeyEnsemblePart
from factory.recipes.recipe import RecipeSettings, check_recipe
from factory.seeds import derive_seed
from factory.train import Epoch, train
from keys.derive import DeviceKey, fixed_guess
from keys.errors import InputError
from keys.files import write_atomic


@dataclass(frozen=True)
class DeviceModel:
    """A trained model with its adapter's digest, how it was trained, and when that was finished.

    Of an ensemble of keys the digest is over those of its members, their epochs follow one another, and parameters are
    counted together.
    """

    name: str
    classifier: DeviceClassifier
    adapter_digest: str
    trainable_parameters: int
    history: tuple[Epoch, ...]
    created: datetime


def block_size(base: Base, recipe: RecipeSettings) -> int:
    """The recipe's M, or the base's own; raises InputError if blocks do not tile the image."""
    if recipe.transform.own_block_size is not None:
        return recipe.transform.own_block_size  # which it checks itself
    size = recipe.block_size or base.default_block_size
    check_block_size(size, base.architecture.contract.height, base.architecture.contract.width)
    return size


def keyed_transform(base: Base, recipe: RecipeSettings, key: DeviceKey | None) -> nn.Module | None:
    """What the recipe does to images of this base under ``key``; None: nothing, as in an un-keyed control."""
    recipe.transform.check(base.network)
    return recipe.transform.build(key, base.architecture.contract.shape, block_size(base, recipe))


def check_parts(base: Base, recipe: RecipeSettings) -> None:
    """Make every part once, before anything is trained. Raises InputError for what does not suit ``base``.

    The base may have classes other than the data's. torch's global generator is left as it was.
    """
    check_recipe(recipe, traits(base.network), f"base {base.architecture.name}")
    keyed_transform(base, recipe, fixed_guess("check"))
    with torch.random.fork_rng(devices=[]):
        recipe.objective.build(base.network, 2, 0.0, base.network)
    if recipe.curriculum is not None:
        recipe.curriculum.build()
    if recipe.decoys is not None:
        recipe.decoys.check()
    if (part := recipe.attractors) is not None:  # of as many classes; the data's are not known yet
        part.build(None, base.architecture.contract.shape, block_size(base, recipe), part.count)
    if recipe.keys is not None:
        recipe.keys.build([nn.Identity()] * recipe.keys.count, None, base.architecture.contract.shape)


def public_model(base: Base, recipe: RecipeSettings) -> ImageClassifier:
    """The base as anyone can have it: images in [0, 1] to logits, with no key; volumes are stacked as without one."""
    architecture = base.architecture
    return ImageClassifier(base.network, architecture.mean, architecture.std, keyed_transform(base, recipe, None))


def make_device_model(
    base: Base,
    key: DeviceKey | None,
    recipe: RecipeSettings,
    splits: Splits,
    *,
    name: str,
    identity: Sequence[str | int],
    seed: int,
    folder: Path,
    shared: Path,
    progress: Progress,
) -> DeviceModel:
    """Fine-tune a copy of ``base`` on images shuffled by ``key`` (None: the un-keyed control).

    ``identity`` names the key without revealing it (fleet, device, generation). Everything lies in ``folder``:
    ``adapter/``, the training checkpoint and ``model.json``, which says what the adapter was made from; of an ensemble
    of keys each member has a folder of its own in it, ``key-1/``, ``key-2/`` and so on. In ``shared`` lies what a
    recipe makes once for all devices.
    """
    if recipe.keys is not None:
        return _ensemble(base, key, recipe, recipe.keys, splits, name, identity, seed, folder, shared, progress)
    transform = keyed_transform(base, recipe, key)
    attractors = recipe.attractors and recipe.attractors.build(
        key, base.architecture.contract.shape, block_size(base, recipe), len(splits.labels)
    )
    made_from = _fingerprint(base, recipe, splits, identity, seed)
    record, adapter = folder / "model.json", folder / "adapter"
    architecture = base.architecture
    finished: dict[str, Any] | None = _read(record, made_from)
    torch.manual_seed(derive_seed(seed, name, "initial adapter"))  # peft draws from the global generator
    network = adapt(base.network, recipe) if finished is None else load_adapter(base.network, recipe, adapter)
    classifier = ImageClassifier(network, architecture.mean, architecture.std, transform)
    if finished is None:
        decoys = recipe.decoys and recipe.decoys.open(base, recipe, splits, shared, progress)
        torch.manual_seed(derive_seed(seed, name, "objective"))  # decoys may have drawn from it
        history, learned = _fine_tune(classifier, base, recipe, splits, decoys, name, made_from, seed, folder, progress)
        save_adapter(network, adapter, learned)
        values: dict[str, Any] = {
            "made_from": made_from, "shared": _digest(_shared_by_all(base, recipe, splits)),
            "adapter_digest": adapter_digest(adapter), "seed": seed,
            "trainable_parameters": trainable_parameters(network), "history": [asdict(epoch) for epoch in history],
            "created": utc_text(datetime.now(UTC)),
        }  # fmt: skip
        write_atomic(record, json.dumps(values, indent=1).encode())
        finished = values
        for checkpoint in folder.glob("training-*.safetensors"):
            checkpoint.unlink()
    elif adapter_digest(adapter) != finished["adapter_digest"]:
        raise InputError(f"The adapter in {adapter} was changed after training; delete {folder} to make it anew.")
    recipe.objective.attach(network, read_learned(adapter))
    classifier.attractors = attractors  # beside what was trained, so that training does not learn to undo them
    return DeviceModel(
        name, classifier.eval(), finished["adapter_digest"], finished["trainable_parameters"],
        tuple(Epoch(**entry) for entry in finished["history"]), _created(finished, record),
    )  # fmt: skip


def _ensemble(
    base: Base, key: DeviceKey | None, recipe: RecipeSettings, part: KeyEnsemblePart, splits: Splits, name: str,
    identity: Sequence[str | int], seed: int, folder: Path, shared: Path, progress: Progress,
) -> DeviceModel:  # fmt: skip
    """One model for each of the device's keys, made like any other; each goes on by itself after an interruption."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    members = [
        make_device_model(
            base, member_key, recipe.model_copy(update={"keys": None}), splits, name=f"{name} key {number}",
            identity=[*identity, "key", number], seed=derive_seed(seed, "key", number), folder=folder / f"key-{number}",
            shared=shared, progress=progress,
        )
        for number, member_key in enumerate(part.member_keys(key), start=1)
    ]  # fmt: skip
    classifier = part.build([member.classifier for member in members], key, base.architecture.contract.shape)
    digests = "".join(f"{member.adapter_digest}\n" for member in members)
    return DeviceModel(
        name, classifier.eval(), hashlib.sha256(digests.encode()).hexdigest(),
        sum(member.trainable_parameters for member in members),
        tuple(epoch for member in members for epoch in member.history), max(member.created for member in members),
    )  # fmt: skip


def _fine_tune(
    classifier: ImageClassifier, base: Base, recipe: RecipeSettings, splits: Splits, decoys: DecoyPool | None,
    name: str, made_from: str, seed: int, folder: Path, progress: Progress,
) -> tuple[tuple[Epoch, ...], dict[str, Tensor]]:  # fmt: skip
    """The history, and what the objective learned."""
    checkpoint = folder / f"training-{made_from[:16]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    classes, smoothing = len(splits.labels), recipe.training.label_smoothing
    objective = recipe.loss(classifier.network, classes, smoothing, base.network)
    history = train(
        classifier, splits.train, splits.validation, recipe.training, seed=seed, name=name, checkpoint=checkpoint,
        progress=progress, objective=objective,
        curriculum=None if recipe.curriculum is None else recipe.curriculum.build(), decoys=decoys,
    )  # fmt: skip
    return tuple(history), objective.learned()


def _fingerprint(base: Base, recipe: RecipeSettings, splits: Splits, identity: Sequence[str | int], seed: int) -> str:
    return _digest([*_shared_by_all(base, recipe, splits), list(identity), seed])


def made_of_something_else(folder: Path, base: Base, recipe: RecipeSettings, splits: Splits) -> bool:
    """Whether a finished model in ``folder`` was made from another base, other data or by another recipe.

    A model that is not there, is not finished, or has a damaged record was not made of anything.
    """
    expected = _digest(_shared_by_all(base, recipe, splits))
    for record in (folder / "model.json", *folder.glob("key-*/model.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(record.read_text()).get("shared", expected) != expected:
                return True
    return False


def _shared_by_all(base: Base, recipe: RecipeSettings, splits: Splits) -> list[Any]:
    """What every device of a fleet is made from.

    A purifier is asked for later, attractors stand beside what was trained, and neither changes a weight; several keys
    are one for each member of an ensemble.
    """
    trained_by = recipe.model_copy(update={"purifier": None, "keys": None, "attractors": None})
    return [base.digest, trained_by.model_dump(mode="json"), splits.digest]


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _created(finished: dict[str, Any], record: Path) -> datetime:
    """When the training was finished: part of the record, so that a package exported again is the same."""
    if "created" in finished:
        return parse_utc(finished["created"])
    return datetime.fromtimestamp(record.stat().st_mtime, UTC)  # a record from before it was written there


def _read(record: Path, made_from: str) -> dict[str, Any] | None:
    """The record of a finished training from the same inputs, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # no record, or a damaged one: train
        values = json.loads(record.read_text())
        return values if values["made_from"] == made_from else None
    return None
