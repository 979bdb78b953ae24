"""What the volumization study does to one network: every attack of the protocol, made on it and judged on it.

An arm reaches this module as a :class:`TrainedArm`; nothing here knows how it was trained. Attacks are kept in the
studies' folder under what they depend on, so that an interrupted study goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from device_tests.accuracy import predict
from device_tests.attacks.attack import Attack
from device_tests.attacks.autoattack import AutoAttack
from device_tests.attacks.bpda import StandInGradient
from device_tests.attacks.order_search import Order, OrderSearch, displaced
from device_tests.attacks.patch import PatchExamples, UniversalPatch
from device_tests.attacks.pgd import PGD
from device_tests.attacks.pixels import SparseSearch
from device_tests.attacks.region_patch import RegionPatch
from device_tests.attacks.regions import Region
from device_tests.crafting import content_key, craft
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from device_tests.region_judgement import RegionJudgement, judge_regions
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from exporters.run_torch import TorchRuntime
from factory.progress import Progress
from factory.studies.spec import VolumizationSpec, VolumizedArmSettings
from keys.files import write_atomic

PATCH, GREY = "patch", "grey-patch"


@dataclass(frozen=True, eq=False)
class TrainedArm:
    """One trained network of an arm.

    ``model``: float32 N×C×H×W in [0, 1] → logits N×K, in evaluation mode, what is judged. ``stand_in``: the same
    function with the gradient of a differentiable stand-in, for BPDA; ``None`` where there is nothing to stand in for.
    ``order``: the order of its patches, where it has one. ``order_flip``: a white-box attack in L∞ made for that order,
    where there is one. A model's function may depend on nothing but its printed
    structure, its parameters and its buffers: attacks on it are kept under these.
    """

    model: nn.Module
    stand_in: nn.Module | None = None
    order: Order | None = None
    order_flip: Attack | None = None


TrainArm = Callable[[VolumizedArmSettings, int], TrainedArm]
"""Train (or read back) network number 1, 2, … of an arm whose ``defence`` is ``"none"`` or ``"volumized"``."""


@dataclass(frozen=True, eq=False)
class Judged:
    """The images that are attacked (uint8 N×C×H×W, labels int64 N), what patches are fitted on, and a folder."""

    images: np.ndarray
    labels: np.ndarray
    examples: PatchExamples
    folder: Path


@dataclass(frozen=True, eq=False)
class NetworkFindings:
    """What became of one network.

    ``clean``: right on the clean image, bool N. ``pixels``: (places, N) → judgement. ``patches``: (``"patch"`` or
    ``"grey-patch"``, share of the area) → judgement. ``whole``: attack of the whole image → right under it, bool N.
    ``moved``: share of the patches that the order search moved, mean over the images.
    """

    clean: np.ndarray
    pixels: Mapping[tuple[str, int], RegionJudgement | NotMeasured]
    patches: Mapping[tuple[str, float], RegionJudgement | NotMeasured]
    whole: Mapping[str, np.ndarray | NotMeasured]
    moved: float | NotMeasured


def judge_network(
    name: str, trained: TrainedArm, spec: VolumizationSpec, on: Judged, progress: Progress
) -> NetworkFindings:
    """Run every attack of ``spec`` on one network and judge it; ``name`` is unique in the study."""
    trained.model.eval()
    with progress.stage(f"attack {name}", total=_cells(spec), unit="attacks") as stage:
        pixels: dict[tuple[str, int], RegionJudgement | NotMeasured] = {}
        for places in spec.places:
            for count in spec.pixels:
                attacks = {region.value: _pixel_attack(spec, region, places) for region in Region}
                size = Perturbation(Norm.L0, float(count))
                pixels[places, count] = _five(name, trained.model, attacks, size, spec, on)
                stage.advance()
        patches: dict[tuple[str, float], RegionJudgement | NotMeasured] = {}
        for share in spec.patches:
            size = Perturbation(Norm.PATCH, share)
            side = size.side(*on.images.shape[-2:])
            fitted = _fitted(name, trained, side, spec, on)
            channels = on.images.shape[1]
            adversarial = {region.value: RegionPatch(fitted, region) for region in Region}
            grey = {region.value: RegionPatch.grey(channels, side, region) for region in Region}
            patches[PATCH, share] = _five(name, trained.model, adversarial, size, spec, on)
            patches[GREY, share] = _five(name, trained.model, grey, size, spec, on)
            stage.advance()
        whole, moved = _whole(name, trained, spec, on)
        stage.advance()
    clean = predict(TorchRuntime(trained.model), on.images) == on.labels
    return NetworkFindings(clean, pixels, patches, whole, moved)


def defended(network: nn.Module, defence: nn.Module) -> TrainedArm:
    """``network`` behind a defence of the input that it was not trained with."""
    model = nn.Sequential(defence, network).eval()
    return TrainedArm(model, nn.Sequential(StandInGradient(defence), network).eval())


def _cells(spec: VolumizationSpec) -> int:
    return len(spec.places) * len(spec.pixels) + len(spec.patches) + 1


def _pixel_attack(spec: VolumizationSpec, region: Region, places: str) -> SparseSearch:
    drawn = places == "drawn"
    return SparseSearch(spec.queries, region, "drawn" if drawn else "searched", spec.stops)


def _made(
    name: str, model: nn.Module, attacks: Sequence[Attack], size: Perturbation, spec: VolumizationSpec, on: Judged
) -> Mapping[str, np.ndarray] | NotMeasured:
    """Attack name → uint8 images; not measured if one of the attacks broke."""
    source = Source(name, Threat.QUERIES, model, f"{name} itself", (name,))
    made = craft(
        source, attacks, on.images, on.labels, perturbation=size, seed=spec.seed, cache=on.folder / "attacks" / name
    )
    return NotMeasured("; ".join(made.failures.values())) if made.failures else made.images


def _five(
    name: str, model: nn.Module, attacks: Mapping[str, Attack], size: Perturbation, spec: VolumizationSpec, on: Judged
) -> RegionJudgement | NotMeasured:
    made = _made(name, model, list(attacks.values()), size, spec, on)
    if isinstance(made, NotMeasured):
        return made
    attacked = {region: made[attack.name] for region, attack in attacks.items()}
    return judge_regions(TorchRuntime(model), on.images, attacked, on.labels)


def _fitted(name: str, trained: TrainedArm, side: int, spec: VolumizationSpec, on: Judged) -> torch.Tensor:
    """The universal patch of one side, made with whatever gradient there is; kept for the next run."""
    attack = UniversalPatch(on.examples, steps=spec.patch_steps)
    on.examples.refuse(torch.from_numpy(from_8bit(on.images)))
    key = content_key(trained.model, on.examples.images, on.examples.labels, attack.description, side, spec.seed)
    path = on.folder / "patches" / f"{name}-{side}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") == key:
                    return stored.get_tensor("patch")
        except (SafetensorError, OSError):
            pass  # damaged: fitted again below
    device = next((tensor.device for tensor in trained.model.parameters()), torch.device("cpu"))
    patch = attack.fit(trained.model, side, seed=spec.seed, device=device).detach().cpu().contiguous()
    write_atomic(path, save({"patch": patch}, {"key": key}))
    return patch


def _both(one: np.ndarray | NotMeasured, other: np.ndarray | NotMeasured) -> np.ndarray | NotMeasured:
    """Which images withstand two attacks."""
    if isinstance(one, NotMeasured):
        return one
    return other if isinstance(other, NotMeasured) else one & other


def _whole(
    name: str, trained: TrainedArm, spec: VolumizationSpec, on: Judged
) -> tuple[dict[str, np.ndarray | NotMeasured], float | NotMeasured]:
    """PGD, BPDA-PGD, AutoAttack, order flip and order search on the whole image; how far the last moved the patches.

    Where there is a stand-in, AutoAttack is run by its gradients and by the network's own, and an image counts as right
    if it withstands both: a defence's own gradient may be the better one.
    """
    size = Perturbation.parse(spec.perturbation)
    pgd = PGD(spec.pgd_steps)
    right: dict[str, np.ndarray | NotMeasured] = {}

    def judged(made: Mapping[str, np.ndarray] | NotMeasured, attack: str) -> np.ndarray | NotMeasured:
        if isinstance(made, NotMeasured):
            return made
        return predict(TorchRuntime(trained.model), made[attack]) == on.labels

    right["PGD"] = judged(_made(name, trained.model, [pgd], size, spec, on), pgd.name)
    if trained.stand_in is None:
        right["BPDA-PGD"] = NotMeasured("the model's own gradient is exact wherever it has one: see PGD")
    else:
        right["BPDA-PGD"] = judged(_made(f"{name}-bpda", trained.stand_in, [pgd], size, spec, on), pgd.name)
    strongest = AutoAttack(spec.autoattack_steps, spec.autoattack_targets, spec.autoattack_queries)
    right["AutoAttack"] = judged(
        _made(f"{name}-autoattack", trained.model, [strongest], size, spec, on), strongest.name
    )
    if trained.stand_in is not None:
        made = _made(f"{name}-autoattack-bpda", trained.stand_in, [strongest], size, spec, on)
        right["AutoAttack"] = _both(right["AutoAttack"], judged(made, strongest.name))
    flip = trained.order_flip
    if flip is None:
        right["order flip"] = NotMeasured("no attack on the order of this network was given")
    else:
        right["order flip"] = judged(_made(name, trained.model, [flip], size, spec, on), flip.name)
    if trained.order is None:
        none = NotMeasured("the network puts no patches in order")
        return right | {"order search": none}, none
    search = OrderSearch(trained.order, (spec.patch_size, spec.patch_size), name, spec.order_queries)
    made = _made(name, trained.model, [search], size, spec, on)
    right["order search"] = judged(made, search.name)
    if isinstance(made, NotMeasured):
        return right, made
    before, after = (torch.from_numpy(from_8bit(images)) for images in (on.images, made[search.name]))
    return right, float(displaced(trained.order, before, after).mean())
