"""The volumization paper's measures: one image attacked in five places, judged as their average and as the worst.

The paper takes "the average of the five attacked classifications results" as the final classification under attack.
Here that is the mean of the softmax over the five attacked images. No deployed model does this, because nobody shows
it the same image five times with an attack in another place each time: four answers to the same image outvote the one
that the attack broke. The averaging belongs to the evaluation and flatters every defence, so it never stands alone:
beside it are the plain worst of the five (an attacker who chooses the place) and every place by itself.

δ is the accuracy under attack minus the clean accuracy over all images, and β the defence success rate: the share of
the attacked images, right when clean, that stay right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from device_tests.accuracy import logits_of, predict, top_class
from device_tests.evidence import Proportion
from device_tests.statistics import Pairs
from exporters.runtime import Runtime


@dataclass(frozen=True, eq=False)
class RegionJudgement:
    """Which of N images one model gets right, each bool N.

    ``clean``: not attacked. ``places``: region → attacked there. ``averaged``: by the mean softmax over all regions.
    Raises ``ValueError`` if they are not equally long, or there is no region.
    """

    clean: np.ndarray
    places: Mapping[str, np.ndarray]
    averaged: np.ndarray

    def __post_init__(self) -> None:
        rows = [self.clean, self.averaged, *self.places.values()]
        if not self.places or any(row.dtype != np.bool_ or row.shape != self.clean.shape for row in rows):
            raise ValueError(f"no judgement over regions: {[(row.dtype, row.shape) for row in rows]}")

    @property
    def worst(self) -> np.ndarray:
        """Which images are right in every place: bool N."""
        return np.all(list(self.places.values()), axis=0)

    @property
    def answers(self) -> Mapping[str, np.ndarray]:
        """The paper's protocol and the plain one, by name: what the other methods take."""
        return {"averaged": self.averaged, "worst of five": self.worst}


def judge_regions(
    runtime: Runtime, clean: np.ndarray, attacked: Mapping[str, np.ndarray], labels: np.ndarray
) -> RegionJudgement:
    """Judge uint8 images N×C×H×W and the same images ``attacked`` in several places, each uint8 N×C×H×W.

    ``labels``: integers N. Raises ``ValueError`` if an attacked set has another shape, or there is none.
    """
    if not attacked or any(images.shape != clean.shape for images in attacked.values()):
        raise ValueError(f"attacked sets of other shapes than {clean.shape}, or none")
    logits = {place: logits_of(runtime, images) for place, images in attacked.items()}
    mean = np.mean([_softmax(answer) for answer in logits.values()], axis=0)
    return RegionJudgement(
        clean=predict(runtime, clean) == labels,
        places={place: top_class(answer) == labels for place, answer in logits.items()},
        averaged=top_class(mean) == labels,
    )


def accuracy_of(right: np.ndarray) -> Proportion:
    """Accuracy over all images, clean mistakes counted as wrong; ``right`` bool N, N ≥ 1."""
    return Proportion(int(right.sum()), len(right))


def robustness(clean: np.ndarray, attacked: np.ndarray) -> Pairs:
    """δ as pairs: ``difference`` is accuracy under attack minus clean accuracy, with its interval; both bool N."""
    return Pairs.of(attacked, clean)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 N×K."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
