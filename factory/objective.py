"""What training minimises, as a module: it may hold parameters of its own, which no device gets."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from factory.classifier import ImageClassifier


class Objective(nn.Module):
    """A loss of a model on a batch. Parameters of its own are trained with the model's; no device gets them."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called before epoch ``epoch`` (0 to ``epochs`` − 1), also when a run goes on after an interruption."""

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss, float32, of images N×C×H×W in [0, 1] with int64 labels N."""
        raise NotImplementedError

    def learned(self) -> dict[str, Tensor]:
        """Its own parameters and buffers by name: kept beside the adapter, and read again by an adaptive attack."""
        return dict(self.state_dict())


class CrossEntropy(Objective):
    """Mean cross-entropy of the logits."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return functional.cross_entropy(model(images).float(), labels, label_smoothing=self.label_smoothing)
