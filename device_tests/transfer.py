"""Transfer: attacks made once on every source, the same 8-bit images judged on every target.

Rules: adversarial images are rounded to 8 bits before anyone judges them; only images that the target gets right
when clean count; the worst case is taken image by image over all attacks of the threats that the rule counts.
A source is believed only if one of its attacks passed its self-check; what is not believed is not measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from device_tests.accuracy import predict
from device_tests.attacks.attack import Attack, Progress
from device_tests.evidence import Measured, Proportion, SelfCheck, ThreatResult, TransferCell
from device_tests.images import from_8bit, reachable_levels, to_8bit
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from exporters.runtime import Runtime
from keys.files import write_atomic

RULE_THREATS = tuple(threat for threat in Threat if threat.in_rule)


@dataclass(frozen=True, eq=False)
class AdversarialSet:
    """What all attacks proposed on one source: attack name → uint8 images N×C×H×W, in the clean images' order.

    ``epsilon``: L∞ radius on [0, 1]; every image lies within floor(ε·255) levels of its clean image. ``key``:
    content digest of everything the images depend on (:func:`adversarial_key`).
    """

    source: str
    threat: Threat
    epsilon: float
    key: str
    images: Mapping[str, np.ndarray]


def content_key(model: nn.Module, images: np.ndarray, labels: np.ndarray, *settings: object) -> str:
    """SHA-256 (64 hex digits) over a model, 8-bit images, their labels, and settings by their text.

    The model counts by its printed structure and by every parameter and buffer, saved or not; a model whose
    function depends on anything else (a plain attribute) must register it as a buffer.
    """
    digest = hashlib.sha256(repr([str(setting) for setting in settings]).encode())
    digest.update(str(model).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for array in (images, labels.astype(np.int64)):
        digest.update(f"\0{array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def adversarial_key(
    source: Source,
    attacks: Sequence[Attack],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float,
    seed: int,
) -> str:
    """Return the key of what :func:`craft` returns for the same arguments."""
    budgets = [f"{attack.name}: {attack.description}" for attack in attacks]
    identity = ("adversarial", source.id, source.threat.code, epsilon, seed)
    return content_key(source.model, images, labels, *identity, *budgets)


def craft(
    source: Source,
    attacks: Sequence[Attack],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float,
    seed: int,
    progress: Progress | None = None,
) -> AdversarialSet:
    """Run every attack on the source and round what it proposes to 8 bits, inside the ball.

    ``images``: uint8 N×C×H×W; ``labels``: integers N; ``epsilon``: L∞ radius on [0, 1], of which the whole levels
    are used. ``progress`` hears of len(images) · Σ ``gradients_per_image`` gradients in all.
    Raises :class:`InputError` if ε reaches no level or an attack's values are not finite.
    """
    key = adversarial_key(source, attacks, images, labels, epsilon=epsilon, seed=seed)
    radius = reachable_levels(epsilon) / 255
    device = next((tensor.device for tensor in source.model.parameters()), torch.device("cpu"))
    clean = torch.from_numpy(from_8bit(images)).to(device)
    truth = torch.from_numpy(labels.astype(np.int64)).to(device)
    proposed: dict[str, np.ndarray] = {}
    for attack in sorted(attacks, key=lambda attack: attack.name):  # the order in which a stored set is read back
        candidates = attack.generate(source.model, clean, truth, epsilon=radius, seed=seed, progress=progress)
        proposed[attack.name] = to_8bit(candidates.detach().cpu().numpy(), images, epsilon)
    return AdversarialSet(source.id, source.threat, epsilon, key, proposed)


def write_adversarial(path: Path, adversarial: AdversarialSet) -> None:
    """Write a set as safetensors, whole or not at all."""
    metadata = {
        "key": adversarial.key,
        "source": adversarial.source,
        "threat": adversarial.threat.code,
        "epsilon": repr(adversarial.epsilon),
    }
    write_atomic(path, save(dict(adversarial.images), metadata=metadata))


def read_adversarial(path: Path, key: str) -> AdversarialSet | None:
    """Read the set under ``path`` if it has this key; ``None`` if there is none, it is damaged, or of another key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("key") != key:
                return None
            images = {name: stored.get_tensor(name) for name in sorted(stored.keys())}
    except SafetensorError:
        return None
    threat = Threat.from_code(metadata["threat"])
    return AdversarialSet(metadata["source"], threat, float(metadata["epsilon"]), key, images)


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
        if doubt is not None:
            doubts[made.source] = doubt
        for attack, attacked in made.images.items():
            predictions[made.source, attack] = predict(target, attacked)
            fooled = (predictions[made.source, attack] != truth)[correct]
            rate = _share(fooled) if doubt is None else NotMeasured(doubt)
            cells.append(TransferCell(made.source, threat, attack, target_id, made.epsilon, rate))

    def worst(sources: Collection[str]) -> np.ndarray:
        wrong = [predicted != truth for (source, _), predicted in predictions.items() if source in sources]
        return np.any(wrong, axis=0)[correct]

    results: list[ThreatResult] = []
    for threat in sorted(by_threat, key=list(Threat).index):
        sources = by_threat[threat]
        doubted = [doubts[source] for source in sources if source in doubts]
        if not sources:
            rate = NotMeasured(f"no attack of threat {threat.code} was run")
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
    """Why a source is not believed; ``None`` if one of its attacks passed its self-check."""
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
    if len({made.epsilon for made in adversarial}) > 1:
        raise ValueError("the adversarial sets were made with different radii")
    for made in adversarial:
        if not made.images:
            raise ValueError(f"no attack was run on {made.source}")
        levels = reachable_levels(made.epsilon)
        for attack, attacked in made.images.items():
            if attacked.shape != images.shape or attacked.dtype != np.uint8:
                raise ValueError(f"{attack} on {made.source} has {attacked.dtype} images {attacked.shape}")
            if np.abs(attacked.astype(np.int16) - images.astype(np.int16)).max(initial=0) > levels:
                raise ValueError(f"{attack} on {made.source} was not made from these images")
