"""The decision trajectory: reconstructions of images as their priors learn them, and what a classifier says of each.

Rules: the optimisation never sees the classifier, so a trajectory can be judged by any number of them. A run that is
killed goes on from its checkpoint, and ends in the same bits as one that was not. An image whose optimisation diverges
is named with its step and its reason; the others go on, as no value passes from one image's network to another's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from factory.purifier.prior_network import PriorShape, first_code, first_weights, render
from factory.purifier.settings import PurifierSettings
from keys.errors import InputError
from keys.files import write_atomic

Classifier = Callable[[Tensor], Tensor]
"""Images float32 N×C×H×W in [0, 1] → logits N×K; no gradient is ever asked of it."""

Advance = Callable[[int], None]
"""Called with the number of steps just done, summed over images."""

CHECKPOINT_EVERY = 100
"""Steps between checkpoints: seconds of work."""

_FORMAT = "1"
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_SMALLEST_LIMIT = 0.02  # squared error: a flat image, or one near the untrained network's grey, has none to lose


@dataclass(frozen=True, eq=False)
class Reconstructions:
    """What the priors of B images drew at K kept steps.

    ``steps``: K step numbers from 1; ``images``: float32 K×B×C×H×W in [0, 1]; ``errors``: float32 K×B, the mean squared
    error of each against its image. ``diverged``: index of an image → why its reconstructions are of no use, a clause.
    """

    steps: tuple[int, ...]
    images: Tensor
    errors: Tensor
    diverged: Mapping[int, str]

    @property
    def fidelity(self) -> Tensor:
        """PSNR in dB of each reconstruction against the image that was given, K×B."""
        return -10 * torch.log10(self.errors.clamp(min=1e-12))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Reconstructions, and the logits of a classifier: float32 K×B×classes."""

    reconstructions: Reconstructions
    logits: Tensor

    @property
    def labels(self) -> Tensor:
        """The class of each reconstruction, int64 K×B."""
        return self.logits.argmax(dim=2)


def reconstruct(
    images: Tensor,
    settings: PurifierSettings,
    *,
    seeds: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    advance: Advance | None = None,
) -> Reconstructions:
    """Optimise one untrained network to each image (float32 B×C×H×W in [0, 1]), all at once.

    ``seeds``: one per image, for its code and first weights; default: the settings' for all. ``checkpoint``: a file
    that is written every :data:`CHECKPOINT_EVERY` steps and read first; one of other images or settings is ignored.
    The same images in the same batch give the same bits; in another batch sums may be rounded in another order.
    Raises :class:`InputError` for images of an unusable size and StorageError if the checkpoint cannot be written.
    """
    shape = PriorShape(images.shape[1], images.shape[2], images.shape[3], settings.width, settings.scales)
    seeds = [settings.seed] * len(images) if seeds is None else list(seeds)
    if len(seeds) != len(images):
        raise ValueError(f"{len(seeds)} seeds for {len(images)} images")
    codes = torch.stack([first_code(shape, seed) for seed in seeds])
    key = _key(images, settings, seeds)
    kept = set(settings.kept_steps)
    state = _State.read(checkpoint, key) if checkpoint is not None else None
    if state is None:
        state = _State.fresh(torch.stack([first_weights(shape, seed) for seed in seeds]))
    elif advance is not None:
        advance(state.step * len(images))
    while state.step < settings.steps:
        state.descend(shape, codes, images, settings.learning_rate)
        if state.step in kept:
            with torch.no_grad():
                state.keep(render(shape, state.weights, codes), images)
        if advance is not None:
            advance(len(images))
        if checkpoint is not None and (state.step % CHECKPOINT_EVERY == 0 or state.step == settings.steps):
            state.write(checkpoint, key)
    found, errors = torch.stack(state.images), torch.stack(state.errors)
    return Reconstructions(settings.kept_steps, found, errors, _diverged(settings, errors, images, state.start))


def judged(reconstructions: Reconstructions, classifier: Classifier) -> Trajectory:
    """What the classifier says of every reconstruction; K·B queries. One that diverged has logits of not a number.

    Raises :class:`InputError` if what the classifier gives is not logits of N × classes.
    """
    steps, count = reconstructions.images.shape[:2]
    usable = [index for index in range(count) if index not in reconstructions.diverged]
    if not usable:
        return Trajectory(reconstructions, torch.full((steps, count, 1), torch.nan))
    found = classify(classifier, reconstructions.images[:, usable].flatten(0, 1))
    logits = torch.full((steps, count, found.shape[1]), torch.nan)
    logits[:, usable] = found.view(steps, len(usable), -1)
    return Trajectory(reconstructions, logits)


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor) -> Tensor:
    """Logits float32 N×K outside any graph; raises :class:`InputError` if they are of another form or not finite."""
    logits = classifier(images)
    if logits.ndim != 2 or len(logits) != len(images):
        raise InputError(
            f"The classifier gave {tuple(logits.shape)} for {len(images)} images; give logits, images × classes."
        )
    if not torch.isfinite(logits).all():
        raise InputError("The classifier gave logits that are not finite; check its weights.")
    return logits.detach().float()


class _State:
    """Weights, Adam's two moments and what was kept, all of B images; ``start``: their first errors."""

    def __init__(
        self, step: int, tensors: Mapping[str, Tensor], images: list[Tensor], errors: list[Tensor], start: Tensor | None
    ) -> None:
        self.step, self.images, self.errors, self.start = step, images, errors, start
        self.weights, self.first, self.second = tensors["weights"], tensors["first"], tensors["second"]

    @classmethod
    def fresh(cls, weights: Tensor) -> _State:
        zero = torch.zeros_like(weights)
        return cls(0, {"weights": weights, "first": zero, "second": zero.clone()}, [], [], None)

    def descend(self, shape: PriorShape, codes: Tensor, images: Tensor, rate: float) -> None:
        """One step of Adam (Kingma and Ba, algorithm 1) on every image's mean squared error."""
        with torch.enable_grad():
            leaf = self.weights.detach().requires_grad_(True)
            loss = (render(shape, leaf, codes) - images).square().mean(dim=(1, 2, 3))
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        self.step += 1
        if self.start is None:
            self.start = loss.detach()
        self.first.lerp_(gradient, 1 - _BETAS[0])
        self.second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        spread = (self.second / (1 - _BETAS[1] ** self.step)).sqrt_().add_(_EPSILON)
        self.weights = leaf.detach().addcdiv(self.first, spread, value=-rate / (1 - _BETAS[0] ** self.step))

    def keep(self, drawn: Tensor, images: Tensor) -> None:
        self.images.append(drawn)
        self.errors.append((drawn - images).square().mean(dim=(1, 2, 3)))

    def write(self, path: Path, key: str) -> None:
        tensors = {"weights": self.weights, "first": self.first, "second": self.second}
        if self.start is not None:
            tensors["start"] = self.start
        if self.images:
            tensors |= {"images": torch.stack(self.images), "errors": torch.stack(self.errors)}
        write_atomic(path, save(tensors, {"key": key, "step": str(self.step)}))

    @classmethod
    def read(cls, path: Path, key: str) -> _State | None:
        """The state in ``path``; None if there is none, it is damaged, or of other images or settings."""
        with contextlib.suppress(SafetensorError, OSError, ValueError, KeyError):
            with safe_open(str(path), "pt") as stored:
                metadata = stored.metadata() or {}
                if metadata["key"] != key:
                    return None
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 – not a dict
            kept = [list(tensors[name].unbind()) if name in tensors else [] for name in ("images", "errors")]
            return cls(int(metadata["step"]), tensors, kept[0], kept[1], tensors.get("start"))
        return None


def _diverged(settings: PurifierSettings, errors: Tensor, images: Tensor, start: Tensor | None) -> dict[int, str]:
    """Images whose error is no number, or ends above that of a flat picture and does not fall."""
    found: dict[int, str] = {}
    for index in range(errors.shape[1]):
        own = errors[:, index]
        broken = (~torch.isfinite(own)).nonzero()
        if len(broken):
            found[index] = f"its error is no finite number at step {settings.kept_steps[int(broken[0])]}"
        elif start is not None:
            first, flat = float(start[index]), float(images[index].var(dim=(1, 2)).mean())
            last = float(own[-max(1, len(own) // 4) :].mean())
            # A short run may not be there yet; one that has lost its way does not come nearer any more.
            stuck = len(own) > 1 and abs(float(own[-1] - own[-2])) < 1e-3 * last
            if last > max(min(first, flat), _SMALLEST_LIMIT) and (last > first / 2 or stuck):
                found[index] = (
                    f"its mean squared error went from {first:.3g} to {last:.3g}, and a flat picture has {flat:.3g}"
                )
    return found


def _key(images: Tensor, settings: PurifierSettings, seeds: Sequence[int]) -> str:
    """Everything that the reconstructions depend on."""
    prior = [settings.steps, settings.learning_rate, settings.width, settings.scales, settings.every]
    digest = hashlib.sha256(json.dumps([_FORMAT, prior, list(seeds), list(images.shape)]).encode())
    digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()
