"""Adversarial images made elsewhere, read from an .npz file or a folder of PNG files, before anything is checked.

Rules: the file is not trusted. Nothing is unpickled, unpacked onto the disk or followed through a link, and no array
or picture is allocated before its header was found to fit the model's input and the bytes that are there. What comes
out has the model's shape; whether it is a fair attack is for :mod:`device_tests.foreign_pairs` to say.
"""

from __future__ import annotations

import csv
import io
import math
import stat
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporters.contract import InputContract
from keys.errors import InputError
from keys.files import write_atomic

LARGEST_COUNT = 100_000
"""Images that are judged at once; as many as the largest acceptance plan takes."""

LARGEST_BYTES = 2**32
"""Largest array that is read."""

LABELS_NAME = "labels.csv"
_ARRAYS = ("adversarial", "clean", "labels", "indices")
_LARGEST_PNG = 2**26
_LARGEST_CSV = 2**26
_PNG_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, eq=False)
class ForeignFile:
    """What a file or folder holds: N ≥ 1 images of the model's shape; ``None`` for what it leaves out.

    ``adversarial``, ``clean``: N×C×H×W, uint8 or any float. ``labels``: int64 N, each a class. ``indices``: int64 N,
    each image's place among the test images, all different. ``where``: the path, for errors.
    """

    where: str
    adversarial: np.ndarray
    clean: np.ndarray | None = None
    labels: np.ndarray | None = None
    indices: np.ndarray | None = None


def read_foreign(path: Path, contract: InputContract, labels: Sequence[str]) -> ForeignFile:
    """Read adversarial images for a model of this contract with these class names.

    An ``.npz`` file holds ``adversarial`` and, if they are there, ``clean``, ``labels`` and ``indices``. A folder holds
    8-bit PNG files: in the order of their names or, where every name is a number, of those test images; and a
    ``labels.csv`` of file,label (class number or name) if it is there.
    Raises :class:`InputError` if it cannot be read or does not fit the model.
    """
    if path.is_dir():
        return _read_folder(path, contract, labels)
    if not path.exists():
        raise InputError(f"{path} does not exist; give an .npz file or a folder of PNG files.")
    if path.suffix.lower() != ".npz":
        raise InputError(f"{path} is neither an .npz file nor a folder of PNG files; give one of the two.")
    return _read_npz(path, contract, len(labels))


def write_clean(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write the clean images to attack elsewhere: ``clean`` uint8 N×C×H×W, ``labels`` and ``indices`` from 0, as .npz.

    With an array ``adversarial`` added, the file is one that :func:`read_foreign` reads.
    """
    stream = io.BytesIO()
    indices = np.arange(len(images))
    np.savez_compressed(stream, clean=images, labels=labels.astype(np.int64), indices=indices)
    write_atomic(path, stream.getvalue())


# .npz


def _read_npz(path: Path, contract: InputContract, classes: int) -> ForeignFile:
    try:
        with zipfile.ZipFile(path) as archive:
            present = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
            if "adversarial" not in present:
                found = f", but {', '.join(sorted(present))}" if present else ""
                raise InputError(
                    f"{path} has no array 'adversarial'{found}; write it with numpy.savez(..., adversarial=...)."
                )
            single = {"labels": 1, "indices": 1}
            arrays = {
                name: _read_array(archive, name, path, single.get(name, math.prod(contract.shape)))
                for name in _ARRAYS
                if name in present
            }
    except InputError:
        raise
    except Exception as error:  # damaged, truncated, encrypted: a header alone can make numpy raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is no readable .npz file ({reason}); write it with numpy.savez.") from error
    adversarial = _shaped(arrays["adversarial"], "adversarial", contract, path)
    clean = _shaped(arrays["clean"], "clean", contract, path) if "clean" in arrays else None
    labels, indices = arrays.get("labels"), arrays.get("indices")
    for name, values in (("clean", clean), ("labels", labels), ("indices", indices)):
        if values is not None and len(values) != len(adversarial):
            raise InputError(
                f"{path} holds {len(adversarial)} adversarial images, but {len(values)} {name}; give one for each."
            )
    for name, values in (("labels", labels), ("indices", indices)):
        if values is not None and (values.ndim != 1 or not np.issubdtype(values.dtype, np.integer)):
            raise InputError(f"{path} holds {name} of {values.dtype} and shape {values.shape}; give one integer each.")
    if labels is not None and not ((labels >= 0) & (labels < classes)).all():
        raise InputError(
            f"{path} holds labels from {labels.min()} to {labels.max()}, but this fleet's {classes} classes are "
            f"numbered from 0 to {classes - 1}."
        )
    if indices is not None:
        _check_different(indices.tolist(), path)
    return ForeignFile(
        str(path), adversarial, clean,
        None if labels is None else labels.astype(np.int64), None if indices is None else indices.astype(np.int64),
    )  # fmt: skip


def _read_array(archive: zipfile.ZipFile, name: str, path: Path, values: int) -> np.ndarray:
    """One array, checked by its header before any of it is allocated: so many ``values`` an image, and no more."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path} holds {name!r} in an unusual compression; write it with numpy.savez.")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise InputError(f"{path} holds {name!r} in an unknown format; write it with numpy.savez.")
        form = np.lib.format
        read_header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        claimed = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or dtype.kind not in "uif" or min(shape, default=0) < 0:
            raise InputError(f"{path} holds {name!r} as {dtype} of shape {shape}; give numbers.")
        if not shape or not 1 <= shape[0] <= LARGEST_COUNT or claimed > LARGEST_BYTES:
            raise InputError(
                f"{path} holds {name!r} of shape {shape} ({claimed} bytes); give 1 to {LARGEST_COUNT} images of "
                f"{LARGEST_BYTES} bytes at most."
            )
        if math.prod(shape[1:]) > values:
            raise InputError(f"{path} holds {name!r} of shape {shape}, more than {values} values for each image.")
        if info.file_size - member.tell() != claimed:
            raise InputError(
                f"{path} holds {name!r} as {dtype} of shape {shape} in {info.file_size - member.tell()} bytes, which "
                "is no plain array; write it with numpy.savez."
            )
        # So many and no more, whatever the archive goes on to unpack.
        data = member.read(claimed)
    flat = np.frombuffer(data, dtype)  # ValueError if it is cut short
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _shaped(images: np.ndarray, name: str, contract: InputContract, path: Path) -> np.ndarray:
    """The images as N×C×H×W; N×H×W×C and, for grey, N×H×W are taken too."""
    channels, height, width = contract.shape
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise InputError(f"{path} holds {name!r} as {images.dtype}; give 8-bit values (uint8) or floats in [0, 1].")
    if images.ndim == 4 and images.shape[1:] == (channels, height, width):
        return images
    if images.ndim == 4 and images.shape[1:] == (height, width, channels):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if channels == 1 and images.ndim == 3 and images.shape[1:] == (height, width):
        return images[:, None]
    raise InputError(
        f"{path} holds {name!r} of shape {images.shape}, but this fleet's models take {contract.color} images of shape "
        f"(N, {channels}, {height}, {width})."
    )


# A folder of PNG files


def _read_folder(folder: Path, contract: InputContract, labels: Sequence[str]) -> ForeignFile:
    files = [entry for entry in folder.iterdir() if entry.suffix.lower() == ".png"]
    if not files:
        raise InputError(f"{folder} holds no PNG files; give a folder with one for each adversarial image.")
    if len(files) > LARGEST_COUNT:
        raise InputError(f"{folder} holds {len(files)} PNG files; at most {LARGEST_COUNT} are judged at once.")
    size = len(files) * math.prod(contract.shape)
    if size > LARGEST_BYTES:
        raise InputError(f"{folder} holds images of {size} bytes in all; at most {LARGEST_BYTES} are judged at once.")
    indices = None
    if all(file.stem.isascii() and file.stem.isdigit() and len(file.stem) <= 18 for file in files):
        files.sort(key=lambda file: int(file.stem))
        _check_different([int(file.stem) for file in files], folder)
        indices = np.array([int(file.stem) for file in files], dtype=np.int64)
    else:
        files.sort(key=lambda file: file.name)
    images = np.stack([_read_png(file, contract) for file in files])
    table = folder / LABELS_NAME
    classes = _read_labels(table, files, labels) if table.is_file() else None
    return ForeignFile(str(folder), images, None, classes, indices)


def _read_png(path: Path, contract: InputContract) -> np.ndarray:
    """One picture as uint8 C×H×W; size and kind are looked at in the header, before it is decoded."""
    from PIL import Image, UnidentifiedImageError

    channels, height, width = contract.shape
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_PNG:
        raise InputError(f"{path} is a link, no plain file, or larger than {_LARGEST_PNG} bytes; give plain PNG files.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as picture:
                if picture.size != (width, height) or picture.mode != _PNG_MODES[channels]:
                    raise InputError(
                        f"{path} is a picture of {picture.width}×{picture.height} pixels of kind {picture.mode}, but "
                        f"this fleet's models take {width}×{height} pixels, 8 bits, {contract.color}."
                    )
                pixels = np.asarray(picture, dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path} claims to be far larger than {width}×{height} pixels; it is not opened.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is no readable PNG file ({error}).") from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read_labels(path: Path, files: Sequence[Path], labels: Sequence[str]) -> np.ndarray:
    """The class of every file, in the files' order; names in the table are only looked up, never opened."""
    if path.lstat().st_size > _LARGEST_CSV or path.is_symlink():
        raise InputError(f"{path} is a link or larger than {_LARGEST_CSV} bytes; give a plain table of file,label.")
    numbers = {name: number for number, name in enumerate(labels)}
    numbers |= {str(number): number for number in range(len(labels)) if str(number) not in numbers}
    wanted = {file.name for file in files}
    found: dict[str, int] = {}
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is no readable table ({error}); write lines of file,label.") from error
    for line, row in enumerate(rows, start=1):
        if not row or (line == 1 and [cell.strip().lower() for cell in row] == ["file", "label"]):
            continue
        if len(row) != 2 or row[0] not in wanted or row[0] in found or row[1].strip() not in numbers:
            raise InputError(
                f"Line {line} of {path} reads {','.join(row)[:80]!r}; write the name of one of the PNG files, once, "
                f"and its class, a name or a number from 0 to {len(labels) - 1}."
            )
        found[row[0]] = numbers[row[1].strip()]
    if missing := sorted(wanted - found.keys()):
        raise InputError(f"{path} has no label for {missing[0]}; give one for each PNG file, or leave the table out.")
    return np.array([found[file.name] for file in files], dtype=np.int64)


def _check_different(indices: Sequence[int], path: Path) -> None:
    seen: set[int] = set()
    for index in indices:
        if index in seen:
            raise InputError(f"{path} gives test image {index} twice; each image is one trial, so give one of them.")
        seen.add(index)
