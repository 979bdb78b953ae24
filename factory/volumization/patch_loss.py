"""The patch aggregate loss (section 4.2): every patch is asked for the class of the whole image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from factory.classifier import ImageClassifier
from factory.objective import Objective
from keys.errors import InputError


def patch_aggregate_loss(patch_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each patch, summed over the N patches (Eq. 10) and averaged over the images: a scalar.

    ``patch_logits`` are float (B, N, k), ``labels`` int64 (B,). The sum makes the loss, and with it the gradient, N
    times that of one prediction: a learning rate chosen for a plain network is N times too large where the optimiser
    does not normalise gradients. Raises :class:`InputError` for other shapes.
    """
    if patch_logits.ndim != 3 or labels.shape != patch_logits.shape[:1]:
        raise InputError(
            f"The patch aggregate loss takes logits (B, N, k) and labels (B,); got the shapes "
            f"{tuple(patch_logits.shape)} and {tuple(labels.shape)}."
        )
    each = functional.cross_entropy(patch_logits.flatten(0, 1), labels.repeat_interleave(patch_logits.shape[1]),
                                    reduction="sum")  # fmt: skip
    return each / len(labels)


class PatchAggregate(Objective):
    """The loss as what training minimises, of a model whose network gives logits for every patch."""

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """See :class:`~factory.objective.Objective`."""
        network = model.network
        assert hasattr(network, "patch_logits")  # refused before, by its traits
        return patch_aggregate_loss(network.patch_logits(model.inputs(images)).float(), labels)  # pyright: ignore
