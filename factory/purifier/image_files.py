"""Images to purify, read from PNG, JPEG and .npy files; nothing is resized, and nothing is unpickled."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from exporters.contract import InputContract
from keys.errors import InputError

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_LARGEST_FILE = 2**26
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, eq=False)
class NamedImage:
    """``name``: of the files that are written for it; ``pixels``: float32 C×H×W in [0, 1]; ``path``: where it was."""

    name: str
    pixels: np.ndarray
    path: Path | None = None


def read_images(paths: Sequence[Path], contract: InputContract | None) -> list[NamedImage]:
    """Read every image of every file, for a model of this contract (None: of any one size, 1 or 3 channels).

    A .npy file holds one image or many, 8-bit or float in [0, 1]: C×H×W, H×W×C, for grey H×W, or N of them; image 2 of
    ``x.npy`` is called ``x-2``. Raises :class:`InputError` for a file that cannot be read, images of another size or
    colour, and two images of one name.
    """
    found: list[NamedImage] = []
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"The image {path} cannot be read ({error.strerror}).") from error
        if size > _LARGEST_FILE:
            raise InputError(f"The image {path} has {size} bytes; at most {_LARGEST_FILE} are read.")
        suffix = path.suffix.lower()
        if suffix in PICTURES:
            found.append(NamedImage(path.stem, _read_picture(path, PICTURES[suffix], contract), path))
        elif suffix == ".npy":
            found += _read_array(path, contract)
        else:
            raise InputError(f"{path} is no PNG, JPEG or .npy file; give images of one of these kinds.")
    names: set[str] = set()
    for image in found:
        if image.name in names:
            raise InputError(f"Two images are called {image.name!r}, and would be written over each other; rename one.")
        names.add(image.name)
        if image.pixels.shape != found[0].pixels.shape:
            raise InputError(
                f"The image {image.name} is of {_said(image.pixels.shape)}, but {found[0].name} of "
                f"{_said(found[0].pixels.shape)}; purify images of one size at a time."
            )
    return found


def _read_picture(path: Path, kind: str, contract: InputContract | None) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=[kind]) as picture:
                if picture.mode not in _MODES.values():
                    raise InputError(f"{path} is a picture of kind {picture.mode}; give 8-bit grey or RGB.")
                channels = 1 if picture.mode == "L" else 3
                _check_size(path, (channels, picture.height, picture.width), contract)
                pixels = np.asarray(picture, dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path} claims to be a huge picture; it is not opened.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is no readable {kind} file ({error}).") from error
    image = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return image.astype(np.float32) / 255


def _read_array(path: Path, contract: InputContract | None) -> list[NamedImage]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise InputError(f"{path} is no readable .npy file of numbers ({str(error).splitlines()[0]}).") from error
    if not isinstance(array, np.ndarray) or (array.dtype != np.uint8 and array.dtype.kind != "f"):
        raise InputError(f"{path} holds no 8-bit values and no floats; give images as uint8 or as floats in [0, 1].")
    if array.size == 0:
        raise InputError(f"{path} holds no images.")
    images = _as_batch(array, contract)
    if images is None:
        raise InputError(f"{path} holds an array of shape {array.shape}, which is no image{_wanted(contract)}.")
    values = images.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)
    if not (values.min() >= 0 and values.max() <= 1):
        raise InputError(f"{path} holds values outside [0, 1]; give 8-bit values, or divide them by 255.")
    _check_size(path, values.shape[1:], contract)
    if len(values) == 1:
        return [NamedImage(path.stem, values[0], path)]
    return [NamedImage(f"{path.stem}-{index}", value, path) for index, value in enumerate(values)]


def _as_batch(array: np.ndarray, contract: InputContract | None) -> np.ndarray | None:
    """N×C×H×W, or None; a channel axis is where 1 or 3 stands (as the contract says, if there is one)."""
    allowed = (1, 3) if contract is None else (contract.channels,)
    if array.ndim == 2 and 1 in allowed:
        return array[None, None]
    if array.ndim == 3 and array.shape[0] in allowed:
        return array[None]
    if array.ndim == 3 and array.shape[2] in allowed:
        return array.transpose(2, 0, 1)[None]
    if array.ndim == 3 and 1 in allowed:
        return array[:, None]
    if array.ndim == 4 and array.shape[1] in allowed:
        return array
    if array.ndim == 4 and array.shape[3] in allowed:
        return array.transpose(0, 3, 1, 2)
    return None


def _check_size(path: Path, shape: Sequence[int], contract: InputContract | None) -> None:
    if contract is not None and tuple(shape) != contract.shape:
        raise InputError(f"{path} holds an image of {_said(shape)}{_but(contract)}.")


def _but(contract: InputContract) -> str:
    return f", but the model takes {contract.color} of {_said(contract.shape)}; prepare it by: {contract.resize}"


def _wanted(contract: InputContract | None) -> str:
    return "" if contract is None else f" of {_said(contract.shape)}"


def _said(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{channels} channel{'' if channels == 1 else 's'}, {height}×{width} pixels"
