"""The low-rank updates inside a model that peft adapted, as arrays: what an adapter package carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from exporters.low_rank import merged

_PREFIX = "base_model.model."
_ADAPTER = "default"


@dataclass(frozen=True, eq=False)
class LowRankLayer:
    """One layer with its update: ``layer`` is the base's own, ``a`` float32 (r, …), ``b`` float32 (out, r, …).

    The scaling is in ``b``, rounded to float32 once.
    """

    layer: nn.Linear | nn.Conv2d
    a: np.ndarray
    b: np.ndarray

    def merge(self) -> None:
        """Add the update to the layer's weight, in place and bit for bit as a device does it."""
        weight = self.layer.weight
        with torch.no_grad():
            weight.copy_(torch.from_numpy(merged(_array(weight), self.a, self.b)))


def low_rank_layers(model: PeftModel) -> dict[str, LowRankLayer]:
    """Name in the plain model → layer and update, for every float32 linear layer and convolution that LoRA adapts."""
    found = {}
    for name, module in _lora_layers(model):
        layer = module.get_base_layer()
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            continue  # an update of its own for each group is no product of two matrices
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.dtype == torch.float32:
            a, b = (_array(getattr(module, which)[_ADAPTER].weight.float()) for which in ("lora_A", "lora_B"))
            scaled = (b.astype(np.float64) * module.scaling[_ADAPTER]).astype(np.float32)
            found[name] = LowRankLayer(layer, a, scaled)
    return found


def merge_low_rank(model: PeftModel) -> None:
    """Merge every update into its layer's weight, in place; layers of other kinds or types by peft's own arithmetic."""
    exact = low_rank_layers(model)
    for name, module in _lora_layers(model):
        if name in exact:
            exact[name].merge()
        else:
            module.merge()


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(_PREFIX), module


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
