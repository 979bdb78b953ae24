"""The syllabus (section 4.3, Eqs. 11–13): the order in which the samples of a batch are learned, simple ones first.

The paper reorders the samples *inside* a batch. With one step of gradient descent on the mean loss of that batch this
changes nothing at all: a mean does not depend on the order of what it is of (nor do the statistics of batch norm). An
order can only mean something if the batch is taken in parts, so here it is cut into ``sub_batches``, each with a step
of its own, from the lowest scores to the highest. That is a choice of this program; it also makes steps smaller and
more frequent, so the control is the same cut without an order (``raster``), not a run on whole batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from factory.volumization.histograms import BINS, LEVELS, check_bins
from factory.volumization.order import KEY, RASTER, check_order, metric_order
from keys.errors import InputError


@dataclass(frozen=True)
class Syllabus:
    """Cuts batches into ``sub_batches`` parts by ``metric``, one of Table 1, or ``raster``: as they come.

    ``bins``: of the metric's histograms. Raises :class:`InputError` for another metric, fewer parts than one, or bins
    that are no power of two.
    """

    metric: str
    sub_batches: int
    bins: int = BINS

    def __post_init__(self) -> None:
        check_order(self.metric)
        check_bins(self.bins)
        if self.metric == KEY:
            raise InputError("A syllabus orders samples by a metric of Table 1 or not at all (raster), not by a key.")
        if self.sub_batches < 1:
            raise InputError(f"A batch is cut into one part or more, not {self.sub_batches}.")

    def order(self, images: Tensor) -> Tensor:
        """Order int64 (B,) of ``images`` uint8 (B, C, H, W): the index of the sample at each place.

        A metric of distance compares with the batch's image of the lowest entropy. Raises :class:`InputError` for
        images that are not uint8 or have more than 32,768 values.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(
                f"A syllabus orders images uint8 (B, C, H, W); got {images.dtype} of the shape {tuple(images.shape)}."
            )
        if self.metric == RASTER:
            return torch.arange(len(images), device=images.device)
        return metric_order(self.metric, images.unsqueeze(0) / (LEVELS - 1), self.bins)[0]

    def steps(self, count: int) -> int:
        """How many parts a batch of ``count`` images is cut into."""
        return min(self.sub_batches, count)

    def parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """Indices int64 of the samples of each sub-batch, in the order in which they are learned.

        Lengths differ by one at most; a batch of fewer images than ``sub_batches`` gives as many parts as images.
        """
        order = self.order(images)
        return tuple(part for part in order.tensor_split(self.sub_batches) if len(part))
