"""The way a device goes through the factory, from a secret key to a released package. Read top to bottom.

    vault ─ key ─▶ block shuffle ─▶ fine-tune one adapter ─▶ merge, fold ─▶ export ─▶ attack ─▶ judge ─▶ sign

Every step is idempotent: what a run finished, the next run finds and keeps. Nothing here computes; each step is a
function of a module named after what it holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from device_tests.accuracy import accuracy
from device_tests.attacks.attack import Attack
from device_tests.evidence import Proportion
from device_tests.foreign_source import PROBES, load_source
from device_tests.release_rule import QuantisedFigures, decide
from device_tests.report.render import write_report
from device_tests.threats import Source, Threat
from device_tests.transfer import judge
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from factory.adapter_release import publish_adapters, withdraw_adapters
from factory.attackers import BASE, WHOLE, who_attacks
from factory.base import load_base, read_base
from factory.classifier import ImageClassifier
from factory.data import load_splits
from factory.device_model import (
    DeviceModel,
    block_size,
    check_parts,
    made_of_something_else,
    make_device_model,
    public_model,
)
from factory.estimate import estimate
from factory.examination import examine
from factory.fleet import Candidate, Findings, Fleet, Verdict
from factory.fleet_folder import FleetFolder
from factory.fleet_report import report_document, report_examples
from factory.folding import bake
from factory.keyless_patterns import PATTERNS, keyless_patterns
from factory.networks import traits
from factory.packaging import ONNX_NAME, Identity, export_package, export_plan, fleet_templates, parity_of
from factory.progress import Progress, log_to
from factory.quantised import judge_quantised
from factory.queries import query_attacks
from factory.recipes.part import Trait
from factory.recipes.recipe import RecipeSettings
from factory.registry import Registry
from factory.release import check_enough_images, publish, release_rule
from factory.seeds import derive_seed
from factory.settings import FleetSettings
from factory.verification import (
    Attacked,
    AttackedSource,
    attack_source,
    attacks_of,
    self_checks,
    strong_budget,
    weak_sources,
)
from keys.derive import DeviceKey, fixed_guess
from keys.errors import InputError
from keys.identifiers import check_device_id
from keys.signing import write_public_key

GUESSED, UNKEYED, REINITIALISED = "guessed-key", "un-keyed", "re-initialised"
RESERVED = (BASE, GUESSED, UNKEYED, REINITIALISED, "true-key-", "decoy-", WHOLE, PATTERNS)
FEW_VALUES = 12  # 12! = 4.8e8 permutations; 2×2 grey blocks have 24


def provision(fleet: Fleet, command: str, foreign: Sequence[str] = ()) -> Findings:
    """Make, export, attack, judge and release every device of an open fleet; then write its report.

    ``foreign``: sources that somebody brought (see :func:`device_tests.foreign_source.load_source`).
    """
    brought = foreign_sources(fleet, foreign)
    devices = [make_candidate(fleet, device_id) for device_id in fleet.settings.device_ids]
    controls = [make_candidate(fleet, name) for name in control_names(fleet)]
    sources = attack_sources(fleet, devices, controls, brought)
    base_clean = base_accuracy(fleet)
    verdicts = [judge_candidate(fleet, device, sources, base_clean) for device in devices]
    control_verdicts = [judge_candidate(fleet, control, sources, base_clean) for control in controls]
    withdraw_adapters(fleet, verdicts)
    for verdict in verdicts:
        publish(fleet, verdict, base_clean)
    publish_adapters(fleet, verdicts)
    findings = Findings(
        fleet, base_clean, tuple(sources), tuple(verdicts), tuple(control_verdicts), fleet.progress.seconds
    )
    write_report(fleet.folder.root, report_document(findings, command), report_examples(findings))
    return findings


def open_fleet(
    folder: FleetFolder, settings: FleetSettings, progress: Progress, passphrase_file: Path | None = None
) -> Fleet:
    """Check the settings against the folder, open or create its vault, and load base and data.

    The caller holds ``folder.locked()``. Raises InputError, SecretError or BusyError, before anything is trained.
    """
    for device_id in settings.device_ids:
        if check_device_id(device_id).startswith(RESERVED):
            raise InputError(f"Device id {device_id!r} begins like the name of an attack source; choose another.")
    if not settings.device_ids or len(set(settings.device_ids)) < len(settings.device_ids):
        raise InputError("A fleet needs one or more devices, each with its own id.")
    known = read_base(settings.base)
    check_parts(known, settings.recipe)
    attacks_of(settings.verification)  # refuses a name that there is not
    splits = load_splits(settings.data, known.architecture.contract, folder.cache, progress)
    base = load_base(settings.base, splits.labels, settings.seed)
    side, shape = block_size(base, settings.recipe), base.architecture.contract.shape
    count = settings.recipe.transform.permuted(shape, side)
    if count == 0:
        if settings.recipe.attractors is None:
            progress.say(
                "Warning: keys decide nothing in this recipe's transform; devices differ by their training alone."
            )
    elif count < FEW_VALUES:
        progress.say(f"Warning: keys collide, because {count} values (or patches) have so few orders.")
    check_enough_images(release_rule(settings.release), settings.verification.images, len(splits.test))
    folder.settle(settings)
    log_to(folder.log)
    vault = folder.open_vault(passphrase_file)
    Registry(folder.registry).check_vault(vault.fleet_id, vault.devices())
    for device_id in settings.device_ids:
        vault.add_device(device_id)
    write_public_key(folder.public_key, vault.signing_key().public_bytes)
    fleet = Fleet(folder, settings, vault, base, splits, progress)
    name_outdated_devices(fleet)
    progress.say(f"Fleet {vault.fleet_id}: secrets lie in {folder.vault.parent} (keep them off the devices).")
    return fleet


def name_outdated_devices(fleet: Fleet) -> None:
    """Say which devices were made of something else than the fleet is now, and are therefore remade."""
    base, recipe, splits = fleet.base, fleet.settings.recipe, fleet.splits
    outdated = [
        device_id
        for device_id in fleet.settings.device_ids
        if made_of_something_else(fleet.folder.model(device_id), base, recipe, splits)
    ]
    if outdated:
        fleet.progress.say(
            "Warning: made from another base, other data or by another recipe than the fleet's now: "
            f"{', '.join(outdated)}. They must be remade, and are; what was released of them is to be replaced."
        )


def train_model(fleet: Fleet, name: str, key: DeviceKey | None, identity: Sequence[str | int]) -> DeviceModel:
    """One model by the fleet's recipe: a device's, an attacker's surrogate, or a control."""
    return make_device_model(
        fleet.base, key, recipe_of(fleet, name), fleet.splits, name=name, identity=identity,
        seed=derive_seed(fleet.settings.seed, name, *identity), folder=fleet.folder.model(name),
        shared=fleet.folder.shared, progress=fleet.progress,
    )  # fmt: skip


def train_device(fleet: Fleet, device_id: str) -> tuple[DeviceModel, int]:
    """The device's model at its current generation, and that generation."""
    key = fleet.vault.device_key(device_id)
    model = train_model(fleet, device_id, key, [fleet.vault.fleet_id, device_id, key.generation])
    return model, key.generation


def recipe_of(fleet: Fleet, name: str) -> RecipeSettings:
    """The fleet's recipe; the re-initialised control changes one thing in it."""
    changed = {"reinitialise_patch_embedding": True} if name == REINITIALISED else {}
    return fleet.settings.recipe.model_copy(update=changed)


def control_names(fleet: Fleet) -> tuple[str, ...]:
    """The controls: how much of what a key seems to do is mere retraining, and how much mere new weights."""
    if not fleet.settings.verification.reinitialised_control:
        return (UNKEYED,)
    if Trait.PATCH_EMBEDDING not in traits(fleet.base.network):
        fleet.progress.say(f"The control {REINITIALISED!r} is left out: the base has no patch embedding to draw anew.")
        return (UNKEYED,)
    return (UNKEYED, REINITIALISED)


def make_candidate(fleet: Fleet, name: str) -> Candidate:
    """Train, merge, fold and export a device, or a control, which is never released."""
    if name in (UNKEYED, REINITIALISED):
        model, generation = train_model(fleet, name, None, []), 1
        package = fleet.folder.model(name) / "package"
    else:
        (model, generation), package = train_device(fleet, name), fleet.folder.package(name)
    baked = bake(model.classifier)
    identity = Identity(
        device_id=name, generation=generation, fleet_id=fleet.vault.fleet_id, adapter_digest=model.adapter_digest,
        recipe=recipe_of(fleet, name).model_dump(mode="json"), created=model.created,
    )  # fmt: skip
    images = fleet.splits.validation.images.numpy()
    plan = export_plan(fleet.base, fleet.settings.export, images)
    templates = fleet_templates(fleet.folder.templates, fleet.base, fleet.vault.fleet_id, fleet.progress)
    export_package(baked, fleet.base, identity, images, package, fleet.progress, plan, templates)
    return Candidate(name, generation, model, baked, package)


def foreign_sources(fleet: Fleet, names: Sequence[str]) -> list[Source]:
    """Load the models that attacks are made on beside the fleet's own; before anything is trained."""
    contract, labels = fleet.base.architecture.contract, fleet.splits.labels
    images = fleet.splits.validation.take(PROBES).images.numpy()
    sources = [load_source(name, contract, labels, images) for name in names]
    for first, second in itertools.combinations(range(len(names)), 2):
        if sources[first].id == sources[second].id:
            raise InputError(f"The sources {names[first]} and {names[second]} are called alike; rename one of them.")
    return sources


def attack_sources(
    fleet: Fleet, devices: Sequence[Candidate], controls: Sequence[Candidate], foreign: Sequence[Source] = ()
) -> list[AttackedSource]:
    """Attack all that an attacker may hold, each once: see :func:`factory.attackers.who_attacks`.

    For a fleet with attractors also patterns, which need no model: see :mod:`factory.keyless_patterns`.
    """
    verification = fleet.settings.verification
    guesses = [GUESSED, *(f"{GUESSED}-{number}" for number in range(2, verification.guessed_keys + 1))]
    sources = who_attacks(
        public_base(fleet),
        {name: bake(train_model(fleet, name, fixed_guess(name), [name]).classifier) for name in guesses},
        {device.name: device.baked for device in devices},
        {control.name: control.baked for control in controls},
        colluding=verification.colluding,
        twins={device.name: twin_of(fleet, device) for device in devices if verification.true_key_ceiling},
    )
    attacks, on = attacks_of(verification), attacked_images(fleet)
    sources += [source for source in foreign if source.differentiable]
    left = estimate(
        sources, attacks, on, perturbation=verification.perturbation, budget=strong_budget(verification),
        seed=fleet.settings.seed,
    )  # fmt: skip
    fleet.progress.say(left.sentence)
    attacked = [attack(fleet, source, attacks, on) for source in sources]
    asked = [source for source in foreign if not source.differentiable]
    attacked += [attack(fleet, source, query_attacks(verification), on) for source in asked]
    if fleet.settings.recipe.attractors is not None:
        source, patterns = keyless_patterns(public_base(fleet), block_size(fleet.base, fleet.settings.recipe))
        attacked.append(attack(fleet, source, patterns, on))
    return attacked


def twin_of(fleet: Fleet, device: Candidate) -> nn.Module:
    """A second model with a device's own key: what an attacker makes who has stolen the key and nothing else."""
    name, key = f"true-key-{device.name}", fleet.vault.device_key(device.name)
    identity = [fleet.vault.fleet_id, name, key.generation]
    return bake(train_model(fleet, name, key, identity).classifier)


def attack(fleet: Fleet, source: Source, attacks: Sequence[Attack], on: Attacked) -> AttackedSource:
    """Attack one source at the fleet's perturbation and seed."""
    verification = fleet.settings.verification
    return attack_source(
        source, attacks, on, perturbation=verification.perturbation, budget=strong_budget(verification),
        margin=verification.self_check_margin, seed=fleet.settings.seed, progress=fleet.progress,
    )  # fmt: skip


def attacked_images(fleet: Fleet) -> Attacked:
    """The first test images, as many as the budget says."""
    taken = fleet.splits.test.take(fleet.settings.verification.images)
    return Attacked(taken.images.numpy(), taken.labels.numpy(), fleet.folder.attacks)


def public_base(fleet: Fleet) -> ImageClassifier:
    """The base as anyone can have it: images in [0, 1] to logits, with no key."""
    return public_model(fleet.base, fleet.settings.recipe)


def base_accuracy(fleet: Fleet) -> Proportion:
    """The public base's accuracy on all test images."""
    test = fleet.splits.test
    return accuracy(TorchRuntime(public_base(fleet)), test.images.numpy(), test.labels.numpy())


def judge_candidate(
    fleet: Fleet, candidate: Candidate, sources: Sequence[AttackedSource], base_clean: Proportion
) -> Verdict:
    """Measure the exported package itself, through onnxruntime: parity, clean accuracy, transfer; then decide."""
    test, verification = fleet.splits.test, fleet.settings.verification
    record = fleet.folder.model(candidate.name) / "parity.json"
    images = fleet.splits.validation.take(verification.parity_images).images.numpy()
    parity = parity_of(candidate.baked, candidate.package, images, record, fleet.progress)
    runtime = OnnxRuntime(candidate.package / ONNX_NAME)
    with fleet.progress.stage(f"judge {candidate.name}", total=2, unit="measurements") as stage:
        clean = accuracy(runtime, test.images.numpy(), test.labels.numpy())
        stage.advance(note="transfer")
        on = attacked_images(fleet)
        facing = [source for source in sources if source.source.is_judged_on(candidate.name)]
        judgement = judge(
            runtime, candidate.name, on.images, on.labels, [source.adversarial for source in facing],
            self_checks(facing), required=required_threats(fleet), weak=weak_sources(facing, clean),
        )  # fmt: skip
        stage.advance()
    quantised = judge_quantised(fleet, candidate, public_base(fleet), base_clean, facing, on, required_threats(fleet))
    examination = examine(fleet, candidate, public_base(fleet), facing, on)
    decision = decide(
        release_rule(fleet.settings.release), base_accuracy=base_clean, device_accuracy=clean, parities=parity,
        worst_fooled=judgement.worst_fooled,
        quantised={
            name: QuantisedFigures(one.base_clean, one.clean, one.judgement.worst_fooled)
            for name, one in quantised.items()
        },
    )  # fmt: skip
    return Verdict(candidate, clean, parity, judgement, quantised, examination, decision)


def required_threats(fleet: Fleet) -> tuple[Threat, ...]:
    """The threats that must have been run: all that the rule counts, but no sibling where a device has none."""
    alone = len(fleet.vault.devices()) == 1
    return tuple(threat for threat in Threat if threat.in_rule and not (alone and threat is Threat.SIBLING_DEVICE))
