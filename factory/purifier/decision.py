"""Where a trajectory crosses a decision boundary, and what is put together on its near side.

The steps are those of the paper's abstract; what it leaves open is inferred, see docs/purifier.md. Early
reconstructions of an adversarial image are smooth and lack its noise; as the noise is learned, the label changes to
that of the given image. An image of the near side is localised on that boundary, pushed on along the reverse of its
direction to the given image, and stitched patch by patch with the reconstructions just before it.

>>> find_crossings([3, 3, 5, 5, 5, 7], [18, 20, 24, 26, 28, 30], given=7, recognisable=22.0, stable=2)
Decision(label=5, crossings=(Crossing(before=4, after=5),))
>>> find_crossings([3, 3, 7, 7, 7, 7], [18, 20, 24, 26, 28, 30], given=7, recognisable=22.0, stable=2)
Decision(label=7, crossings=())
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from factory.purifier.settings import PurifierSettings
from factory.purifier.trajectory import Classifier, Trajectory, classify

LEVELS = 255
MOST_CROSSINGS = 3
"""On-boundary images of one image at most, the last ones: a trajectory may cross a boundary to and fro."""


@dataclass(frozen=True)
class Crossing:
    """Two neighbouring points of a trajectory of K reconstructions, the label changing between them.

    ``before``: index of a reconstruction; ``after``: the next index, K for the given image itself.
    """

    before: int
    after: int


@dataclass(frozen=True)
class Decision:
    """``label``: the class before the noise; the given image's own, without crossings, where none was found."""

    label: int
    crossings: tuple[Crossing, ...]


@dataclass(frozen=True, eq=False)
class OnBoundary:
    """An image localised on a boundary: ``image`` (index in the batch), ``share`` of the way from before to after.

    ``on``, ``pushed``: float32 C×H×W in [0, 1].
    """

    image: int
    crossing: Crossing
    share: float
    on: Tensor
    pushed: Tensor


def find_crossings(
    labels: Sequence[int], fidelity: Sequence[float], given: int, recognisable: float, stable: int
) -> Decision:
    """Read one image's trajectory: the labels of K reconstructions with their PSNR in dB, and the given image's label.

    Reconstructions below ``recognisable`` are not yet pictures of anything, and have no vote. Of the others, a label
    that ``stable`` in a row agree on and that is not ``given`` is one that the image had before its noise was learned;
    of several the one with the most reconstructions, the later one where they are equal.
    """
    start = next((index for index, value in enumerate(fidelity) if value >= recognisable), len(labels))
    runs: list[tuple[int, int, int]] = []  # label, length, index of the last one
    at = start
    for label, group in groupby(labels[start:]):
        length = len(list(group))
        at += length
        if label != given and length >= stable:
            runs.append((label, length, at - 1))
    if not runs:
        return Decision(given, ())
    votes: Counter[int] = Counter()
    for label, length, _ in runs:
        votes[label] += length
    latest = {label: last for label, _, last in runs}
    label = max(votes, key=lambda one: (votes[one], latest[one]))
    ends = [last for one, _, last in runs if one == label][-MOST_CROSSINGS:]
    return Decision(label, tuple(Crossing(end, end + 1) for end in ends))


def decide(
    trajectory: Trajectory, given_labels: Sequence[int], settings: PurifierSettings
) -> tuple[Decision | None, ...]:
    """A decision for each of B images with their given labels; None where the optimisation diverged."""
    found = trajectory.reconstructions
    labels, fidelity = trajectory.labels, found.fidelity
    return tuple(
        None
        if index in found.diverged
        else find_crossings(
            labels[:, index].tolist(), fidelity[:, index].tolist(), given, settings.recognisable, settings.stable
        )
        for index, given in enumerate(given_labels)
    )


def localise(
    images: Tensor, trajectory: Trajectory, decisions: Sequence[Decision | None], classifier: Classifier,
    settings: PurifierSettings,
) -> list[OnBoundary]:  # fmt: skip
    """On-boundary images of all crossings, by bisection between the two points of each, and pushed from the noise.

    ``images``: the given ones, float32 B×C×H×W. With x on the boundary and g the given image, pushed is
    clip(x + push·(x - g)). Costs ``bisections`` queries per crossing.
    """
    places = [
        (index, decision.label, crossing)
        for index, decision in enumerate(decisions)
        if decision is not None
        for crossing in decision.crossings
    ]
    if not places:
        return []
    drawn = trajectory.reconstructions.images
    given = torch.stack([images[index] for index, _, _ in places])
    near = torch.stack([drawn[crossing.before, index] for index, _, crossing in places])
    far = torch.stack(
        [
            drawn[crossing.after, index] if crossing.after < len(drawn) else images[index]
            for index, _, crossing in places
        ]
    )
    wanted = torch.tensor([label for _, label, _ in places])
    low, high = torch.zeros(len(places)), torch.ones(len(places))
    for _ in range(settings.bisections):
        middle = (low + high) / 2
        kept = classify(classifier, torch.lerp(near, far, middle.view(-1, 1, 1, 1))).argmax(dim=1) == wanted
        low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
    # The near end of what is left: it still has the label, so nothing has to be pushed back over the boundary.
    on = torch.lerp(near, far, low.view(-1, 1, 1, 1))
    pushed = (on + settings.push * (on - given)).clamp(0, 1)
    return [
        OnBoundary(index, crossing, float(share), x, p)
        for (index, _, crossing), share, x, p in zip(places, low, on, pushed, strict=True)
    ]


def stitch(candidates: Tensor, patch: int) -> Tensor:
    """One image of M that show the same, float32 M×C×H×W → C×H×W, patch by patch of ``patch`` × ``patch`` pixels.

    Each patch is the mean of the M, an image weighted by how close it is there to their median, which is where the
    images of the prior agree: what one of them has alone is noise, or a step that went astray. Patches overlap by half
    and fade into each other along a triangle, so that no seam shows.
    """
    count, _, height, width = candidates.shape
    if count == 1:
        return candidates[0]
    middle = candidates.quantile(0.5, dim=0)  # of an even number the mean of the middle two
    total, weight = torch.zeros_like(middle), torch.zeros(1, height, width)
    for top in _starts(height, patch):
        for left in _starts(width, patch):
            rows, columns = slice(top, top + patch), slice(left, left + patch)
            part = candidates[:, :, rows, columns]
            distance = (part - middle[:, rows, columns]).square().mean(dim=(1, 2, 3))
            share = torch.softmax(-distance / distance.mean().clamp(min=1e-8), dim=0)
            fade = _fade(part.shape[2])[:, None] * _fade(part.shape[3])[None, :]
            total[:, rows, columns] += fade * (share.view(-1, 1, 1, 1) * part).sum(dim=0)
            weight[:, rows, columns] += fade
    return (total / weight).clamp(0, 1)


def to_8bit_grid(images: Tensor) -> Tensor:
    """The nearest multiples of 1/255: what a file, a network and a device receive."""
    return torch.round(images.clamp(0, 1) * LEVELS) / LEVELS


def _starts(side: int, patch: int) -> list[int]:
    if side <= patch:
        return [0]
    return sorted({*range(0, side - patch, max(1, patch // 2)), side - patch})


def _fade(side: int) -> Tensor:
    place = torch.arange(side, dtype=torch.float32) + 0.5
    return torch.minimum(place, side - place)
