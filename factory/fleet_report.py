"""From what a run found to the report's document, and the example images beside it."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform

import numpy as np
import torch
from torch import Tensor, nn

from device_tests.accuracy import accuracy_drop
from device_tests.evidence import Proportion
from device_tests.report.document import (
    AttackReport,
    BaseReport,
    DataReport,
    DecisionReport,
    Machine,
    ParityNotMeasured,
    ParityReport,
    QuantisedReport,
    ReportDocument,
    RuleReport,
    SelfCheckBudget,
    SelfCheckReport,
    SourceReport,
    TargetReport,
    VerificationReport,
    by_class_of,
    by_source_of,
    canaries_report,
    cells_of,
    formats_of,
    now,
    threats_of,
)
from device_tests.report.figures import difference_times_ten
from device_tests.report.fleet_figures import Example
from device_tests.statistics import at_least_once
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from exporters.parity import Parity
from factory.device_model import block_size, keyed_transform
from factory.fleet import Findings, Fleet, Verdict
from factory.keyless_patterns import PATTERNS
from factory.packaging import tool_versions
from factory.recipes.recipe import PARTS_OF_TRAINING
from factory.release import release_rule
from factory.verification import AttackedSource, attacks_of, strong_budget
from keys.derive import fixed_guess

RULE_REASONS = (
    "One test per device on the per-image worst case: testing every cell on its own would reject good devices by "
    "chance alone.",
    "The un-keyed control goes through the same rule: a rule that releases it could not tell a keyed device from an "
    "un-keyed one.",
)
_EXAMPLES_PER_DEVICE = 2


def report_document(findings: Findings, command: str) -> ReportDocument:
    """Everything measured, as the document behind report.json and report.html."""
    fleet = findings.fleet
    verification, splits = fleet.settings.verification, fleet.splits
    verdicts = [*findings.verdicts, *findings.controls]
    return ReportDocument(
        schema=1,
        keyfoundry=importlib.metadata.version("keyfoundry"),
        created=now(),
        fleet_id=fleet.vault.fleet_id,
        command=command,
        settings=fleet.settings.model_dump(mode="json"),
        versions=tool_versions(),
        seed=fleet.settings.seed,
        machine=this_machine(),
        seconds={name: round(seconds, 2) for name, seconds in findings.seconds.items()},
        base=BaseReport(
            name=fleet.settings.base.name, digest=fleet.base.digest,
            parameters=sum(p.numel() for p in fleet.base.network.parameters()), clean=findings.base_clean,
        ),
        data=DataReport(
            name=splits.name, digest=splits.digest, train=len(splits.train), validation=len(splits.validation),
            test=len(splits.test), skipped=splits.train.skipped + splits.test.skipped, labels=splits.labels,
        ),
        verification=VerificationReport(
            budget=verification.budget,
            epsilon=verification.epsilon,
            images=min(verification.images, len(splits.test)),
            attacks=tuple(AttackReport(name=a.name, description=a.description) for a in attacks_of(verification)),
            threats=VerificationReport.all_threats(),
            self_check=SelfCheckBudget(
                strong_attack=strong_budget(verification).describe(len(splits.labels)),
                margin=verification.self_check_margin,
            ),
        ),
        rule=RuleReport.of(
            release_rule(fleet.settings.release),
            reasons=(*fleet.settings.release.reasons, *RULE_REASONS), tests=len(findings.verdicts),
        ),
        sources=tuple(
            SourceReport(
                id=one.source.id, threat=one.source.threat.code, description=one.source.description,
                self_checks=tuple(SelfCheckReport.of(check) for check in one.checks)
                or NotMeasured(_unchecked(one.source)),
            )
            for one in (*findings.sources, *(one for verdict in verdicts for one in _query_sources(verdict)))
        ),
        targets=(
            *(_target(fleet, verdict, findings.base_clean, control=False) for verdict in findings.verdicts),
            *(_target(fleet, verdict, findings.base_clean, control=True) for verdict in findings.controls),
        ),
        notes=_notes(findings),
    )  # fmt: skip


def this_machine() -> Machine:
    """The machine that this run takes place on."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}", processor=_processor(), cores=os.cpu_count() or 1
    )


def recipe_in_words(fleet: Fleet, *, control: bool) -> str:
    """What a device is made by: transform, keys, adaptation, the parts that training has beside the default, epochs."""
    recipe = fleet.settings.recipe
    words = ["no key" if control else recipe.transform.describe(block_size(fleet.base, recipe))]
    if recipe.keys is not None and not control:
        words.append(f"{recipe.keys.count} keys ({recipe.keys.combine})")
    if recipe.attractors is not None:
        words.append(f"{recipe.attractors.count} attractors")
    embedding = " with a whole patch embedding" if recipe.whole_patch_embedding else ""
    words.append(f"LoRA r = {recipe.rank}{embedding}" if recipe.adaptation == "lora" else recipe.adaptation)
    chosen = recipe.model_dump()
    words += [f"{name} {recipe.parts[name].name}".strip() for name in PARTS_OF_TRAINING if name in chosen]
    words.append(f"{recipe.training.epochs} epoch{'' if recipe.training.epochs == 1 else 's'}")
    return ", ".join(words)


def _target(fleet: Fleet, verdict: Verdict, base_clean: Proportion, *, control: bool) -> TargetReport:
    released = verdict.decision.released and not control
    queries = verdict.examination.queries
    judgements = [verdict.judgement, *([] if queries is None else [queries.judgement])]
    return TargetReport(
        id=verdict.candidate.name,
        role="control" if control else "device",
        generation=verdict.candidate.generation,
        recipe=recipe_in_words(fleet, control=control),
        trainable_parameters=verdict.candidate.model.trainable_parameters,
        clean=verdict.clean,
        accuracy_drop=accuracy_drop(base_clean, verdict.clean),
        parity=tuple(_parity(name, value) for name, value in verdict.parity.items()),
        cells=tuple(cell for judged in judgements for cell in cells_of(judged)),
        by_source=tuple(source for judged in judgements for source in by_source_of(judged)),
        threats=tuple(threat for judged in judgements for threat in threats_of(judged)),
        worst_case=verdict.judgement.worst_case,
        by_class=by_class_of(verdict.judgement, fleet.splits.labels),
        formats=formats_of(verdict.examination.formats),
        quantised=tuple(
            QuantisedReport(
                format=name,
                clean=one.clean,
                accuracy_drop=accuracy_drop(one.base_clean, one.clean),
                worst_case=one.judgement.worst_case,
            )
            for name, one in verdict.quantised.items()
        ),
        canaries=canaries_report(verdict.examination.canaries),
        decision=DecisionReport.of(verdict.decision),
        package=str(verdict.candidate.package.relative_to(fleet.folder.root)) if released else None,
        adapter_digest=verdict.candidate.model.adapter_digest,
    )


def _unchecked(source: Source) -> str:
    if source.id == PATTERNS:
        return "no model is attacked, so that no strong attack can vouch for it"
    if source.differentiable:
        return "every attack on it failed"
    return "it gives answers and no gradients that a strong attack could use"


def _query_sources(verdict: Verdict) -> tuple[AttackedSource, ...]:
    queries = verdict.examination.queries
    return () if queries is None else queries.sources


def _parity(name: str, value: Parity | NotMeasured) -> ParityReport | ParityNotMeasured:
    if isinstance(value, NotMeasured):
        return ParityNotMeasured(format=name, not_measured=value.reason)
    if not math.isfinite(value.max_relative_difference):
        return ParityNotMeasured(format=name, not_measured="the exported model's logits are not finite")
    return ParityReport(
        format=name, runtime=value.runtime, n=value.n, max_relative_difference=value.max_relative_difference,
        limit=value.limit, top1_agreement=value.top1_agreement, top1_limit=value.top1_limit, passed=value.passed,
    )  # fmt: skip


def _notes(findings: Findings) -> tuple[str, ...]:
    notes = [
        "A device attacked through itself (T5) is the white-box ceiling: whoever holds a device can fool that device.",
        "Fooling rates are among the images that the target classifies correctly when clean; adversarial images are "
        "rounded to 8 bits, and the exported ONNX file itself was judged.",
    ]
    run = {cell.threat for verdict in findings.verdicts for cell in verdict.judgement.cells}
    if all(verdict.examination.queries is None for verdict in findings.verdicts):
        notes.append("Query attacks on the target (T4) are not measured with this budget; --budget standard has them.")
    if Threat.COLLUDING_DEVICES not in run:
        notes.append(
            "Colluding devices (T3) are not measured: that takes --budget standard and more devices than collude."
        )
    for attack in attacks_of(findings.fleet.settings.verification):
        without = [
            one.source.id
            for one in findings.sources
            if one.source.differentiable and attack.name not in {*one.adversarial.images, *one.adversarial.failures}
        ]
        if without:
            notes.append(f"{attack.name} was left out on {', '.join(without)}: it needs a Vision Transformer.")
    notes += [
        f"{verdict.candidate.name} shows signs of gradient masking ({'; '.join(found.reasons)}): its figures look "
        "better than they are."
        for verdict in findings.verdicts
        if (found := verdict.examination.canaries) is not None and found.failed
    ]
    notes += [
        f"{verdict.candidate.name}: not every sign of gradient masking could be looked for."
        for verdict in findings.verdicts
        if (found := verdict.examination.canaries) is not None and not found.failed and not found.passed
    ]
    tests = len(findings.verdicts)
    alpha = findings.fleet.settings.release.alpha
    notes.append(
        f"This report makes {tests} acceptance tests, one per device. If all devices were exactly acceptable, at least "
        f"one would be rejected by chance with a probability of {at_least_once(alpha, tests):.2f} at most."
    )
    if len(findings.verdicts) == 1:
        notes.append("The fleet has one device, so no attack from a sibling (T2) could be made; add one to measure it.")
    notes.append(
        "The keyed view of the examples is drawn with a public illustration key: one image beside its shuffled form "
        "would give a device's permutation away."
    )
    earlier = {v.candidate.name: v.candidate.generation - 1 for v in findings.verdicts if v.candidate.generation > 1}
    if earlier:
        listed = ", ".join(f"{name} ({count})" for name, count in earlier.items())
        notes.append(f"Earlier generations, each another try on the same test images: {listed}.")
    if any(control.decision.released for control in findings.controls):
        notes.append(
            "An un-keyed control passes the rule. At these settings, the rule cannot tell a keyed device from an "
            "un-keyed one, and a release says nothing about the key."
        )
    return tuple(notes)


def report_examples(findings: Findings) -> tuple[Example, ...]:
    """For each device, the first image that fools the public base and not the device, and the first that does both."""
    base = findings.sources[0]
    assert base.source.threat is Threat.PUBLIC_BASE
    fleet = findings.fleet
    clean = fleet.splits.test.take(fleet.settings.verification.images)
    labels = fleet.splits.labels
    if not base.adversarial.images:
        return ()
    attack = list(base.adversarial.images)[-1]
    attacked = base.adversarial.images[attack]
    with torch.no_grad():
        base_says = np.concatenate(
            [base.source.model(part.float() / 255).argmax(1).numpy() for part in torch.from_numpy(attacked).split(256)]
        )
    # One clean image beside its shuffled form gives a permutation away, so the picture shows a public key's shuffle.
    shuffle = keyed_transform(fleet.base, fleet.settings.recipe, fixed_guess("illustration"))
    examples = []
    for verdict in findings.verdicts:
        says = verdict.judgement.predictions[base.source.id, attack]
        fooling = verdict.judgement.correct & (base_says != verdict.judgement.labels)
        holds = np.flatnonzero(fooling & (says == verdict.judgement.labels))
        falls = np.flatnonzero(fooling & (says != verdict.judgement.labels))
        for index in [*holds[:1], *falls[:1]][:_EXAMPLES_PER_DEVICE]:
            before, after = clean.images[index], torch.from_numpy(attacked[index])
            examples.append(
                Example(
                    device_id=verdict.candidate.name, source_id=base.source.id, attack=attack,
                    label=labels[int(clean.labels[index])], predicted=labels[int(says[index])],
                    clean=before.numpy(), keyed=_keyed(shuffle, before),
                    adversarial=after.numpy(), difference=difference_times_ten(before.numpy(), after.numpy()),
                )
            )  # fmt: skip
    return tuple(examples)


def _keyed(shuffle: nn.Module | None, image: Tensor) -> np.ndarray:
    """What ``shuffle`` makes of a uint8 image C×H×W."""
    if shuffle is None:
        return image.numpy()
    # Transforms are of images in [0, 1]: a shuffle would not care, but a flip is 1 - x.
    seen = (shuffle(image[None].float() / 255)[0] * 255).round().byte()
    if seen.ndim == 3:
        return seen.numpy()
    # A volume C×N×p×p as an image again, its patches row by row in their order.
    channels, _, side, _ = seen.shape
    _, height, width = image.shape
    rows = seen.view(channels, height // side, width // side, side, side)
    return rows.transpose(2, 3).reshape(channels, height, width).numpy()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
