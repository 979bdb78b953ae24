"""Transfer: attacks made once on every source, the same 8-bit images judged on every target.

Rules: adversarial images are rounded to 8 bits before anyone judges them; only images that the target gets right
when clean count; the worst case is taken image by image over all attacks of the threats that the rule counts.
A source is believed only if one of its attacks passed its self-check; what is not believed is not measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from device_tests.accuracy import predict
from device_tests.crafting import AdversarialSet
from device_tests.evidence import Measured, Proportion, SelfCheck, ThreatResult, TransferCell
from device_tests.threats import Threat
from exporters.measured import NotMeasured
from exporters.runtime import Runtime

RULE_THREATS = tuple(threat for threat in Threat if threat.in_rule)


@dataclass(frozen=True, eq=False)
class TargetJudgement:
    """Everything seen on one target, image by image, and the figures drawn from it.

    ``labels``, ``clean_predictions``: int64 N. ``predictions``: (source, attack) → int64 N, in the same order.
    ``cells``: one per source and attack. ``threats``: one per threat that was run or is required.
    ``worst_fooled``: for each image that the target gets right when clean, in order, whether any attack of a
    threat in the rule fools it; or why that is not known.
    """

    target: str
    labels: np.ndarray
    clean_predictions: np.ndarray
    predictions: Mapping[tuple[str, str], np.ndarray]
    cells: tuple[TransferCell, ...]
    threats: tuple[ThreatResult, ...]
    worst_fooled: np.ndarray | NotMeasured

    @property
    def correct(self) -> np.ndarray:
        """Which images the target gets right when clean: bool N."""
        return self.clean_predictions == self.labels

    def wrong(self, source: str, attack: str) -> np.ndarray:
        """Which images the target gets wrong under this attack, whether right when clean or not: bool N."""
        return self.predictions[source, attack] != self.labels

    def fooled(self, source: str, attack: str) -> np.ndarray:
        """Among the images that are right when clean, in order, which this attack fools: bool n."""
        return self.wrong(source, attack)[self.correct]

    @property
    def worst_case(self) -> Measured:
        """The per-image worst over every attack of every threat in the rule."""
        if isinstance(self.worst_fooled, NotMeasured):
            return self.worst_fooled
        return _share(self.worst_fooled)


def judge(
    target: Runtime,
    target_id: str,
    images: np.ndarray,
    labels: np.ndarray,
    adversarial: Sequence[AdversarialSet],
    checks: Sequence[SelfCheck],
    *,
    required: Collection[Threat] = RULE_THREATS,
    weak: Mapping[str, str] | None = None,
) -> TargetJudgement:
    """Evaluate one target on the clean images and on every adversarial set.

    ``images``: the clean uint8 N×C×H×W that the sets were made from; ``labels``: integers N. ``checks``: one per
    source and attack. A source is believed if one of its attacks passed: the strongest is what the worst case
    rests on, and another attack that is weaker at home may still transfer better. The cells of any other source
    are not measured; nor then are its threat and the worst case. A ``required`` threat without a source is not
    measured.

    Controls and the target itself never enter the worst case. A control says what retraining alone changes and
    is read beside the threats: the rule's threats are fixed before anything is measured, and a yardstick is not
    one of them, although an attacker could build it too. Whoever holds the target itself wins by definition.
    ``weak``: source → why it is no attacker to reckon with (it hardly classifies), whatever its self-check says; it is
    not measured. Raises ``ValueError`` if a set was not made from these images.
    """
    _check_sets(adversarial, images)
    truth = labels.astype(np.int64)
    clean_predictions = predict(target, images)
    correct = clean_predictions == truth
    predictions: dict[tuple[str, str], np.ndarray] = {}
    cells: list[TransferCell] = []
    doubts: dict[str, str] = {}
    by_threat: dict[Threat, list[str]] = {threat: [] for threat in Threat if threat in required}
    for made in adversarial:
        threat = made.threat.on(made.source, target_id)
        by_threat.setdefault(threat, []).append(made.source)
        doubt = (weak or {}).get(made.source) or _doubt(made, checks)
        if doubt is None and made.failures:
            # The attack that broke might have been the strongest: what the others did is no worst case.
            doubts[made.source] = "; ".join(made.failures.values())
        if doubt is not None:
            doubts[made.source] = doubt
        for attack, attacked in made.images.items():
            predictions[made.source, attack] = predict(target, attacked)
            fooled = (predictions[made.source, attack] != truth)[correct]
            rate = _share(fooled) if doubt is None else NotMeasured(doubt)
            cells.append(TransferCell(made.source, threat, attack, target_id, made.perturbation, rate))
        for attack, reason in made.failures.items():
            cells.append(TransferCell(made.source, threat, attack, target_id, made.perturbation, NotMeasured(reason)))

    with_gradients = {made.source for made in adversarial if made.differentiable}

    def worst(sources: Collection[str]) -> np.ndarray:
        wrong = [predicted != truth for (source, _), predicted in predictions.items() if source in sources]
        return np.any(wrong, axis=0)[correct]

    results: list[ThreatResult] = []
    for threat in sorted(by_threat, key=list(Threat).index):
        sources = by_threat[threat]
        doubted = [doubts[source] for source in sources if source in doubts]
        if not sources:
            rate = NotMeasured(f"no attack of threat {threat.code} was run")
        elif threat in required and not with_gradients.intersection(sources):
            # Answers alone are a weak attack, and nothing vouches for it: it may add to a worst case, never be it.
            rate = NotMeasured(f"no attack of threat {threat.code} had gradients")
        elif doubted:
            rate = NotMeasured("; ".join(doubted))
        else:
            rate = _share(worst(sources))
        results.append(ThreatResult(threat, target_id, tuple(sources), rate))
    counted = [result for result in results if result.threat.in_rule]
    missing = [result.fooled.reason for result in counted if isinstance(result.fooled, NotMeasured)]
    if missing:
        worst_fooled: np.ndarray | NotMeasured = NotMeasured("; ".join(missing))
    elif not counted:
        worst_fooled = NotMeasured("no attack of a threat in the rule was run")
    else:
        worst_fooled = worst({source for result in counted for source in result.sources})
    return TargetJudgement(
        target=target_id,
        labels=truth,
        clean_predictions=clean_predictions,
        predictions=predictions,
        cells=tuple(cells),
        threats=tuple(results),
        worst_fooled=worst_fooled,
    )


def _share(fooled: np.ndarray) -> Measured:
    if len(fooled) == 0:
        return NotMeasured("the target gets none of the clean images right")
    return Proportion(int(fooled.sum()), len(fooled))


def _doubt(made: AdversarialSet, checks: Sequence[SelfCheck]) -> str | None:
    """Why a source is not believed; ``None`` if one of its attacks passed its self-check, or none is needed."""
    if not made.needs_self_check:
        return None
    own = [check for check in checks if check.source == made.source and check.attack in made.images]
    if any(check.passed for check in own):
        return None
    if not own:
        return f"the attacks on {made.source} were not self-checked"
    found = []
    for check in own:
        mine, strong = check.attack_success, check.strong_success
        if isinstance(mine, NotMeasured):
            return f"the self-check on {made.source} was not measured: {mine.reason}"
        if isinstance(strong, NotMeasured):
            return f"the self-check on {made.source} was not measured: {strong.reason}"
        found.append(f"{check.attack} fools {mine.value:.3f}, {check.strong_attack} {strong.value:.3f} of {strong.n}")
    return f"the attacks were too weak on their own source {made.source} ({'; '.join(found)})"


def _check_sets(adversarial: Sequence[AdversarialSet], images: np.ndarray) -> None:
    if len(adversarial) != len({made.source for made in adversarial}):
        raise ValueError("a source occurs twice among the adversarial sets")
    if len({made.perturbation for made in adversarial}) > 1:
        raise ValueError("the adversarial sets were made for different perturbations")
    for made in adversarial:
        if not made.images and not made.failures:
            raise ValueError(f"no attack was run on {made.source}")
        for attack, attacked in made.images.items():
            if attacked.shape != images.shape or attacked.dtype != np.uint8:
                raise ValueError(f"{attack} on {made.source} has {attacked.dtype} images {attacked.shape}")
            if not made.perturbation.contains(attacked, images).all():
                raise ValueError(f"{attack} on {made.source} was not made from these images")
