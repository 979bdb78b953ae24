"""All formats of one model into one folder: converted in full, or written from a template where one fits.

What a template can hold is what every value of every weight leaves in its place: float32, float16 and linear int8.
The other formats follow from the ONNX file or the module by a search over values (calibration, clustering) or by
another program's writer, and are made anew for every device; they are still the same bytes each time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
from torch import nn

from exporters.contract import InputContract
from exporters.formats import DEFAULT_FORMATS, FORMATS, OPSET, Format, named_formats
from exporters.manifest import FileDigest, FormatEntry
from exporters.onnx_precision import to_fp16, to_int8, to_int8_static
from exporters.template import (
    TemplateError,
    device_tensors,
    is_permutation,
    load_template,
    make_template,
    patch,
    probe_of,
    prove,
    save_template,
)
from exporters.to_coreml import Precision, Target, export_coreml
from exporters.to_onnx import export_onnx
from exporters.to_ort import export_ort
from keys.errors import InputError
from keys.files import write_atomic

ONNX_FP32 = "onnx-fp32"


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """What is exported: names of formats (:mod:`exporters.formats`) and what is the same for all devices.

    ``calibration``: uint8 N×C×H×W, the images that static quantisation takes activations' ranges from.
    """

    contract: InputContract
    labels: tuple[str, ...]
    formats: tuple[str, ...] = DEFAULT_FORMATS
    opset: int = OPSET
    batch: Literal["dynamic", "static"] = "dynamic"
    target: Target = "iOS16"
    calibration: np.ndarray | None = field(default=None, repr=False)

    def entries(self) -> dict[str, FormatEntry]:
        """What the manifest says about each format."""
        onnx = {"opset": self.opset, "batch": self.batch}
        return {
            one.name: FormatEntry(
                one.path, one.runtime, one.precision, {"target": self.target} if one.runtime == "coreml" else onnx
            )
            for one in named_formats(self.formats)
        }


@dataclass(frozen=True)
class Templates:
    """The fleet's templates in ``folder``. ``made_from``: what must be equal for a device to be patched.

    ``tell`` is given one sentence whenever a model is converted in full although a template was to be used.
    """

    folder: Path
    made_from: Mapping[str, str]
    tell: Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What was written: path → digest of every file, and whether it came from a template."""

    digests: Mapping[str, FileDigest]
    from_template: bool


def export(module: nn.Module, folder: Path, plan: ExportPlan, templates: Templates | None = None) -> Exported:
    """Write all formats of ``module`` (N×C×H×W in [0, 1] to logits N×K) into the empty ``folder``.

    With ``templates`` the first model is converted in full and leaves a template, from which the others are written,
    with the same bytes as a full conversion; without, or where it does not fit, all are converted. Raises
    :class:`InputError` if the module cannot be exported, and ``StorageError`` if the disk is full.
    """
    digests = None if templates is None else _from_template(module, folder, plan, templates)
    from_template = digests is not None
    if digests is None:
        convert(module, folder, plan)
        digests = digests_of(folder)
        if templates is not None:
            _leave_template(module, folder, plan, templates)
    made_anew = _make_anew(module, folder, plan)
    kept = {name: digest for name, digest in digests.items() if (folder / name).exists()}
    return Exported(kept | made_anew, from_template)


def convert(module: nn.Module, folder: Path, plan: ExportPlan) -> None:
    """Convert the formats that a template can hold, and the float32 ONNX file that others are made of."""
    formats = {one.name: one for one in named_formats(plan.formats)}
    if any(one.runtime == "onnxruntime" for one in formats.values()):
        source = folder / FORMATS[ONNX_FP32].path
        export_onnx(module, source, plan.contract, plan.labels, opset=plan.opset, batch=plan.batch)
        for name, change in (("onnx-fp16", to_fp16), ("onnx-int8", to_int8)):
            if name in formats:
                write_atomic(folder / formats[name].path, change(source.read_bytes()))
    for one in formats.values():
        if one.runtime == "coreml" and one.patched:
            _export_coreml(module, folder, one, plan)


def _export_coreml(module: nn.Module, folder: Path, one: Format, plan: ExportPlan) -> None:
    precision = cast(Precision, one.precision)
    export_coreml(module, folder / one.path, plan.contract, plan.labels, precision=precision, target=plan.target)


def _make_anew(module: nn.Module, folder: Path, plan: ExportPlan) -> dict[str, FileDigest]:
    """Make what no template can hold, then drop the ONNX file if it was only needed for that."""
    formats = {one.name: one for one in named_formats(plan.formats)}
    source = folder / FORMATS[ONNX_FP32].path
    for one in formats.values():
        if one.patched:
            continue
        if one.name == "onnx-int8-static":
            if plan.calibration is None or not len(plan.calibration):
                raise InputError("Static int8 needs images to calibrate on; give some, or take onnx-int8.")
            images = plan.calibration.astype(np.float32) / 255
            write_atomic(folder / one.path, to_int8_static(source.read_bytes(), images))
        elif one.name == "ort-fp32":
            export_ort(source.read_bytes(), folder / one.path)
        else:
            _export_coreml(module, folder, one, plan)
    if ONNX_FP32 not in formats:
        source.unlink(missing_ok=True)
    made = [folder / one.path for one in formats.values() if not one.patched]
    return {name: digest for path in made for name, digest in digests_of(folder, path).items()}


def digests_of(folder: Path, part: Path | None = None) -> dict[str, FileDigest]:
    """Path below ``folder`` → digest of every file, or of those in ``part`` of it."""
    part = part or folder
    files = [part] if part.is_file() else sorted(path for path in part.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        digests[path.relative_to(folder).as_posix()] = FileDigest(sha256, path.stat().st_size)
    return digests


# ---- templates ----------------------------------------------------------------------------------------------------


def _from_template(
    module: nn.Module, folder: Path, plan: ExportPlan, templates: Templates
) -> dict[str, FileDigest] | None:
    """Write the module from the template; None, told to the user, if it has to be converted."""
    place, made_from = _place(module, plan, templates), _made_from(module, plan, templates)
    if _is_unusable(place, made_from):
        return None
    try:
        template = load_template(place, made_from)
        return None if template is None else patch(template, device_tensors(module), folder)
    except TemplateError as error:
        templates.tell(f"The template in {place} is not used ({error}); this model is converted in full.")
        return None


def _leave_template(module: nn.Module, converted: Path, plan: ExportPlan, templates: Templates) -> None:
    """Make and prove the template of a module that was just converted into ``converted``."""
    place, made_from = _place(module, plan, templates), _made_from(module, plan, templates)
    if _is_unusable(place, made_from):
        return
    probe = probe_of(module)
    scratch = place.with_name(f"{place.name}.probe")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        tensors, of_probe = device_tensors(module), device_tensors(probe)
        convert(probe, scratch, plan)
        template = make_template(scratch, of_probe, made_from)
        fault = prove(template, tensors, converted)
        if fault is None:
            save_template(template, place)
    except TemplateError as error:
        fault = str(error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if fault is not None:
        templates.tell(f"Every device is converted in full: a template would not give this model's bytes ({fault}).")
        write_atomic(place / _UNUSABLE, json.dumps({"made_from": made_from, "fault": fault}).encode())


_UNUSABLE = "unusable.json"


def _is_unusable(place: Path, made_from: str) -> bool:
    """Whether a template of just these inputs was made before and did not give the bytes."""
    try:
        return json.loads((place / _UNUSABLE).read_bytes())["made_from"] == made_from
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _made_from(module: nn.Module, plan: ExportPlan, templates: Templates) -> str:
    """What a template belongs to: the module's structure and constants, the plan, and what the caller names.

    Constants are buffers outside of the state, and integers in it that a probe leaves as they are.
    """
    constants = hashlib.sha256()
    state = module.state_dict()
    for name, buffer in module.named_buffers():
        if name not in state or not (buffer.is_floating_point() or is_permutation(buffer)):
            constants.update(name.encode() + buffer.detach().cpu().contiguous().numpy().tobytes())
    return json.dumps(
        {
            **templates.made_from, "module": hashlib.sha256(repr(module).encode()).hexdigest(),
            "constants": constants.hexdigest(), "contract": plan.contract.to_json(), "labels": list(plan.labels),
            "formats": {name: asdict(entry) for name, entry in plan.entries().items()},
        },
        sort_keys=True,
    )  # fmt: skip


def _place(module: nn.Module, plan: ExportPlan, templates: Templates) -> Path:
    """One template for each kind of module and plan: a control's may be another than the devices'."""
    kind = [repr(module), sorted(module.state_dict()), plan.entries().keys()]
    return templates.folder / hashlib.sha256(repr(kind).encode()).hexdigest()[:16]
