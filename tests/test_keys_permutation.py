from __future__ import annotations

import hashlib
import hmac
import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keys.derive import MasterSecret, derive_device_key
from keys.errors import InputError
from keys.permutation import MAX_VALUES, fisher_yates, inverse, permutation

KEY = derive_device_key(MasterSecret(bytes(range(32))), device_id="camera-01", generation=1)

# fmt: off
KNOWN = {
    1: [0],
    4: [2, 3, 1, 0],
    16: [10, 15, 11, 6, 2, 14, 9, 5, 1, 8, 0, 4, 12, 7, 3, 13],
    49: [4, 46, 15, 13, 32, 20, 5, 1, 16, 18, 9, 12, 31, 23, 0, 11, 40, 26, 21, 36, 22, 38, 28, 35, 3, 8, 43,
         41, 29, 44, 7, 24, 2, 39, 47, 37, 48, 6, 30, 19, 42, 25, 17, 34, 33, 14, 27, 45, 10],
}
# fmt: on
KNOWN_768_FIRST = [394, 155, 406, 305, 158, 607, 548, 528, 710, 272, 262, 225]
KNOWN_768_DIGEST = "b1315b0d53a62b068ab2300364bd6326c8d5cf44f0bf6dc8e480d820e294596f"

raw_keys = st.binary(min_size=32, max_size=32)


def literal_permutation(secret: bytes, n: int) -> list[int]:
    """The same definition, written a second time: HKDF from HMAC, the keystream from single AES blocks."""
    info = b""
    for part in (b"keyfoundry subkey v1", b"permutation", n.to_bytes(8, "big")):
        info += len(part).to_bytes(4, "big") + part
    pseudo_random_key = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    stream_key = hmac.new(pseudo_random_key, info + b"\x01", hashlib.sha256).digest()

    def words() -> Iterator[int]:
        for counter in itertools.count():
            encryptor = Cipher(AES(stream_key), ECB()).encryptor()
            block = encryptor.update(counter.to_bytes(16, "big"))
            for start in (0, 4, 8, 12):
                yield int.from_bytes(block[start : start + 4], "big")

    stream = words()
    result = list(range(n))
    for last in reversed(range(1, n)):
        choices = last + 1
        usable = (2**32 // choices) * choices
        word = next(w for w in stream if w < usable)
        other = word % choices
        result[last], result[other] = result[other], result[last]
    return result


@pytest.mark.parametrize("n", KNOWN)
def test_known_permutations(n: int):
    p = permutation(KEY, n)
    assert p.dtype == np.int64
    assert p.tolist() == KNOWN[n]


def test_known_permutation_of_a_paper_block():
    p = permutation(KEY, 768)
    assert p[:12].tolist() == KNOWN_768_FIRST
    assert hashlib.sha256(p.astype("<i8").tobytes()).hexdigest() == KNOWN_768_DIGEST


@pytest.mark.parametrize("n", [1, 2, 3, 4, 16, 49, 768, 3072])
def test_agrees_with_a_literal_second_implementation(n: int):
    for number in range(5):
        secret = hashlib.sha256(b"literal %d" % number).digest()
        assert permutation(secret, n).tolist() == literal_permutation(secret, n)


def test_a_device_key_and_its_raw_bytes_mean_the_same():
    assert permutation(KEY, 49).tolist() == permutation(KEY.secret, 49).tolist()


@settings(deadline=None)
@given(raw_keys, st.integers(1, 400))
def test_is_a_bijection_and_is_repeatable(secret: bytes, n: int):
    p = permutation(secret, n)
    assert sorted(p.tolist()) == list(range(n))
    assert permutation(secret, n).tolist() == p.tolist()


@settings(deadline=None)
@given(raw_keys, st.integers(0, 255), st.integers(64, 400))
def test_one_bit_of_the_key_changes_it(secret: bytes, bit: int, n: int):
    other = (int.from_bytes(secret, "big") ^ 1 << bit).to_bytes(32, "big")
    assert permutation(secret, n).tolist() != permutation(other, n).tolist()


@settings(deadline=None)
@given(raw_keys, st.integers(64, 400), st.integers(64, 400))
def test_another_n_is_another_permutation_and_no_prefix_of_it(secret: bytes, m: int, n: int):
    assume(m < n)
    small, large = permutation(secret, m), permutation(secret, n)
    assert [v for v in large.tolist() if v < m] != small.tolist()
    assert large[:m].tolist() != small.tolist()


@settings(deadline=None)
@given(raw_keys, st.integers(1, 200))
def test_the_inverse_undoes_it_by_the_stated_convention(secret: bytes, n: int):
    p = permutation(secret, n)
    values = np.arange(n) * 7 + 3
    out = np.array([values[p[j]] for j in range(n)])
    assert np.array_equal(out, values[p])
    assert np.array_equal(out[inverse(p)], values)
    assert np.array_equal(inverse(inverse(p)), p)


def test_the_shuffle_reaches_every_permutation_exactly_once():
    # With the words that stand for all choices 0 … 3, 0 … 2, 0 … 1: 24 ways, 24 permutations.
    choices = itertools.product(range(4), range(3), range(2))
    results = {tuple(fisher_yates(iter(words), 4)) for words in choices}
    assert results == set(itertools.permutations(range(4)))


def test_a_word_that_would_bias_the_result_is_rejected():
    # 2³² = 3 · 1431655765 + 1: for three values only the last word is beyond the last whole multiple.
    last = 2**32 - 1
    accepted = fisher_yates(iter([last - 1, 0]), 3)
    assert fisher_yates(iter([last, last, last - 1, 0]), 3) == accepted
    # Powers of two divide 2³²: nothing is rejected.
    assert fisher_yates(iter([last]), 2) == [0, 1]


def test_uniform_over_many_keys():
    keys = 24 * 200
    counts = Counter(tuple(permutation(hashlib.sha256(b"uniform %d" % i).digest(), 4).tolist()) for i in range(keys))
    assert len(counts) == math.factorial(4)
    expected = keys / 24
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    # χ² with 23 degrees of freedom: 0.1 % quantiles on both sides (too even would be as wrong).
    assert 7.5 < statistic < 49.7


@pytest.mark.parametrize("n", [0, -1, MAX_VALUES + 1])
def test_n_out_of_range_is_refused(n: int):
    with pytest.raises(InputError, match=f"needs 1 to {MAX_VALUES} values, not {n}"):
        permutation(KEY, n)


def test_a_short_key_is_refused():
    with pytest.raises(InputError, match="has 32 bytes, but 16 were given"):
        permutation(bytes(16), 4)


@pytest.mark.parametrize("values", [[0, 0], [1, 2], [-1, 0], [[0, 1], [1, 0]]])
def test_only_a_permutation_has_an_inverse(values: list):
    with pytest.raises(InputError, match="is no permutation"):
        inverse(np.array(values))
