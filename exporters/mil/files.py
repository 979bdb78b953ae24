"""The files of a Core ML package, from a folder or from memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keys.errors import InputError

Source = Path | Mapping[str, bytes]


@dataclass(frozen=True)
class PackageFiles:
    """A folder ``….mlpackage``, or the bytes of its files by their path inside it, with ``/`` between folders."""

    source: Source

    @property
    def label(self) -> str:
        """What to call the package in a sentence."""
        return str(self.source) if isinstance(self.source, Path) else "the package in memory"

    def name(self, path: str) -> str:
        """What to call one file of it."""
        return str(self.source / path) if isinstance(self.source, Path) else f"{path} of the package in memory"

    def read(self, path: str, missing: str) -> bytes:
        """The bytes of a file. Raises :class:`InputError` with the sentence ``missing`` if there is no such file."""
        try:
            if isinstance(self.source, Mapping):
                return self.source[path]
            if not (self.source / path).is_file():  # a pipe would be waited for, and a device read without end
                raise FileNotFoundError(path)
            return (self.source / path).read_bytes()
        except (KeyError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise InputError(missing) from error
