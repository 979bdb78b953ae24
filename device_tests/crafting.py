"""Adversarial images: made on one source by every attack, rounded to 8 bits, and kept under what they depend on.

Rules: an attack's images are stored in chunks, each under a digest of the source's weights, the clean images, the
attack's whole budget, the perturbation and the seed; a run that was interrupted goes on with the next chunk, one more
image extends what is there, and anything else that changed is attacked anew. An attack that breaks leaves a failure
with its reason, never a hole that looks like resistance.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from device_tests.attacks.attack import Attack, Progress
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from device_tests.threats import Source, Threat
from keys.errors import KeyfoundryError
from keys.files import write_atomic

CHUNK = 128
"""Images attacked and stored at a time."""

_FORMAT = "1"
_log = logging.getLogger("keyfoundry")


@dataclass(frozen=True, eq=False)
class AdversarialSet:
    """What the attacks proposed on one source: attack name → uint8 images N×C×H×W, in the clean images' order.

    Every image lies within ``perturbation`` of its clean image. ``failures``: attack name → why it gave nothing.
    ``differentiable``: the source gives gradients, so that its attacks can be compared with a strong one.
    """

    source: str
    threat: Threat
    perturbation: Perturbation
    images: Mapping[str, np.ndarray]
    failures: Mapping[str, str] = field(default_factory=dict[str, str])
    differentiable: bool = True

    @property
    def needs_self_check(self) -> bool:
        """Whether a strong attack must vouch for these: wherever there are gradients in a ball.

        Of what only answers, the answers are the success; single pixels and patches have no strong reference attack,
        and the grey patch is their control.
        """
        return self.differentiable and self.perturbation.norm in (Norm.LINF, Norm.L2)


def content_key(model: nn.Module, images: np.ndarray, labels: np.ndarray, *settings: object) -> str:
    """SHA-256 (64 hex digits) over a model, 8-bit images, their labels, and settings by their text.

    The model counts by its printed structure and by every parameter and buffer, saved or not; a model whose
    function depends on anything else (a plain attribute) must register it as a buffer.
    """
    digest = hashlib.sha256(repr([str(setting) for setting in settings]).encode())
    digest.update(str(model).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for array in (images, labels.astype(np.int64)):
        digest.update(f"\0{array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def craft(
    source: Source,
    attacks: Sequence[Attack],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    perturbation: Perturbation,
    seed: int,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> AdversarialSet:
    """Run every attack on the source and round what it proposes to 8 bits, inside the perturbation set.

    ``images``: uint8 N×C×H×W; ``labels``: integers N; ``cache``: folder that holds this source's chunks.
    ``progress`` hears of the gradients (or, for attacks without, of the queries) as they are computed, cached ones at
    once: len(images) · Σ ``gradients_per_image`` for attacks that do not end early. Raises :class:`InputError` if a
    source's values are not finite, ``ValueError`` if an attack is of another norm or two have one name; any other
    fault of an attack becomes a failure.
    """
    if len({attack.name for attack in attacks}) < len(attacks):
        raise ValueError(f"two attacks have one name: {sorted(attack.name for attack in attacks)}")
    proposed: dict[str, np.ndarray] = {}
    failures: dict[str, str] = {}
    for attack in sorted(attacks, key=lambda attack: attack.name):
        if attack.norm is not perturbation.norm:
            raise ValueError(f"{attack.name} is an attack of {attack.norm.value}, not of {perturbation}")
        try:
            chunks = [
                _chunk(source, attack, images[part], labels[part], perturbation, seed, cache, part.start, progress)
                for part in _chunks(len(images))
            ]
        except KeyfoundryError:
            raise
        except Exception as error:  # noqa: BLE001 – an attack may be anyone's code and raise anything
            _log.exception("%s on %s failed", attack.name, source.id)
            failures[attack.name] = f"{attack.name} on {source.id} failed: {type(error).__name__}: {error}"
            continue
        proposed[attack.name] = np.concatenate(chunks)
    return AdversarialSet(source.id, source.threat, perturbation, proposed, failures, source.differentiable)


def cached_images(
    source: Source, attack: Attack, images: np.ndarray, labels: np.ndarray, *, perturbation: Perturbation, seed: int,
    cache: Path,
) -> int:  # fmt: skip
    """How many of the images need not be attacked again."""
    done = 0
    for part in _chunks(len(images)):
        path, key = _place(source, attack, images[part], labels[part], perturbation, seed, cache, part.start)
        done += len(images[part]) if _read(path, key, images[part].shape) is not None else 0
    return done


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def _place(
    source: Source, attack: Attack, images: np.ndarray, labels: np.ndarray, perturbation: Perturbation, seed: int,
    cache: Path, start: int,
) -> tuple[Path, str]:  # fmt: skip
    identity = ("adversarial", _FORMAT, attack.name, attack.description, perturbation.code, seed)
    folder = f"{attack.name}-{perturbation.code.replace(':', '-')}"
    # How many in the name: a run on fewer images, which ends inside a chunk, must not take the place of the whole one.
    path = cache / folder / f"{start:06d}-{len(images)}.safetensors"
    return path, content_key(source.model, images, labels, *identity)


def _chunk(
    source: Source, attack: Attack, images: np.ndarray, labels: np.ndarray, perturbation: Perturbation, seed: int,
    cache: Path | None, start: int, progress: Progress | None,
) -> np.ndarray:  # fmt: skip
    path, key = Path(), ""
    if cache is not None:
        path, key = _place(source, attack, images, labels, perturbation, seed, cache, start)
        stored = _read(path, key, images.shape)
        if stored is not None:
            if progress is not None:
                progress(len(images) * attack.gradients_per_image)
            return stored
    device = next((tensor.device for tensor in source.model.parameters()), torch.device("cpu"))
    clean = torch.from_numpy(from_8bit(images)).to(device)
    truth = torch.from_numpy(labels.astype(np.int64)).to(device)
    # The same seed for every chunk: a universal patch, drawn from it, must be one patch.
    candidates = attack.generate(source.model, clean, truth, epsilon=perturbation.radius, seed=seed, progress=progress)
    made = perturbation.to_8bit(candidates.detach().cpu().numpy(), images)
    if cache is not None:
        write_atomic(path, save({"images": made}, metadata={"key": key}))
    return made


def _read(path: Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The stored chunk if it has this key; ``None`` if there is none, it is damaged, or of another key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return None
            images: np.ndarray = stored.get_tensor("images")
    except (SafetensorError, OSError):
        return None
    return images if images.dtype == np.uint8 and images.shape == shape else None
