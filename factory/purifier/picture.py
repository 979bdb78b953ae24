"""A picture of one trajectory: class probabilities along the steps, the boundary, and what the prior drew."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from factory.purifier.purify import Purified

_SHOWN, _THUMBNAILS = 4, 6
# Okabe and Ito's hues, which colour-blind readers can tell apart; each line has a marker of its own as well.
_COLOURS, _MARKERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), "os^D"


def draw_trajectory(given: Tensor, purified: Purified, index: int, title: str, name: Callable[[int], str]) -> bytes:
    """PNG of image ``index`` of a batch; ``given``: that image, float32 C×H×W in [0, 1]; ``name``: of a class.

    The image's optimisation must not have diverged. The same arguments give the same bytes.
    """
    reconstructions = purified.trajectory.reconstructions
    steps = reconstructions.steps
    probabilities = purified.trajectory.logits[:, index].softmax(dim=1)
    figure = Figure(figsize=(10.5, 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    pictures = _pictures(given, purified, index)
    grid = figure.add_gridspec(2, len(pictures), height_ratios=(2, 1))
    axes: Any = figure.add_subplot(grid[0, :])
    given_label, label = int(purified.given_labels[index]), int(purified.labels[index])
    for place, one in enumerate(_classes(probabilities, given_label, label)):
        said = name(one) + {given_label: " (as given)", label: " (purified)"}.get(one, "")
        if one == given_label == label:
            said = f"{name(one)} (as given and purified)"
        axes.plot(steps, probabilities[:, one], color=_COLOURS[place], marker=_MARKERS[place], markersize=3, label=said)
    for number, boundary in enumerate(one for one in purified.boundaries if one.image == index):
        at = _step_of(steps, boundary.crossing.before, boundary.share)
        axes.axvline(at, color="#333333", linestyle="--", label=None if number else "boundary crossed")
    axes.set(title=title, xlabel="step of the prior's optimisation", ylabel="probability", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)  # beside the lines, not over them
    for column, (caption, picture) in enumerate(pictures):
        below: Any = figure.add_subplot(grid[1, column])
        below.imshow(_as_rows(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        below.set_title(caption, fontsize=8)
        below.axis("off")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _classes(probabilities: Tensor, given: int, label: int) -> list[int]:
    """The classes worth a line: as given, purified, and the most probable others."""
    order = probabilities.amax(dim=0).argsort(descending=True).tolist()
    return list(dict.fromkeys([given, label, *order]))[:_SHOWN]


def _step_of(steps: tuple[int, ...], before: int, share: float) -> float:
    """Where a boundary stands on the axis of steps; beyond the last one it lies towards the given image."""
    gap = steps[before + 1] - steps[before] if before + 1 < len(steps) else steps[0]
    return steps[before] + share * gap


def _pictures(given: Tensor, purified: Purified, index: int) -> list[tuple[str, Tensor]]:
    found = purified.trajectory.reconstructions
    chosen = sorted({round(place) for place in np.linspace(0, len(found.steps) - 1, _THUMBNAILS)})
    shown = [(f"step {found.steps[place]}\n{found.fidelity[place, index]:.1f} dB", place) for place in chosen]
    pictures = [(caption, found.images[place, index]) for caption, place in shown]
    on = [("on the\nboundary", one.on) for one in purified.boundaries if one.image == index][-1:]
    return [("given\n", given), *pictures, *on, ("purified\n", purified.images[index])]


def _as_rows(image: Tensor) -> np.ndarray:
    return image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
