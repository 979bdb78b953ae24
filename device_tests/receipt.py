"""The receipt: what a device measured about its package, as one JSON file.

Rules of this module: a receipt names the exact package (the SHA-256 of its manifest) and the runtime; what
was not measured says so with its reason; it passes only if there is no reason against it. It is not signed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from device_tests.evidence import Measured
from device_tests.latency import Latency
from exporters.parity import Parity
from keys.errors import InputError
from keys.files import write_atomic

SCHEMA = 1


@dataclass(frozen=True)
class Receipt:
    """``golden`` compares the golden logits with the factory's; ``reasons`` are sentences, none if passed.

    ``package_digest`` is SHA-256 (hex) of the manifest's bytes; ``created`` is UTC, ISO 8601.
    """

    package_digest: str
    device_id: str
    generation: int
    fleet_id: str
    runtime: str
    runtime_version: str
    platform: str
    golden: Parity
    accuracy: Measured
    latency: Latency
    created: str
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every check that ran was within its limit."""
        return not self.reasons

    def to_json(self) -> dict[str, object]:
        """Plain JSON types, with the schema's number."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "reasons": list(self.reasons),
            "package_digest": self.package_digest,
            "device_id": self.device_id,
            "generation": self.generation,
            "fleet_id": self.fleet_id,
            "runtime": self.runtime,
            "runtime_version": self.runtime_version,
            "platform": self.platform,
            "golden": self.golden.to_json(),
            "accuracy": self.accuracy.to_json(),
            "latency": self.latency.to_json(),
            "created": self.created,
        }


def write_receipt(path: Path, receipt: Receipt, *, package: Path) -> None:
    """Write the receipt, whole or not at all.

    Raises :class:`InputError` if ``path`` lies inside the folder ``package``: one file more would make the
    package's next check refuse it.
    """
    if path.resolve().is_relative_to(package.resolve()):
        raise InputError(f"The receipt {path} would lie inside the package; write it to another folder.")
    write_atomic(path, json.dumps(receipt.to_json(), indent=2, allow_nan=False).encode() + b"\n")
