"""IDX files: plain, gzip and xz; what is truncated, corrupt or something else is refused."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from factory.idx import find_idx, read_idx, write_idx_xz
from keys.errors import InputError

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
# The format's own description, by hand: two zero bytes, the type, the number of sizes, the sizes, the values.
BYTES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, *range(24)])
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", PACKED)
def test_an_idx_file_is_read_and_found_whatever_its_packing(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"train-images-idx3-ubyte{ending}"
    path.write_bytes(PACKED[ending](BYTES))
    assert find_idx(tmp_path, "train-images-idx3-ubyte") == path
    array = read_idx(path)
    assert array.dtype == np.uint8
    assert array.flags.writeable
    assert np.array_equal(array, ARRAY)


def test_there_may_be_no_such_file(tmp_path: Path) -> None:
    assert find_idx(tmp_path, "train-images-idx3-ubyte") is None


def test_what_the_sample_was_written_with_is_the_format(tmp_path: Path) -> None:
    write_idx_xz(tmp_path / "a.xz", ARRAY)
    assert lzma.decompress((tmp_path / "a.xz").read_bytes()) == BYTES


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("kept", [0, 3, 10, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str, kept: int) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACKED[ending](BYTES)[:kept])
    with pytest.raises(InputError, match=r"truncated or corrupt|not an IDX file|its header promises"):
        read_idx(path)


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_a_corrupt_packing_is_refused(tmp_path: Path, ending: str) -> None:
    packed = bytearray(PACKED[ending](BYTES))
    packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / f"a{ending}"
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"truncated or corrupt|not an IDX file|its header promises"):
        read_idx(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is not an IDX file of unsigned bytes"),
        (bytes([0, 0, 0x0D, 1, 0, 0, 0, 1, 0, 0, 0, 0]), "is not an IDX file of unsigned bytes"),
        (bytes([0, 0, 8, 0]), "is not an IDX file of unsigned bytes"),
        (bytes([0, 0, 8, 5]) + bytes(20), "is not an IDX file of unsigned bytes"),
        (BYTES + b"\0", "holds 25 bytes where its header promises 24"),
        (bytes([0, 0, 8, 2]) + b"\xff" * 8, "more than this reader accepts"),
    ],
)
def test_what_is_not_idx_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_idx(path)
