"""The vault: one passphrase-protected file that holds the fleet's master secret and signing seed.

Rules of the file (JSON, schema 1, mode 0600, written whole or not at all):

* The two secrets are wrapped by AES key wrap (RFC 3394) under a key that Argon2id (RFC 9106) makes from the
  passphrase and a random salt. Wrapping goes through :class:`KeyCustody`, so that a PKCS#11 token or a cloud
  KMS can take the passphrase's place; only the passphrase is built.
* Everything else in the file (fleet id, Argon2id's settings, wrapped keys, the devices' generations) is in
  clear and under an HMAC-SHA256 whose key is derived from the master secret, not from the passphrase: it
  then works the same for every custody. An altered field is refused; an older copy of the whole file is not
  detectable from the file alone.
* A file that group or others may read, a symbolic link, and a file that is not regular are refused.
* A change re-reads the file under an exclusive lock (``.NAME.lock`` beside it, released by the system even
  after a crash), so that two processes that rotate at once both count. Reading needs no lock.

Passphrases are normalised to Unicode NFKC and encoded as UTF-8, so that the same characters typed on two
systems (composed or not, non-breaking space or space) open the same vault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hmac
import json
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from keys.derive import DeviceKey, MasterSecret, check_generation, derive_device_key, expand
from keys.errors import InputError, SecretError
from keys.files import storage_errors, write_atomic
from keys.identifiers import check_device_id
from keys.signing import SEED_BYTES, SigningKey

SCHEMA = 1

_SALT_BYTES = 16
_WRAPPED_BYTES = 40  # RFC 3394 adds 8 bytes to the 32 of a secret.
_MAC_BYTES = 32
_MAC_FORMAT = b"keyfoundry vault mac v1"
_MAX_VAULT_BYTES = 64 * 1024 * 1024
_MAX_PASSPHRASE_BYTES = 4096
_CUSTODY = "passphrase: argon2id, aes-256 key wrap"


class KeyCustody(Protocol):
    """Where the key that wraps the fleet's secrets lives."""

    def wrap(self, secret: bytes) -> bytes:
        """Return the 32-byte ``secret`` encrypted and authenticated."""
        ...

    def unwrap(self, wrapped: bytes) -> bytes:
        """Return the secret inside ``wrapped``; raises :class:`SecretError` if it does not authenticate."""
        ...


@dataclass(frozen=True)
class Argon2Cost:
    """What one guess of a passphrase costs: memory in KiB, passes over it, lanes (RFC 9106, section 3.1).

    The default is RFC 9106's second recommended option (64 MiB, 3 passes, 4 lanes). The bounds keep a
    hostile vault file from asking for all memory or for hours. Raises :class:`InputError` outside them.
    """

    memory_kib: int = 64 * 1024
    iterations: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        bounds = {
            "lanes": (1, 16),
            "iterations": (1, 16),
            "memory_kib": (8 * self.lanes, 1024 * 1024),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"Argon2id's {name} is {value}, outside {low} to {high}; use the default.")


@dataclass(frozen=True, eq=False)
class PassphraseCustody:
    """AES-256 key wrap (RFC 3394) under a key that Argon2id made from a passphrase."""

    wrapping_key: bytes = field(repr=False)

    @classmethod
    def from_passphrase(cls, passphrase: str, salt: bytes, cost: Argon2Cost) -> PassphraseCustody:
        """Run Argon2id (about 0.15 s at the default cost); raises :class:`SecretError` if it is empty."""
        kdf = Argon2id(
            salt=salt,
            length=32,
            iterations=cost.iterations,
            lanes=cost.lanes,
            memory_cost=cost.memory_kib,
        )
        return cls(kdf.derive(_passphrase_bytes(passphrase)))

    def wrap(self, secret: bytes) -> bytes:
        """Return the 32-byte ``secret`` wrapped in 40 bytes."""
        return aes_key_wrap(self.wrapping_key, secret)

    def unwrap(self, wrapped: bytes) -> bytes:
        """Return the secret; raises :class:`SecretError` if the passphrase is another one."""
        try:
            return aes_key_unwrap(self.wrapping_key, wrapped)
        except InvalidUnwrap as error:
            raise SecretError("The passphrase is wrong, or the wrapped key was altered.") from error


@dataclass(frozen=True)
class _Content:
    """What a vault file says; nothing in it is secret."""

    fleet_id: str
    salt: bytes
    cost: Argon2Cost
    master_secret: bytes  # wrapped
    signing_seed: bytes  # wrapped
    generations: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "fleet_id": self.fleet_id,
            "custody": {"method": _CUSTODY, "salt": self.salt.hex(), **dataclasses.asdict(self.cost)},
            "wrapped": {"master_secret": self.master_secret.hex(), "signing_seed": self.signing_seed.hex()},
            "generations": self.generations,
        }

    def mac(self, master: MasterSecret) -> bytes:
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode("ascii")
        return hmac.digest(expand(master.secret, _MAC_FORMAT), canonical, "sha256")


class Vault:
    """An open vault: derives device keys, signs, and counts each device's generation.

    What it knows of devices is the file's state when it was opened or last changed through this object.
    """

    def __init__(self, path: Path, content: _Content, master: MasterSecret, signing_key: SigningKey) -> None:
        self._path = path
        self._content = content
        self._master = master
        self._signing_key = signing_key

    def __repr__(self) -> str:
        devices = len(self._content.generations)
        return f"Vault({str(self._path)!r}, fleet_id={self.fleet_id!r}, devices={devices})"

    @property
    def path(self) -> Path:
        """The vault's file."""
        return self._path

    @property
    def fleet_id(self) -> str:
        """The fleet's public random id, 16 hex digits."""
        return self._content.fleet_id

    def devices(self) -> dict[str, int]:
        """Device id → current generation, in the order of the ids."""
        return dict(sorted(self._content.generations.items()))

    def device_key(self, device_id: str) -> DeviceKey:
        """Return the device's key at its current generation, 1 if the vault does not list it.

        Writes nothing. Raises :class:`InputError` for a bad device id.
        """
        generation = self._content.generations.get(device_id, 1)
        return derive_device_key(self._master, device_id=device_id, generation=generation)

    def signing_key(self) -> SigningKey:
        """Return the key that signs the fleet's manifests."""
        return self._signing_key

    def add_device(self, device_id: str) -> int:
        """List a device at generation 1 and save; a device that is listed stays as it is.

        Returns its generation. Raises :class:`InputError` for a bad device id, :class:`SecretError` if the
        file was altered meanwhile.
        """
        check_device_id(device_id)
        return self._change(device_id, lambda generations: generations.get(device_id, 1))

    def rotate(self, device_id: str) -> int:
        """Move a listed device to the next generation, from which on it has another key, and save.

        Returns the new generation. Raises :class:`InputError` for a device that is not listed,
        :class:`SecretError` if the file was altered meanwhile.
        """

        def next_generation(generations: dict[str, int]) -> int:
            if device_id not in generations:
                raise InputError(f"Device {device_id!r} is not in the vault {self._path}; add it first.")
            return check_generation(generations[device_id] + 1)

        return self._change(device_id, next_generation)

    def _change(self, device_id: str, new_generation: Callable[[dict[str, int]], int]) -> int:
        with _locked(self._path):
            content = _read_content(self._path, self._master)
            generation = new_generation(content.generations)
            if content.generations.get(device_id) != generation:
                generations = {**content.generations, device_id: generation}
                content = dataclasses.replace(content, generations=generations)
                write_atomic(self._path, _serialise(content, self._master), mode=0o600)
            self._content = content
        return generation


def create_vault(path: Path, passphrase: str, *, cost: Argon2Cost | None = None) -> Vault:
    """Make a vault with a fresh master secret, signing seed, salt and fleet id, and return it open.

    ``cost`` is :class:`Argon2Cost`'s default unless given. Raises :class:`SecretError` if ``path`` exists
    (a vault is never overwritten) or the passphrase is empty, :class:`StorageError` if it cannot be written.
    """
    cost = cost or Argon2Cost()
    salt = secrets.token_bytes(_SALT_BYTES)
    custody: KeyCustody = PassphraseCustody.from_passphrase(passphrase, salt, cost)
    master = MasterSecret.generate()
    signing_key = SigningKey(secrets.token_bytes(SEED_BYTES))
    content = _Content(
        fleet_id=secrets.token_hex(8),
        salt=salt,
        cost=cost,
        master_secret=custody.wrap(master.secret),
        signing_seed=custody.wrap(signing_key.seed),
        generations={},
    )
    _write_new(path, _serialise(content, master))
    return Vault(path, content, master, signing_key)


def open_vault(path: Path, passphrase: str) -> Vault:
    """Open a vault and check all of it.

    Raises :class:`SecretError` for a missing file, one that others may read, a link, a corrupt, truncated or
    altered file, a newer schema, and a wrong passphrase.
    """
    content, mac = _parse(_read_private_file(path, _MAX_VAULT_BYTES), path)
    custody: KeyCustody = PassphraseCustody.from_passphrase(passphrase, content.salt, content.cost)
    try:
        master = MasterSecret(custody.unwrap(content.master_secret))
        seed = custody.unwrap(content.signing_seed)
    except SecretError as error:
        raise SecretError(
            f"The passphrase does not open the vault {path}, or the file was altered; "
            "check the passphrase, then restore a backup."
        ) from error
    _authenticate(content, mac, master, path)
    return Vault(path, content, master, SigningKey(seed))


def generate_passphrase_file(path: Path) -> str:
    """Write a fresh random passphrase (256 bits, one line, mode 0600) to a new file and return it.

    Raises :class:`SecretError` if ``path`` exists: overwriting it could lock a vault for ever.
    """
    passphrase = secrets.token_urlsafe(32)
    _write_new(path, f"{passphrase}\n".encode("ascii"))
    return passphrase


def read_passphrase_file(path: Path) -> str:
    """Return the one line of a passphrase file (UTF-8) without its line end.

    Raises :class:`SecretError` if the file is missing, a link, readable by others, empty, not UTF-8, or has
    more than one line.
    """
    data = _read_private_file(path, _MAX_PASSPHRASE_BYTES)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    passphrase = text.removesuffix("\n").removesuffix("\r")
    # Raised outside the handler above, whose exception carries the file's bytes.
    if not passphrase or "\n" in passphrase or "\r" in passphrase:
        raise SecretError(f"{path} does not hold one line of UTF-8 text; put the passphrase alone in it.")
    return passphrase


def _passphrase_bytes(passphrase: str) -> bytes:
    normal = unicodedata.normalize("NFKC", passphrase)
    # Lone surrogates stand for bytes that were not UTF-8, as in an environment variable.
    if any("\ud800" <= character <= "\udfff" for character in normal):
        raise SecretError("The passphrase is not valid UTF-8 text; enter it again.")
    if not normal:
        raise SecretError("The passphrase is empty; choose one of several words.")
    return normal.encode("utf-8")


def _serialise(content: _Content, master: MasterSecret) -> bytes:
    document = {**content.to_json(), "mac": content.mac(master).hex()}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("ascii")


def _read_content(path: Path, master: MasterSecret) -> _Content:
    content, mac = _parse(_read_private_file(path, _MAX_VAULT_BYTES), path)
    _authenticate(content, mac, master, path)
    return content


def _authenticate(content: _Content, mac: bytes, master: MasterSecret, path: Path) -> None:
    if not hmac.compare_digest(content.mac(master), mac):
        raise SecretError(f"The vault {path} was altered or replaced; restore a backup.")


def _parse(data: bytes, path: Path) -> tuple[_Content, bytes]:
    """Return the content and the (not yet checked) authentication code of a vault file's bytes."""
    try:
        document = json.loads(data, object_pairs_hook=_no_duplicates)
        schema = document["schema"]
        if type(schema) is int and schema > SCHEMA:
            raise SecretError(
                f"The vault {path} has schema {schema}, but {SCHEMA} is the newest known; update keyfoundry."
            )
        top, custody, wrapped = _fields(document), _fields(document["custody"]), _fields(document["wrapped"])
        if (
            top != {"schema", "fleet_id", "custody", "wrapped", "generations", "mac"}
            or custody != {"method", "salt", "memory_kib", "iterations", "lanes"}
            or wrapped != {"master_secret", "signing_seed"}
            or type(schema) is not int
            or schema != SCHEMA
            or document["custody"]["method"] != _CUSTODY
        ):
            raise ValueError
        cost = document["custody"]
        content = _Content(
            fleet_id=_hex(document["fleet_id"], 8).hex(),
            salt=_hex(cost["salt"], _SALT_BYTES),
            cost=Argon2Cost(*(_integer(cost[name]) for name in ("memory_kib", "iterations", "lanes"))),
            master_secret=_hex(document["wrapped"]["master_secret"], _WRAPPED_BYTES),
            signing_seed=_hex(document["wrapped"]["signing_seed"], _WRAPPED_BYTES),
            generations={
                check_device_id(device): check_generation(_integer(generation))
                for device, generation in document["generations"].items()
            },
        )
        return content, _hex(document["mac"], _MAC_BYTES)
    except InputError as error:
        raise SecretError(f"The vault {path} is corrupt or was altered: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SecretError(f"The vault {path} is corrupt or truncated; restore a backup.") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError
    return result


def _fields(value: dict[str, Any]) -> set[str]:
    return set(value.keys())


def _integer(value: object) -> int:
    # JSON's true is an int to isinstance, and 1.0 equals 1.
    if type(value) is not int:
        raise ValueError
    return value


def _hex(text: object, size: int) -> bytes:
    if not isinstance(text, str) or not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text):
        raise ValueError
    return bytes.fromhex(text)


def _read_private_file(path: Path, max_bytes: int) -> bytes:
    """Return a file's bytes if only its owner may read it; raises :class:`SecretError`.

    The checks are made on the open file, so that it cannot be exchanged between check and reading.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SecretError(f"There is no file {path}; check the path, or make it first.") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SecretError(f"{path} is a symbolic link; pass the path of the file itself.") from error
        raise SecretError(f"{path} cannot be read ({error.strerror}); check its owner and mode.") from error
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise SecretError(f"{path} is not a regular file; pass the path of the file itself.")
        if mode & 0o077:
            raise SecretError(f"Others may use {path} (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            data = stream.read(max_bytes + 1)
    finally:
        os.close(handle)
    if len(data) > max_bytes:
        raise SecretError(f"{path} is larger than {max_bytes} bytes; pass the path of the right file.")
    return data


def _write_new(path: Path, data: bytes) -> None:
    with _locked(path):
        # lexists: a dangling link is something there too.
        if os.path.lexists(path):
            raise SecretError(f"{path} exists and is never overwritten; choose another path or move it away.")
        write_atomic(path, data, mode=0o600)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file; waits for another holder, which needs it for milliseconds."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
