"""Device ids: names that are safe as a folder name, in a manifest and in a key derivation.

>>> check_device_id("camera-01")
'camera-01'
"""

from __future__ import annotations

import re

from keys.errors import InputError

_DEVICE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def check_device_id(text: str) -> str:
    """Return ``text`` unchanged if it is a device id: 1 to 63 of a-z, 0-9 and "-", not beginning with "-".

    Device ids become folder names, so nothing that could leave a folder ("/", "..", NUL) or that two file
    systems see differently (upper case, non-ASCII) is one. Raises :class:`InputError`.
    """
    # fullmatch, not "$": the latter lets a trailing newline through.
    if not _DEVICE_ID.fullmatch(text):
        raise InputError(
            f"{text[:80]!r} is not a device id; use 1 to 63 of a-z, 0-9 and '-', and begin with a-z or 0-9."
        )
    return text
