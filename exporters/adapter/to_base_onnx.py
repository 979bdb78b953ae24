"""The base's ONNX model with places for an adapter: initializers that are graph inputs, too (torch and onnx).

Such an initializer is the default of an input that may be left out, which is what onnxruntime's LoRA sets. With the
defaults (updates of zero) the model is the public base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.contract import InputContract
from exporters.to_onnx import export_onnx
from keys.errors import InputError
from keys.files import write_atomic


class LowRankLinear(nn.Module):
    """W·x + bias + B·(A·x): ``linear``'s own parameters under their names, and an update of rank ``rank``, zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.zeros(rank, linear.in_features), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        """Values (…, in) to (…, out)."""
        update = functional.linear(functional.linear(values, self.lora_A), self.lora_B)
        return functional.linear(values, self.weight, self.bias) + update


def export_base_onnx(
    module: nn.Module, path: Path, contract: InputContract, labels: Sequence[str], overridable: Sequence[str]
) -> None:
    """Write ``module`` to ``path`` as :func:`exporters.to_onnx.export_onnx` does, with ``overridable`` parameters.

    Raises :class:`InputError` as that does, and if a name is not among the exported initializers.
    """
    export_onnx(module, path, contract, labels)
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in overridable:
        if name not in stored:
            raise InputError(f"LoRA-only packages are not possible for this model: the export has no tensor {name}.")
        tensor = stored[name]
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    write_atomic(Path(path), model.SerializeToString(deterministic=True))
