"""When a package is trusted: pure functions of bytes and digests, with one sentence for every refusal.

Rules of this module: no input, no output, no clock. The order is fixed: the signature over the manifest's
bytes first, and only then is anything in the manifest believed; then whose package it is; then its files,
names and sizes before contents. What comes out is a :class:`VerifiedPackage`; there is no half-trusted state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from exporters.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    FileDigest,
    Manifest,
    parse_manifest,
    shown,
)
from keys.errors import PackageError
from keys.signing import SIGNATURE_BYTES, verify

# What is signed begins with this, so that no other signature of the key passes for a manifest's.
SIGNATURE_CONTEXT = b"keyfoundry manifest v1\0"


@dataclass(frozen=True)
class VerifiedPackage:
    """A manifest whose signature was checked; ``digest`` is SHA-256 (hex) of the manifest's bytes."""

    manifest: Manifest
    digest: str


def signed_message(manifest: bytes) -> bytes:
    """The bytes that ``manifest.sig`` signs: a domain-separation prefix and the manifest's bytes."""
    return SIGNATURE_CONTEXT + manifest


def verify_package(
    manifest: bytes,
    signature: bytes | None,
    files: Mapping[str, FileDigest],
    public_key: bytes,
    *,
    device_id: str | None = None,
    fleet_id: str | None = None,
) -> VerifiedPackage:
    """Decide whether these bytes are a package of the factory that holds ``public_key``'s other half.

    ``signature`` is None for a package without ``manifest.sig``; ``files`` maps the path of every file beside
    the manifest to its digest; ``public_key`` is 32 raw bytes; ``device_id`` and ``fleet_id``, where given,
    must be the package's. Raises :class:`PackageError` with the first reason to refuse.
    """
    package = verify_manifest(manifest, signature, public_key, device_id=device_id, fleet_id=fleet_id)
    check_listing(package.manifest, {name: digest.size for name, digest in files.items()})
    for name, digest in files.items():
        check_file(package.manifest, name, digest)
    return package


def verify_manifest(
    manifest: bytes,
    signature: bytes | None,
    public_key: bytes,
    *,
    device_id: str | None = None,
    fleet_id: str | None = None,
) -> VerifiedPackage:
    """The first half of :func:`verify_package`: all that can be said before a file is looked at."""
    if signature is None:
        raise PackageError(
            f"The package has no {SIGNATURE_NAME}: the factory did not release it; use only signed packages."
        )
    if len(signature) != SIGNATURE_BYTES:
        raise PackageError(
            f"{SIGNATURE_NAME} holds {len(signature)} bytes, not {SIGNATURE_BYTES}; "
            "get the package again from the factory."
        )
    if len(manifest) > MAX_MANIFEST_BYTES:
        raise PackageError(f"{MANIFEST_NAME} has over {MAX_MANIFEST_BYTES} bytes; get the package again.")
    try:
        verify(public_key, signed_message(manifest), signature)
    except PackageError as error:
        # Nothing inside an unproven manifest may be quoted here, not even to tell these causes apart.
        raise PackageError(
            f"{SIGNATURE_NAME} does not fit {MANIFEST_NAME} under this public key: one of the two was "
            "changed, or another factory's key signed it; check the public key, then get the package again."
        ) from error
    trusted = parse_manifest(manifest)
    if fleet_id is not None and trusted.fleet_id != fleet_id:
        raise PackageError(
            f"The package belongs to fleet {trusted.fleet_id}, not to {shown(fleet_id)}; get this fleet's."
        )
    if device_id is not None and trusted.device_id != device_id:
        raise PackageError(
            f"The package was made for device {shown(trusted.device_id)}, not for {shown(device_id)}; "
            "get this device's own package."
        )
    return VerifiedPackage(trusted, hashlib.sha256(manifest).hexdigest())


def check_listing(manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Refuse missing, added, renamed and resized files; ``sizes`` maps each file there is to its size."""
    missing = sorted(manifest.files.keys() - sizes.keys())
    added = sorted(sizes.keys() - manifest.files.keys())
    added_by_size = {sizes[name]: name for name in reversed(added)}
    for lost in missing:
        if (found := added_by_size.get(manifest.files[lost].size)) is not None:
            raise PackageError(
                f"{shown(lost)} is missing and {shown(found)} of the same size is there in its place: "
                "a file was renamed; get the package again from the factory."
            )
    if missing:
        raise PackageError(f"The file {shown(missing[0])} is missing; get the package again.")
    if added:
        raise PackageError(
            f"The file {shown(added[0])} is in the package but not in its manifest: it was added later; "
            "get the package again from the factory."
        )
    for name, size in sizes.items():
        if size != manifest.files[name].size:
            raise PackageError(
                f"The file {shown(name)} has {size} bytes, not the {manifest.files[name].size} that were "
                "signed; get the package again from the factory."
            )


def check_file(manifest: Manifest, name: str, digest: FileDigest) -> None:
    """Refuse a file whose content is not what the manifest says."""
    if name not in manifest.files:
        raise PackageError(f"The package has no file {shown(name)}; get one that was exported with it.")
    if manifest.files[name] != digest:
        raise PackageError(
            f"The file {shown(name)} was changed: its SHA-256 is not the signed one; "
            "get the package again from the factory."
        )
