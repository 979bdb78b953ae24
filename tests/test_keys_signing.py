from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import InputError, PackageError
from keys.signing import (
    SigningKey,
    public_key_from_pem,
    public_key_to_pem,
    read_public_key,
    verify,
    write_public_key,
)

# RFC 8032, section 7.1, tests 1 to 3: seed, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]
KEY = SigningKey(bytes(range(32)))
PEM = (
    b"-----BEGIN PUBLIC KEY-----\n"
    b"MCowBQYDK2VwAyEAA6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=\n"
    b"-----END PUBLIC KEY-----\n"
)


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC_8032)
def test_known_signatures(seed: str, public: str, message: str, signature: str):
    key = SigningKey(bytes.fromhex(seed))
    assert key.public_bytes.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    verify(bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(signature))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_what_was_signed_verifies(message: bytes):
    verify(KEY.public_bytes, message, KEY.sign(message))


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=100), st.data())
def test_one_flipped_bit_anywhere_is_refused(message: bytes, data: st.DataObject):
    signature = KEY.sign(message)
    for part in ("message", "signature"):
        content = {"message": bytearray(message), "signature": bytearray(signature)}
        bit = data.draw(st.integers(0, 8 * len(content[part]) - 1))
        content[part][bit // 8] ^= 1 << bit % 8
        with pytest.raises(PackageError, match="The signature does not match"):
            verify(KEY.public_bytes, bytes(content["message"]), bytes(content["signature"]))


def test_another_key_or_another_domain_is_refused():
    signature = KEY.sign(b"manifest v1\0hello")
    with pytest.raises(PackageError, match="altered or signed with another key"):
        verify(SigningKey(bytes(32)).public_bytes, b"manifest v1\0hello", signature)
    with pytest.raises(PackageError, match="altered or signed with another key"):
        verify(KEY.public_bytes, b"receipt v1\0hello", signature)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_a_signature_of_another_length_is_refused(size: int):
    with pytest.raises(PackageError, match=f"has {size} bytes instead of 64"):
        verify(KEY.public_bytes, b"hello", bytes(size))


def test_keys_of_another_length_are_refused():
    with pytest.raises(InputError, match="A public key has 32 bytes, but 31"):
        verify(bytes(31), b"hello", bytes(64))
    with pytest.raises(InputError, match="A signing key has 32 bytes, but 33"):
        SigningKey(bytes(33))


def test_a_signing_key_does_not_show_its_seed():
    for text in (repr(KEY), str(KEY)):
        assert text == "SigningKey()"


def test_known_public_key_file(tmp_path: Path):
    path = tmp_path / "signing-key.pub"
    write_public_key(path, KEY.public_bytes)
    assert path.read_bytes() == PEM == public_key_to_pem(KEY.public_bytes)
    assert path.stat().st_mode & 0o777 == 0o644
    assert read_public_key(path) == KEY.public_bytes


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_a_public_key_survives_its_file_format(seed: bytes):
    public = SigningKey(seed).public_bytes
    assert public_key_from_pem(public_key_to_pem(public), source="here") == public


def private_pem() -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def elliptic_pem() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a PEM public key"),
        (b"\x00\xff" * 40, "is not a PEM public key"),
        (KEY.public_bytes, "is not a PEM public key"),
        (PEM[:60], "is not a PEM public key"),
        (PEM.replace(b"MCow", b"MCoz"), "is not a PEM public key"),
        (private_pem(), "holds a private key"),
        (elliptic_pem(), "not Ed25519"),
        (PEM + b" " * 70_000, "is too large"),
    ],
)
def test_a_bad_public_key_file_is_refused_by_name(tmp_path: Path, content: bytes, sentence: str):
    path = tmp_path / "signing-key.pub"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        read_public_key(path)
    assert str(path) in str(caught.value)


def test_a_missing_public_key_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        read_public_key(tmp_path / "signing-key.pub")
    with pytest.raises(InputError, match="cannot be read"):
        read_public_key(tmp_path)
