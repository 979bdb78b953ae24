"""The reference runtime: a plain module in PyTorch, float32, on the device where its parameters lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from exporters.runtime import batches


@dataclass(frozen=True)
class TorchRuntime:
    """Evaluate ``module`` (in evaluation mode; N×C×H×W in [0, 1] to N×K)."""

    module: nn.Module
    name: str = "torch"

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 N×K of ``images`` float32 N×C×H×W in [0, 1]."""
        parameter = next(self.module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        parts = []
        with torch.inference_mode():
            for part in batches(images):
                values = torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)).to(device)
                parts.append(self.module(values).float().cpu().numpy())
        return np.concatenate(parts)
