"""The one error tree: every error that a user can cause is a subclass of :class:`KeyfoundryError`.

Each message is one sentence that says what was wrong, with which value, and what to do. Only the command
line turns these into exit codes; the table in the README is compared with :func:`exit_codes` by a test.
"""

from __future__ import annotations


class KeyfoundryError(Exception):
    """An error with no code of its own."""

    exit_code = 1


class InputError(KeyfoundryError):
    """Settings, data, an image or a model that cannot be used."""

    exit_code = 3


class SecretError(KeyfoundryError):
    """A vault, a passphrase or a key file that cannot be used or is not protected."""

    exit_code = 4


class PackageError(KeyfoundryError):
    """A package that was refused: signature, digest, schema, device or format."""

    exit_code = 5


class CheckFailed(KeyfoundryError):  # noqa: N818 – a check that fails is a result, not a malfunction
    """A check ran and failed: parity, golden logits, accuracy on the device."""

    exit_code = 6


class BusyError(KeyfoundryError):
    """Another run holds the output folder."""

    exit_code = 7


class StorageError(KeyfoundryError):
    """The disk is full or a file could not be written; nothing under a final name was changed."""

    exit_code = 8


def exit_codes() -> dict[int, str]:
    """Exit code → meaning, for every error class and the codes that the command line adds itself."""
    table = {0: "success", 2: "wrong usage of the command line", 130: "interrupted; run again to go on"}
    for error in [KeyfoundryError, *KeyfoundryError.__subclasses__()]:
        table[error.exit_code] = (error.__doc__ or "").split("\n")[0].rstrip(".")
    return dict(sorted(table.items()))
