"""What an attacker holds: the threats by code, and the models that attacks are made on.

Rules: a threat says who the attacker is and whether the release rule counts it; a source is one model an
attacker may hold. The target itself as a source is the ceiling: shown on the heat map's diagonal, never counted.
No torch at run time: a report reads this file too.

>>> Threat.from_code("T2") is Threat.SIBLING_DEVICE
True
>>> [threat.code for threat in Threat if threat.in_rule]
['T0', 'T1', 'T2']
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


class Threat(Enum):
    """One attacker: its code, a sentence for people, and whether the release rule counts it."""

    PUBLIC_BASE = ("T0", "The attacker holds the public base and nothing else.", True)
    GUESSED_KEY = ("T1", "The attacker trains a device of its own by the same recipe with a guessed key.", True)
    SIBLING_DEVICE = ("T2", "The attacker has extracted another device of the same fleet.", True)
    COLLUDING_DEVICES = (
        "T3",
        "The attacker has extracted several devices of the same fleet and attacks all of them and the base at once.",
        False,
    )
    QUERIES = ("T4", "The attacker asks the target for labels or scores, again and again.", False)
    UNKEYED_CONTROL = (
        "control",
        "Not an attacker but a control: the same recipe without a key shows what retraining alone changes.",
        False,
    )
    TARGET_ITSELF = ("T5", "The attacker holds the target itself: the ceiling, which is expected to win.", False)

    def __init__(self, code: str, sentence: str, in_rule: bool) -> None:
        self.code = code
        self.sentence = sentence
        self.in_rule = in_rule

    @classmethod
    def from_code(cls, code: str) -> Threat:
        """The threat with this code; raises ``ValueError`` for an unknown one."""
        for threat in cls:
            if threat.code == code:
                return threat
        raise ValueError(f"no threat has the code {code!r}")

    def on(self, source: str, target: str) -> Threat:
        """Return the threat that a source of this kind is to a target.

        A sibling is the target itself where the two are one model; queries stay queries.
        """
        return Threat.TARGET_ITSELF if source == target and self is not Threat.QUERIES else self


@dataclass(frozen=True)
class Source:
    """A model that attacks are made on.

    ``id``: unique within a fleet; a sibling's is its device id. ``model``: float32 N×C×H×W in [0, 1] → logits
    N×K, differentiable in its input (except for queries); one module, which may be an ensemble. ``description``: for
    the report. ``targets``: ids of the models that it is judged on; ``None``: all. ``differentiable``: it gives
    gradients, and not only answers.
    """

    id: str
    threat: Threat
    model: nn.Module
    description: str
    targets: tuple[str, ...] | None = None
    differentiable: bool = True

    def is_judged_on(self, target: str) -> bool:
        """Whether what is made on this source is judged on this target."""
        return self.targets is None or target in self.targets
