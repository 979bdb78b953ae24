"""Adversarial images made elsewhere beside their clean ones: are they a fair attack on these images?

Rules: what is judged is 8-bit, so floats in [0, 1] are rounded, inward, and it is said; no image outside the
perturbation set is judged; a clean image that the file leaves out is the test image of its index. Nothing is repaired:
one fault is one error that names the first image it is about.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from device_tests.foreign_images import ForeignFile
from device_tests.images import LEVELS
from device_tests.perturbation import Norm, Perturbation
from device_tests.statistics import Risks, acceptance_plan
from keys.errors import InputError

_EXAMINED = 200
"""Images outside the set that are compared with all clean ones, to tell whether the order is wrong."""

_CHUNK_VALUES = 20_000_000


@dataclass(frozen=True, eq=False)
class ForeignPairs:
    """N clean images with their labels, and what an attacker made of them, all within ``perturbation``.

    ``clean``, ``adversarial``: uint8 N×C×H×W; ``labels``: int64 N. ``notes``: what a reader must know about them.
    """

    clean: np.ndarray
    labels: np.ndarray
    adversarial: np.ndarray
    perturbation: Perturbation
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def pair(
    file: ForeignFile, test_images: np.ndarray, test_labels: np.ndarray, perturbation: Perturbation
) -> ForeignPairs:
    """Put the adversarial images beside their clean ones and check every pair.

    ``test_images``: uint8 M×C×H×W, the fleet's test images in the order that its attacks use; ``test_labels``: M. They
    stand in for what the file leaves out: its first images, or those of its ``indices``.
    Raises :class:`InputError` for values that are not finite or outside [0, 1], labels or indices that do not fit the
    test images, images in another order than the clean ones, and images outside the perturbation set.
    """
    clean, labels, notes = _clean(file, test_images, test_labels)
    _check_values(file.adversarial, "adversarial", file.where)
    adversarial = _rounded(file.adversarial)
    outside = ~perturbation.contains(adversarial, clean)
    if file.adversarial.dtype != np.uint8:
        # Rounding alone may lead out of the set; from inside it, it is done inward.
        origin = clean if file.clean is None else file.clean
        inside = _distances(file.adversarial, origin, perturbation.norm) <= perturbation.size + 1e-6
        moved = outside & inside
        adversarial[moved] = perturbation.to_8bit(file.adversarial[moved], clean[moved])
        outside &= ~inside
        notes.append("The adversarial images are floats and were rounded to 8 bits, as a device receives them.")
    if outside.any():
        own = None if file.clean is not None else _own_places(file)
        pool = clean if own is None else test_images
        _refuse(file.where, adversarial, clean, outside, pool, own, perturbation)
    unchanged = int((adversarial == clean).all(axis=(1, 2, 3)).sum())
    if unchanged == len(clean):
        raise InputError(f"Every adversarial image of {file.where} equals its clean image; give the attacked ones.")
    if unchanged:
        notes.append(f"{unchanged} of the {len(clean)} adversarial images equal their clean images: no attack on them.")
    return ForeignPairs(clean, labels, adversarial, perturbation, tuple(notes))


def check_enough(images: int, risks: Risks) -> None:
    """Raise :class:`InputError` if no acceptance test with these risks is possible on so few images."""
    needed = acceptance_plan(risks.p0, risks.p1, risks.alpha, risks.beta).n
    if images < needed:
        raise InputError(
            f"{images} adversarial images are too few: to tell a fooling rate of {risks.p0:g} from {risks.p1:g} at "
            f"risks of {risks.alpha:g} and {risks.beta:g} takes {needed} that a device gets right when clean; give "
            "more images (the risks of a fleet are fixed when it is made)."
        )


def _clean(
    file: ForeignFile, test_images: np.ndarray, test_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if file.clean is None:
        return _from_test_images(file, test_images, test_labels)
    _check_values(file.clean, "clean", file.where)
    clean = _rounded(file.clean)
    places = _places(clean, test_images)
    if file.indices is not None:
        _check_indices(file, len(test_images))
        for number, index in enumerate(file.indices.tolist()):
            if not np.array_equal(clean[number], test_images[index]):
                raise InputError(
                    f"The clean image {number} of {file.where} is not the fleet's test image {index}, which its "
                    "'indices' name; write both in one order, or leave 'indices' out."
                )
    unknown = np.flatnonzero(places < 0)
    if file.labels is None and len(unknown):
        raise InputError(
            f"{file.where} holds clean images without labels, and clean image {unknown[0]} is not among the fleet's "
            "test images, which would tell its label; add 'labels'."
        )
    true = test_labels[places].astype(np.int64)
    labels = true if file.labels is None else file.labels
    wrong = np.flatnonzero((places >= 0) & (labels != true))
    if len(wrong):
        raise InputError(
            f"{file.where} gives clean image {wrong[0]} the class {labels[wrong[0]]}, but it is test image "
            f"{places[wrong[0]]} of this fleet, of class {true[wrong[0]]}; write images and labels in one order."
        )
    notes: list[str] = []
    if len(unknown):
        notes.append(
            f"{len(unknown)} of the {len(clean)} clean images are not test images of this fleet; figures on training "
            "images flatter a model."
        )
    repeated = len(clean) - len(np.unique(clean.reshape(len(clean), -1), axis=0))
    if repeated:
        notes.append(f"{repeated} clean images occur more than once; the intervals take every image for a new trial.")
    return clean, labels, notes


def _from_test_images(
    file: ForeignFile, test_images: np.ndarray, test_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if file.indices is None and len(file.adversarial) > len(test_images):
        raise InputError(
            f"{file.where} holds {len(file.adversarial)} adversarial images, but the fleet has {len(test_images)} test "
            "images; add the array 'clean'."
        )
    _check_indices(file, len(test_images))
    places = _own_places(file)
    labels = test_labels[places].astype(np.int64)
    if file.labels is not None and (wrong := np.flatnonzero(file.labels != labels)).size:
        first = int(wrong[0])
        raise InputError(
            f"{file.where} is in another order than the fleet's test images: {wrong.size} of {len(labels)} labels "
            f"differ, the first at image {first} ({file.labels[first]}, where test image {places[first]} is of class "
            f"{labels[first]}); add the array 'clean', or 'indices' into the fleet's test images."
        )
    return test_images[places], labels, []


def _own_places(file: ForeignFile) -> np.ndarray:
    return np.arange(len(file.adversarial)) if file.indices is None else file.indices


def _check_indices(file: ForeignFile, count: int) -> None:
    if file.indices is not None and not ((file.indices >= 0) & (file.indices < count)).all():
        raise InputError(
            f"{file.where} names test images from {file.indices.min()} to {file.indices.max()}, but the fleet's "
            f"{count} are numbered from 0 to {count - 1}."
        )


def _check_values(images: np.ndarray, name: str, where: str) -> None:
    if images.dtype == np.uint8:
        return
    for number, image in enumerate(images):
        low, high = float(image.min()), float(image.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError(f"The {name} image {number} of {where} has values that are not finite.")
        if low < 0 or high > 1:
            raise InputError(
                f"The {name} image {number} of {where} has values from {low:g} to {high:g}; give floats in [0, 1], "
                "before any normalisation, or 8-bit values as uint8."
            )


def _rounded(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images.copy()
    return np.stack([np.rint(image.astype(np.float64) * LEVELS).astype(np.uint8) for image in images])


def _distances(images: np.ndarray, clean: np.ndarray, norm: Norm) -> np.ndarray:
    """How far each image is from its clean one, in the unit of a perturbation's size (a patch: its square)."""
    found: list[float] = []
    for image, origin in zip(images, clean, strict=True):
        difference = np.abs(_levels(image) - _levels(origin))
        if norm is Norm.LINF:
            found.append(float(difference.max()) / LEVELS)
        elif norm is Norm.L2:
            found.append(float(np.sqrt((difference**2).sum())) / LEVELS)
        else:
            rows, columns = np.nonzero(np.rint(difference).any(axis=0))
            if norm is Norm.L0:
                found.append(float(len(rows)))
            else:
                side = max((int(np.ptp(axis)) + 1 for axis in (rows, columns) if len(axis)), default=0)
                found.append(side**2 / difference[0].size)
    return np.array(found)


def _levels(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) * (1 if image.dtype == np.uint8 else LEVELS)


def _refuse(
    where: str, adversarial: np.ndarray, clean: np.ndarray, outside: np.ndarray, pool: np.ndarray,
    own: np.ndarray | None, perturbation: Perturbation,
) -> None:  # fmt: skip
    """Say whether images outside the set belong to other clean images, or are simply too far away."""
    examined = np.flatnonzero(outside)[:_EXAMINED]
    own = np.arange(len(clean)) if own is None else own
    nearest = _nearest(adversarial[examined], pool, perturbation.norm)
    elsewhere = np.array([not np.array_equal(pool[a], pool[b]) for a, b in zip(nearest, own[examined], strict=True)])
    if 2 * elsewhere.sum() > len(examined):
        first = int(np.argmax(elsewhere))
        raise InputError(
            f"{where} is in another order than the clean images: {int(elsewhere.sum())} of {len(examined)} adversarial "
            f"images that were looked at are closer to another clean image than to their own; the first is image "
            f"{examined[first]}, which is closest to clean image {nearest[first]}, not {own[examined][first]}."
        )
    distances = _distances(adversarial[outside], clean[outside], perturbation.norm)
    largest = int(np.flatnonzero(outside)[distances.argmax()])
    raise InputError(
        f"{int(outside.sum())} of {len(clean)} adversarial images of {where} lie outside {perturbation}: the farthest "
        f"is image {largest}, by {_as_text(distances.max(), perturbation.norm)}; give images inside the "
        "set."
    )


def _as_text(distance: float, norm: Norm) -> str:
    if norm is Norm.LINF:
        return f"L∞ {round(distance * LEVELS)}/255"
    if norm is Norm.L0:
        return f"{distance:g} pixels"
    return f"L2 {distance:.4g}" if norm is Norm.L2 else f"a square of {100 * distance:.3g} % of the area"


def _nearest(images: np.ndarray, pool: np.ndarray, norm: Norm) -> np.ndarray:
    """The pool's closest image to each one: by the fewest changed values for pixels and patches, else by L2."""
    flat = images.reshape(len(images), -1)
    size = max(1, _CHUNK_VALUES // flat.shape[1])
    best, closest = np.full(len(flat), np.inf), np.zeros(len(flat), dtype=np.int64)
    for start in range(0, len(pool), size):
        part = pool[start : start + size].reshape(len(pool[start : start + size]), -1)
        if norm in (Norm.LINF, Norm.L2):
            floats, rows = part.astype(np.float32), flat.astype(np.float32)
            distance = (floats**2).sum(axis=1)[None] - 2 * rows @ floats.T + (rows**2).sum(axis=1)[:, None]
        else:
            distance = np.stack([(part != row).sum(axis=1) for row in flat]).astype(np.float32)
        found = distance.argmin(axis=1)
        nearer = distance[np.arange(len(flat)), found] < best
        best = np.where(nearer, distance[np.arange(len(flat)), found], best)
        closest = np.where(nearer, start + found, closest)
    return closest


def _places(images: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Where in the pool each image stands, byte for byte; -1 where it does not."""
    # Backwards, so that of equal images the first one counts.
    known = {_digest(pool[index]): index for index in reversed(range(len(pool)))}
    return np.array([known.get(_digest(image), -1) for image in images], dtype=np.int64)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()
