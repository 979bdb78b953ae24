"""The value that stands where a figure is missing: it carries the reason and never counts as a pass.

>>> NotMeasured("coremltools predicts on macOS only").to_json()
{'not_measured': 'coremltools predicts on macOS only'}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NotMeasured:
    """A figure that was not measured; ``reason`` is a clause that completes "not measured: …"."""

    reason: str

    def to_json(self) -> dict[str, str]:
        """``{"not_measured": reason}``; the key tells it from every measured value."""
        return {"not_measured": self.reason}

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> NotMeasured:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        reason = value.get("not_measured")
        if len(value) != 1 or not isinstance(reason, str):
            raise ValueError(f"not a 'not measured' value: {dict(value)!r}")
        return cls(reason)
