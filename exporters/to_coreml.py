"""A plain module as a Core ML package: an ML Program that Xcode and Vision use with no glue code.

* Input ``image``: one 8-bit image, grey or RGB, of the contract's size; the program scales it by 1/255.
* Outputs: ``classLabel`` (string) and ``classLabel_probs`` (dictionary from class name to softmax), which make
  it a classifier for Vision (``predictedFeatureName`` is set), and ``logits`` (float32 1×K), so that parity
  and the golden values are checked on the same quantity as for ONNX, not on the logarithm of a softmax that
  underflows in fp16.
* ``target`` is the oldest system that runs the package: iOS 16 (macOS 13, the default, for the most devices), iOS 17
  (macOS 14) or iOS 18 (macOS 15), whose programs hold newer versions of the same operators.
* ``precision`` is fp32, fp16, or fp16 with compressed weights: ``int8`` (one scale per output channel) or
  ``palettized`` (indices into one table of 64 values per tensor). Only the weights of linear layers, convolutions and
  products of matrices are compressed, from ``INT8_THRESHOLD`` and ``PALETTE_THRESHOLD`` values on; the rest is float16.
* The same module gives the same bytes: conversion date, tool versions and random identifiers are taken out (the
  package's manifest names the tools). Two modules of one architecture give files of one length that differ only in
  what is made of their weights (see :mod:`exporters.coreml_passes`).
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from exporters.checks import check_float16_range, check_module
from exporters.contract import InputContract
from exporters.coreml_passes import independent_of_values
from exporters.mil.program import ITEM, MODEL_PATH, WEIGHTS_PATH
from exporters.quiet import import_coremltools, quiet
from keys.errors import InputError, StorageError
from keys.files import folder_being_written

Precision = Literal["fp32", "fp16", "int8", "palettized"]
Target = Literal["iOS16", "iOS17", "iOS18"]

# The most values of a tensor that is left in float16: scales or a table would take up what is saved. For palettes it
# is also the least that coremltools clusters exactly and by itself (it wants scikit-learn for fewer values).
INT8_THRESHOLD = 2048
PALETTE_THRESHOLD = 9_999
PALETTE_BITS = 6
# The layers whose weights are compressed; position embeddings and the like are small and are added, not multiplied.
_COMPRESSED = ("linear", "conv", "matmul")


class _Classifier(nn.Module):
    """Logits and their softmax, the two tensors that the Core ML outputs are made of."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.module(image)
        probabilities = torch.softmax(logits, dim=-1)
        return logits, probabilities


def export_coreml(
    module: nn.Module,
    path: Path,
    contract: InputContract,
    labels: Sequence[str],
    *,
    precision: Precision = "fp16",
    target: Target = "iOS16",
) -> None:
    """Write ``module`` (N×C×H×W in [0, 1] to logits N×K) as the folder ``path``, whole or not at all.

    ``precision`` is that of weights and activations (activations of the compressed kinds are float16); image,
    ``logits`` and the last softmax are float32 in all. ``target`` is the oldest system that shall run it.
    Raises :class:`InputError` if one of the two is unknown, if the module cannot be exported (see
    :func:`exporters.checks.check_module`), holds a value beyond float16 while ``precision`` is not fp32, or uses an
    operator that coremltools lacks, and ``StorageError`` if the disk is full.
    """
    for what, value, known in (("precision", precision, get_args(Precision)), ("target", target, get_args(Target))):
        if value not in known:
            raise InputError(f"The Core ML {what} {value!r} is unknown; choose one of {', '.join(known)}.")
    check_module(module, contract, labels)
    if precision != "fp32":
        check_float16_range(module)
    with folder_being_written(Path(path)) as folder:
        # Converted inside the folder, so that a large model is written once, on the disk where it stays.
        raw = folder / "converted.mlpackage"
        spec = _convert(module, raw, contract, labels, precision, target)
        _strip_source(spec)
        weights = folder / WEIGHTS_PATH
        weights.parent.mkdir(parents=True)
        (raw / WEIGHTS_PATH).replace(weights)
        weights.chmod(0o644)
        _remove_package(raw)
        (folder / MODEL_PATH).write_bytes(spec.SerializeToString(deterministic=True))
        (folder / "Manifest.json").write_text(_package_manifest())


def _convert(
    module: nn.Module, raw: Path, contract: InputContract, labels: Sequence[str], precision: Precision, target: Target
) -> Any:
    """The converted model's specification; its weights are left in the package ``raw``.

    Two steps, because coremltools 9 cannot give a classifier a further output while it still holds the
    description of the traced outputs: the first makes the program with both tensors named, the second only
    compresses weights and adds the classifier to it.
    """
    ct = import_coremltools()
    layout = ct.colorlayout.GRAYSCALE if contract.channels == 1 else ct.colorlayout.RGB
    shape = (1, *contract.shape)
    image = ct.ImageType(name="image", shape=shape, scale=1 / 255, color_layout=layout)
    outputs = [ct.TensorType(name=name, dtype=np.float32) for name in ("logits", "probabilities")]
    classes = ct.ClassifierConfig(
        list(labels), predicted_feature_name="classLabel", predicted_probabilities_output="probabilities"
    )
    try:
        with quiet(), independent_of_values(), torch.no_grad():
            traced = torch.jit.trace(_Classifier(module).eval(), torch.zeros(shape), check_trace=False)
            program = ct.convert(
                traced,
                convert_to="milinternal",
                inputs=[image],
                outputs=outputs,
                minimum_deployment_target=ct.target[target],
                compute_precision=ct.precision.FLOAT32 if precision == "fp32" else _float16(ct),
            )
            program.functions["main"].output_types = None
            model = ct.convert(
                program,
                convert_to="mlprogram",
                classifier_config=classes,
                minimum_deployment_target=ct.target[target],
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=_compression(ct, precision),
                skip_model_load=True,
                package_dir=str(raw),
            )
    except (NotImplementedError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"coremltools cannot convert this model to Core ML: {reason}") from error
    except RuntimeError as error:
        # What coremltools raises where it cannot write the weights: to the system's temporary folder first, then
        # to the package. It does not tell a full disk from a failing one.
        if not any(text in str(error) for text in ("FileWriter", "filesystem error")):
            raise
        raise StorageError(
            f"The model's weights could not be written to {tempfile.gettempdir()} and {raw.parent.parent}; "
            "free space on both (TMPDIR names the first) and run again."
        ) from error
    return model.get_spec()


def _float16(ct: Any) -> Any:
    """float16 for all but the last softmax: rounded, it would tie classes whose logits differ."""
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: op.outputs[0].name != "probabilities")


def _compression(ct: Any, precision: Precision) -> Any:
    """The passes of the second step: what compresses the weights, and nothing where they are kept."""
    pipeline = ct.PassPipeline.EMPTY
    if precision not in ("int8", "palettized"):
        return pipeline
    optimize = import_coremltools("coremltools.optimize.coreml")
    if precision == "int8":
        name = "compression::linear_quantize_weights"
        config = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int8", granularity="per_channel", weight_threshold=INT8_THRESHOLD
        )
    else:
        name = "compression::palettize_weights"
        config = optimize.OpPalettizerConfig(
            mode="kmeans", nbits=PALETTE_BITS, granularity="per_tensor", weight_threshold=PALETTE_THRESHOLD
        )
    layers = dict.fromkeys(_COMPRESSED, config)
    pipeline.append_pass(name)
    pipeline.set_options(name, {"config": optimize.OptimizationConfig(op_type_configs=layers)})
    return pipeline


def _strip_source(spec: Any) -> None:
    """Take out what tells of the machine or the day of the conversion."""
    spec.description.metadata.Clear()
    spec.mlProgram.attributes.clear()


def _package_manifest() -> str:
    """The package's table of contents, with identifiers that depend on nothing but the format."""
    weights, model = (str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in (WEIGHTS_PATH, MODEL_PATH))
    entries = {
        weights: {
            "author": ITEM,
            "description": "CoreML Model Weights",
            "name": "weights",
            "path": f"{ITEM}/weights",
        },
        model: {
            "author": ITEM,
            "description": "CoreML Model Specification",
            "name": "model.mlmodel",
            "path": f"{ITEM}/model.mlmodel",
        },
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": model}
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"


def _remove_package(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()
