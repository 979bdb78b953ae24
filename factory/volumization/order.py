"""The order of the patches of an image (section 4.1), and of the samples of a batch (Eqs. 11–13): the same functions.

An order of N things is a permutation: ``order[j]`` is the index of what comes at place j. It ascends by the metric, and
equal scores keep the order of their indices, so that there is one answer everywhere. A metric that needs a reference
takes the thing of the lowest entropy, the first of several.

Two orders use no metric: ``key``, the permutation that a device's key stands for (the same for every image, so that
nothing in an image can change it), and ``raster``, row by row: no sorting, a control.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factory.volumization.histograms import BINS, levels
from factory.volumization.metrics import METRICS, Compared, check_size, metric_named, score_of_entropy
from keys.errors import InputError

KEY, RASTER = "key", "raster"
ORDERS = (*METRICS, KEY, RASTER)


def check_order(name: str) -> None:
    """Raise :class:`InputError` unless ``name`` is a metric, ``key`` or ``raster``."""
    if name not in ORDERS:
        raise InputError(f"There is no order {name!r}; there are {', '.join(ORDERS)}.")


def ascending(scores: Tensor) -> Tensor:
    """Indices int64 (B, N) that sort integer ``scores`` (B, N) upwards, equal ones by their index.

    Places are counted by comparisons and only then sorted: no runtime's sort has to be stable, since places are all
    different.
    """
    one, other = scores.unsqueeze(2), scores.unsqueeze(1)
    index = torch.arange(scores.shape[1], device=scores.device)
    earlier = index.unsqueeze(0) < index.unsqueeze(1)
    before = torch.logical_or(other < one, torch.logical_and(other == one, earlier))
    places = before.to(torch.int32).sum(2, dtype=torch.int32)
    return places.argsort(1)


def reference_index(patches: Tensor, bins: int = BINS) -> Tensor:
    """Index int64 (B, 1) of the patch of the lowest entropy, the first of several; float patches (B, N, C, h, w)."""
    found = levels(patches)
    check_size(found.shape[2])
    return ascending(score_of_entropy(found, bins))[:, :1]


def metric_order(metric: str, patches: Tensor, bins: int = BINS, reference: Tensor | None = None) -> Tensor:
    """Order int64 (B, N) of float patches (B, N, C, h, w) in [0, 1] by ``metric``, ascending (Eqs. 11–13).

    ``reference``: float (B, C, h, w), chosen by the user; the patch of the lowest entropy if it is not given.
    Raises :class:`InputError` for an unknown metric or number of bins, and patches of more than 32,768 values.
    """
    measured = metric_named(metric)
    found = levels(patches)
    check_size(found.shape[2])
    # A metric without distances never looks at the reference.
    against = found[:, :1]
    if measured.distance and reference is None:
        lowest = ascending(score_of_entropy(found, bins))[:, :1]
        against = found.gather(1, lowest.unsqueeze(2).expand(-1, -1, found.shape[2]))
    elif reference is not None:
        against = levels(reference.unsqueeze(1))
    return ascending(measured.score(Compared(found, against, bins)))
