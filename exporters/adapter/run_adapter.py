"""The base's ONNX model with a device's adapter put on it by onnxruntime's own LoRA; numpy and onnxruntime only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from exporters.adapter.adapter_file import read_adapter_file
from exporters.contract import checked_images
from exporters.manifest import shown
from exporters.runtime import batches
from keys.errors import PackageError

_TYPES = {"tensor(float)": np.dtype(np.float32), "tensor(int64)": np.dtype(np.int64)}


class AdapterRuntime:
    """A base model with one adapter on it.

    ``base``: the path or the bytes of the base package's ``model.onnx``; ``adapter``: an adapter file that nobody
    else can change; it must stay while this runs, because onnxruntime maps it into memory. ``threads``: compute
    threads, onnxruntime's own choice if None. Raises :class:`PackageError` if the base cannot be loaded, or the adapter
    has other tensors than the base takes.
    """

    name = "onnxruntime-lora"

    def __init__(self, base: str | Path | bytes, adapter: Path, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        model = base if isinstance(base, bytes) else str(base)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes, which have no common base
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PackageError(f"onnxruntime cannot load the base package's ONNX model: {reason}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        names = ([value.name for value in inputs], [value.name for value in outputs])
        sides = tuple(side for side in inputs[0].shape[1:] if isinstance(side, int)) if inputs else ()
        if names != (["image"], ["logits"]) or len(sides) != 3:
            raise PackageError(
                f"The base's ONNX model maps {names[0]} to {names[1]}, not images N×C×H×W in 'image' to 'logits'; "
                "get the base package again."
            )
        self.input_shape: tuple[int, int, int] = (sides[0], sides[1], sides[2])
        _check_fit(adapter, self._session)
        self._adapter = onnxruntime.LoraAdapter()
        self._adapter.Load(str(adapter))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 N×K of ``images`` float32 N×C×H×W in [0, 1]. Raises InputError for others."""
        images = checked_images(images, self.input_shape)
        options = onnxruntime.RunOptions()
        options.add_active_adapter(self._adapter)
        parts = [self._session.run(["logits"], {"image": part}, options)[0] for part in batches(images)]
        return np.concatenate([np.asarray(part) for part in parts])


def _check_fit(adapter: Path, session: onnxruntime.InferenceSession) -> None:
    """Refuse an adapter that onnxruntime would take but that is not this base's: it ignores what is left out."""
    tensors = read_adapter_file(adapter)
    wanted = {value.name: value for value in session.get_overridable_initializers()}
    if not wanted:
        raise PackageError("The base's ONNX model takes no adapter; give a base package.")
    for name in sorted(tensors.keys() ^ wanted.keys()):
        side, other = ("adapter", "base") if name in tensors else ("base", "adapter")
        raise PackageError(
            f"The {side} has {shown(name)} and the {other} has not: they were made by different recipes; "
            "get the adapter package of this fleet."
        )
    for name, tensor in tensors.items():
        if list(tensor.shape) != wanted[name].shape or tensor.dtype != _TYPES.get(wanted[name].type):
            raise PackageError(
                f"The adapter's {shown(name)} is {tensor.dtype} of {list(tensor.shape)}, but the base takes "
                f"{wanted[name].type} of {wanted[name].shape} (another rank or recipe); get this fleet's."
            )
        if tensor.dtype == np.int64 and not np.array_equal(np.sort(tensor, axis=None), np.arange(tensor.size)):
            raise PackageError(f"The adapter's {shown(name)} is no permutation; get the adapter package again.")
