"""What the purifier saves and what it costs: accuracy and picture quality, with and without it, and who breaks it.

Four answers stand beside each other on the same images: no defence, JPEG, total variation, and the purifier. PGD and
AutoAttack know nothing of any of them; BPDA with EOT knows the purifier and everything but its seed, and is run on its
output and on its whole trajectory, and Square Attack asks the purified classifier for scores. A defence that is only
measured on those that know nothing is not measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from device_tests.accuracy import predict
from device_tests.attacks.attack import Attack
from device_tests.attacks.autoattack import AutoAttack
from device_tests.attacks.pgd import PGD
from device_tests.crafting import content_key, craft
from device_tests.defences.jpeg import JpegCompression
from device_tests.defences.total_variation import TotalVariation
from device_tests.evidence import Proportion
from device_tests.images import from_8bit
from device_tests.perturbation import Perturbation
from device_tests.report.charts import Pictures
from device_tests.report.study_document import (
    BarGroup,
    Bars,
    BudgetLine,
    Gallery,
    GalleryItem,
    Section,
    StudyDocument,
    Table,
    TableCell,
)
from device_tests.statistics import Pairs
from device_tests.threats import Source, Threat
from exporters.run_torch import TorchRuntime
from factory.purifier.aware_attack import PurifierBPDA, PurifierSquare
from factory.purifier.likeness import psnr, ssim
from factory.purifier.purify import purify
from factory.purifier.settings import PurifierSettings
from factory.studies.spec import PurifierSpec
from factory.studies.study_report import study_document, written
from factory.studies.workbench import FleetMeasured, Workbench
from keys.errors import CheckFailed
from keys.files import write_atomic

GALLERY = "purified"
NONE, JPEG, TV, PURIFIER = "no defence", "JPEG", "total variation", "purifier"
DEFENCES = (NONE, JPEG, TV, PURIFIER)
CLEAN, OBLIVIOUS, AUTOATTACK = "clean", "PGD", "AutoAttack"
AWARE, TRAJECTORY, QUERIES = "BPDA with EOT", "BPDA on the trajectory", "Square through the purifier"
_FORMAT = "1"
_TV_STEPS = 100


@dataclass(frozen=True, eq=False)
class Victim:
    """A classifier by name; ``source``: as what it is attacked."""

    name: str
    model: nn.Module
    source: Source


@dataclass(frozen=True, eq=False)
class Answered:
    """One set of images behind every defence. ``images``, by defence: uint8 N×C×H×W; ``right``: bool N.

    ``clean``: uint8, what they were before the attack; ``changed``: bool N, where the purifier found a crossing;
    ``diverged``: images whose optimisation diverged, which stay as they were given.
    """

    clean: np.ndarray
    images: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    changed: np.ndarray
    diverged: int


Measurements = dict[str, Answered]


def purifier_study(
    bench: Workbench, spec: PurifierSpec, command: str
) -> tuple[StudyDocument, dict[str, list[Pictures]]]:
    """Attack the base, and the first model of each arm, before and behind every defence."""
    victims = [Victim("the public base", bench.base_model, bench.base_source())]
    for arm in spec.arms:
        member = bench.zoo.member(spec.arm(arm), 1)
        source = Source(member.id, Threat.SIBLING_DEVICE, member.baked, f"{member.id} itself", (member.id,))
        victims.append(Victim(member.id, member.baked, source))
    measured = {victim.name: _measure(bench, spec, victim) for victim in victims}
    sections: list[Section] = []
    highlights: dict[str, FleetMeasured] = {}
    for name, found in measured.items():
        sections.append(Section(title=f"Accuracy: {name}", prose=_prose(found), blocks=(_bars(found), _table(found))))
        sections.append(Section(title=f"Picture quality: {name}", prose=(), blocks=(_quality_table(found),)))
        highlights |= {
            f"{name}: accuracy behind the purifier, {attack}": _share(found[attack].right[PURIFIER]) for attack in found
        }
    gallery, pictures = _gallery(bench, measured[victims[0].name])
    sections.append(gallery)
    document = study_document(
        bench, name="purifier", title="What the deep-image-prior purifier saves, and what it costs",
        conclusion=[sentence for name, found in measured.items() for sentence in _conclusion(name, found)],
        highlights=highlights, budgets=_budgets(spec), sections=sections, command=command,
    )  # fmt: skip
    return document, {GALLERY: pictures}


def _measure(bench: Workbench, spec: PurifierSpec, victim: Victim) -> Measurements:
    on = bench.images()
    perturbation = Perturbation.parse(spec.perturbation)
    few = min(spec.aware_images, len(on.images))
    aware = {
        name: _attacked(bench, victim.source, attack, perturbation, on.images[:few], on.labels[:few], spec.aware_batch)
        for name, attack in _aware(spec).items()
    }
    oblivious = {
        name: _attacked(bench, victim.source, attack, perturbation, on.images, on.labels)
        for name, attack in _oblivious(spec).items()
    }
    sets = {CLEAN: on.images, **oblivious, **aware}
    return {
        name: _answered(bench, spec, victim, images, on.images[: len(images)], on.labels[: len(images)], name)
        for name, images in sets.items()
    }


def _oblivious(spec: PurifierSpec) -> dict[str, Attack]:
    autoattack = AutoAttack(spec.autoattack_steps, spec.autoattack_targets, spec.autoattack_queries)
    return {OBLIVIOUS: PGD(steps=spec.attack_steps), AUTOATTACK: autoattack}


def _aware(spec: PurifierSpec) -> dict[str, Attack]:
    output = PurifierBPDA(spec.purifier, steps=spec.aware_steps, samples=spec.aware_samples)
    return {
        AWARE: output,
        TRAJECTORY: dataclasses.replace(output, trajectory=True),
        QUERIES: PurifierSquare(spec.purifier, spec.aware_queries),
    }


def _attacked(
    bench: Workbench, source: Source, attack: Attack, perturbation: Perturbation, images: np.ndarray,
    labels: np.ndarray, batch: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Adversarial images uint8 N×C×H×W, kept ``batch`` at a time (all at once for None)."""
    size = batch or len(images)
    parts: list[np.ndarray] = []
    total = len(images) * attack.gradients_per_image
    with bench.progress.stage(f"{attack.name} on {source.id}", total=total, unit="gradients") as stage:
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            cache = bench.shared / "purifier" / f"{source.id}-{start:04d}"
            made = craft(
                source, [attack], images[part], labels[part], perturbation=perturbation, seed=bench.spec.seed,
                cache=cache, progress=stage.advance,
            )  # fmt: skip
            if made.failures:
                raise CheckFailed(f"The study cannot go on: {made.failures[attack.name]}")
            parts.append(made.images[attack.name])
    return np.concatenate(parts)


def _answered(
    bench: Workbench, spec: PurifierSpec, victim: Victim, images: np.ndarray, clean: np.ndarray, labels: np.ndarray,
    name: str,
) -> Answered:  # fmt: skip
    given = torch.from_numpy(from_8bit(images))
    purified, changed, diverged = _purified(bench, victim, images, labels, spec.purifier, name)
    shown = {
        NONE: images,
        JPEG: _levels(JpegCompression(spec.jpeg_quality)(given)),
        TV: _levels(TotalVariation(spec.tv_weight, _TV_STEPS)(given)),
        PURIFIER: purified,
    }
    runtime = TorchRuntime(victim.model)
    right = {defence: predict(runtime, found) == labels for defence, found in shown.items()}
    return Answered(clean, shown, right, changed, diverged)


def _purified(
    bench: Workbench, victim: Victim, images: np.ndarray, labels: np.ndarray, settings: PurifierSettings, name: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Purified images, whether each was changed, and how many diverged; batch by batch, kept for the next run."""
    folder = bench.shared / "purifier" / f"{victim.source.id}-purified"
    parts: list[dict[str, np.ndarray]] = []
    ask = _asked(victim.model)
    with bench.progress.stage(
        f"purify {name} images", total=len(images) * settings.steps, unit="steps"
    ) as stage:  # fmt: skip
        for start in range(0, len(images), settings.batch):
            part = slice(start, start + settings.batch)
            key = content_key(victim.model, images[part], labels[part], "purified", _FORMAT, settings)
            path = folder / f"{key[:16]}.safetensors"
            known = _read(path, key)
            if known is None:
                checkpoint = folder / f"{key[:16]}.unfinished"
                made = purify(
                    torch.from_numpy(from_8bit(images[part])), ask, settings, checkpoint=checkpoint,
                    advance=stage.advance,
                )  # fmt: skip
                changed = np.array([bool(one and one.crossings) for one in made.decisions])
                diverged = np.array([index in made.failures for index in range(len(made.labels))])
                known = {"images": _levels(made.images), "changed": changed, "diverged": diverged}
                write_atomic(path, save(known, {"key": key}))
                checkpoint.unlink(missing_ok=True)
            else:
                stage.advance(len(images[part]) * settings.steps)
            parts.append(known)
    whole = {field: np.concatenate([one[field] for one in parts]) for field in ("images", "changed", "diverged")}
    return whole["images"], whole["changed"], int(whole["diverged"].sum())


def _read(path: Path, key: str) -> dict[str, np.ndarray] | None:
    try:
        with safe_open(str(path), "numpy") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return None
            return {name: stored.get_tensor(name) for name in ("images", "changed", "diverged")}
    except (OSError, SafetensorError):
        return None


def _asked(model: nn.Module) -> Callable[[Tensor], Tensor]:
    runtime = TorchRuntime(model)
    return lambda images: torch.from_numpy(runtime.logits(images.numpy()))


def _levels(images: Tensor) -> np.ndarray:
    return np.rint(images.clamp(0, 1).numpy() * 255).astype(np.uint8)


def _share(right: np.ndarray) -> Proportion:
    return Proportion(int(right.sum()), len(right))


def _prose(found: Measurements) -> tuple[str, ...]:
    clean, attacked = found[CLEAN], found[OBLIVIOUS]
    said = (
        f"The purifier found a boundary crossed by {int(clean.changed.sum())} of {len(clean.changed)} clean images and "
        f"by {int(attacked.changed.sum())} of {len(attacked.changed)} attacked by PGD; the others come back as given."
    )
    diverged = sum(one.diverged for one in found.values())
    more = f" The optimisation of {diverged} images diverged; they count as they were given." if diverged else ""
    return (
        said + more,
        "Accuracy over all images, wrong when clean or not. The attacks are made on the classifier without a defence, "
        "but for BPDA and Square, which are made through the purifier with seeds of their own.",
    )


def _bars(found: Measurements) -> Bars:
    return Bars(
        title="Accuracy behind each defence",
        caption="BPDA and Square are run on the first images only: their bars stand alone.",
        value_label="accuracy", series=DEFENCES,
        groups=tuple(
            BarGroup(name=name, cells=tuple(_share(one.right[defence]) for defence in DEFENCES))
            for name, one in found.items()
        ),
    )  # fmt: skip


def _table(found: Measurements) -> Table:
    few = len(found[AWARE].right[NONE])
    rows: list[tuple[TableCell, ...]] = []
    for name, one in found.items():
        rows.append((name, *(_share(one.right[defence]) for defence in DEFENCES), _pairs(one.right[PURIFIER], one)))
    one = found[OBLIVIOUS]
    first = {defence: one.right[defence][:few] for defence in DEFENCES}
    rows.append((f"PGD, the first {few} images", *(_share(first[defence]) for defence in DEFENCES), ""))
    return Table(
        title="The same in numbers", caption="McNemar's exact test on the same images.",
        columns=("attack", *DEFENCES, "purifier against the better of JPEG and TV"), rows=tuple(rows),
    )  # fmt: skip


def _pairs(right: np.ndarray, one: Answered) -> str:
    best = max((JPEG, TV), key=lambda name: int(one.right[name].sum()))
    pairs = Pairs.of(right, one.right[best])
    low, high = pairs.interval
    return f"{pairs.difference:+.3f} [{low:+.3f}, {high:+.3f}] against {best} (n = {pairs.n}, p = {pairs.p_value:.2g})"


def _quality_table(found: Measurements) -> Table:
    rows: list[tuple[TableCell, ...]] = []
    for name in (CLEAN, OBLIVIOUS):
        one = found[name]
        reference = torch.from_numpy(from_8bit(one.clean))
        for defence in DEFENCES:
            images = torch.from_numpy(from_8bit(one.images[defence]))
            ratio, likeness = psnr(images, reference).numpy(), ssim(images, reference).numpy()
            finite = ratio[np.isfinite(ratio)]
            same = len(ratio) - len(finite)
            rows.append((name, defence, _mean(finite, "dB"), f"{same} of {len(ratio)}", _mean(likeness, "SSIM")))
    return Table(
        title="Against the clean images", caption="Means with 95 % t-intervals; PSNR over the images that differ.",
        columns=("images", "behind", "PSNR", "identical to the clean image", "SSIM"), rows=tuple(rows),
    )  # fmt: skip


def _mean(values: Sequence[float] | np.ndarray, unit: str) -> str:
    from scipy import stats

    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) == 0:
        return "no image differs"
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return f"{mean:.3g} {unit} (one image)"
    half = float(stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    digits = 3 if unit == "SSIM" else 1
    return f"{mean:.{digits}f} {unit} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def _gallery(bench: Workbench, found: Measurements) -> tuple[Section, list[Pictures]]:
    """The first attacked images that the base gets wrong, as given against purified."""
    labels, one = bench.splits.labels, found[OBLIVIOUS]
    runtime = TorchRuntime(bench.base_model)
    truth = bench.images().labels
    before, after = predict(runtime, one.images[NONE]), predict(runtime, one.images[PURIFIER])
    chosen = np.flatnonzero(before != truth)[:6]
    items = tuple(
        GalleryItem(
            label=labels[int(truth[index])], source_prediction=labels[int(before[index])],
            target_prediction=labels[int(after[index])],
            note="clean, then purified from PGD; 'source' is without a defence",
        )
        for index in chosen
    )  # fmt: skip
    gallery = Gallery(name=GALLERY, title="Purified images", caption="", items=items)
    pictures = [Pictures(one.clean[index], one.images[PURIFIER][index]) for index in chosen]
    return Section(title="Examples", prose=("The second picture is the purified one.",), blocks=(gallery,)), pictures


def _conclusion(name: str, found: Measurements) -> list[str]:
    clean, plain, strong = (found[one] for one in (CLEAN, OBLIVIOUS, AUTOATTACK))
    aware, trajectory, queries = (found[one] for one in (AWARE, TRAJECTORY, QUERIES))
    return [
        f"{name}: against PGD that knows of no defence, accuracy goes from {written(_share(plain.right[NONE]))} to "
        f"{written(_share(plain.right[PURIFIER]))} behind the purifier (JPEG {written(_share(plain.right[JPEG]))}, "
        f"total variation {written(_share(plain.right[TV]))}); on clean images it goes from "
        f"{written(_share(clean.right[NONE]))} to {written(_share(clean.right[PURIFIER]))}.",
        f"{name}: against AutoAttack that knows of no defence, from {written(_share(strong.right[NONE]))} to "
        f"{written(_share(strong.right[PURIFIER]))} (JPEG {written(_share(strong.right[JPEG]))}, total variation "
        f"{written(_share(strong.right[TV]))}).",
        f"{name}: of {len(aware.right[PURIFIER])} images, BPDA with EOT on the purifier's output leaves "
        f"{written(_share(aware.right[PURIFIER]))} right, on its whole trajectory "
        f"{written(_share(trajectory.right[PURIFIER]))}, and Square, which asks the purified classifier, "
        f"{written(_share(queries.right[PURIFIER]))}.",
    ]


def _budgets(spec: PurifierSpec) -> list[BudgetLine]:
    images, few, restart = str(spec.images), str(spec.aware_images), "1"
    smoothing = f"Chambolle, weight {spec.tv_weight:g}"
    return [
        *(
            BudgetLine(part=name, images=count, steps=attack.description, restarts=restart, queries="none")
            for count, attacks in ((images, _oblivious(spec)), (few, _aware(spec)))
            for name, attack in attacks.items()
        ),
        BudgetLine(
            part=PURIFIER, images=images, steps=f"{spec.purifier.steps} of the prior, per image", restarts=restart,
            queries=f"about {len(spec.purifier.kept_steps) + spec.purifier.bisections + 3} per image",
        ),
        BudgetLine(part=JPEG, images=images, steps=f"quality {spec.jpeg_quality}", restarts="none", queries="none"),
        BudgetLine(part=TV, images=images, steps=smoothing, restarts="none", queries="none"),
    ]  # fmt: skip
