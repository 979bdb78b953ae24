"""LoRA-only packages of a fleet: released with the full packages that they stand for, and withdrawn with them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from exporters.manifest import MANIFEST_NAME, SIGNATURE_NAME
from exporters.package import inspect_package, open_package, sign_package
from factory.adapter_package import export_adapter_package, export_base_package
from factory.fleet import Fleet, Verdict
from keys.errors import PackageError
from keys.files import sha256_file


def publish_adapters(fleet: Fleet, verdicts: Sequence[Verdict]) -> None:
    """Write and sign the base package and the adapter package of every released device; the rest are taken away.

    An adapter package is made anew only if the full package or the base package has changed since.
    """
    settings, recipe = fleet.settings.export, fleet.settings.recipe
    if not settings.adapters:
        return
    base_package = fleet.folder.base_package
    export_base_package(
        fleet.base, recipe, fleet.vault.fleet_id, fleet.splits.validation.images.numpy(), base_package, fleet.progress,
        created=min(verdict.candidate.model.created for verdict in verdicts), formats=settings.formats,
        target=settings.target,
    )  # fmt: skip
    _sign(fleet, base_package)
    for verdict in verdicts:
        package = fleet.folder.adapter_package(verdict.candidate.name)
        if not verdict.decision.released:
            shutil.rmtree(package, ignore_errors=True)
            continue
        if not _current(package, verdict.candidate.package, base_package):
            export_adapter_package(
                verdict.candidate.model.classifier, fleet.base, recipe, base_package, verdict.candidate.package,
                package, fleet.progress,
            )  # fmt: skip
        _sign(fleet, package)


def _sign(fleet: Fleet, package: Path) -> None:
    """Sign a package that has no signature of this fleet's key."""
    key = fleet.vault.signing_key()
    try:
        open_package(package, key.public_bytes)
    except PackageError:
        sign_package(package, key)


def _current(package: Path, full_package: Path, base_package: Path) -> bool:
    """Whether the adapter package stands for the full package as it is, on the base package as it is."""
    if not (package / SIGNATURE_NAME).is_file():
        return False
    try:
        adapter, _ = inspect_package(package)
        full, _ = inspect_package(full_package)
    except PackageError:
        return False
    files = {name: entry.sha256 for name, entry in full.files.items()}
    needed = sha256_file(base_package / MANIFEST_NAME)
    return adapter.evidence.get("stands_for") == files and adapter.requires == needed
