"""The IDX format of MNIST-like data sets: plain, gzip or xz files of unsigned bytes."""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from pathlib import Path

import numpy as np

from keys.errors import InputError

_UNSIGNED_BYTE = 0x08
_LARGEST = 4 << 30


def find_idx(root: Path, stem: str) -> Path | None:
    """The file ``stem`` in ``root`` with no ending, ``.gz`` or ``.xz``, or None."""
    for ending in ("", ".gz", ".xz"):
        path = root / (stem + ending)
        if path.is_file():
            return path
    return None


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file into a uint8 array of the shape that its header states.

    Raises InputError if the file is truncated, not IDX, or not of unsigned bytes.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as stream:
            magic = stream.read(4)
            if len(magic) != 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE or not 1 <= magic[3] <= 4:
                raise InputError(f"{path} is not an IDX file of unsigned bytes.")
            sizes = stream.read(4 * magic[3])
            if len(sizes) != 4 * magic[3]:
                raise InputError(f"{path} is truncated or corrupt: it ends inside its header.")
            shape = tuple(int.from_bytes(sizes[at : at + 4], "big") for at in range(0, len(sizes), 4))
            size = math.prod(shape)
            if size > _LARGEST:
                raise InputError(f"{path} claims {size} bytes, more than this reader accepts.")
            data = stream.read(size + 1)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is truncated or corrupt: {error}.") from error
    if len(data) != size:
        raise InputError(f"{path} holds {len(data)} bytes where its header promises {size}.")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


def write_idx_xz(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as an xz-compressed IDX file (used to make the shipped sample)."""
    header = bytes([0, 0, _UNSIGNED_BYTE, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(lzma.compress(header + array.astype(np.uint8).tobytes(), preset=9 | lzma.PRESET_EXTREME))
