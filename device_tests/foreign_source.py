"""A model of one's own as a source: a Python factory ``package.module:factory``, or an ONNX file.

Rules: a source is looked at with real images before anything is attacked on it: its input, its number of classes, and
whether a gradient comes back. What gives no gradient can only be asked, and says so. A Python source is the user's own
code and runs when it is loaded: its name comes from the command line or a study's file, never from anything read out
of a package or a report. An ONNX file is data; its conversion to torch is believed only where it agrees with
onnxruntime on real images.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError, Message
from torch import nn
from torch.nn import functional

from device_tests.attacks.answers import AnsweringModel
from device_tests.attacks.gradients import at_rest
from device_tests.images import from_8bit
from device_tests.threats import Source, Threat
from exporters.contract import InputContract, checked_images
from exporters.quiet import quiet
from exporters.run_torch import TorchRuntime
from exporters.runtime import BATCH, batches
from keys.errors import InputError

AGREEMENT = 1e-3
"""How far a converted ONNX file's logits may be from onnxruntime's, as a share of the largest logit."""

PROBES = 32
"""Real images that a source is looked at with."""

_LARGEST_ONNX = 2**31  # one protobuf message
_PYTHON_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def load_source(
    text: str,
    contract: InputContract,
    labels: Sequence[str],
    images: np.ndarray,
    *,
    threat: Threat = Threat.PUBLIC_BASE,
) -> Source:
    """Load ``package.module:factory`` or the path of an ``.onnx`` file as a source, and look at it.

    The factory takes no arguments and returns a module of float32 N×C×H×W in [0, 1] → logits N×K; importing it runs
    the user's code. An ONNX file maps one such input to one such output. ``images``: real clean ones, uint8 N×C×H×W of
    the contract's shape, of which the first ``PROBES`` are used; ``labels``: the K class names. ``threat``: the place
    that the source takes among the attackers.
    Raises :class:`InputError` if it cannot be loaded, has other classes or another input, gives probabilities or values
    that are not finite, or if onnxruntime cannot run it.
    """
    probes = images[:PROBES]
    if text.lower().endswith(".onnx"):
        return _onnx_source(Path(text), contract, len(labels), probes, threat)
    if _PYTHON_NAME.fullmatch(text):
        return _python_source(text, contract, len(labels), probes, threat)
    raise InputError(
        f"{text!r} is no source; give package.module:factory, a function without arguments that returns a torch "
        "module, or the path of an .onnx file."
    )


class OnnxFile:
    """Any ONNX classifier in onnxruntime: one float32 input N×C×H×W, whatever its name, and one output N×K.

    The batch is free or fixed to one. Raises :class:`InputError` if it cannot be run or looks otherwise.
    """

    name = "onnxruntime"

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of its own for every fault of a file
            raise InputError(f"onnxruntime cannot load {where}: {_first_line(error)}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        outputs = [output for output in outputs if output.name == "logits"] or outputs
        if len(inputs) != 1 or len(outputs) != 1:
            raise InputError(
                f"{where} has {len(inputs)} inputs and {len(outputs)} outputs; a source maps one image input to one "
                "output, the logits."
            )
        self._input, self._output = inputs[0].name, outputs[0].name
        self.shape: tuple[Any, ...] = tuple(inputs[0].shape)
        if inputs[0].type != "tensor(float)" or len(self.shape) != 4 or self.shape[0] not in (1, None, *_names(inputs)):
            raise InputError(
                f"{where} takes {inputs[0].type} of shape {list(self.shape)}; a source takes float32 N×C×H×W in "
                "[0, 1] with a free batch size, or 1."
            )

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 N×K of ``images`` float32 N×C×H×W in [0, 1]; raises :class:`InputError` if it cannot."""
        images = checked_images(images, (images.shape[1], images.shape[2], images.shape[3]))
        parts: list[np.ndarray] = []
        for part in batches(images, 1 if self.shape[0] == 1 else BATCH):
            try:
                answer = np.asarray(self._session.run([self._output], {self._input: part})[0])
            except Exception as error:  # as above
                size = "×".join(map(str, images.shape[1:]))
                raise InputError(f"{self.where} cannot run images of {size}: {_first_line(error)}") from error
            if answer.ndim != 2 or len(answer) != len(part) or answer.dtype.kind != "f":
                raise InputError(
                    f"{self.where} gives {answer.dtype} of shape {answer.shape} for {len(part)} images; a source gives "
                    "logits, images × classes."
                )
            parts.append(answer)
        return np.concatenate(parts)


class ConvertedOnnx(nn.Module):
    """An ONNX file as a torch module: float32 N×C×H×W in [0, 1] → logits N×K.

    ``digest``, the file's SHA-256, is a buffer: constants of the graph need not be, and a cache must tell two files
    apart.
    """

    def __init__(self, converted: nn.Module, digest: bytes) -> None:
        super().__init__()
        self.converted = converted
        self.digest: torch.Tensor
        self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits N×K."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the converter's own code, which nobody here can change
            return self.converted(images)


def _python_source(text: str, contract: InputContract, classes: int, probes: np.ndarray, threat: Threat) -> Source:
    module_name, _, attribute = text.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's code runs here and may raise anything
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(
            f"The source {text} cannot be imported ({reason}); install its package, or set PYTHONPATH to its folder."
        ) from error
    try:
        model = factory()
    except Exception as error:  # and here
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(f"The source {text} cannot be made: it was called without arguments ({reason}).") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"The source {text} returned {type(model).__name__}, not a torch.nn.Module.")
    model.eval()
    try:
        logits = TorchRuntime(model).logits(from_8bit(probes))
    except Exception as error:  # and here
        size = "×".join(map(str, contract.shape))
        raise InputError(
            f"The source {text} does not take this fleet's images, float32 N×{size} in [0, 1] "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error
    _check_logits(text, logits, len(probes), classes)
    missing = _missing_gradient(model, probes)
    description = f"a source of the user's own, {text}"
    if missing is not None:
        description += f"; it can only be asked: {missing}"
    return Source(_id(module_name, attribute), threat, model, description, differentiable=missing is None)


def _onnx_source(path: Path, contract: InputContract, classes: int, probes: np.ndarray, threat: Threat) -> Source:
    data = read_onnx(path)
    digest = hashlib.sha256(data)
    runtime = OnnxFile(data, str(path))
    _check_shape(runtime, contract)
    answers = runtime.logits(from_8bit(probes))
    _check_logits(str(path), answers, len(probes), classes)
    converted = _converted(data, digest.digest(), probes, answers)
    # With the digest: many files are called model.onnx, and two sources must not be one.
    name = _id(path.stem, digest.hexdigest()[:8])
    description = f"a source of the user's own, the ONNX file {path.name}"
    if isinstance(converted, nn.Module):
        return Source(name, threat, converted, f"{description}, converted to torch")
    model = AnsweringModel(runtime, digest.hexdigest())
    return Source(name, threat, model, f"{description}; it can only be asked: {converted}", differentiable=False)


def _converted(data: bytes, digest: bytes, probes: np.ndarray, answers: np.ndarray) -> ConvertedOnnx | str:
    """The file as a torch module that agrees with onnxruntime's ``answers``, or a clause that says why not."""
    try:
        from onnx2pytorch import ConvertModel
        from onnxscript import optimizer
    except ImportError:
        return "its conversion for gradients needs onnx2pytorch; install keyfoundry[onnx-source]"
    try:
        with quiet():
            # Folding constants first: exporters leave weights behind Identity nodes, where the converter loses them.
            graph = optimizer.optimize(onnx.load_model_from_string(data))
            model = ConvertedOnnx(ConvertModel(graph), digest).eval()
            logits = TorchRuntime(model).logits(from_8bit(probes))
            missing = _missing_gradient(model, probes)
    except Exception as error:  # noqa: BLE001 – a converter may raise anything on a graph that it does not know
        return f"it cannot be converted to torch ({type(error).__name__}: {_first_line(error)})"
    difference = np.inf
    if logits.shape == answers.shape and np.isfinite(logits).all():
        difference = float(np.abs(logits - answers).max() / np.abs(answers).max())
    if difference > AGREEMENT:
        return f"converted to torch its logits are off by {difference:.2g} of the largest (limit {AGREEMENT:g})"
    return model if missing is None else missing


def read_onnx(path: Path) -> bytes:
    """The bytes of an ONNX file with all of its weights inside; raises :class:`InputError` for anything else."""
    try:
        size = path.stat().st_size
        if size >= _LARGEST_ONNX:
            raise InputError(f"The ONNX file {path} has {size} bytes; give one of less than 2 GiB.")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"The ONNX file {path} cannot be read: {error.strerror}.") from error
    try:
        graph = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise InputError(f"{path} is no ONNX file, or it is damaged.") from error
    # onnxruntime would read them from wherever the file says, and the digest would not cover them.
    if _has_external_data(graph):
        raise InputError(f"The ONNX file {path} keeps weights in other files; save it as one file, weights inside.")
    return data


def _has_external_data(message: Message) -> bool:
    for field, value in message.ListFields():
        if field.name == "external_data":
            return True
        parts = value if field.is_repeated else [value]
        if field.message_type is not None and any(_has_external_data(part) for part in parts):
            return True
    return False


def _check_shape(runtime: OnnxFile, contract: InputContract) -> None:
    """Refuse an input that declares another size; axes without a number are found out by running it."""
    declared = runtime.shape[1:]
    if any(isinstance(side, int) and side != wanted for side, wanted in zip(declared, contract.shape, strict=True)):
        raise InputError(
            f"{runtime.where} takes images of {'×'.join(map(str, declared))}, but this fleet's are "
            f"{'×'.join(map(str, contract.shape))} (channels, height, width); export the model for those."
        )


def _check_logits(where: str, logits: np.ndarray, count: int, classes: int) -> None:
    if logits.ndim != 2 or logits.shape[0] != count:
        raise InputError(f"{where} gives {logits.shape} for {count} images; a source gives logits, images × classes.")
    if logits.shape[1] != classes:
        raise InputError(f"{where} has {logits.shape[1]} classes, but this fleet has {classes}.")
    if not np.isfinite(logits).all() or not np.abs(logits).max() > 0:
        raise InputError(f"{where} gives logits that are not finite, or all zero; check its weights.")
    if logits.min() >= 0 and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise InputError(
            f"{where} gives probabilities (they sum to one), and attacks on those are weak; leave out the last "
            "softmax, so that it gives logits."
        )


def _missing_gradient(model: nn.Module, probes: np.ndarray) -> str | None:
    """Why no gradient comes back through ``model``, as a clause; ``None`` if one does."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    images = torch.from_numpy(from_8bit(probes)).to(device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    try:
        with at_rest(model), torch.enable_grad():
            leaf = images.requires_grad_(True)
            loss = functional.cross_entropy(model(leaf), labels, reduction="sum")
            gradient = torch.autograd.grad(loss, leaf)[0]
    except RuntimeError as error:  # nothing in the graph, or a step without a derivative
        return f"it gives no gradient ({_first_line(error)})"
    if not torch.isfinite(gradient).all():
        return "its gradient is not finite on real images"
    return None if gradient.any() else "its gradient is zero on real images"


def _names(inputs: Sequence[Any]) -> list[str]:
    """The names of free axes."""
    return [axis for value in inputs for axis in value.shape if isinstance(axis, str)]


def _id(*parts: str) -> str:
    """A source id that is safe as a folder's name and that no device of a fleet can have."""
    return "own." + "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[-40:] for part in parts)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]
