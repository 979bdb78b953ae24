"""The seven metrics of Table 1 between patches and a reference patch, for all patches of a batch at once.

Each is a whole number (its *score*, int32), made of counts and 8-bit levels by additions alone, so that two runtimes
can never disagree on which of two patches comes first; :func:`measure` gives it in its unit. Logarithms are natural and
come from a table of 2^k·ln c for the possible counts c, rounded once; k is as large as int32 allows, which for patches
of 192 values moves an entropy by less than 1e-6. A count of zero adds nothing (0·log 0 = 0).

With b the histogram of cells (see :mod:`~factory.volumization.histograms`), P the number of values of a patch, x the
patch and r the reference, and where that differs from the Table:

* ``entropy`` H(x) = −Σ p ln p, p = b/P, in nats. The Table has Σ b·log(N/b), b normalised and N unexplained: H + ln N
  for shares, P·H for counts and N = P. The order is the same, so this is the usual form.
* ``joint-entropy`` JE(x, r) = −Σ p(i, j) ln p(i, j) over the joint histogram of values at the same place. The Table's
  Σ b log b lacks the sign and has one histogram; without the sign the order would be reversed.
* ``mutual-information`` H(x) + H(r) − JE(x, r), as in the Table; 0 or more up to rounding.
* ``kl`` Σ p ln(p/q), q of the reference, with one added to every count of both, so that an empty cell of the reference
  gives no infinity. The Table multiplies by the pixel x₁ᵢ instead of its share, which is no divergence.
* ``mse`` Σ(x − r)²/P with intensities in [0, 1]. The Table divides by N² pixels of one channel.
* ``psnr`` 10·log₁₀(1/MSE) in dB, with MSE at least (1/255)²/P/2: below every MSE of two different 8-bit patches, so
  that equal patches have a finite PSNR, the largest. Its order is that of ``mse``, reversed.
* ``max-norm`` max |x − r| in [0, 1]. The Table's max(x₁ … xₙ) is the largest value of one image and no distance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from factory.volumization.histograms import BINS, LEVELS, cells, check_bins, counts, joint_counts, levels, recorded
from keys.errors import InputError

LARGEST_PATCH = 2**15
"""Values of a patch: above it a sum of squares of levels would not fit into int32."""

_ROOM = 2**29
_AT_ONCE = 2**18
"""Values, or counts, that are held at a time: more of them do not fit into caches, and the memory is made anew."""
_EXACT = 2**24
"""Float32 holds every whole number below it, so that sums are exact in any order."""


@dataclass(frozen=True)
class Compared:
    """Levels of patches (B, N, P) and of their reference (B, 1, P), to be counted in ``bins`` cells."""

    patches: Tensor
    reference: Tensor
    bins: int

    @property
    def size(self) -> int:
        """P, the number of values of a patch."""
        return self.patches.shape[2]


def score_of_entropy(of: Tensor, bins: int) -> Tensor:
    """−2^k·Σ c ln c, int32 (B, N), of levels (B, N, P): ascending as the entropy."""
    size = of.shape[2]

    def score(part: Tensor) -> Tensor:
        return -_sum(counts(cells(part, bins), bins), size, bins)

    return _in_parts(score, of, held=of.shape[1] * max(size, bins))


def _entropy(given: Compared) -> Tensor:
    return score_of_entropy(given.patches, given.bins)


def _joint_entropy(given: Compared) -> Tensor:
    bins = given.bins

    def score(patches: Tensor, reference: Tensor) -> Tensor:
        return -_sum(joint_counts(cells(patches, bins), cells(reference, bins), bins), given.size, bins)

    held = given.patches.shape[1] * max(given.size, bins**2)
    return _in_parts(score, given.patches, given.reference, held=held)


def _mutual_information(given: Compared) -> Tensor:
    return _entropy(given) + score_of_entropy(given.reference, given.bins) - _joint_entropy(given)


def _kl(given: Compared) -> Tensor:
    found = counts(cells(given.patches, given.bins), given.bins)
    expected = counts(cells(given.reference, given.bins), given.bins)
    table = _logarithms(given.size, given.bins)
    ratios = _looked_up(table, found) - _looked_up(table, expected)
    return ((found + 1) * ratios).sum(2, dtype=torch.int32)


def _squares(given: Compared) -> Tensor:
    difference = given.patches - given.reference
    if given.size * (LEVELS - 1) ** 2 < _EXACT and difference.dtype == torch.float32 and not recorded():
        return difference.square_().sum(2).to(torch.int32)  # equal to the sum below, and many times as fast
    whole = difference.to(torch.int32)
    return (whole * whole).sum(2, dtype=torch.int32)


def _largest(given: Compared) -> Tensor:
    return (given.patches - given.reference).abs().amax(2).to(torch.int32)


@dataclass(frozen=True)
class Metric:
    """One row of Table 1.

    ``distance``: whether it needs a reference. ``score``: int32 (B, N), ascending as the metric. ``value``: the score
    (float64) in the metric's unit, given P and the number of bins.
    """

    distance: bool
    score: Callable[[Compared], Tensor]
    value: Callable[[Tensor, int, int], Tensor]


def _nats(score: Tensor, size: int, bins: int) -> Tensor:
    return math.log(size) + score / (size * _unit(size, bins))


def _mean_square(score: Tensor, size: int, bins: int) -> Tensor:
    return score / (size * (LEVELS - 1) ** 2)


def _decibels(score: Tensor, size: int, bins: int) -> Tensor:
    return -10 * torch.log10(_mean_square((-score).clamp(min=0.5), size, bins))


METRICS: dict[str, Metric] = {
    "entropy": Metric(False, _entropy, _nats),
    "mutual-information": Metric(True, _mutual_information, _nats),
    "kl": Metric(True, _kl, lambda score, size, bins: score / ((size + bins) * _unit(size, bins))),
    "psnr": Metric(True, lambda given: -_squares(given), _decibels),
    "max-norm": Metric(True, _largest, lambda score, size, bins: score / (LEVELS - 1)),
    "joint-entropy": Metric(True, _joint_entropy, _nats),
    "mse": Metric(True, _squares, _mean_square),
}


def metric_named(name: str) -> Metric:
    """The metric ``name``; raises :class:`InputError` if there is none."""
    if name not in METRICS:
        raise InputError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return METRICS[name]


def measure(name: str, patches: Tensor, reference: Tensor, bins: int = BINS) -> Tensor:
    """The metric ``name`` of float patches (B, N, C, h, w) in [0, 1] against (B, C, h, w): float64 (B, N), finite.

    In nats (entropy, joint entropy, mutual information, KL), dB (PSNR), [0, 1] (max norm) or [0, 1]² (MSE); ``bins``
    is for the first four. Raises :class:`InputError` for an unknown metric, a number of bins that is no power of two
    from 2 to 256, patches of more than 32,768 values, or shapes that differ.
    """
    metric = metric_named(name)
    check_bins(bins)
    if patches.ndim != 5 or reference.shape != (patches.shape[0], *patches.shape[2:]):
        raise InputError(
            f"Patches (B, N, C, h, w) are compared with a reference (B, C, h, w); got the shapes "
            f"{tuple(patches.shape)} and {tuple(reference.shape)}."
        )
    given = Compared(levels(patches), levels(reference.unsqueeze(1)), bins)
    check_size(given.size)
    return metric.value(metric.score(given).double(), given.size, bins)


def check_size(size: int) -> None:
    """Raise :class:`InputError` if a patch of ``size`` values is too large for exact scores."""
    if size > LARGEST_PATCH:
        raise InputError(f"A patch of {size} values is too large to be ordered (at most {LARGEST_PATCH}); cut smaller.")


def _in_parts(score: Callable[..., Tensor], *batches: Tensor, held: int) -> Tensor:
    """``score`` of batches of equal length, for as many images at a time as caches hold ``held`` values each.

    A graph that is recorded stays whole.
    """
    images = max(1, _AT_ONCE // held)
    if recorded() or len(batches[0]) <= images:
        return score(*batches)
    parts = zip(*(batch.split(images) for batch in batches), strict=True)
    return torch.cat([score(*part) for part in parts])


def _sum(found: Tensor, size: int, bins: int) -> Tensor:
    """2^k·Σ c ln c over the last axis of counts."""
    return _looked_up(_products(size, bins), found).sum(2, dtype=torch.int32)


def _looked_up(table: tuple[int, ...], places: Tensor) -> Tensor:
    # A tensor that were kept between calls could be one of a recording, which holds no values.
    values = torch.tensor(table, dtype=torch.int32, device=places.device)
    # Along one axis, which every exporter writes as one gather.
    return values.index_select(0, places.flatten()).view(places.shape)


def _unit(size: int, bins: int) -> int:
    """2^k, the largest for which every sum of a score stays below 2^29."""
    return 2 ** int(math.log2(_ROOM / ((size + bins) * math.log(size + bins))))


@functools.lru_cache(maxsize=64)
def _products(size: int, bins: int) -> tuple[int, ...]:
    """round(2^k·c ln c) for c = 0 … P."""
    unit = _unit(size, bins)
    return tuple(round(unit * c * math.log(max(c, 1))) for c in range(size + 1))


@functools.lru_cache(maxsize=64)
def _logarithms(size: int, bins: int) -> tuple[int, ...]:
    """round(2^k·ln(c + 1)) for c = 0 … P."""
    unit = _unit(size, bins)
    return tuple(round(unit * math.log(c + 1)) for c in range(size + 1))
