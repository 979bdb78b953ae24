"""Golden images: a few images and the logits that the factory saw for them, carried inside every package.

The device runs the images again and compares. Rules of this module: numpy only; a file is never unpickled,
and nothing is allocated for an array before its header was found to agree with the bytes that are there.

>>> golden = Golden(np.zeros((1, 1, 2, 2), np.uint8), np.zeros((1, 3), np.float32))
>>> read_arrays(golden.to_bytes(), ("images", "logits"), "golden.npz")["logits"].shape
(1, 3)
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exporters.contract import InputContract
from keys.errors import InputError, PackageError

GOLDEN_NAME = "golden.npz"
_MAX_GOLDEN = 1024


@dataclass(frozen=True, eq=False)
class Golden:
    """``images`` uint8 (n, C, H, W); ``logits`` float32 (n, K), what torch gave for images / 255."""

    images: np.ndarray
    logits: np.ndarray

    def to_bytes(self) -> bytes:
        """The bytes of ``golden.npz``; the same arrays give the same bytes."""
        stream = io.BytesIO()
        np.savez(stream, images=self.images.astype(np.uint8), logits=self.logits.astype(np.float32))
        return stream.getvalue()


def read_golden(data: bytes, contract: InputContract, classes: int) -> Golden:
    """Read ``golden.npz`` for a model of this contract with ``classes`` logits.

    Raises :class:`PackageError` if the file cannot be read or its arrays have other types or shapes.
    """
    try:
        arrays = read_arrays(data, ("images", "logits"), GOLDEN_NAME)
    except InputError as error:
        raise PackageError(str(error)) from error
    images, logits = arrays["images"], arrays["logits"]
    size = (contract.channels, contract.height, contract.width)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != size:
        raise PackageError(
            f"{GOLDEN_NAME} holds images of {images.dtype} and shape {images.shape}, not uint8 (n, "
            f"{', '.join(map(str, size))}) as the manifest's input says; get the package again."
        )
    if not 1 <= len(images) <= _MAX_GOLDEN:
        raise PackageError(f"{GOLDEN_NAME} holds {len(images)} images, not 1 to {_MAX_GOLDEN}; get it again.")
    if logits.dtype != np.float32 or logits.shape != (len(images), classes):
        raise PackageError(
            f"{GOLDEN_NAME} holds logits of {logits.dtype} and shape {logits.shape}, not float32 "
            f"({len(images)}, {classes}) as the manifest's labels say; get the package again."
        )
    if not np.isfinite(logits).all():
        raise PackageError(f"{GOLDEN_NAME} holds logits that are not finite; get the package again.")
    return Golden(images, logits)


def read_arrays(data: bytes, names: Sequence[str], where: str) -> dict[str, np.ndarray]:
    """The arrays ``names`` of an .npz file given as bytes; ``where`` names the file in errors.

    Raises :class:`InputError` if the bytes are not such a file, lack a name, or hold Python objects.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            present = set(archive.namelist())
            if missing := [name for name in names if f"{name}.npy" not in present]:
                raise InputError(f"{where} has no array {missing[0]!r}; write it with numpy.savez.")
            return {name: _read_array(archive, name, where) for name in names}
    except InputError:
        raise
    except Exception as error:  # damaged, truncated, encrypted: a header alone can make numpy raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where} is no readable .npz file ({reason}); write it with numpy.savez.") from error


def _read_array(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise InputError(f"{where} holds {name!r} in an unknown format; write it with numpy.savez.")
        form = np.lib.format
        read_header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        claimed = math.prod(shape) * dtype.itemsize
        left = archive.getinfo(f"{name}.npy").file_size - member.tell()
        if dtype.hasobject or claimed != left:
            raise InputError(
                f"{where} holds {name!r} as {dtype} of shape {shape} in {left} bytes, which is no plain "
                "array; write it with numpy.savez."
            )
        flat = np.frombuffer(member.read(), dtype)
    return flat.reshape(shape, order="F" if fortran_order else "C")
