"""The package: written, signed and opened, from a folder or from memory; ``package_rules`` decides what is trusted.

Rules of this module: a package is a folder of plain files, without links, special files or empty folders.
A candidate has ``manifest.json`` only; ``manifest.sig`` beside it makes it released. A reader gets bytes only
through :meth:`OpenPackage.read`, which checks the very bytes it returns, so that a file changed after the
package was opened is never used. Writing goes::

    with folder_being_written(path) as folder:     # keys.files: appears whole or not at all
        ...                                        # exporters write their files
        write_package(folder, manifest)            # fills in the digests
    add_evidence(path, evidence)                   # what was measured about these very files
    sign_package(path, signing_key)                # only if the release rule says so
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from exporters.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    FileDigest,
    Manifest,
    parse_manifest,
    shown,
)
from exporters.package_rules import (
    check_file,
    check_listing,
    signed_message,
    verify_manifest,
)
from keys.errors import PackageError
from keys.files import write_atomic
from keys.signing import SIGNATURE_BYTES, SigningKey

# More entries than any manifest may list; a folder with more is refused without being walked to its end.
_MAX_ENTRIES = 20_000
_CHUNK = 2**20


@dataclass(frozen=True)
class OpenPackage:
    """A verified package on disk; ``digest`` is the SHA-256 (hex) of its manifest's bytes."""

    folder: Path
    manifest: Manifest
    digest: str

    def read(self, name: str) -> bytes:
        """The content of one file, checked against the signed digest as it is read.

        Raises :class:`PackageError` if the package has no such file or it has changed since.
        """
        if name not in self.manifest.files:
            raise PackageError(f"The package has no file {shown(name)}; get one that was exported with it.")
        with _opened(self.folder, name) as stream:
            data = stream.read(self.manifest.files[name].size + 1)
        check_file(self.manifest, name, FileDigest.of(data))
        return data

    def copy_folder(self, name: str, destination: Path) -> Path:
        """Copy the folder ``name`` of the package below ``destination``, checking each file; return the copy.

        For libraries that load from a path: give a private folder, so that they load what was checked.
        Raises :class:`PackageError` if the package has no such folder.
        """
        for file in _files_below(self.manifest, name):
            write_atomic(destination / file, self.read(file))
        return destination / name


@dataclass(frozen=True)
class MemoryPackage:
    """A verified package that lies in memory only; ``digest`` is the SHA-256 (hex) of its manifest's bytes.

    ``read(name)`` goes to ``OnnxRuntime``, and ``folder("model.mlpackage")`` to a reader of Core ML packages that
    takes files by their path; neither touches the disk.
    """

    manifest: Manifest
    digest: str
    _content: Mapping[str, bytes] = dataclasses.field(repr=False)

    def read(self, name: str) -> bytes:
        """The content of one file. Raises :class:`PackageError` if the package has no such file."""
        if name not in self._content:
            raise PackageError(f"The package has no file {shown(name)}; get one that was exported with it.")
        return self._content[name]

    def folder(self, name: str) -> Mapping[str, bytes]:
        """The files of the folder ``name`` of the package by their path inside it, ``/`` between folders.

        Raises :class:`PackageError` if the package has no such folder.
        """
        return {file.removeprefix(f"{name}/"): self.read(file) for file in _files_below(self.manifest, name)}


def open_package(
    folder: Path, public_key: bytes, *, device_id: str | None = None, fleet_id: str | None = None
) -> OpenPackage:
    """Open a package and verify all of it, as :func:`exporters.package_rules.verify_package` does in memory.

    ``public_key`` is 32 raw bytes. Raises :class:`PackageError` with the first reason to refuse.
    """
    manifest = _read_manifest(folder)
    signature = None
    if SIGNATURE_NAME in _entries(folder, ""):
        with _opened(folder, SIGNATURE_NAME) as stream:
            signature = stream.read(SIGNATURE_BYTES + 1)
    verified = verify_manifest(manifest, signature, public_key, device_id=device_id, fleet_id=fleet_id)
    _check_content(folder, verified.manifest)
    return OpenPackage(folder, verified.manifest, verified.digest)


def open_package_bytes(
    files: Mapping[str, bytes], public_key: bytes, *, device_id: str | None = None, fleet_id: str | None = None
) -> MemoryPackage:
    """Open a package that never lay on this disk, and verify all of it; ``files`` is content by path.

    ``files`` holds every file of the package, ``manifest.json`` and ``manifest.sig`` among them, with ``/`` between
    folders; ``public_key`` is 32 raw bytes. Raises :class:`PackageError` with the first reason to refuse.
    """
    # Taken once: what is checked here is what is read later, whatever becomes of the caller's mapping.
    content = dict(files)
    for name, data in content.items():
        if type(name) is not str or type(data) is not bytes:
            raise PackageError(
                f"The file {shown(name)} is given as {type(data).__name__}; give each file's path as text and its "
                "content as immutable bytes."
            )
    manifest = content.pop(MANIFEST_NAME, None)
    if manifest is None:
        raise PackageError(f"This is not a package, without {MANIFEST_NAME}; give all files of a package.")
    signature = content.pop(SIGNATURE_NAME, None)
    # The signature first: the digests of what a stranger sends cost time.
    trusted = verify_manifest(manifest, signature, public_key, device_id=device_id, fleet_id=fleet_id)
    check_listing(trusted.manifest, {name: len(data) for name, data in content.items()})
    for name, data in content.items():
        check_file(trusted.manifest, name, FileDigest.of(data))
    return MemoryPackage(trusted.manifest, trusted.digest, content)


def inspect_package(folder: Path) -> tuple[Manifest, bool]:
    """The manifest of a package and whether it has a signature file, with nothing verified: to be shown only.

    Raises :class:`PackageError` if there is no readable manifest.
    """
    return parse_manifest(_read_manifest(folder)), (folder / SIGNATURE_NAME).is_file()


def whole_package(folder: Path) -> Manifest | None:
    """The manifest of a package that holds just the files it lists, signed or not; None if there is no such package."""
    if not folder.is_dir():
        return None
    try:
        manifest, _ = inspect_package(folder)
        return manifest if digest_folder(folder) == dict(manifest.files) else None
    except PackageError:
        return None


def verifies(folder: Path, public_key: bytes, *, fleet_id: str | None = None) -> bool:
    """Whether :func:`open_package` would open it."""
    try:
        open_package(folder, public_key, fleet_id=fleet_id)
    except PackageError:
        return False
    return True


def write_package(folder: Path, manifest: Manifest, digests: Mapping[str, FileDigest] | None = None) -> Manifest:
    """Make ``folder``, which holds the exported files, an unsigned package; return the manifest with digests.

    ``manifest.files`` is replaced by what lies in the folder; ``digests`` are those that the caller took while it
    wrote the files, so that they need not be read again. A signature from before is removed first.
    Raises :class:`PackageError` if a file's name or kind is not allowed in a package, or if ``digests`` are of other
    files or sizes than those that are there.
    """
    complete = dataclasses.replace(manifest, files=digest_folder(folder) if digests is None else dict(digests))
    check_listing(complete, _list_folder(folder))
    return _write_manifest(folder, complete)


def add_evidence(folder: Path, evidence: Mapping[str, object]) -> Manifest:
    """Replace the evidence of an unsigned or signed package; it is unsigned afterwards.

    Raises :class:`PackageError` if the files are no longer those that the manifest lists: evidence belongs to
    the bytes it was measured on.
    """
    manifest = parse_manifest(_read_manifest(folder))
    _check_content(folder, manifest)
    return _write_manifest(folder, dataclasses.replace(manifest, evidence=dict(evidence)))


def sign_package(folder: Path, key: SigningKey) -> None:
    """Sign the manifest; raises :class:`PackageError` if the files are no longer those that it lists."""
    manifest = _read_manifest(folder)
    _check_content(folder, parse_manifest(manifest))
    write_atomic(folder / SIGNATURE_NAME, key.sign(signed_message(manifest)))


def digest_folder(folder: Path) -> dict[str, FileDigest]:
    """Digest every file of a package folder but the manifest and its signature.

    Raises :class:`PackageError` for links, special files, empty folders and names that are not UTF-8.
    """
    return {name: _digest(folder, name) for name in sorted(_list_folder(folder))}


def _files_below(manifest: Manifest, name: str) -> list[str]:
    files = [file for file in manifest.files if file.startswith(f"{name}/")]
    if not files:
        raise PackageError(f"The package has no folder {shown(name)}; get one that was exported with it.")
    return files


def _check_content(folder: Path, manifest: Manifest) -> None:
    """Compare the folder with its manifest; names and sizes first, so that no foreign file is read."""
    sizes = _list_folder(folder)
    check_listing(manifest, sizes)
    for name in sizes:
        check_file(manifest, name, _digest(folder, name))


def _write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    data = manifest.to_bytes()
    parsed = parse_manifest(data)
    # In this order, a run that is cut short leaves an unsigned package, never a stale signature.
    (folder / SIGNATURE_NAME).unlink(missing_ok=True)
    write_atomic(folder / MANIFEST_NAME, data)
    return parsed


def _read_manifest(folder: Path) -> bytes:
    if folder.is_file():
        raise PackageError(f"{folder} is a file and no package, which is a folder; give the path of a package.")
    if not folder.is_dir():
        raise PackageError(f"There is no package folder at {folder}; give the path of a package.")
    if MANIFEST_NAME not in _entries(folder, ""):
        raise PackageError(f"{folder} is not a package, without {MANIFEST_NAME}; give the path of a package.")
    with _opened(folder, MANIFEST_NAME) as stream:
        return stream.read(MAX_MANIFEST_BYTES + 1)


def _list_folder(folder: Path) -> dict[str, int]:
    """Path → size of every file but the manifest and its signature."""
    sizes = {}
    seen = 0
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        entries = _entries(folder, prefix)
        seen += len(entries)
        if seen > _MAX_ENTRIES:
            raise PackageError(f"{folder} holds over {_MAX_ENTRIES} entries; give the path of a package.")
        if not entries:
            raise PackageError(f"The package holds the empty folder {shown(prefix)}; get the package again.")
        for name in sorted(f"{prefix}{entry}" for entry in entries):
            status = _status(folder, name)
            if stat.S_ISDIR(status.st_mode):
                waiting.append(f"{name}/")
                continue
            _check_kind(name, status)
            if name not in (MANIFEST_NAME, SIGNATURE_NAME):
                sizes[name] = status.st_size
    return sizes


def _entries(folder: Path, prefix: str) -> list[str]:
    """The names in one folder of the package; one more than the allowed number at most."""
    try:
        names = [entry.name for entry in itertools.islice((folder / prefix).iterdir(), _MAX_ENTRIES + 1)]
    except OSError as error:
        raise _unreadable(prefix or str(folder), error) from error
    for name in names:
        if not _is_utf8(name):
            raise PackageError(
                f"The package holds a file whose name {shown(name)} is not UTF-8; get the package again."
            )
    return names


def _status(folder: Path, name: str) -> os.stat_result:
    try:
        return (folder / name).lstat()
    except OSError as error:
        raise _unreadable(name, error) from error


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_kind(name: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise PackageError(
            f"{shown(name)} is a symbolic link; a package holds plain files only: copy it without links."
        )
    if not stat.S_ISREG(status.st_mode):
        raise PackageError(f"{shown(name)} is not a plain file; get the package again from the factory.")
    if status.st_nlink > 1:
        raise PackageError(
            f"{shown(name)} is a hard link: the same file lies in another place, from where it could be "
            "changed; copy the package without links."
        )


def _opened(folder: Path, name: str) -> BinaryIO:
    """Open one plain file; a link or a pipe in its place is refused, neither followed nor waited for."""
    try:
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if (folder / name).is_symlink():
            _check_kind(name, (folder / name).lstat())
        raise _unreadable(name, error) from error
    try:
        _check_kind(name, os.fstat(handle))
    except PackageError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _digest(folder: Path, name: str) -> FileDigest:
    digest = hashlib.sha256()
    size = 0
    with _opened(folder, name) as stream:
        try:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        except OSError as error:
            raise _unreadable(name, error) from error
    return FileDigest(digest.hexdigest(), size)


def _unreadable(name: str, error: OSError) -> PackageError:
    return PackageError(f"{shown(name)} cannot be read ({error.strerror}); check the disk and the rights.")
