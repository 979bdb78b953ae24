"""Which values of a block a key picks, and in which order: every choice from a subkey with a purpose of its own.

The block shuffle uses the key itself (purpose "permutation" of :mod:`keys.permutation`). All other choices go through
one more subkey, named here, so that what one transform shows of its key says nothing about another's. Nothing of this
may change: a key would then mean another model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from keys.derive import DeviceKey
from keys.permutation import permutation

FLIPPED_PLACES = "bit flip: places"
ENCRYPTED_PLACES = "format-preserving encryption: places"
ENCRYPTION_TABLE = "format-preserving encryption: table"
CHOICE_OF_MEMBER = "key ensemble: order of the choice's values"
ATTRACTOR_SIGNS = "attractors: signs"
ATTRACTED_CLASSES = "attractors: classes"


def keyed_order(key: DeviceKey, n: int, purpose: str) -> NDArray[np.int64]:
    """The permutation of 0 … n − 1 that ``key`` stands for under ``purpose``, int64 of shape (n,)."""
    return permutation(key.subkey(purpose), n)


def keyed_half(key: DeviceKey, n: int, purpose: str) -> NDArray[np.int64]:
    """The ⌊n / 2⌋ of n places that ``key`` picks under ``purpose``, int64, in ascending order.

    Each subset of that size is equally likely; of one place it is none.
    """
    return np.sort(keyed_order(key, n, purpose)[: n // 2])
