"""Files written whole or not at all: temporary name, fsync, rename, fsync of the folder.

>>> import tempfile, pathlib
>>> with tempfile.TemporaryDirectory() as folder:
...     path = pathlib.Path(folder) / "greeting.txt"
...     write_atomic(path, b"hello")
...     path.read_bytes()
b'hello'
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from keys.errors import StorageError


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write ``data`` under ``path`` so that a reader sees the old file or the new one, never a part.

    ``mode`` is set before the first byte is written, so a secret (0o600) is never readable by others.
    Raises :class:`StorageError` if the disk is full or the folder cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                os.fchmod(stream.fileno(), mode)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(path)
            sync_folder(path.parent)
        finally:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def folder_being_written(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``final`` (replacing it) only if the block succeeds.

    Raises :class:`StorageError` if the disk is full; ``final`` is then what it was before.
    """
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    with path.open("rb") as stream:
                        os.fsync(stream.fileno())
            for path in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
                sync_folder(path)
            retired = final.with_name(f".{final.name}.old.part")
            shutil.rmtree(retired, ignore_errors=True)
            if final.exists():
                final.replace(retired)
            temporary.replace(final)
            sync_folder(final.parent)
            shutil.rmtree(retired, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 lower-case hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors inside the block into one clear :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"The disk is full: {path} was not written; free space and run again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"No permission to write {path}; choose another folder with --out.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise StorageError(f"{path} cannot be written: a file stands where a folder belongs.") from error
        raise
