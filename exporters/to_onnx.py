"""A plain module as one ONNX file: float32, free batch size, class names and input contract inside.

Input ``image`` (float32 N×C×H×W in [0, 1]), output ``logits`` (float32 N×K); initializers keep the names of
the parameters. The exporter's metadata (source paths, stack traces, class hierarchies) is taken out: a
package tells nothing about the machine it was made on. The same module gives the same bytes.

Attention must be exported in its plain form: build timm models after ``timm.layers.set_fused_attn(False)``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from google.protobuf.message import Message
from torch import nn

from exporters.checks import check_module, named_tensors
from exporters.contract import InputContract
from exporters.quiet import quiet
from keys.errors import InputError
from keys.files import write_atomic

OPSET = 20
LABELS_KEY = "keyfoundry.labels"
INPUT_KEY = "keyfoundry.input"
# One protobuf message holds 2 GiB; the graph around the weights of the largest ViTs is far below 64 MiB.
LARGEST_WEIGHTS = 2**31 - 2**26
_SOURCE_FIELDS = ("metadata_props", "doc_string")


def export_onnx(
    module: nn.Module, path: Path, contract: InputContract, labels: Sequence[str], *, opset: int = OPSET
) -> None:
    """Write ``module`` (N×C×H×W in [0, 1] to logits N×K) to ``path``, whole or not at all.

    Raises :class:`InputError` if the module cannot be exported (see :func:`exporters.checks.check_module`),
    does not fit into one file (2 GiB) or uses an operator that the exporter lacks, and ``StorageError``
    if the disk is full.
    """
    if opset < OPSET:
        raise InputError(f"The ONNX opset must be at least {OPSET}; got {opset}.")
    check_module(module, contract, labels)
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(module))
    if size > LARGEST_WEIGHTS:
        raise InputError(
            f"The model's weights take {size / 2**30:.2f} GiB and one ONNX file holds less than 2; "
            "choose a smaller base."
        )
    model = _convert(module, contract, opset)
    _strip_source(model)
    entries = {
        INPUT_KEY: json.dumps(contract.to_json(), sort_keys=True),
        LABELS_KEY: json.dumps(list(labels), ensure_ascii=False),
    }
    onnx.helper.set_model_props(model, entries)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"The exported graph is not valid ONNX: {error}") from error
    write_atomic(Path(path), model.SerializeToString(deterministic=True))


def _convert(module: nn.Module, contract: InputContract, opset: int) -> onnx.ModelProto:
    # An example batch of two: with one, the exporter would take the batch size for a constant.
    example = torch.zeros(2, *contract.shape)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                # Off, because optimising renames and merges initializers.
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"torch cannot export this model to ONNX: {str(error).splitlines()[0]}") from error
    assert program is not None
    return program.model_proto


def _strip_source(message: Message) -> None:
    """Take metadata and documentation out of a message and of all messages inside it."""
    for field, value in message.ListFields():
        if field.name in _SOURCE_FIELDS:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                _strip_source(part)
