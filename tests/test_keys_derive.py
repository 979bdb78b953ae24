from __future__ import annotations

import hashlib
import hmac
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.derive import (
    DeviceKey,
    MasterSecret,
    check_generation,
    derive_device_key,
    expand,
    fixed_guess,
    random_device_key,
    subkey,
)
from keys.errors import InputError

MASTER = MasterSecret(bytes(range(32)))

# Computed with HMAC from hashlib alone; a change here gives every provisioned device another key.
KNOWN_KEYS = [
    ("device", "camera-01", 1, "e888508ad4ad06603af03c4d8314fcda56fbedacc9e73905fabd2b170a57f5f2"),
    ("device", "camera-01", 2, "51fe057ab6f4b09f08e505044febe529a1b0c21615cf5e1ff4de91af2ce352f3"),
    ("device", "camera-02", 1, "cd4875afa27aeb068f1b758f4a38c104c5f5a02c8ca4563763ff54f929ee1f10"),
    ("other", "camera-01", 1, "c55a85c3b1e06840f0f3dc8892377f71f4ce20aacd75bd8d8a9c32eea913c077"),
]


def literal_hkdf(secret: bytes, *fields: bytes) -> bytes:
    """RFC 5869 with an absent salt and one block of output, written out."""
    pseudo_random_key = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    info = b""
    for part in fields:
        info += bytes([0, 0, 0, len(part)]) + part
    return hmac.new(pseudo_random_key, info + b"\x01", hashlib.sha256).digest()


@pytest.mark.parametrize(("purpose", "device_id", "generation", "expected"), KNOWN_KEYS)
def test_known_device_keys(purpose: str, device_id: str, generation: int, expected: str):
    key = derive_device_key(MASTER, purpose=purpose, device_id=device_id, generation=generation)
    assert key.secret.hex() == expected
    info = (b"keyfoundry device key v1", purpose.encode(), device_id.encode(), generation.to_bytes(4, "big"))
    assert key.secret == literal_hkdf(MASTER.secret, *info)
    assert (key.device_id, key.generation) == (device_id, generation)


def test_known_subkey():
    key = derive_device_key(MASTER, device_id="camera-01", generation=1)
    assert key.subkey("permutation").hex() == "09e944d6707f8831b00c5cad0026114c01e25e32d6ca4511b630ef5632ed08e6"
    assert key.subkey("permutation") == literal_hkdf(key.secret, b"keyfoundry subkey v1", b"permutation")


def test_known_guess_is_public():
    guess = fixed_guess("guess-1")
    assert guess.secret.hex() == "34d96d9552d26247c1925a6b33f538cfa12ec4c78434d31465cecdc661b078bd"
    assert guess.secret == hashlib.sha256(b"keyfoundry guessed key v1\0guess-1").digest()
    assert (guess.device_id, guess.generation) == ("guess-1", 0)
    assert fixed_guess("guess-2").secret != guess.secret


def test_the_default_purpose_is_device():
    key = derive_device_key(MASTER, device_id="camera-01", generation=1)
    assert key.secret.hex() == KNOWN_KEYS[0][3]


device_ids = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
purposes = st.text(st.characters(max_codepoint=127), min_size=1, max_size=20)
generations = st.integers(1, 2**32 - 1)


@settings(deadline=None)
@given(
    st.tuples(purposes, device_ids, generations),
    st.tuples(purposes, device_ids, generations),
    st.binary(min_size=32, max_size=32),
)
def test_two_keys_are_equal_only_if_all_their_inputs_are(
    a: tuple[str, str, int], b: tuple[str, str, int], secret: bytes
):
    master = MasterSecret(secret)
    keys = [derive_device_key(master, purpose=p, device_id=d, generation=g).secret for p, d, g in (a, b)]
    assert (keys[0] == keys[1]) == (a == b)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_two_lists_of_fields_never_collide(a: list[bytes], b: list[bytes]):
    assert (expand(bytes(32), *a) == expand(bytes(32), *b)) == (a == b)


def test_fields_cannot_slide_into_each_other():
    assert expand(bytes(32), b"ab", b"c") != expand(bytes(32), b"a", b"bc")
    assert subkey(bytes(32), "a", b"b") != subkey(bytes(32), "ab")


def test_masters_and_random_keys_are_fresh():
    assert len({MasterSecret.generate().secret for _ in range(8)}) == 8
    keys = [random_device_key("camera-01") for _ in range(8)]
    assert len({key.secret for key in keys}) == 8
    assert {(key.device_id, key.generation, len(key.secret)) for key in keys} == {("camera-01", 0, 32)}


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format])
def test_keys_do_not_show_their_bytes(show):
    for key in (MASTER, derive_device_key(MASTER, device_id="camera-01", generation=1)):
        text = show(key)
        assert key.secret.hex() not in text
        assert repr(key.secret) not in text
        assert "secret" not in text


def test_keys_are_compared_only_on_purpose():
    a, b = (derive_device_key(MASTER, device_id="camera-01", generation=1) for _ in range(2))
    assert a != b
    assert hmac.compare_digest(a.secret, b.secret)


def test_a_device_key_reaches_a_worker_process():
    key = derive_device_key(MASTER, device_id="camera-01", generation=3)
    copy: DeviceKey = pickle.loads(pickle.dumps(key))  # noqa: S301 -- what multiprocessing does
    assert (copy.device_id, copy.generation, copy.secret) == (key.device_id, key.generation, key.secret)


@pytest.mark.parametrize("generation", [0, -1, 2**32, True])
def test_a_generation_out_of_range_is_refused(generation: int):
    with pytest.raises(InputError, match=f"Generation {generation!r} is outside 1 to"):
        derive_device_key(MASTER, device_id="camera-01", generation=generation)


def test_the_last_generation_is_allowed():
    assert check_generation(2**32 - 1) == 2**32 - 1


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_secret_of_another_length_is_refused_without_showing_it(size: int):
    wrong = b"\xa7" * size
    for make in (MasterSecret, lambda s: DeviceKey("camera-01", 1, s), lambda s: subkey(s, "permutation")):
        with pytest.raises(InputError, match=f"has 32 bytes, but {size} were given") as caught:
            make(wrong)
        assert "a7" not in str(caught.value)


@pytest.mark.parametrize("purpose", ["", "schlüssel"])
def test_a_purpose_is_ascii(purpose: str):
    with pytest.raises(ValueError, match="a purpose is non-empty ASCII"):
        derive_device_key(MASTER, purpose=purpose, device_id="camera-01", generation=1)


@pytest.mark.parametrize("name", ["", "../a", "Camera"])
def test_a_bad_device_id_or_guess_label_is_refused(name: str):
    with pytest.raises(InputError, match="is not a device id"):
        derive_device_key(MASTER, device_id=name, generation=1)
    with pytest.raises(InputError, match="is not a device id"):
        fixed_guess(name)
