"""Ed25519 signatures (RFC 8032), and the public key's file.

Rules: signer and verifier stand side by side and work on bytes; a caller puts a domain-separation prefix
of its own before what it signs, so that a signature of one kind is never one of another kind.

>>> key = SigningKey(bytes(32))
>>> key
SigningKey()
>>> verify(key.public_bytes, b"example v1\\0hello", key.sign(b"example v1\\0hello"))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from keys.errors import InputError, PackageError
from keys.files import write_atomic

SEED_BYTES = 32
PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64

_MAX_PEM_BYTES = 64 * 1024


@dataclass(frozen=True, eq=False)
class SigningKey:
    """An Ed25519 private key, held as its 32-byte seed, which ``repr`` and ``str`` hide."""

    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.seed) != SEED_BYTES:
            raise InputError(f"A signing key has {SEED_BYTES} bytes, but {len(self.seed)} were given.")

    @property
    def public_bytes(self) -> bytes:
        """The raw public key, 32 bytes."""
        return self._private().public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature of ``message``, which begins with the caller's domain prefix."""
        return self._private().sign(message)

    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)


def verify(public: bytes, message: bytes, signature: bytes) -> None:
    """Return if ``signature`` (64 bytes) over ``message`` was made by the holder of ``public`` (32 bytes).

    Raises :class:`PackageError` if not, and :class:`InputError` if ``public`` is not 32 bytes.
    """
    key = _public_key(public)
    if len(signature) != SIGNATURE_BYTES:
        raise PackageError(
            f"The signature has {len(signature)} bytes instead of {SIGNATURE_BYTES}; fetch the package again."
        )
    try:
        key.verify(signature, message)
    except InvalidSignature as error:
        raise PackageError(
            "The signature does not match: the content was altered or signed with another key; "
            "do not use it, and check that the public key is the right fleet's."
        ) from error


def public_key_to_pem(public: bytes) -> bytes:
    """Return a raw public key (32 bytes) as PEM (SubjectPublicKeyInfo, RFC 8410), ASCII."""
    return _public_key(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def public_key_from_pem(pem: bytes, *, source: str) -> bytes:
    """Return the raw public key (32 bytes) in ``pem``; ``source`` names it in the :class:`InputError`."""
    if b"PRIVATE KEY" in pem:
        raise InputError(f"{source} holds a private key; pass the public key file (signing-key.pub) instead.")
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"{source} is not a PEM public key; pass the fleet's signing-key.pub as the factory wrote it."
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{source} holds a key that is not Ed25519; pass the fleet's signing-key.pub.")
    return key.public_bytes_raw()


def write_public_key(path: Path, public: bytes) -> None:
    """Write a raw public key (32 bytes) as PEM, readable by all, whole or not at all."""
    write_atomic(path, public_key_to_pem(public))


def read_public_key(path: Path) -> bytes:
    """Return the raw public key (32 bytes) in a PEM file; raises :class:`InputError` if there is none."""
    try:
        with path.open("rb") as stream:
            pem = stream.read(_MAX_PEM_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"The public key file {path} cannot be read ({error.strerror}); pass the fleet's signing-key.pub."
        ) from error
    if len(pem) > _MAX_PEM_BYTES:
        raise InputError(f"{path} is too large for a public key; pass the fleet's signing-key.pub.")
    return public_key_from_pem(pem, source=str(path))


def _public_key(public: bytes) -> Ed25519PublicKey:
    if len(public) != PUBLIC_BYTES:
        raise InputError(f"A public key has {PUBLIC_BYTES} bytes, but {len(public)} were given.")
    return Ed25519PublicKey.from_public_bytes(public)
