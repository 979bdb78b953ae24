"""Joint training on cross-entropy and prototype conformity at several depths (Eqs. 7 to 9, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from factory.classifier import ImageClassifier
from factory.objective import Objective
from factory.prototypes.depths import Depth, Tokens, captured, pooled
from factory.prototypes.loss import Bound, prototype_conformity
from keys.errors import InputError


@dataclass(frozen=True)
class Weights:
    """What the parts of the joint loss count.

    ``conformity``: each depth's L_PC beside the network's cross-entropy (Eq. 7: 1). ``auxiliary``: each depth's own
    cross-entropy (Eq. 8: 1; Algorithm 1 has none: 0). ``centroid_rate``: the centroids' learning rate in multiples of
    the network's.
    """

    conformity: float
    auxiliary: float
    centroid_rate: float


class Prototypes(nn.Module):
    """One depth: the auxiliary branch G_φ (Eq. 9), the class centroids w^c, and a classifier of its own for Eq. 8.

    The centroids are stored divided by ``rate``. Adam's steps have the length of the learning rate whatever the
    gradient, so the centroids themselves move ``rate`` times as fast as all other parameters.
    """

    def __init__(self, depth: Depth, classes: int, dimension: int | None, bound: Bound, weights: Weights) -> None:
        super().__init__()
        self.depth, self.bound, self.rate = depth, bound, weights.centroid_rate
        narrow = dimension is not None and dimension < depth.width
        self.branch = nn.Linear(depth.width, dimension) if narrow and dimension else nn.Identity()
        width = dimension if narrow and dimension else depth.width
        self.scaled_centroids = nn.Parameter(_apart(classes, width, bound.radius) / self.rate)
        self.classifier = nn.Linear(width, classes) if weights.auxiliary else None

    @property
    def centroids(self) -> Tensor:
        """w^c, k×d."""
        return self.scaled_centroids * self.rate


def _apart(classes: int, width: int, radius: float) -> Tensor:
    """Centroids k×d in random directions, at right angles where they fit: balls of ``radius`` that just touch."""
    directions = torch.empty(classes, width)
    nn.init.orthogonal_(directions)
    return functional.normalize(directions, dim=1) * radius * math.sqrt(2)


class ConformityObjective(Objective):
    """Cross-entropy of the network, plus L_PC at every depth once ``warm_up`` epochs (T′) of it alone are over.

    ``dimension``: what an intermediate depth's features are projected to where they are wider; the features that the
    classifier sees are compared as they are, so that prediction by the nearest prototype (Eq. 6) needs no branch.
    """

    def __init__(
        self, depths: Sequence[Depth], classes: int, *, dimension: int, tokens: Tokens, bound: Bound, weights: Weights,
        warm_up: int = 0, label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weights, self.warm_up, self.label_smoothing = weights, warm_up, label_smoothing
        self.tokens: Tokens = tokens
        self.joint = warm_up == 0
        self.levels = nn.ModuleList(
            Prototypes(depth, classes, None if depth.before else dimension, bound, weights) for depth in depths
        )

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Algorithm 1, line 3: cross-entropy alone while epoch < T′."""
        self.joint = epoch >= self.warm_up

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """The joint loss of Eq. 7, summed over depths; see :class:`Objective`. The mean over the batch."""
        return self.joint_loss(model, images, labels) if self.joint else self._cross_entropy(model(images), labels)

    def joint_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Eq. 7 of any module with the network inside: what an adaptive attack climbs (Table 3)."""
        logits, features = self.features(model, images)
        loss = self._cross_entropy(logits, labels)
        for level, found in zip(self._levels, features, strict=True):
            loss = loss + self.weights.conformity * prototype_conformity(found, labels, level.centroids, level.bound)
            if level.classifier is not None:
                loss = loss + self.weights.auxiliary * self._cross_entropy(level.classifier(found), labels)
        return loss

    def features(self, model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits N×k of ``images``, and what each depth's branch makes of them, N×d.

        Raises InputError if ``model`` runs past one of the depths.
        """
        depths = [level.depth for level in self._levels]
        with captured(model, depths) as found:
            logits = model(images)
        missing = [depth.module for depth in depths if depth.name not in found]
        if missing:
            raise InputError(f"The network never calls its part {missing[0]}, so no features come out of it.")
        return logits, [
            level.branch(pooled(found[level.depth.name], level.depth, model, self.tokens)) for level in self._levels
        ]

    @property
    def _levels(self) -> list[Prototypes]:
        return [level for level in self.levels if isinstance(level, Prototypes)]

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


def centroids_in(learned: Mapping[str, Tensor], level: int, rate: float) -> Tensor:
    """The centroids k×d of depth number ``level`` among an objective's parameters; raises KeyError without them."""
    return learned[f"levels.{level}.scaled_centroids"] * rate
