"""A plain module as one ONNX file: float32, free or fixed batch size, class names and input contract inside.

Input ``image`` (float32 N×C×H×W in [0, 1]), output ``logits`` (float32 N×K), where N is free or, for runtimes that
want every shape to be known, 1; initializers keep the names of the parameters. Operator sets 17 to 22 can be had: what
a set lacks is spelled out in older operators (GELU before 20 by the error function), and the file asks for the oldest
file version that its operator set needs, so that old runtimes load it.

The exporter's metadata (source paths, stack traces, class hierarchies) is taken out: a package tells nothing about
the machine it was made on. The same module gives the same bytes.

Attention must be exported in its plain form: build timm models after ``timm.layers.set_fused_attn(False)``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import torch
from google.protobuf.message import Message
from torch import nn

from exporters.checks import check_module, named_tensors
from exporters.contract import InputContract
from exporters.formats import OPSET, OPSETS
from exporters.onnx_bias import drop_made_biases
from exporters.onnx_lowering import lower_to_17
from exporters.quiet import quiet
from keys.errors import InputError
from keys.files import write_atomic

Batch = Literal["dynamic", "static"]

# torch's exporter is written for it; older ones are made from it here.
_OLDEST_OF_TORCH = 18
LABELS_KEY = "keyfoundry.labels"
INPUT_KEY = "keyfoundry.input"
# One protobuf message holds 2 GiB; the graph around the weights of the largest ViTs is far below 64 MiB.
LARGEST_WEIGHTS = 2**31 - 2**26
_SOURCE_FIELDS = ("metadata_props", "doc_string")


def export_onnx(
    module: nn.Module,
    path: Path,
    contract: InputContract,
    labels: Sequence[str],
    *,
    opset: int = OPSET,
    batch: Batch = "dynamic",
) -> None:
    """Write ``module`` (N×C×H×W in [0, 1] to logits N×K) to ``path``, whole or not at all.

    ``opset`` is from 17 to 22; ``batch`` leaves N free, or fixes it to 1.
    Raises :class:`InputError` if the module cannot be exported (see :func:`exporters.checks.check_module`),
    does not fit into one file (2 GiB) or uses an operator that the exporter or the opset lacks, if ``opset`` or
    ``batch`` is another, and ``StorageError`` if the disk is full.
    """
    if type(opset) is not int or opset not in OPSETS:
        raise InputError(f"The ONNX opset must be a whole number from {OPSETS[0]} to {OPSETS[-1]}; got {opset!r}.")
    if batch not in get_args(Batch):
        raise InputError(f"The ONNX batch must be 'dynamic' or 'static'; got {batch!r}.")
    check_module(module, contract, labels)
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(module))
    if size > LARGEST_WEIGHTS:
        raise InputError(
            f"The model's weights take {size / 2**30:.2f} GiB and one ONNX file holds less than 2; "
            "choose a smaller base."
        )
    model = _convert(module, contract, max(opset, _OLDEST_OF_TORCH), batch)
    _strip_source(model)
    drop_made_biases(model)
    if opset < _OLDEST_OF_TORCH:
        lower_to_17(model)
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
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


def _convert(module: nn.Module, contract: InputContract, opset: int, batch: Batch) -> onnx.ModelProto:
    # A free batch size needs an example of two: with one, the exporter would take the batch size for a constant.
    free = batch == "dynamic"
    example = torch.zeros(2 if free else 1, *contract.shape)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) if free else None,
                # Off, because optimising renames and merges initializers.
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"torch cannot export this model to ONNX: {str(error).splitlines()[0]}") from error
    assert program is not None
    _rename_results(program.model.graph)
    model = program.model_proto
    # Where it cannot express a model in an operator set, the exporter leaves it in another and only warns.
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found != {"": opset}:
        needed = ", ".join(f"{domain or 'ONNX'} {version}" for domain, version in sorted(found.items()))
        raise InputError(
            f"torch cannot express this model in ONNX opset {opset}, but in {needed}; choose a newer opset."
        )
    return model


def _rename_results(graph: Any) -> None:
    """Give results other names where they have an initializer's: torch calls a mean "mean", whatever a buffer is."""
    taken = {*graph.initializers, *(value.name for node in graph for value in node.outputs)}
    for node in graph:
        for value in node.outputs:
            if value.name in graph.initializers:
                name = next(name for number in count(1) if (name := f"{value.name}_{number}") not in taken)
                taken.add(name)
                value.name = name


def _strip_source(message: Message) -> None:
    """Take metadata and documentation out of a message and of all messages inside it."""
    for field, value in message.ListFields():
        if field.name in _SOURCE_FIELDS:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                _strip_source(part)
