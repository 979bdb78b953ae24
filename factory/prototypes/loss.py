"""The prototype conformity loss of one depth (Eq. 5), and what keeps it bounded.

Eq. 5 has two negative terms that fall without end as features and centroids move apart. The paper speaks of fixed,
non-overlapping balls around the centroids and gives neither a radius nor a bound. Here a :class:`Bound` says what a
distance counts at most; a ball's radius r makes 2r that limit, where two balls no longer overlap, so that the loss of
an image is never below −4r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Bound:
    """What keeps the loss from falling for ever.

    ``"ball"``: what pushes apart ends at a distance of 2·``radius``. ``"sphere"``: features and centroids are scaled
    to the length ``radius``, so that no two are farther apart than 2·``radius``. ``"none"``: Eq. 5 as it stands.
    """

    kind: Literal["ball", "sphere", "none"]
    radius: float

    def place(self, vectors: Tensor) -> Tensor:
        """Features or centroids …×d where they are compared: as they are, or on the sphere."""
        return self.radius * functional.normalize(vectors, dim=-1) if self.kind == "sphere" else vectors

    def limit(self, distances: Tensor) -> Tensor:
        """What distances count in the terms that push apart."""
        return distances.clamp(max=2 * self.radius) if self.kind == "ball" else distances


def distances(features: Tensor, centroids: Tensor) -> Tensor:
    """Euclidean distances N×k of ``features`` N×d and ``centroids`` k×d, float32; gradient 0 where two coincide.

    Differences are squared and added up as they are: ‖a‖² + ‖b‖² − 2ab would lose what is small.
    """
    return torch.cdist(features.float(), centroids.float(), compute_mode="donot_use_mm_for_euclid_dist")


def prototype_conformity(features: Tensor, labels: Tensor, centroids: Tensor, bound: Bound) -> Tensor:
    """Eq. 5, as the mean over the batch instead of its sum: the scalar loss of ``features`` N×d, ``labels`` int64 N.

    ``centroids``: k×d, k of at least 2. Each image: the distance to its own centroid, minus the mean over the other
    k − 1 classes of (its distance to their centroid + the distance of that centroid to its own). A class without an
    image in the batch is pulled by nothing; its centroid is pushed only.
    """
    features, centroids = bound.place(features.float()), bound.place(centroids.float())
    away = distances(features, centroids)
    between = bound.limit(distances(centroids, centroids))[labels]
    others = functional.one_hot(labels, len(centroids)) == 0
    pushed = torch.where(others, bound.limit(away) + between, 0).sum(dim=1) / (len(centroids) - 1)
    pulled = away.gather(1, labels.unsqueeze(1)).squeeze(1)
    return (pulled - pushed).mean()
