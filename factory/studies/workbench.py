"""What every study works with: data, base, the zoo of models, attacks made once, and judgements.

Everything that is expensive lies in the studies' folder under what it depends on, so that a study that was
interrupted, or another one about the same models, goes on with what is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from torch import nn

from device_tests.accuracy import accuracy, predict
from device_tests.attacks.attack import Attack
from device_tests.ensemble import Ensemble
from device_tests.evidence import Measured, Proportion
from device_tests.fleet_statistics import FleetDifference, FleetRate, fleet_rate, group_difference
from device_tests.perturbation import Perturbation
from device_tests.self_check import StrongBudget
from device_tests.threats import Source, Threat
from device_tests.transfer import TargetJudgement, judge
from exporters.measured import NotMeasured
from exporters.run_torch import TorchRuntime
from factory.attackers import BASE, colluding_groups
from factory.attractors import without_attractors
from factory.base import load_base, read_base
from factory.classifier import ImageClassifier
from factory.data import load_splits
from factory.device_model import check_parts
from factory.networks import traits
from factory.progress import Progress, log_to
from factory.recipes.part import Trait
from factory.studies.spec import ArmSettings, Spec
from factory.studies.zoo import Member, Zoo
from factory.verification import Attacked, AttackedSource, attack_source, self_checks, weak_sources
from keys.errors import BusyError, InputError
from keys.files import storage_errors

MARGIN = 0.05
"""How far below the strong attack an attack may stay on its own source: evaluation by the same rule as a fleet's."""

FleetMeasured = FleetRate | Proportion | NotMeasured


class Workbench:
    """An open studies folder: decoded data, models and attacks are shared by all studies in it."""

    def __init__(self, folder: Path, spec: Spec, progress: Progress) -> None:
        self.folder, self.spec, self.progress = folder, spec, progress
        known = read_base(spec.base)
        architecture = known.architecture
        if Trait.IMAGES not in traits(known.network):
            raise InputError(
                f"Base {architecture.name} takes volumes, which the study volumization is for; no other is."
            )
        for arm in spec.arms:
            check_parts(known, spec.arm(arm).recipe)
        self.splits = load_splits(spec.data, architecture.contract, folder / "data", progress)
        if spec.training_images is not None:
            self.splits = dataclasses.replace(self.splits, train=self.splits.train.take(spec.training_images))
        self.base = load_base(spec.base, self.splits.labels, spec.seed)
        # One folder per base, data and seed: models and attacks of others have the same names.
        identity = "\0".join([self.base.digest, self.splits.digest, str(spec.seed)])
        self.shared = folder / "shared" / hashlib.sha256(identity.encode()).hexdigest()[:12]
        self.zoo = Zoo(self.shared / "models", self.base, self.splits, seed=spec.seed, progress=progress)
        self.base_model = ImageClassifier(self.base.network, architecture.mean, architecture.std)
        self._attacked: dict[object, AttackedSource] = {}

    @functools.cached_property
    def base_clean(self) -> Proportion:
        """The public base's accuracy on all test images."""
        test = self.splits.test
        return accuracy(TorchRuntime(self.base_model), test.images.numpy(), test.labels.numpy())

    def members(self, arm: ArmSettings) -> list[Member]:
        """All models of an arm, trained if they are not yet."""
        return self.zoo.members(self.spec.arm(arm), arm.models)

    def images(self, arm: ArmSettings | None = None, at_most: int | None = None) -> Attacked:
        """The first test images: as many as the arm or the spec says, ``at_most`` so many."""
        wanted = (arm.images if arm is not None else None) or self.spec.images
        taken = self.splits.test.take(wanted if at_most is None else min(wanted, at_most))
        return Attacked(taken.images.numpy(), taken.labels.numpy(), self.shared / "attacks")

    def attack(
        self, source: Source, attacks: Sequence[Attack], perturbation: Perturbation, on: Attacked
    ) -> AttackedSource:
        """Attack a source, or take what was made before."""
        spec = self.spec
        budget = StrongBudget(steps=spec.strong_steps, targets=spec.strong_targets, images=spec.strong_images)
        descriptions = tuple(attack.description for attack in attacks)
        identity = (source.id, source.targets, descriptions, perturbation, len(on.images))
        if identity not in self._attacked:
            self._attacked[identity] = attack_source(
                source, attacks, on, perturbation=perturbation, budget=budget, margin=MARGIN, seed=spec.seed,
                progress=self.progress,
            )  # fmt: skip
        return self._attacked[identity]

    def base_source(self) -> Source:
        """The public base."""
        return Source(BASE, Threat.PUBLIC_BASE, self.base_model, "the public base")

    def other_keys(self, members: Sequence[Member]) -> list[Source]:
        """Sources of single other models of an arm, so many that every member is a target of one of them.

        In one arm a guessed-key model, a sibling and a colluding device are made in the same way: these are all three.
        Whoever holds a model leaves its attractors out.
        """
        models = {member.id: without_attractors(member.baked) for member in members}
        return [
            Source(name, Threat.GUESSED_KEY, models[name], "another key", targets)
            for (name,), targets in colluding_groups(tuple(models), 1)
        ]

    def ensemble_with_base(self, members: Sequence[Member], count: int) -> list[Source]:
        """As :meth:`other_keys`: the public base and ``count`` other models at once, without their attractors."""
        models = {member.id: without_attractors(member.baked) for member in members}
        sources: list[Source] = []
        for number, (names, targets) in enumerate(colluding_groups(tuple(models), count), start=1):
            group = f"{names[0]}{with_base(1)}" if count == 1 else f"{members[0].arm.name}{with_base(count)}{number}"
            words = f"the base and {count} other {'key' if count == 1 else 'keys'} at once"
            model = Ensemble([self.base_model, *(models[name] for name in names)])
            sources.append(Source(group, Threat.COLLUDING_DEVICES, model, words, targets))
        return sources

    def judge(self, name: str, model: nn.Module, sources: Sequence[AttackedSource], on: Attacked) -> TargetJudgement:
        """Judge one model on what was made on the sources that concern it; all of one perturbation."""
        facing = [one for one in sources if one.source.is_judged_on(name)]
        runtime = TorchRuntime(model)
        return judge(
            runtime, name, on.images, on.labels, [one.adversarial for one in facing], self_checks(facing), required=(),
            weak=weak_sources(facing, accuracy(runtime, on.images, on.labels)),
        )  # fmt: skip


def right(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which of the images, uint8 N×C×H×W, the model gives their labels: bool N."""
    return predict(TorchRuntime(model), images) == labels


def with_base(count: int) -> str:
    """What the ids of the sources have in common that are the public base and ``count`` other models at once."""
    return "-and-base" if count == 1 else f"-base-and-{count}-"


@contextlib.contextmanager
def open_workbench(folder: Path, spec: Spec, progress: Progress) -> Iterator[Workbench]:
    """Hold the studies' folder for one run; raises BusyError if another run has it."""
    with studies_folder(folder):
        yield Workbench(folder, spec, progress)


@contextlib.contextmanager
def studies_folder(folder: Path) -> Iterator[None]:
    """Make the folder and hold it, with its log; raises BusyError if another run has it."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyError(f"Another study is at work in {folder}; wait for it or choose another --out.") from error
    try:
        log_to(folder / "study.log")
        yield
    finally:
        lock.release()


Pick = Callable[[TargetJudgement], np.ndarray | NotMeasured]


def worst_over(threats: Sequence[Threat] | None = None, attack: str | None = None, source: str | None = None) -> Pick:
    """Which images a target gets wrong in the worst case over these threats, this attack, these sources; all if None.

    ``source``: a part of the sources' ids. The result is bool N over all images; or the reason why it is not known.
    """

    def pick(judgement: TargetJudgement) -> np.ndarray | NotMeasured:
        chosen = [cell for cell in judgement.cells if threats is None or cell.threat in threats]
        chosen = [cell for cell in chosen if attack is None or cell.attack == attack]
        chosen = [cell for cell in chosen if source is None or source in cell.source]
        missing = [cell.fooled.reason for cell in chosen if isinstance(cell.fooled, NotMeasured)]
        if missing or not chosen:
            return NotMeasured("; ".join(dict.fromkeys(missing)) or "no such attack was run")
        return np.any([judgement.wrong(cell.source, cell.attack) for cell in chosen], axis=0)

    return pick


def worst_of(picks: Sequence[Pick]) -> Pick:
    """The worst case over several picks; not known if one of them is not."""

    def pick(judgement: TargetJudgement) -> np.ndarray | NotMeasured:
        found = _stacked([one(judgement) for one in picks])
        return found if isinstance(found, NotMeasured) else np.any(found, axis=0)

    return pick


def fooling(judgements: Sequence[TargetJudgement], pick: Pick) -> FleetMeasured:
    """Fooling rate over several targets: among the images that each gets right when clean."""
    return _over_fleet(judgements, pick, lambda judgement: judgement.correct)


def robust_accuracy(judgements: Sequence[TargetJudgement], pick: Pick) -> FleetMeasured:
    """The papers' measure: share of all images that a target gets right under attack; clean mistakes count as wrong."""

    def right(judgement: TargetJudgement) -> np.ndarray | NotMeasured:
        wrong = pick(judgement)
        return wrong if isinstance(wrong, NotMeasured) else judgement.correct & ~wrong

    return _over_fleet(judgements, right, lambda judgement: np.ones_like(judgement.correct))


def clean_accuracy(judgements: Sequence[TargetJudgement]) -> FleetMeasured:
    """Accuracy on the clean images that were attacked, over several targets."""
    return _over_fleet(
        judgements, lambda judgement: judgement.correct, lambda judgement: np.ones_like(judgement.correct)
    )


def advantage(
    control: Sequence[TargetJudgement], keyed: Sequence[TargetJudgement], pick: Pick
) -> FleetDifference | NotMeasured:
    """Fooling rate of the control minus that of the keyed models, on the images that both were attacked on."""
    images = min(len(control[0].labels), len(keyed[0].labels))
    sides: list[np.ndarray] = []
    for group in (control, keyed):
        fooled = outcomes(group, pick)
        if isinstance(fooled, NotMeasured):
            return fooled
        sides += [fooled[:, :images], correct(group)[:, :images]]
    return group_difference(*sides)


def outcomes(judgements: Sequence[TargetJudgement], pick: Pick) -> np.ndarray | NotMeasured:
    """``pick`` of every judgement, bool D×N; not measured, with all reasons, if one of them is not."""
    return _stacked([pick(judgement) for judgement in judgements])


def _stacked(rows: Sequence[np.ndarray | NotMeasured]) -> np.ndarray | NotMeasured:
    missing = dict.fromkeys(row.reason for row in rows if isinstance(row, NotMeasured))
    return NotMeasured("; ".join(missing)) if missing else np.array(rows, dtype=bool)


def correct(judgements: Sequence[TargetJudgement]) -> np.ndarray:
    """Which clean images each target gets right, bool D×N."""
    return np.array([judgement.correct for judgement in judgements], dtype=bool)


def _over_fleet(
    judgements: Sequence[TargetJudgement], pick: Pick, counted: Callable[[TargetJudgement], np.ndarray]
) -> FleetMeasured:
    hits = outcomes(judgements, pick)
    if isinstance(hits, NotMeasured):
        return hits
    return rate_over_models(hits, np.array([counted(judgement) for judgement in judgements], dtype=bool))


def rate_over_models(hits: np.ndarray, mask: np.ndarray) -> FleetMeasured:
    """A rate over models and images, bool D×N each; of a single model a proportion of its images."""
    return one_model(hits[0], mask[0]) if len(hits) == 1 else fleet_rate(hits, mask)


def one_model(hits: np.ndarray, mask: np.ndarray) -> Measured:
    """A proportion of one model's images."""
    if not mask.any():
        return NotMeasured("the target gets none of the clean images right")
    return Proportion(int((hits & mask).sum()), int(mask.sum()))
