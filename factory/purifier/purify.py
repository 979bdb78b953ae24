"""The purifier: images in, purified images with their labels and trajectories out.

Training-free and attack-agnostic: the classifier is only asked, never differentiated, and nothing is known of the
attack. Four steps, one module each: reconstruct (:mod:`~factory.purifier.prior_network`), ask
(:mod:`~factory.purifier.trajectory`), localise and stitch (:mod:`~factory.purifier.decision`).

An image without a crossing comes back as it was given: all its recognisable reconstructions have its own label, so
nothing speaks of noise, and a reconstruction would have the same label and less detail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from factory.purifier.decision import Decision, OnBoundary, decide, localise, stitch, to_8bit_grid
from factory.purifier.settings import PurifierSettings
from factory.purifier.trajectory import Advance, Classifier, Trajectory, classify, judged, reconstruct
from keys.errors import CheckFailed, InputError


@dataclass(frozen=True, eq=False)
class Purified:
    """What became of B images.

    ``images``: float32 B×C×H×W on the grid of 8 bits; ``labels``: int64 B, the classifier's for those;
    ``given_labels``: int64 B. ``boundaries``: on-boundary images, none for an image without a crossing.
    ``failures``: index of an image whose optimisation diverged → why; it comes back as it was given, and
    must not be taken for purified.
    """

    images: Tensor
    labels: Tensor
    given_labels: Tensor
    trajectory: Trajectory
    decisions: tuple[Decision | None, ...]
    boundaries: tuple[OnBoundary, ...]
    failures: Mapping[int, str]

    def check(self, names: Sequence[str]) -> None:
        """Raise :class:`CheckFailed` that names every image (by ``names``, one each) that was not purified."""
        check_purified({names[index]: reason for index, reason in self.failures.items()}, len(names))


def purify(
    images: Tensor,
    classifier: Classifier,
    settings: PurifierSettings | None = None,
    *,
    seeds: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    advance: Advance | None = None,
) -> Purified:
    """Purify images (float32 B×C×H×W in [0, 1], B ≥ 1) for a classifier of such images → logits B×K.

    ``seeds``: one per image for its prior; default: the settings'. ``checkpoint``, ``advance``: see
    :func:`~factory.purifier.trajectory.reconstruct`. All B are optimised at once; ``settings.batch`` is for callers.
    Costs about K·B queries for K kept steps. Raises :class:`InputError` for images or logits that cannot be used.
    """
    settings = settings or PurifierSettings()
    if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise InputError(
            f"The purifier takes float images N×C×H×W with 1 or 3 channels, not {images.dtype} {tuple(images.shape)}."
        )
    if not (images.min() >= 0 and images.max() <= 1):
        raise InputError("The purifier takes images with values in [0, 1]; divide 8-bit images by 255.")
    images = images.detach().float()
    given = classify(classifier, images).argmax(dim=1)
    trajectory = judged(reconstruct(images, settings, seeds=seeds, checkpoint=checkpoint, advance=advance), classifier)
    decisions = decide(trajectory, given.tolist(), settings)
    boundaries = localise(images, trajectory, decisions, classifier, settings)
    purified, labels = images.clone(), given.clone()
    crossing = [index for index, decision in enumerate(decisions) if decision is not None and decision.crossings]
    if crossing:
        wanted = torch.tensor([_label(decisions[index]) for index in crossing])
        pieces = [_pieces(index, trajectory, boundaries, settings) for index in crossing]
        stitched = to_8bit_grid(torch.stack([stitch(piece, settings.patch) for piece in pieces]))
        # Stitched images of one label need not have it; the last reconstruction before the boundary does.
        safe = to_8bit_grid(torch.stack([piece[0] for piece in pieces]))
        held = classify(classifier, stitched).argmax(dim=1) == wanted
        chosen = torch.where(held.view(-1, 1, 1, 1), stitched, safe)
        purified[crossing] = chosen
        labels[crossing] = classify(classifier, chosen).argmax(dim=1)
    return Purified(
        purified, labels, given, trajectory, decisions, tuple(boundaries), trajectory.reconstructions.diverged
    )


def check_purified(failures: Mapping[str, str], total: int) -> None:
    """Raise :class:`CheckFailed` if any of ``total`` images was not purified; ``failures``: its name → why."""
    if failures:
        said = "; ".join(f"{name}: {reason}" for name, reason in sorted(failures.items()))
        raise CheckFailed(
            f"The optimisation of {len(failures)} of {total} images diverged ({said}); lower the learning rate. "
            "All others were purified."
        )


def _label(decision: Decision | None) -> int:
    assert decision is not None
    return decision.label


def _pieces(index: int, trajectory: Trajectory, boundaries: Sequence[OnBoundary], settings: PurifierSettings) -> Tensor:
    """What one image is stitched from, M×C×H×W: the last reconstruction before its last crossing first."""
    own = [boundary for boundary in boundaries if boundary.image == index]
    drawn, labels = trajectory.reconstructions.images, trajectory.labels
    last = own[-1].crossing.before
    label = labels[last, index]
    pieces = [drawn[last, index]]
    for boundary in own:
        before = boundary.crossing.before
        pieces.append(boundary.pushed)
        pieces += [
            drawn[step, index]
            for step in range(max(0, before - settings.neighbours), before)
            if labels[step, index] == label
        ]
    return torch.stack(pieces)
