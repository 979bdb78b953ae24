"""LoRA-only packages: the base package that a fleet's devices share, and the adapter package of one device.

The base package holds the public base, in ONNX with places for an adapter and in Core ML as it is. An adapter package
holds what makes a device of it, made from the device's full package and checked against it: onnxruntime's logits with
the adapter on the base, and the bytes of the Core ML packages that a device assembles. Both come out unsigned; who
releases the full package signs the adapter (:func:`exporters.package.sign_package`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from exporters.adapter.adapter_file import ADAPTER_NAME, A, B, device_tensors, write_adapter
from exporters.adapter.coreml_delta import DELTA_NAME, CoreMLDelta, deltas_to_bytes, find_delta
from exporters.adapter.run_adapter import AdapterRuntime
from exporters.adapter.to_base_onnx import LowRankLinear, export_base_onnx
from exporters.formats import DEFAULT_FORMATS, FORMATS
from exporters.golden import GOLDEN_NAME, Golden, read_golden
from exporters.manifest import MANIFEST_NAME, FormatEntry, Manifest, utc_text
from exporters.mil.program import WEIGHTS_PATH
from exporters.onnx_file import stored_tensors
from exporters.package import inspect_package, whole_package, write_package
from exporters.parity import ParityLimits, compare
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.to_coreml import Target, export_coreml
from factory.adaptation import adapt
from factory.base import Base
from factory.classifier import ImageClassifier
from factory.device_model import keyed_transform
from factory.folding import bake
from factory.keyed_transforms.key_ensemble import DeviceClassifier
from factory.keyed_transforms.neutral import neutral
from factory.low_rank_layers import low_rank_layers
from factory.packaging import tool_versions
from factory.progress import Progress
from factory.recipes.recipe import RecipeSettings
from keys.derive import fixed_guess
from keys.errors import CheckFailed, InputError
from keys.files import folder_being_written, sha256_file, write_atomic

BASE_ID = "base"
# The same float32 values, of which the updates are added to the activations instead of to the weights.
LIMITS = ParityLimits("fp32", 1e-5, 1.0)
_GOLDEN_IMAGES = 8
_TRANSFORM = "transform."
_ONNX = FORMATS["onnx-fp32"]
_COREML = (FORMATS["coreml-fp16"], FORMATS["coreml-fp32"])


@dataclass(frozen=True)
class PackageSizes:
    """Bytes of the files of a device's full package, of its adapter package, and of the Core ML delta inside that."""

    full: int
    adapter: int
    coreml_delta: int

    @property
    def share(self) -> float:
        """The adapter package as a share of the full one."""
        return self.adapter / self.full


@dataclass(frozen=True, eq=False)
class _Plain:
    """The base as a device's full package holds its model, and which of its tensors an adapter sets.

    ``low_rank``: linear layers of ``module`` that get an update; ``whole``: names of tensors that are replaced.
    """

    module: nn.Module
    low_rank: tuple[str, ...]
    whole: tuple[str, ...]


def export_base_package(
    base: Base, recipe: RecipeSettings, fleet_id: str, golden_images: np.ndarray, package: Path, progress: Progress,
    *, created: datetime, formats: Sequence[str] = DEFAULT_FORMATS, target: Target = "iOS16",
) -> Manifest:  # fmt: skip
    """Write the unsigned base package of a fleet, unless it is there, whole and of the same base and recipe.

    ``golden_images``: uint8 N×C×H×W. ``created``: what the manifest says, so that the same inputs give the same bytes.
    ``formats``: which Core ML formats it holds besides ONNX, for ``target``; only float ones can be assembled by a
    device, so others are left out. Raises :class:`InputError` if the recipe trains no LoRA.
    """
    chosen = [_ONNX, *(format for format in _COREML if format.name in formats)]
    settings = {"coreml": {"target": target}}
    entries = {
        format.name: FormatEntry(format.path, format.runtime, format.precision, settings.get(format.runtime, {}))
        for format in chosen
    }
    existing = _existing(package, base, recipe, fleet_id, entries)
    if existing is not None:
        return existing
    plain = _plain(base, recipe)
    contract, labels = base.architecture.contract, base.architecture.labels
    with (
        folder_being_written(package) as folder,
        progress.stage("export the base package", total=len(chosen), unit="files") as stage,
    ):
        module, places = _with_places(plain, recipe.rank)
        export_base_onnx(module, folder / _ONNX.path, contract, labels, places)
        stage.advance()
        for format in chosen[1:]:
            export_coreml(
                plain.module, folder / format.path, contract, labels,
                precision="fp16" if format.precision == "fp16" else "fp32", target=target,
            )  # fmt: skip
            stage.advance(note=format.title)
        images = golden_images[:_GOLDEN_IMAGES]
        logits = TorchRuntime(plain.module).logits(images.astype(np.float32) / 255)
        write_atomic(folder / GOLDEN_NAME, Golden(images, logits).to_bytes())
        return write_package(
            folder,
            Manifest(
                device_id=BASE_ID, generation=1, fleet_id=fleet_id, base_digest=base.digest,
                adapter_digest=hashlib.sha256(b"").hexdigest(), recipe=recipe.model_dump(mode="json"), labels=labels,
                input=contract, files={}, evidence={}, created=utc_text(created), tools=tool_versions(),
                formats=entries, kind="base",
            ),
        )  # fmt: skip


def export_adapter_package(
    model: DeviceClassifier, base: Base, recipe: RecipeSettings, base_package: Path, full_package: Path, package: Path,
    progress: Progress,
) -> Manifest:  # fmt: skip
    """Write the unsigned adapter package of a device, whose trained ``model`` the ``full_package`` was made of.

    The same inputs give the same bytes. Raises :class:`InputError` if the recipe trains no LoRA, the packages are not
    of this base and recipe, or the model cannot be told apart from its base by an adapter; and :class:`CheckFailed`
    if base and adapter together do not answer as the full package.
    """
    full, _ = inspect_package(full_package)
    shared, _ = inspect_package(base_package)
    plain = _plain(base, recipe)
    _check_pair(full, shared, base, recipe)
    with (
        folder_being_written(package) as folder,
        progress.stage(f"adapter package {full.device_id}", total=3, unit="steps") as stage,
    ):
        tensors = _tensors(model, plain)
        write_adapter(folder / ADAPTER_NAME, tensors)
        write_atomic(folder / GOLDEN_NAME, (full_package / GOLDEN_NAME).read_bytes())
        stage.advance(note="Core ML")
        deltas = _write_deltas(tensors, full, full_package, base_package, folder)
        stage.advance(note="comparison")
        evidence = _compared(full, full_package, base_package, folder)
        stage.advance()
        entries = {"onnx-adapter": FormatEntry(ADAPTER_NAME, _ONNX.runtime, _ONNX.precision, {"rank": recipe.rank})}
        if deltas:
            paths = [delta.path for delta in deltas]
            entries["coreml-delta"] = FormatEntry(DELTA_NAME, "coreml", "as the base", {"packages": paths})
        return write_package(
            folder,
            dataclasses.replace(
                full, files={}, evidence=evidence, formats=entries, kind="adapter",
                requires=sha256_file(base_package / MANIFEST_NAME),
            ),
        )  # fmt: skip


def sizes_of(full: Manifest, adapter: Manifest) -> PackageSizes:
    """What the adapter package saves, from the two manifests."""
    coreml = [entry.size for name, entry in adapter.files.items() if name not in (ADAPTER_NAME, GOLDEN_NAME)]
    whole, small = (sum(entry.size for entry in manifest.files.values()) for manifest in (full, adapter))
    return PackageSizes(whole, small, sum(coreml))


def _plain(base: Base, recipe: RecipeSettings) -> _Plain:
    if recipe.adaptation != "lora":
        raise InputError(
            f"LoRA-only packages need a recipe with adaptation lora, not {recipe.adaptation}; send full packages."
        )
    if recipe.objective.changes_network:
        raise InputError(
            f"LoRA-only packages need the base's own graph, which the objective {recipe.objective.name} changes at its "
            "end; set its inference to softmax, or send full packages."
        )
    if recipe.keys is not None:
        raise InputError("LoRA-only packages hold the model of one key, not an ensemble; send full packages.")
    if recipe.attractors is not None:
        raise InputError("LoRA-only packages need the base's own graph, which has no attractors; send full packages.")
    # Any key's transform has the tensors that a device's will replace.
    keyed = keyed_transform(base, recipe, fixed_guess(BASE_ID))
    unkeyed = None if keyed is None else neutral(keyed)
    module = bake(ImageClassifier(base.network, base.architecture.mean, base.architecture.std, unkeyed))
    # A transform that could not be folded stays in the graph, around the ViT.
    prefix = "network." if isinstance(module, ImageClassifier) else ""
    with torch.random.fork_rng(devices=[]):  # peft draws the updates, which are not looked at here
        adapted = adapt(base.network, recipe)
    assert isinstance(adapted, PeftModel)
    layers = {name: found.layer for name, found in low_rank_layers(adapted).items()}
    low_rank = tuple(name for name, layer in layers.items() if isinstance(layer, nn.Linear))
    saved = [n for n, part in adapted.named_modules() if isinstance(part, ModulesToSaveWrapper)]
    replaced = {
        "patch_embed.proj",  # shuffle and normalisation are folded into it
        *(name for name in layers if name not in low_rank),
        *(name.removeprefix("base_model.model.") for name in saved),
    }
    parents = tuple(f"{prefix}{name}." for name in sorted(replaced))
    whole = [name for name in module.state_dict() if name.startswith(parents)]
    whole += [name for name in module.state_dict() if prefix and name.startswith(_TRANSFORM)]
    return _Plain(module, tuple(f"{prefix}{name}" for name in low_rank), tuple(whole))


def _with_places(plain: _Plain, rank: int) -> tuple[nn.Module, list[str]]:
    """A copy of the plain module with updates of zero, and the names of all that an adapter sets."""
    module = copy.deepcopy(plain.module)
    for name in plain.low_rank:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module.set_submodule(name, LowRankLinear(linear, rank))
    return module.eval(), [*plain.whole, *(name + part for name in plain.low_rank for part in (A, B))]


def _tensors(model: DeviceClassifier, plain: _Plain) -> dict[str, np.ndarray]:
    """What the adapter file holds."""
    if not isinstance(model, ImageClassifier) or not isinstance(model.network, PeftModel):
        raise InputError("LoRA-only packages need a model that LoRA adapted; send the full package.")
    baked = bake(model)
    state = baked.state_dict()
    prefix = "network." if isinstance(baked, ImageClassifier) else ""
    layers = {f"{prefix}{name}": layer for name, layer in low_rank_layers(model.network).items()}
    missing = [*(set(plain.whole) - state.keys()), *(set(plain.low_rank) - layers.keys())]
    if missing:
        raise InputError(f"The device's model has no {sorted(missing)[0]}, so it was not made by this recipe.")
    tensors = {name: state[name].cpu().numpy() for name in plain.whole}
    for name in plain.low_rank:
        tensors[name + A], tensors[name + B] = layers[name].a, layers[name].b
    return tensors


def _check_pair(full: Manifest, shared: Manifest, base: Base, recipe: RecipeSettings) -> None:
    """Raise InputError unless the base package is the one that this device's adapter can be put on."""
    if shared.kind != "base" or full.kind != "model":
        raise InputError(
            "An adapter package is made from a base package and a device's full one, not from packages of kind "
            f"{shared.kind} and {full.kind}."
        )
    for name, values in {
        "fleet": {full.fleet_id, shared.fleet_id},
        "base": {full.base_digest, shared.base_digest, base.digest},
        "rank": {recipe.rank, shared.recipe.get("rank")},
        "block size": {recipe.block_size, shared.recipe.get("block_size")},
        "transform": {_canonical(recipe.model_dump(mode="json")), _canonical(shared.recipe)},
        "set of classes": {full.labels, shared.labels},
    }.items():
        if len(values) > 1:
            raise InputError(f"The base package has another {name} than the device; export the base package again.")


def _canonical(recipe: Mapping[str, object]) -> str:
    """The transform that a recipe names, as text that does not depend on the order of its settings."""
    return json.dumps(recipe.get("transform"), sort_keys=True)


def _write_deltas(
    tensors: Mapping[str, np.ndarray], full: Manifest, full_package: Path, base_package: Path, folder: Path
) -> list[CoreMLDelta]:
    """Write the Core ML delta and what it needs for every float format that both packages hold."""
    held = [
        format.path
        for format in _COREML
        if all((package / format.path / WEIGHTS_PATH).is_file() for package in (full_package, base_package))
    ]
    if not held:
        return []
    data = (base_package / _ONNX.path).read_bytes()
    values = device_tensors({tensor.name: tensor.read(data) for tensor in stored_tensors(data)}, tensors)
    deltas = []
    for path in held:
        weights = f"{path}/{WEIGHTS_PATH}"
        names = [name for name in full.files if name.startswith(f"{path}/") and name != weights]
        for name in names:
            of_device = (full_package / name).read_bytes()
            if not (base_package / name).is_file():
                raise InputError(f"LoRA-only is not possible for this model: its base has no file {name}.")
            if of_device != (base_package / name).read_bytes():
                write_atomic(folder / name, of_device)
        pair = [(package / weights).read_bytes() for package in (base_package, full_package)]
        deltas.append(find_delta(path, pair[0], pair[1], values))
    write_atomic(folder / DELTA_NAME, deltas_to_bytes(deltas))
    return deltas


def _compared(full: Manifest, full_package: Path, base_package: Path, folder: Path) -> dict[str, object]:
    """The adapter's evidence: which files it stands for, and how closely it answers as they do."""
    golden = read_golden((full_package / GOLDEN_NAME).read_bytes(), full.input, len(full.labels))
    images = golden.images.astype(np.float32) / 255
    runtime = AdapterRuntime(base_package / _ONNX.path, folder / ADAPTER_NAME)
    reference = OnnxRuntime(full_package / _ONNX.path).logits(images)
    parity = compare(
        reference, runtime.logits(images), LIMITS.difference, LIMITS.top1, runtime=runtime.name,
        precision=LIMITS.precision,
    )  # fmt: skip
    if not parity.passed:
        raise CheckFailed(
            f"Base and adapter of {full.device_id} differ from its full package by "
            f"{parity.max_relative_difference:.2g} of the largest logit (limit {parity.limit:g}); send the full one."
        )
    return {
        "stands_for": {name: entry.sha256 for name, entry in full.files.items()},
        "parity_with_full_package": parity.to_json(),
    }


def _existing(
    package: Path, base: Base, recipe: RecipeSettings, fleet_id: str, formats: Mapping[str, FormatEntry]
) -> Manifest | None:
    manifest = whole_package(package)
    if manifest is None:
        return None
    found = (manifest.kind, manifest.base_digest, dict(manifest.recipe), manifest.fleet_id, dict(manifest.formats))
    wanted = ("base", base.digest, recipe.model_dump(mode="json"), fleet_id, dict(formats))
    return manifest if found == wanted else None
