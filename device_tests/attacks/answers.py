"""What query attacks share: a target that only answers, and a count of what it was asked.

Rules: one query is one image's logits or label; whatever an attack asks goes through :class:`Queries`, so that
its count is exact. A runtime becomes a model without gradients here, and query attacks need no more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import batches
from device_tests.images import LEVELS
from exporters.runtime import Runtime


class AnsweringModel(nn.Module):
    """Anything that turns images into logits, such as onnxruntime, as a model without parameters or gradients.

    ``digest`` names what answers, e.g. its package's model by SHA-256: it is printed with the module, which is how
    a cache tells one answering model from another.
    """

    def __init__(self, runtime: Runtime, digest: str) -> None:
        super().__init__()
        self._runtime, self._digest = runtime, digest

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits float32 N×K of images N×C×H×W in [0, 1], N ≥ 1, on the images' device and outside any graph."""
        values = images.detach().cpu().numpy().astype(np.float32, copy=False)
        return torch.from_numpy(np.array(self._runtime.logits(values), dtype=np.float32)).to(images.device)

    def extra_repr(self) -> str:
        """What answers."""
        return f"{self._runtime.name} {self._digest}"


class Queries:
    """Ask a model at rest, and count: one for every image whose logits are given."""

    def __init__(self, model: nn.Module, progress: Progress | None = None) -> None:
        self._model, self._progress = model, progress
        self.asked = 0
        self._classes = 0

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits N×K of any number of images, in batches; none at all are no query."""
        self.asked += len(images)
        if self._progress is not None and len(images):
            self._progress(len(images))
        parts = [self._model(images[part]).float() for part in batches(images)]
        if not parts:
            return images.new_zeros(0, self._classes)
        self._classes = parts[0].shape[1]
        return torch.cat(parts)

    def logits_of_8bit(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the images rounded to 8 bits: what a device would be given."""
        return self.logits(torch.round(images * LEVELS) / LEVELS)


def margins(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """True class's logit minus the largest other one, N; below zero where the model is wrong."""
    true = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true - others.max(dim=1).values
