"""Prediction by the nearest prototype (Eq. 6), as the last layer of a plain network.

The paper gives an image its class "if and only if the sample lies within its decision region"; how far that reaches is
not said, and here every image gets a class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from factory.prototypes.depths import classifier_name, plain
from factory.prototypes.loss import Bound
from keys.errors import InputError

_TINY = 1e-12
"""Squared distances below it count as it and have no gradient, where the square root's would be infinite."""


class NearestPrototype(nn.Module):
    """Features N×d to logits N×k: minus the distance to each centroid, so that the largest is Eq. 6's class.

    Made of differences, squares, sums and a root, which every exporter knows.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, bound: Bound) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("centroids", bound.place(centroids.detach().clone().float()))

    def extra_repr(self) -> str:
        """The bound, which no tensor holds."""
        return f"{self.bound}"

    def forward(self, features: Tensor) -> Tensor:
        """Logits −‖f − w_j‖, never above 0."""
        apart = self.bound.place(features).unsqueeze(1) - self.centroids
        return -apart.square().sum(dim=2).clamp(min=_TINY).sqrt()


def attach_nearest_prototype(network: nn.Module, centroids: Tensor, bound: Bound) -> None:
    """Put the nearest-prototype rule in the place of ``network``'s classifier.

    Raises InputError if there is no single classifier, or the centroids k×d are not of its d features.
    """
    network = plain(network)
    name = classifier_name(network)
    width = getattr(network.get_submodule(name), "in_features", None)
    if centroids.ndim != 2 or (width is not None and centroids.shape[1] != width):
        raise InputError(f"Centroids of the shape {tuple(centroids.shape)} do not fit the features before {name}.")
    if not torch.isfinite(centroids).all():
        raise InputError("A centroid is not finite, so this model cannot be used; train it again.")
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, NearestPrototype(centroids, bound))
