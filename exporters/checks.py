"""What a plain module must be before it is exported; every refusal names the label, tensor or shape at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from exporters.contract import InputContract
from keys.errors import InputError


def check_labels(labels: Sequence[str]) -> None:
    """Raise :class:`InputError` unless there are two or more class names, none empty and all different."""
    if len(labels) < 2:
        raise InputError(f"A classifier needs at least two class names; got {len(labels)}.")
    empty = next((index for index, label in enumerate(labels) if not label.strip()), None)
    if empty is not None:
        raise InputError(f"The name of class {empty} is empty; name every class.")
    # Core ML answers with a dictionary keyed by class name, so a repeated name would lose a class.
    label, times = Counter(labels).most_common(1)[0]
    if times > 1:
        raise InputError(f"The class name {label!r} is used {times} times; class names must be different.")


def check_module(module: nn.Module, contract: InputContract, labels: Sequence[str]) -> None:
    """Raise :class:`InputError` unless ``module`` can be exported under ``contract`` with these ``labels``.

    It must be in evaluation mode, hold finite float32 weights (integer buffers are free), accept an image
    of the contract's size and give one logit per label.
    """
    check_labels(labels)
    if any(part.training for part in module.modules()):
        raise InputError("The model is in training mode; call eval() on it before the export.")
    for name, tensor in named_tensors(module):
        if tensor.dtype != torch.float32:
            raise InputError(f"The tensor {name} is {tensor.dtype}; convert the model to float32 first.")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"The tensor {name} holds NaN or infinite values; train the model again.")
    size = "×".join(map(str, contract.shape))
    try:
        with torch.inference_mode():
            logits = module(torch.zeros(1, *contract.shape))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The model does not take an image of size {size}: {error}") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise InputError(f"The model must map images N×{size} to one tensor of logits N×K.")
    if logits.shape[1] != len(labels):
        raise InputError(
            f"The model gives {logits.shape[1]} logits and there are {len(labels)} class names; "
            "the two numbers must be the same."
        )


def check_float16_range(module: nn.Module) -> None:
    """Raise :class:`InputError` naming the first tensor with a value that float16 cannot hold (over 65504)."""
    for name, tensor in named_tensors(module):
        check_float16(name, float(tensor.abs().max()) if tensor.numel() else 0.0)


def check_float16(name: str, largest: float) -> None:
    """Raise :class:`InputError` naming the tensor if its ``largest`` absolute value is beyond float16."""
    limit = torch.finfo(torch.float16).max
    if largest > limit:
        raise InputError(f"The tensor {name} holds {largest:g}, more than float16 can ({limit:g}); export it in fp32.")


def named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Name and value of every floating-point parameter and buffer."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point()]
