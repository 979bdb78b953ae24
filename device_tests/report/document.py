"""report.json: frozen models whose JSON Schema is published as schema.json beside this file.

Rules: every field is required and no other is allowed; shares lie in [0, 1] (an accuracy drop of 0.03 is three
points); times are UTC; nothing secret is ever put in here. Figures are the values of :mod:`device_tests.evidence`
in their own JSON shape. A new or changed field means a new ``schema`` number once a version has been published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import TypeAliasType

from device_tests.evidence import Measured, Proportion, SelfCheck
from device_tests.perturbation import Perturbation
from device_tests.release_rule import Decision, ReleaseRule
from device_tests.threats import Threat
from exporters.measured import NotMeasured
from keys.errors import InputError
from keys.files import write_atomic

if TYPE_CHECKING:
    from device_tests.canaries import Canaries
    from device_tests.package_judgement import PackageJudgement
    from device_tests.transfer import TargetJudgement

SCHEMA_PATH = Path(__file__).with_name("schema.json")

ValueT = TypeVar("ValueT")


def _reader(kind: type[ValueT], from_json: Callable[[Mapping[str, Any]], ValueT]) -> Callable[[object], ValueT]:
    def read(value: object) -> ValueT:
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        try:
            return from_json(value)
        except TypeError as error:
            raise ValueError(f"a field has the wrong type: {error}") from error

    return read


def _proportion(value: Mapping[str, Any]) -> Proportion:
    proportion = Proportion.from_json(value)
    interval = value["interval"]
    if len(interval) != 2 or not np.allclose(interval, proportion.interval, atol=1e-9):
        raise ValueError(f"interval {interval} is not that of {proportion.successes} out of {proportion.n}")
    return proportion


_SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}

ProportionJSON = TypeAliasType(
    "ProportionJSON",
    Annotated[
        Proportion,
        PlainValidator(_reader(Proportion, _proportion)),
        PlainSerializer(lambda proportion: proportion.to_json()),
        WithJsonSchema(
            {
                "type": "object",
                "title": "Proportion",
                "description": "Successes out of n images, with the 95 % Wilson interval [low, high].",
                "properties": {
                    "successes": {"type": "integer", "minimum": 0},
                    "n": {"type": "integer", "minimum": 1},
                    "value": _SHARE,
                    "interval": {"type": "array", "items": _SHARE, "minItems": 2, "maxItems": 2},
                },
                "required": ["successes", "n", "value", "interval"],
                "additionalProperties": False,
            }
        ),
    ],
)
"""A :class:`~device_tests.evidence.Proportion` as its own JSON; its value and interval must fit its counts."""

NotMeasuredJSON = TypeAliasType(
    "NotMeasuredJSON",
    Annotated[
        NotMeasured,
        PlainValidator(_reader(NotMeasured, NotMeasured.from_json)),
        PlainSerializer(lambda missing: missing.to_json()),
        WithJsonSchema(
            {
                "type": "object",
                "title": "NotMeasured",
                "description": "Stands where a figure is missing, with the reason; never counts as a pass.",
                "properties": {"not_measured": {"type": "string"}},
                "required": ["not_measured"],
                "additionalProperties": False,
            }
        ),
    ],
)
"""A :class:`~exporters.measured.NotMeasured` as its own JSON."""


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )


def _perturbation_code(text: str) -> str:
    try:
        return Perturbation.parse(text).code
    except InputError as error:
        raise ValueError(str(error)) from error


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
PerturbationCode = Annotated[
    str, AfterValidator(_perturbation_code), Field(description="norm and size, e.g. linf:0.03 or l2:0.5")
]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Machine(_Model):
    """Where the run took place."""

    system: str
    processor: str
    cores: int = Field(ge=1)


class BaseReport(_Model):
    """The public base that every device starts from."""

    name: str
    digest: Digest
    parameters: Count
    clean: ProportionJSON
    """Clean accuracy on the test images."""


class DataReport(_Model):
    """The images: how many in each split, and how many files were skipped as unusable."""

    name: str
    digest: Digest
    train: Count
    validation: Count
    test: Count
    skipped: Count
    labels: tuple[str, ...] = Field(min_length=2)


class AttackReport(_Model):
    """One attack and its whole budget in words."""

    name: str
    description: str


class ThreatReport(_Model):
    """One threat: what its attacker holds, and whether the release rule counts it."""

    code: str
    sentence: str
    in_rule: bool


class SelfCheckBudget(_Model):
    """The strong attack that every attack is compared with on its own source."""

    strong_attack: str
    margin: Share
    """How far below the strong attack's success an attack may stay and still be believed."""


class VerificationReport(_Model):
    """What was attacked, and how hard."""

    budget: str
    """quick, standard or full; the settings have every number of it."""
    epsilon: float = Field(gt=0, le=1)
    """L-infinity radius on inputs in [0, 1]."""
    images: int = Field(ge=1)
    """Test images that were attacked."""
    attacks: tuple[AttackReport, ...]
    threats: tuple[ThreatReport, ...]
    self_check: SelfCheckBudget

    @staticmethod
    def all_threats() -> tuple[ThreatReport, ...]:
        """Every threat that the project knows, in its order."""
        return tuple(
            ThreatReport(code=threat.code, sentence=threat.sentence, in_rule=threat.in_rule) for threat in Threat
        )


class RuleReport(_Model):
    """The release rule and the documented reasons for its limits."""

    allowed_accuracy_drop: Share
    p0: Share
    """Acceptable fooling rate, rejected with probability alpha at most."""
    p1: Share
    """Unacceptable fooling rate, released with probability beta at most."""
    alpha: Share
    beta: Share
    images_needed: int = Field(ge=1)
    """The smallest number of images (right when clean) on which the test keeps both risks."""
    limit: Count
    """How many of those images may be fooled."""
    producer_risk: Share
    consumer_risk: Share
    reasons: tuple[str, ...]
    tests: Count
    """How many acceptance tests this report makes: one per device."""

    @classmethod
    def of(cls, rule: ReleaseRule, *, reasons: Sequence[str], tests: int) -> RuleReport:
        """Build it from the rule as it was applied to ``tests`` devices."""
        plan = rule.smallest_plan
        return cls(
            allowed_accuracy_drop=rule.allowed_accuracy_drop,
            p0=rule.p0,
            p1=rule.p1,
            alpha=rule.alpha,
            beta=rule.beta,
            images_needed=plan.n,
            limit=plan.c,
            producer_risk=plan.producer_risk,
            consumer_risk=plan.consumer_risk,
            reasons=tuple(reasons),
            tests=tests,
        )


class SelfCheckReport(_Model):
    """One attack's white-box success on its own source beside the strong attack's, on the same images."""

    attack: str
    attack_success: ProportionJSON | NotMeasuredJSON
    strong_attack: str
    strong_success: ProportionJSON | NotMeasuredJSON
    passed: bool
    margin: Share

    @classmethod
    def of(cls, check: SelfCheck) -> SelfCheckReport:
        """Build it from the evidence."""
        return cls(
            attack=check.attack,
            attack_success=check.attack_success,
            strong_attack=check.strong_attack,
            strong_success=check.strong_success,
            passed=check.passed,
            margin=check.margin,
        )


class SourceReport(_Model):
    """A model that attacks were made on; ``self_checks`` has one entry per attack, or says why there is none."""

    id: str
    threat: str
    """Code of the threat that this source is to every target but itself."""
    description: str
    self_checks: tuple[SelfCheckReport, ...] | NotMeasuredJSON


def _finite(value: object) -> object:
    # JSON has no infinity, and a model whose logits overflow must still be reported.
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ParityReport(_Model):
    """An exported format against the trained model, on the same n images."""

    format: str
    runtime: str
    n: int = Field(ge=1)
    max_relative_difference: Annotated[float | None, Field(ge=0), BeforeValidator(_finite)]
    """Largest difference of a logit, over the largest logit; null where a logit was not finite."""
    limit: float = Field(gt=0)
    top1_agreement: Share
    top1_limit: Share
    passed: bool


class ParityNotMeasured(_Model):
    """A format that was not compared, and why."""

    format: str
    not_measured: str


class CellReport(_Model):
    """One attack, made on ``source``, evaluated on this target: the share fooled of what is right when clean."""

    source: str
    threat: str
    """What the source is to this target; T5 where the two are one model."""
    attack: str
    perturbation: PerturbationCode
    fooled: ProportionJSON | NotMeasuredJSON


class SourceResult(_Model):
    """The per-image worst over all attacks made on one source."""

    source: str
    threat: str
    worst: ProportionJSON | NotMeasuredJSON


class ThreatResultReport(_Model):
    """The per-image worst over all sources and attacks of one threat."""

    threat: str
    sources: tuple[str, ...]
    worst: ProportionJSON | NotMeasuredJSON


class ClassResult(_Model):
    """The per-image worst over every attack of the rule, among the images of one class."""

    label: str
    worst: ProportionJSON | NotMeasuredJSON


class FormatUnderAttack(_Model):
    """An exported format beside torch, on the first ``images`` of the attacks that were made on the public base."""

    format: str
    runtime: str
    images: int = Field(ge=1)
    fooled: ProportionJSON | NotMeasuredJSON
    torch_fooled: ProportionJSON | NotMeasuredJSON
    torch_only: Count
    """Images that fool torch alone, of those that both get right when clean."""
    format_only: Count
    differing: ProportionJSON
    """Adversarial images of which the format's class differs from torch's."""
    largest_difference: Annotated[float | None, Field(ge=0), BeforeValidator(_finite)]
    """Largest difference of a logit, over the largest logit; null where a logit was not finite."""


class QuantisedReport(_Model):
    """A quantised format that was judged by itself, as its model was."""

    format: str
    clean: ProportionJSON
    """Clean accuracy: of ONNX on all test images, of Core ML on the attacked ones."""
    accuracy_drop: float = Field(ge=-1, le=1)
    """Base minus format on the same images, as a share."""
    worst_case: ProportionJSON | NotMeasuredJSON
    """The per-image worst over every attack of every threat in the rule, against the exported file."""


class FormatNotAttacked(_Model):
    """A format that saw no adversarial image, and why."""

    format: str
    not_measured: str


class CanaryReport(_Model):
    """One sign of gradient masking: whether it passed, and a sentence."""

    name: str
    passed: bool | NotMeasuredJSON
    sentence: str


class CanariesReport(_Model):
    """The gradient-masking list of one model; with a failed canary its figures look better than they are."""

    images: Count
    perturbation: PerturbationCode
    passed: bool
    results: tuple[CanaryReport, ...]


class ConditionReport(_Model):
    """One condition of the rule, and a sentence with its figures."""

    name: str
    met: bool
    sentence: str


class AcceptanceTestReport(_Model):
    """The acceptance test as applied: ``fooled`` of ``n`` images, at most ``limit`` allowed; the exact risks."""

    n: int = Field(ge=1)
    fooled: Count
    limit: Count
    producer_risk: Share
    consumer_risk: Share
    passed: bool


class DecisionReport(_Model):
    """Released or rejected; ``reasons`` are the sentences of the conditions that are not met."""

    released: bool
    reasons: tuple[str, ...]
    conditions: tuple[ConditionReport, ...] = Field(min_length=1)
    test: AcceptanceTestReport | None
    """None where too little was measured to apply the test."""

    @classmethod
    def of(cls, decision: Decision) -> DecisionReport:
        """Build it from what the release rule decided."""
        test = decision.test
        return cls(
            released=decision.released,
            reasons=decision.reasons,
            conditions=tuple(
                ConditionReport(name=condition.name, met=condition.met, sentence=condition.sentence)
                for condition in decision.conditions
            ),
            test=None
            if test is None
            else AcceptanceTestReport(
                n=test.plan.n,
                fooled=test.fooled,
                limit=test.plan.c,
                producer_risk=test.plan.producer_risk,
                consumer_risk=test.plan.consumer_risk,
                passed=test.passed,
            ),
        )

    @model_validator(mode="after")
    def _consistent(self) -> DecisionReport:
        unmet = tuple(condition.sentence for condition in self.conditions if not condition.met)
        if self.reasons != unmet or self.released != (not unmet):
            raise ValueError("a decision must follow from its conditions")
        return self


def _inside(path: str | None) -> str | None:
    if path is not None:
        parsed = PurePosixPath(path)
        if not parsed.parts or parsed.is_absolute() or ".." in parsed.parts:
            raise ValueError(f"{path!r} is not a path inside the fleet's folder")
    return path


class TargetReport(_Model):
    """A model that the rule was applied to: a device, or the un-keyed control as a negative control."""

    id: str
    role: Literal["device", "control"]
    generation: Count
    recipe: str
    trainable_parameters: Count
    clean: ProportionJSON
    """Clean accuracy on the test images."""
    accuracy_drop: float = Field(ge=-1, le=1)
    """Base minus target, as a share; negative where the target is better."""
    parity: tuple[ParityReport | ParityNotMeasured, ...]
    cells: tuple[CellReport, ...]
    by_source: tuple[SourceResult, ...]
    threats: tuple[ThreatResultReport, ...]
    worst_case: ProportionJSON | NotMeasuredJSON
    """The per-image worst over every attack of every threat in the rule."""
    by_class: tuple[ClassResult, ...]
    formats: tuple[FormatUnderAttack | FormatNotAttacked, ...] | NotMeasuredJSON
    """Every exported format under attack, beside torch."""
    quantised: tuple[QuantisedReport, ...] = ()
    """The quantised formats, each judged by itself; empty where a package has none."""
    canaries: CanariesReport | NotMeasuredJSON
    decision: DecisionReport
    package: Annotated[str | None, AfterValidator(_inside)]
    """Folder of the signed package, relative to this report; null where there is none."""
    adapter_digest: Digest

    @model_validator(mode="after")
    def _only_released_devices_have_packages(self) -> TargetReport:
        if self.package is not None and not (self.role == "device" and self.decision.released):
            raise ValueError(f"{self.id} has a signed package and is not a released device")
        return self


class ReportDocument(_Model):
    """One provisioned fleet: what was made, how it was tested, what was decided."""

    model_config = ConfigDict(json_schema_extra={"$schema": "https://json-schema.org/draft/2020-12/schema"})

    schema_version: Literal[1] = Field(alias="schema")
    keyfoundry: str
    """Version of Keyfoundry."""
    created: Annotated[AwareDatetime, AfterValidator(lambda time: time.astimezone(UTC))]
    fleet_id: str
    command: str
    """The resolved command line, without secrets."""
    settings: dict[str, JsonValue]
    """Every setting as it was resolved."""
    versions: dict[str, str]
    seed: int
    machine: Machine
    seconds: dict[str, Annotated[float, Field(ge=0)]]
    """Seconds of each stage, in the order of the stages."""
    base: BaseReport
    data: DataReport
    verification: VerificationReport
    rule: RuleReport
    sources: tuple[SourceReport, ...]
    targets: tuple[TargetReport, ...] = Field(min_length=1)
    notes: tuple[str, ...]

    @property
    def devices(self) -> tuple[TargetReport, ...]:
        """The targets that are devices."""
        return tuple(target for target in self.targets if target.role == "device")

    @property
    def controls(self) -> tuple[TargetReport, ...]:
        """The targets that are negative controls."""
        return tuple(target for target in self.targets if target.role == "control")

    def to_bytes(self) -> bytes:
        """Return the bytes of report.json."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    @model_validator(mode="after")
    def _consistent(self) -> ReportDocument:
        sources = _unique("source", (source.id for source in self.sources))
        _unique("target", (target.id for target in self.targets))
        threats = _unique("threat", (threat.code for threat in self.verification.threats))
        used = {source.threat for source in self.sources}
        for target in self.targets:
            rows = [*target.cells, *target.by_source]
            unknown = {row.source for row in rows} - sources
            if unknown:
                raise ValueError(f"target {target.id} names sources that are not listed: {sorted(unknown)}")
            used |= {row.threat for row in (*rows, *target.threats)}
        if used - threats:
            raise ValueError(f"threats are used and not described: {sorted(used - threats)}")
        if self.rule.tests != len(self.devices):
            raise ValueError(f"{self.rule.tests} tests were announced for {len(self.devices)} devices")
        return self


def cells_of(judgement: TargetJudgement) -> tuple[CellReport, ...]:
    """Every source and attack on one target."""
    return tuple(
        CellReport(
            source=cell.source,
            threat=cell.threat.code,
            attack=cell.attack,
            perturbation=cell.perturbation.code,
            fooled=cell.fooled,
        )
        for cell in judgement.cells
    )


def by_source_of(judgement: TargetJudgement) -> tuple[SourceResult, ...]:
    """Return the per-image worst over the attacks of each source, in the order of the cells.

    As in the judgement itself, a source none of whose attacks is believed is not measured, and once one is, the
    images of its other attacks count too.
    """
    results = []
    for source in dict.fromkeys(cell.source for cell in judgement.cells):
        cells = [cell for cell in judgement.cells if cell.source == source]
        reasons = [cell.fooled.reason for cell in cells if isinstance(cell.fooled, NotMeasured)]
        broken = any((source, cell.attack) not in judgement.predictions for cell in cells)
        if broken or len(reasons) == len(cells):
            worst: Measured = NotMeasured("; ".join(dict.fromkeys(reasons)))
        else:
            fooled = np.any([judgement.fooled(source, cell.attack) for cell in cells], axis=0)
            worst = Proportion(int(fooled.sum()), len(fooled))
        results.append(SourceResult(source=source, threat=cells[0].threat.code, worst=worst))
    return tuple(results)


def threats_of(judgement: TargetJudgement) -> tuple[ThreatResultReport, ...]:
    """Return the per-image worst of each threat on one target."""
    return tuple(
        ThreatResultReport(threat=result.threat.code, sources=result.sources, worst=result.fooled)
        for result in judgement.threats
    )


def by_class_of(judgement: TargetJudgement, labels: Sequence[str]) -> tuple[ClassResult, ...]:
    """Return the worst case of the rule's threats for the images of each class."""
    worst = judgement.worst_fooled
    truth = judgement.labels[judgement.correct]
    results: list[ClassResult] = []
    for index, label in enumerate(labels):
        if isinstance(worst, NotMeasured):
            figure: Measured = worst
        elif not (truth == index).any():
            figure = NotMeasured("the target gets none of this class right")
        else:
            figure = Proportion(int(worst[truth == index].sum()), int((truth == index).sum()))
        results.append(ClassResult(label=label, worst=figure))
    return tuple(results)


def formats_of(
    judged: PackageJudgement | NotMeasured,
) -> tuple[FormatUnderAttack | FormatNotAttacked, ...] | NotMeasured:
    """Return every format of a package under attack."""
    if isinstance(judged, NotMeasured):
        return judged
    rows: list[FormatUnderAttack | FormatNotAttacked] = []
    for name, found in judged.formats.items():
        if isinstance(found, NotMeasured):
            rows.append(FormatNotAttacked(format=name, not_measured=found.reason))
            continue
        rows.append(
            FormatUnderAttack(
                format=name,
                runtime=found.runtime,
                images=found.images,
                fooled=found.fooled,
                torch_fooled=found.torch_fooled,
                torch_only=found.torch_only,
                format_only=found.format_only,
                differing=found.differing,
                largest_difference=found.largest_difference,
            )
        )
    return tuple(rows)


def canaries_report(canaries: Canaries | None) -> CanariesReport | NotMeasured:
    """Return the gradient-masking list of one model; without one, why not."""
    if canaries is None:
        return NotMeasured("this budget looks for no gradient masking; --budget standard does")
    return CanariesReport(
        images=canaries.images,
        perturbation=canaries.perturbation.code,
        passed=canaries.passed,
        results=tuple(
            CanaryReport(name=canary.name, passed=canary.verdict, sentence=canary.sentence)
            for canary in canaries.results
        ),
    )


def now() -> datetime:
    """Return the time to put into ``created``: UTC, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def schema_json() -> str:
    """Return the text of the published JSON Schema."""
    return json.dumps(ReportDocument.model_json_schema(), indent=2) + "\n"


def write_schema(path: Path = SCHEMA_PATH) -> None:
    """Write the published JSON Schema; run it after every change of the models."""
    write_atomic(path, schema_json().encode())


def _unique(what: str, names: Iterable[str]) -> set[str]:
    listed = list(names)
    repeated = sorted({name for name in listed if listed.count(name) > 1})
    if repeated:
        raise ValueError(f"the {what} {repeated[0]!r} is listed twice")
    return set(listed)
