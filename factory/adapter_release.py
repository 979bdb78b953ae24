"""LoRA-only packages of a fleet: released with the full packages that they stand for, and withdrawn with them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from exporters.package import inspect_package, open_package, sign_package, verifies
from factory.adapter_package import export_adapter_package, export_base_package
from factory.fleet import Fleet, Verdict
from keys.errors import PackageError


def withdraw_adapters(fleet: Fleet, verdicts: Sequence[Verdict]) -> None:
    """Take away every adapter package that stands for no released package as it is, whatever the settings ask for.

    To be called before anything is released: a run that is cut short leaves no adapter of a rejected device.
    """
    for verdict in verdicts:
        if not (verdict.decision.released and _current(fleet, verdict)):
            shutil.rmtree(fleet.folder.adapter_package(verdict.candidate.name), ignore_errors=True)


def publish_adapters(fleet: Fleet, verdicts: Sequence[Verdict]) -> None:
    """Write and sign the base package and the adapter package of every released device; the rest are taken away.

    An adapter package is made anew only if the full package or the base package has changed since. What lies there
    without a signature of this fleet's key is made anew, too, and never signed as it was found.
    """
    settings, recipe, key = fleet.settings.export, fleet.settings.recipe, fleet.vault.signing_key()
    withdraw_adapters(fleet, verdicts)
    if not settings.adapters:
        return
    base_package = fleet.folder.base_package
    if not verifies(base_package, key.public_bytes, fleet_id=fleet.vault.fleet_id):
        shutil.rmtree(base_package, ignore_errors=True)
    export_base_package(
        fleet.base, recipe, fleet.vault.fleet_id, fleet.splits.validation.images.numpy(), base_package, fleet.progress,
        created=min(verdict.candidate.model.created for verdict in verdicts), formats=settings.formats,
        target=settings.target,
    )  # fmt: skip
    if not verifies(base_package, key.public_bytes, fleet_id=fleet.vault.fleet_id):
        sign_package(base_package, key)
    for verdict in verdicts:
        package = fleet.folder.adapter_package(verdict.candidate.name)
        if verdict.decision.released and not _current(fleet, verdict):
            export_adapter_package(
                verdict.candidate.model.classifier, fleet.base, recipe, base_package, verdict.candidate.package,
                package, fleet.progress,
            )  # fmt: skip
            sign_package(package, key)


def _current(fleet: Fleet, verdict: Verdict) -> bool:
    """Whether the adapter package, signed and whole, stands for the full package as it is, on the base as it is."""
    device_id, key = verdict.candidate.name, fleet.vault.signing_key().public_bytes
    try:
        adapter = open_package(fleet.folder.adapter_package(device_id), key, device_id=device_id).manifest
        base = open_package(fleet.folder.base_package, key, fleet_id=fleet.vault.fleet_id)
        full, _ = inspect_package(verdict.candidate.package)
    except PackageError:
        return False
    files = {name: entry.sha256 for name, entry in full.files.items()}
    same = (adapter.kind, adapter.generation, adapter.fleet_id) == ("adapter", full.generation, full.fleet_id)
    return same and adapter.evidence.get("stands_for") == files and adapter.requires == base.digest
