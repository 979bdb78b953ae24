"""The release: the rule with its reasons, the evidence in the manifest, the signature, and the registry's row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from device_tests.evidence import Proportion
from device_tests.release_rule import ReleaseRule
from exporters.manifest import MANIFEST_NAME, SIGNATURE_NAME
from exporters.package import add_evidence, inspect_package, sign_package, verifies
from factory.fleet import Fleet, Verdict
from factory.registry import DeviceRow, Registry
from factory.settings import ReleaseSettings
from keys.errors import InputError
from keys.files import sha256_file


def release_rule(settings: ReleaseSettings) -> ReleaseRule:
    """The rule that the settings state; raises InputError if they state none."""
    return ReleaseRule(
        p0=settings.acceptable_fooling, p1=settings.unacceptable_fooling, alpha=settings.alpha, beta=settings.beta,
        allowed_accuracy_drop=settings.allowed_accuracy_drop,
    )  # fmt: skip


def check_enough_images(rule: ReleaseRule, images: int, available: int) -> None:
    """Raise InputError if the acceptance test needs more images than will be attacked."""
    needed = rule.smallest_plan.n
    if min(images, available) < needed:
        raise InputError(
            f"The release rule needs {needed} images that a device classifies correctly, but {min(images, available)} "
            "will be attacked; raise verification.images, give more test images, or state wider risks."
        )


def evidence_of(fleet: Fleet, verdict: Verdict, base_clean: Proportion) -> dict[str, Any]:
    """What the manifest says was measured: every figure with its n and interval, and how to repeat it."""
    examination = verdict.examination
    queries, formats, canaries = examination.queries, examination.formats, examination.canaries
    return {
        "data": {"name": fleet.splits.name, "sha256": fleet.splits.digest},
        "seed": fleet.settings.seed,
        "siblings_attacked": len(fleet.settings.device_ids) - 1,
        "earlier_generations": Registry(fleet.folder.registry).earlier_generations(
            verdict.candidate.name, verdict.candidate.generation
        ),
        "verification": fleet.settings.verification.model_dump(mode="json"),
        "base_accuracy": base_clean.to_json(),
        "accuracy": verdict.clean.to_json(),
        "parity": {name: value.to_json() for name, value in verdict.parity.items()},
        "cells": [cell.to_json() for cell in verdict.judgement.cells],
        "threats": [threat.to_json() for threat in verdict.judgement.threats],
        "quantised": {
            name: {
                "base_accuracy": one.base_clean.to_json(),
                "accuracy": one.clean.to_json(),
                "cells": [cell.to_json() for cell in one.judgement.cells],
                "worst_case": one.judgement.worst_case.to_json(),
            }
            for name, one in verdict.quantised.items()
        },
        "queries": [] if queries is None else [cell.to_json() for cell in queries.judgement.cells],
        "formats": formats.to_json(),
        "canaries": None if canaries is None else canaries.to_json(),
        "worst_case": verdict.judgement.worst_case.to_json(),
        "decision": verdict.decision.to_json(),
    }


def publish(fleet: Fleet, verdict: Verdict, base_clean: Proportion) -> None:
    """Write the evidence into the package and sign it if it is released; a rejected package is never signed."""
    package, released = verdict.candidate.package, verdict.decision.released
    evidence = evidence_of(fleet, verdict, base_clean)
    manifest, signed = inspect_package(package)
    as_decided = verifies(package, fleet.vault.signing_key().public_bytes) if released else not signed
    if json.loads(json.dumps(evidence)) != manifest.evidence or not as_decided:
        add_evidence(package, evidence)
        if released:
            sign_package(package, fleet.vault.signing_key())
    _record(fleet, verdict, package)


def _record(fleet: Fleet, verdict: Verdict, package: Path) -> None:
    Registry(fleet.folder.registry).record(
        DeviceRow(
            device_id=verdict.candidate.name,
            generation=verdict.candidate.generation,
            fleet_id=fleet.vault.fleet_id,
            status="released" if (package / SIGNATURE_NAME).is_file() else "rejected",
            base_digest=fleet.base.digest,
            adapter_digest=verdict.candidate.model.adapter_digest,
            manifest_digest=sha256_file(package / MANIFEST_NAME),
            package=str(package.relative_to(fleet.folder.root)),
            reasons=list(verdict.decision.reasons),
        )
    )
