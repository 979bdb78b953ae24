"""Gradient-masking canaries: signs that a model only *looks* robust because its gradients mislead the attacks.

Rules: the canaries of one model are run before any of its figures is believed, on the images that it gets right when
clean, at one L∞ radius, on 8-bit images. Where two attacks are compared it is on the same images, by McNemar's
exact one-sided test at ``LEVEL``: a canary fails if the attack that must not win does win by more than chance. What
could not be run is not measured, and that is no pass. The list follows Athalye, Carlini and Wagner (ICML 2018,
section 3.1) and Carlini et al. ("On evaluating adversarial robustness", 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from device_tests.accuracy import predict
from device_tests.attacks.attack import Attack, Progress
from device_tests.attacks.bim import BIM
from device_tests.attacks.fgsm import FGSM
from device_tests.attacks.gradients import at_rest, batches, loss_gradient
from device_tests.attacks.pgd import PGD
from device_tests.evidence import Measured, Proportion, measured_from_json
from device_tests.images import LEVELS, from_8bit
from device_tests.perturbation import Norm, Perturbation
from device_tests.self_check import StrongBudget, run_strong
from device_tests.statistics import Pairs
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from exporters.run_torch import TorchRuntime
from keys.errors import KeyfoundryError

LEVEL = 0.01
"""A comparison fails below this one-sided p: one sound model in a hundred fails it by chance, at most."""

FGSM_LEVEL = 0.05
"""FGSM must fool more than noise with a one-sided p below this."""

LEAST_IMAGES = 20
"""With fewer images no comparison could fail, so that none is made."""

SURVIVORS = 0.01
"""Share of the images that may withstand an unbounded attack: the last iterate of a few runs is not a proof."""

MOSTLY_NOISE = 0.9
"""Where noise alone fools this share, the radius is too large to compare attacks."""

FLAT_IMAGES = 0.05
"""Share of the images whose gradient may be zero in more than half of the pixels."""

RISING_IMAGES = 0.8
"""Share of the images whose loss must rise when each pixel moves one 8-bit level along the gradient's sign."""

WIDER = (2, 4)
"""Where ε fools too few images to put noise, FGSM and PGD in order, these multiples of it are tried."""

UNBOUNDED = PGD(steps=30)
RESTARTS = 3
STEPS = (BIM(steps=1, reach=1.0), BIM(steps=5, reach=2.0), BIM(steps=25, reach=2.5))
STRONG_BUDGET = StrongBudget()
"""What white-box means here beside PGD: the self-check's strong attack."""


@dataclass(frozen=True)
class Canary:
    """One sign: whether it passed, a sentence for people, and the figures behind it by name."""

    name: str
    verdict: bool | NotMeasured
    sentence: str
    figures: Mapping[str, Measured] = field(default_factory=dict[str, Measured])

    @property
    def passed(self) -> bool:
        """True only if it was measured and passed."""
        return self.verdict is True

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "verdict": self.verdict.to_json() if isinstance(self.verdict, NotMeasured) else self.verdict,
            "sentence": self.sentence,
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Canary:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        if set(value) != {"name", "verdict", "sentence", "figures"}:
            raise ValueError(f"no canary: fields {sorted(value)}")
        verdict = value["verdict"]
        if not isinstance(verdict, bool):
            verdict = NotMeasured.from_json(verdict)
        figures = {str(name): measured_from_json(figure) for name, figure in value["figures"].items()}
        return cls(str(value["name"]), verdict, str(value["sentence"]), figures)


@dataclass(frozen=True)
class Canaries:
    """All canaries of one model. ``source``: its id. ``images``: how many it got right when clean and were used."""

    source: str
    perturbation: Perturbation
    images: int
    results: tuple[Canary, ...]

    @property
    def passed(self) -> bool:
        """True only if every canary was measured and passed."""
        return all(canary.passed for canary in self.results)

    @property
    def failed(self) -> tuple[Canary, ...]:
        """Those that were measured and did not pass: each of them marks every figure of this model."""
        return tuple(canary for canary in self.results if canary.verdict is False)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of all that did not pass, measured or not."""
        return tuple(f"{canary.name}: {canary.sentence}" for canary in self.results if not canary.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``passed`` is derived and only for readers."""
        return {
            "source": self.source,
            "perturbation": self.perturbation.code,
            "images": self.images,
            "passed": self.passed,
            "results": [canary.to_json() for canary in self.results],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Canaries:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        if set(value) != {"source", "perturbation", "images", "passed", "results"}:
            raise ValueError(f"no canaries: fields {sorted(value)}")
        canaries = cls(
            str(value["source"]),
            Perturbation.parse(str(value["perturbation"])),
            int(value["images"]),
            tuple(Canary.from_json(canary) for canary in value["results"]),
        )
        if canaries.passed is not value["passed"]:
            raise ValueError(f"the canaries of {canaries.source} disagree with their own verdicts")
        return canaries


def run_canaries(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float,
    seed: int,
    black_box: Mapping[str, np.ndarray],
    square: Attack | None,
    source: str = "model",
    strong: StrongBudget = STRONG_BUDGET,
    progress: Progress | None = None,
) -> Canaries:
    """Run all canaries of one model at the L∞ radius ``epsilon`` (on [0, 1]).

    ``images``: uint8 N×C×H×W; ``labels``: integers N. ``black_box``: by name, adversarial uint8 images made on other
    models, in the clean images' order and within ``epsilon`` of them. ``square``: an attack that uses no gradients.
    ``strong``: budget of the white-box attack, whose ``images`` is not used. ``progress`` hears of every gradient
    and of ``square``'s queries, at most N · :func:`canary_cost`. The model is left as it was.
    Raises ``ValueError`` if adversarial images do not fit the clean ones.
    """
    perturbation = Perturbation(Norm.LINF, epsilon)
    for name, attacked in black_box.items():
        if attacked.shape != images.shape or not perturbation.contains(attacked, images).all():
            raise ValueError(f"the images of {name} do not lie within {perturbation} of the clean ones")
    right = _predict(model, images) == labels
    bench = _Bench(model, images[right], labels[right].astype(np.int64), perturbation, seed, source, strong, progress)
    shown = {name: attacked[right] for name, attacked in black_box.items()}
    checks: dict[str, Callable[[], Canary]] = {
        "same answer twice": lambda: _same_answer(bench),
        "loss surface": lambda: _loss_surface(bench),
        "unbounded budget": lambda: _unbounded(bench),
        "more steps": lambda: _more_steps(bench),
        "noise, FGSM, PGD": lambda: _order(bench),
        "white box against black box": lambda: _black_box(bench, shown),
        "white box against queries": lambda: _queries(bench, square),
    }
    results: list[Canary] = []
    for name, check in checks.items():
        if len(bench.clean) < LEAST_IMAGES:
            results.append(
                _unmeasured(name, f"the model gets {len(bench.clean)} images right, {LEAST_IMAGES} are needed")
            )
            continue
        try:
            results.append(replace(check(), name=name))
        except KeyfoundryError as error:
            results.append(_unmeasured(name, str(error)))
    return Canaries(source, perturbation, len(bench.clean), tuple(results))


def canary_cost(strong: StrongBudget = STRONG_BUDGET, square: Attack | None = None) -> int:
    """Gradients and queries per image, at most."""
    attacks = [*STEPS, *[FGSM(), PGD()] * (1 + len(WIDER)), *[UNBOUNDED] * RESTARTS]
    total = sum(attack.gradients_per_image for attack in attacks) + (strong.steps + 1) * (1 + strong.targets)
    return total + (0 if square is None else square.gradients_per_image)


def loss_slice(
    model: nn.Module, image: np.ndarray, label: int, *, epsilon: float, points: int = 21, seed: int = 0
) -> np.ndarray:
    """Cross-entropy on a slice of the input space around one image, for a picture: float64, points×points.

    ``image``: uint8 C×H×W, in the middle. Rows run along the sign of its gradient, columns along a random sign, both
    from −``epsilon`` to ``epsilon`` in even steps; pixels are cut to [0, 1]. A masked model shows a plain, stairs or
    noise where a sound one shows a slope along the rows. ``points`` is odd, so that the image itself is on the grid.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"a slice needs an odd number of points, at least 3, not {points}")
    device = _device(model)
    clean = torch.from_numpy(from_8bit(image[None])).to(device)
    truth = torch.tensor([label], device=device)
    generator = torch.Generator().manual_seed(seed)
    across = torch.where(torch.rand(clean.shape, generator=generator) < 0.5, -1.0, 1.0).to(device)
    offsets = torch.linspace(-epsilon, epsilon, points, device=device)
    offsets[points // 2] = 0
    with at_rest(model), torch.no_grad():
        along = loss_gradient(model, clean, truth).sign()
        rows, columns = torch.meshgrid(offsets, offsets, indexing="ij")
        grid = clean + rows.reshape(-1, 1, 1, 1) * along + columns.reshape(-1, 1, 1, 1) * across
        losses = _losses(model, grid.clamp(0, 1), truth.expand(points * points))
    return losses.reshape(points, points)


@dataclass(eq=False)
class _Bench:
    """One model and its images, with every attack run once."""

    model: nn.Module
    clean: np.ndarray
    labels: np.ndarray
    perturbation: Perturbation
    seed: int
    source: str
    budget: StrongBudget
    progress: Progress | None
    done: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])

    def tensors(self, chosen: np.ndarray | slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        device = _device(self.model)
        return (
            torch.from_numpy(from_8bit(self.clean[chosen])).to(device),
            torch.from_numpy(self.labels[chosen]).to(device),
        )

    def fooled(self, attack: Attack, perturbation: Perturbation | None = None) -> np.ndarray:
        """Which images the attack fools the model with, within the bench's perturbation or another: bool N."""
        within = perturbation or self.perturbation
        key = f"{attack.description} within {within}"
        if key not in self.done:
            self.done[key] = self.fooled_with(attack, np.arange(len(self.clean)), within, self.seed)
        return self.done[key]

    def fooled_with(self, attack: Attack, chosen: np.ndarray, perturbation: Perturbation, seed: int) -> np.ndarray:
        images, labels = self.tensors(chosen)
        budget: dict[str, Any] = {"epsilon": perturbation.radius, "seed": seed, "progress": self.progress}
        candidates = attack.generate(self.model, images, labels, **budget)
        return self.wrong_on(perturbation.to_8bit(candidates.detach().cpu().numpy(), self.clean[chosen]), chosen)

    def wrong_on(self, attacked: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        return _predict(self.model, attacked) != self.labels[chosen]

    def white_box(self) -> np.ndarray:
        """Which images PGD or the strong attack fools the model with."""
        if "white box" not in self.done:
            strong = run_strong(
                Source(self.source, Threat.TARGET_ITSELF, self.model, "the model itself"), self.clean, self.labels,
                perturbation=self.perturbation, budget=replace(self.budget, images=len(self.clean)), seed=self.seed,
                progress=self.progress,
            )  # fmt: skip
            fooled = self.fooled(PGD()).copy()
            fooled[np.array(strong.images, dtype=np.int64)] |= np.array(strong.fooled, dtype=bool)
            # A model that answers at random may get a right image wrong when it is asked again.
            self.done["white box"] = fooled
        return self.done["white box"]


def _same_answer(bench: _Bench) -> Canary:
    first, second = (_logits(bench.model, bench.clean) for _ in range(2))
    scale = np.abs(first).max(axis=1)
    same = np.abs(first - second).max(axis=1) <= 1e-4 * scale
    figures = {"same": _share(same)}
    if same.all():
        return _canary(True, "The same image gives the same scores when it is asked for again.", figures)
    return _canary(
        False,
        f"{int((~same).sum())} of {len(same)} images get other scores when they are asked for again: the model answers "
        "at random, and attacks must average over its answers.",
        figures,
    )


def _loss_surface(bench: _Bench) -> Canary:
    images, labels = bench.tensors()
    zero, rising = np.zeros(len(images)), np.zeros(len(images), dtype=bool)
    with at_rest(bench.model), torch.no_grad():
        for part in batches(images):
            gradient = loss_gradient(bench.model, images[part], labels[part])
            zero[part] = (gradient == 0).flatten(1).double().mean(dim=1).cpu().numpy()
            stepped = (images[part] + gradient.sign() / LEVELS).clamp(0, 1)
            before, after = (_losses(bench.model, x, labels[part]) for x in (images[part], stepped))
            rising[part] = after > before
    flat = zero > 0.5
    figures = {"mostly zero gradient": _share(flat), "loss rises": _share(rising)}
    good = flat.mean() <= FLAT_IMAGES and rising.mean() >= RISING_IMAGES
    return _canary(
        bool(good),
        f"{zero.mean():.1%} of all pixels have a gradient of exactly zero; on {int(flat.sum())} of {len(flat)} images "
        f"it is most pixels (at most {FLAT_IMAGES:.0%} may). One level along the gradient raises the loss of "
        f"{int(rising.sum())} images (at least {RISING_IMAGES:.0%} must).",
        figures,
    )


def _unbounded(bench: _Bench) -> Canary:
    standing = np.arange(len(bench.clean))
    for restart in range(RESTARTS):
        if len(standing):
            whole = Perturbation(Norm.LINF, 1.0)
            standing = standing[~bench.fooled_with(UNBOUNDED, standing, whole, bench.seed + restart)]
    left = np.isin(np.arange(len(bench.clean)), standing)
    return _canary(
        bool(left.mean() <= SURVIVORS),
        f"With no bound on the change (ε = 1, {RESTARTS} runs of PGD) {int(left.sum())} of {len(left)} images "
        f"withstand; at most {SURVIVORS:.0%} may.",
        {"withstand": _share(left)},
    )


def _more_steps(bench: _Bench) -> Canary:
    runs = [bench.fooled(attack) for attack in STEPS]
    figures = {f"{attack.steps} steps": _share(fooled) for attack, fooled in zip(STEPS, runs, strict=True)}
    worst = min(Pairs.of(few, many).p_first_larger for i, few in enumerate(runs) for many in runs[i + 1 :])
    counts = ", ".join(f"{int(run.sum())} in {attack.steps}" for attack, run in zip(STEPS, runs, strict=True))
    verdict = "fewer steps are never better than more" if worst >= LEVEL else "fewer steps fool more than more steps do"
    return _canary(
        worst >= LEVEL,
        f"BIM fools {counts} steps, of {len(runs[0])} images: {verdict} (smallest p = {worst:.2g}, limit {LEVEL:g}).",
        figures,
    )


def _order(bench: _Bench) -> Canary:
    """Compare at the smallest of a few radii at which enough images are fooled to tell the attacks apart."""
    canary = _order_at(bench, bench.perturbation)
    for factor in WIDER:
        if isinstance(canary.verdict, NotMeasured):
            wider = _order_at(bench, Perturbation(Norm.LINF, min(1.0, factor * bench.perturbation.radius)))
            canary = canary if isinstance(wider.verdict, NotMeasured) else wider
    return canary


def _order_at(bench: _Bench, perturbation: Perturbation) -> Canary:
    generator = np.random.default_rng(bench.seed)
    signs = generator.choice(np.array([-1.0, 1.0], dtype=np.float32), size=bench.clean.shape)
    noisy = (from_8bit(bench.clean) + perturbation.radius * signs).clip(0, 1)
    noise = bench.wrong_on(perturbation.to_8bit(noisy, bench.clean))
    fgsm, pgd = (bench.fooled(attack, perturbation) for attack in (FGSM(), PGD()))
    figures = {"noise": _share(noise), "FGSM": _share(fgsm), "PGD": _share(pgd)}
    counts = f"At {perturbation} noise fools {int(noise.sum())}, FGSM {int(fgsm.sum())}, PGD {int(pgd.sum())} "
    counts += f"of {len(noise)} images"
    below_pgd = Pairs.of(fgsm, pgd).p_first_larger
    if below_pgd < LEVEL:
        return _canary(False, f"{counts}: FGSM beats PGD (p = {below_pgd:.2g}, limit {LEVEL:g}).", figures)
    above_noise = Pairs.of(fgsm, noise).p_first_larger
    if above_noise < FGSM_LEVEL:
        return _canary(True, f"{counts}, in this order.", figures)
    if noise.mean() >= MOSTLY_NOISE:
        return _unmeasured("", f"{counts}: the radius is so large that noise is enough", figures)
    # So few that FGSM could not have been better than noise by more than chance.
    if 0.5 ** int((fgsm | pgd | noise).sum()) >= FGSM_LEVEL:
        return _unmeasured("", f"{counts}: too few to tell them apart; take a larger radius or more images", figures)
    words = f"FGSM is not better than noise (p = {above_noise:.2g}, must be below {FGSM_LEVEL:g})"
    return _canary(False, f"{counts}: {words}.", figures)


def _black_box(bench: _Bench, attacked: Mapping[str, np.ndarray]) -> Canary:
    if not attacked:
        return _unmeasured("", "no adversarial images of another model were given")
    white = bench.white_box()
    figures: dict[str, Measured] = {"white box": _share(white)}
    better: list[str] = []
    most = 0
    for name, images in attacked.items():
        black = bench.wrong_on(images)
        figures[name] = _share(black)
        most = max(most, int(black.sum()))
        p = Pairs.of(black, white).p_first_larger
        if p < LEVEL:
            better.append(f"{name} ({int(black.sum())}, p = {p:.2g})")
    counts = f"White-box attacks fool {int(white.sum())} of {len(white)} images"
    if better:
        return _canary(False, f"{counts}, and images made on another model fool more: {', '.join(better)}.", figures)
    return _canary(True, f"{counts}, images made on other models {most} at most.", figures)


def _queries(bench: _Bench, square: Attack | None) -> Canary:
    if square is None:
        return _unmeasured("", "no attack by queries was given")
    white, found = bench.white_box(), bench.fooled(square)
    p = Pairs.of(found, white).p_first_larger
    counts = f"White-box attacks fool {int(white.sum())} of {len(white)} images, {square.name} {int(found.sum())}"
    end = "." if p >= LEVEL else f": an attack without gradients is stronger (p = {p:.2g}, limit {LEVEL:g})."
    return _canary(p >= LEVEL, counts + end, {"white box": _share(white), square.name: _share(found)})


def _canary(passed: bool, sentence: str, figures: Mapping[str, Measured]) -> Canary:
    return Canary("", passed, sentence, figures)


def _unmeasured(name: str, reason: str, figures: Mapping[str, Measured] | None = None) -> Canary:
    return Canary(name, NotMeasured(reason), f"Not measured: {reason}.", figures or {})


def _share(chosen: np.ndarray) -> Proportion:
    return Proportion(int(chosen.sum()), len(chosen))


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _predict(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with at_rest(model):
        return predict(TorchRuntime(model), images)


def _logits(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with at_rest(model):
        return TorchRuntime(model).logits(from_8bit(images))


def _losses(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Cross-entropy of each image, float64, so that a confident model's small losses can be told apart."""
    parts = [
        nn.functional.cross_entropy(model(images[part]).double(), labels[part], reduction="none")
        for part in batches(images)
    ]
    return torch.cat(parts).cpu().numpy()
