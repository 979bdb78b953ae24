"""Results that cost time, kept as JSON under a digest of everything that they depend on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from keys.errors import InputError
from keys.files import write_atomic

T = TypeVar("T")


def kept(
    path: Path, key: str, *, compute: Callable[[], T], to_json: Callable[[T], Any], from_json: Callable[[Any], T]
) -> T:
    """What ``path`` holds under ``key``; else what ``compute`` gives, which is then written there.

    A record that is missing, damaged, of another key or of another version is replaced, never trusted.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, InputError):
        stored = json.loads(path.read_text())
        if stored["key"] == key:
            return from_json(stored["value"])
    value = compute()
    write_atomic(path, json.dumps({"key": key, "value": to_json(value)}).encode())
    return value
