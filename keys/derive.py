"""From the fleet's master secret to one key per device, and from a device key to one subkey per purpose.

Rules: everything is HKDF-SHA256 (RFC 5869, no salt: the inputs are already uniform) with an info string of
length-prefixed fields, so that two different lists of fields never give the same info string. The first
field names the format and its version. No secret appears in a ``repr``; keys have no ``==``, so compare
their ``secret`` with ``hmac.compare_digest`` where a comparison is truly meant. Python cannot wipe memory:
a secret lives until its process ends.

>>> master = MasterSecret(bytes(range(32)))
>>> derive_device_key(master, device_id="camera-01", generation=1)
DeviceKey(device_id='camera-01', generation=1)
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keys.errors import InputError
from keys.identifiers import check_device_id

SECRET_BYTES = 32
MAX_GENERATION = 2**32 - 1

_DEVICE_FORMAT = b"keyfoundry device key v1"
_SUBKEY_FORMAT = b"keyfoundry subkey v1"
_GUESS_FORMAT = b"keyfoundry guessed key v1\0"


@dataclass(frozen=True, eq=False)
class MasterSecret:
    """The fleet's one root secret, 32 uniform bytes; who holds it can derive every device's key."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_secret(self.secret)

    @classmethod
    def generate(cls) -> MasterSecret:
        """Return a fresh master secret from the operating system's CSPRNG."""
        return cls(secrets.token_bytes(SECRET_BYTES))


@dataclass(frozen=True, eq=False)
class DeviceKey:
    """The key of one device: 32 bytes that ``repr`` and ``str`` hide; it can be pickled for a worker.

    ``generation`` counts rotations from 1; 0 marks a key that belongs to no fleet (a guess).
    """

    device_id: str
    generation: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_device_id(self.device_id)
        _check_secret(self.secret)

    def subkey(self, purpose: str) -> bytes:
        """Return 32 bytes bound to ``purpose`` (non-empty ASCII, else ValueError)."""
        return subkey(self.secret, purpose)


def derive_device_key(master: MasterSecret, *, purpose: str = "device", device_id: str, generation: int) -> DeviceKey:
    """Derive a device's key from the master secret, a purpose, the device id and the generation.

    ``generation`` is 1 to 2³² − 1. Raises :class:`InputError` for a bad device id or generation and
    ValueError for a purpose that is empty or not ASCII.
    """
    check_device_id(device_id)
    check_generation(generation)
    fields = (_DEVICE_FORMAT, _encode(purpose), device_id.encode("ascii"), generation.to_bytes(4, "big"))
    return DeviceKey(device_id, generation, expand(master.secret, *fields))


def subkey(secret: bytes, purpose: str, *context: bytes) -> bytes:
    """Return 32 bytes bound to ``purpose`` and to each ``context`` field, from a 32-byte ``secret``.

    Raises :class:`InputError` if the secret is not 32 bytes, ValueError if the purpose is empty or not ASCII.
    """
    return expand(secret, _SUBKEY_FORMAT, _encode(purpose), *context)


def random_device_key(device_id: str) -> DeviceKey:
    """Return a fresh random key (generation 0) that no master secret derives."""
    return DeviceKey(device_id, 0, secrets.token_bytes(SECRET_BYTES))


def fixed_guess(label: str) -> DeviceKey:
    """Return the attacker's guessed key with this label: SHA-256 of the public label, generation 0.

    A guessed key is not a secret: anyone can compute it from its label, which lets a study go on after an
    interruption with the same guesses. It never depends on a master secret. ``label`` has the form of a
    device id (it names the surrogate's folder); raises :class:`InputError` otherwise.
    """
    check_device_id(label)
    return DeviceKey(label, 0, hashlib.sha256(_GUESS_FORMAT + label.encode("ascii")).digest())


def expand(secret: bytes, *fields: bytes) -> bytes:
    """HKDF-SHA256 of a 32-byte secret to 32 bytes; info = each field after its length as 4 big-endian bytes.

    Raises :class:`InputError` if the secret is not 32 bytes.
    """
    _check_secret(secret)
    info = b"".join(len(part).to_bytes(4, "big") + part for part in fields)
    return HKDF(algorithm=SHA256(), length=SECRET_BYTES, salt=None, info=info).derive(secret)


def check_generation(generation: int) -> int:
    """Return ``generation`` if it is 1 to 2³² − 1; raises :class:`InputError`."""
    if isinstance(generation, bool) or not 1 <= generation <= MAX_GENERATION:
        raise InputError(f"Generation {generation!r} is outside 1 to {MAX_GENERATION}; begin with 1.")
    return generation


def _check_secret(secret: bytes) -> None:
    # The message gives the length only: an error text must never hold a secret.
    if len(secret) != SECRET_BYTES:
        raise InputError(f"A key has {SECRET_BYTES} bytes, but {len(secret)} were given; pass the raw key.")


def _encode(purpose: str) -> bytes:
    if not purpose or not purpose.isascii():
        raise ValueError(f"a purpose is non-empty ASCII, not {purpose!r}")
    return purpose.encode("ascii")
