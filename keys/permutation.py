"""The secret permutation of n values that a device's key stands for.

Convention: the permutation ``p`` of a block means ``out[j] = in[p[j]]``, that is ``out = in[p]`` in NumPy,
and ``in = out[inverse(p)]``.

Rules: the only randomness is an AES-256-CTR keystream (counter from 0) under an HKDF subkey bound to the
purpose "permutation" and to n; words are 32-bit big-endian, and words that would bias the result are
rejected. Nothing of this may change: a key would then mean another permutation.

>>> p = permutation(bytes(32), 4)
>>> sorted(p.tolist())
[0, 1, 2, 3]
>>> p[inverse(p)].tolist()
[0, 1, 2, 3]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from keys.derive import DeviceKey, subkey
from keys.errors import InputError

# More values than a 4-channel block of 2,048 × 2,048 pixels; also far below 2³², which 32-bit words need.
MAX_VALUES = 2**24

_WORDS = 2**32
_CHUNK_BYTES = 4096


def permutation(key: bytes | DeviceKey, n: int) -> NDArray[np.int64]:
    """Return the permutation of 0 … n − 1 (shape (n,), int64) that ``key`` (32 bytes) stands for.

    Each of the n! permutations is equally likely over uniform keys. Raises :class:`InputError` if n is
    outside 1 to 2²⁴ or a raw key is not 32 bytes.
    """
    if not 1 <= n <= MAX_VALUES:
        raise InputError(f"A permutation needs 1 to {MAX_VALUES} values, not {n}; check the block size.")
    secret = key.secret if isinstance(key, DeviceKey) else key
    stream_key = subkey(secret, "permutation", int(n).to_bytes(8, "big"))
    return np.array(fisher_yates(_keystream_words(stream_key), n), dtype=np.int64)


def inverse(p: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return q (shape (n,), int64) with q[p[j]] = j; raises :class:`InputError` if p is no permutation."""
    n = p.size
    if p.ndim != 1 or not np.array_equal(np.sort(p), np.arange(n)):
        raise InputError(f"An array of shape {p.shape} is no permutation; pass one that permutation() made.")
    q = np.empty(n, dtype=np.int64)
    q[p] = np.arange(n)
    return q


def fisher_yates(words: Iterator[int], n: int) -> list[int]:
    """Shuffle 0 … n − 1 with uniform 32-bit ``words`` (Durstenfeld's form: Knuth, TAOCP 2, algorithm P).

    For i = n − 1 down to 1, position i swaps with a uniform j in 0 … i. A word at or above the largest
    multiple of i + 1 is rejected, so that j has no modulo bias.
    """
    values = list(range(n))
    for i in range(n - 1, 0, -1):
        limit = _WORDS - _WORDS % (i + 1)
        word = next(words)
        while word >= limit:
            word = next(words)
        j = word % (i + 1)
        values[i], values[j] = values[j], values[i]
    return values


def _keystream_words(key: bytes) -> Iterator[int]:
    # A zero nonce is safe: the key is used for this one stream only.
    encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()
    while True:
        yield from np.frombuffer(encryptor.update(bytes(_CHUNK_BYTES)), dtype=">u4").tolist()
