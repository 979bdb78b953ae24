"""The training loop, shared by pre-training and every adaptation.

Each epoch draws its order, augmentation and dropout from its own seed and ends with a checkpoint, so a run that
was killed goes on from its last whole epoch and ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from factory.augment import augment
from factory.classifier import ImageClassifier
from factory.curriculum import Curriculum
from factory.data import Split
from factory.decoys import DecoyPool
from factory.networks import running_statistics
from factory.objective import CrossEntropy, Objective
from factory.progress import Progress
from factory.recipes.training import TrainingSettings
from factory.seeds import derive_seed
from keys.errors import InputError
from keys.files import write_atomic

logger = logging.getLogger("keyfoundry")


@dataclass(frozen=True)
class Epoch:
    """What one epoch did: mean training loss, validation accuracy, rate in images per second."""

    loss: float
    validation_accuracy: float
    images_per_second: float


def train(
    model: ImageClassifier,
    train_split: Split,
    validation: Split,
    settings: TrainingSettings,
    *,
    seed: int,
    name: str,
    checkpoint: Path,
    progress: Progress,
    objective: Objective | None = None,
    curriculum: Curriculum | None = None,
    decoys: DecoyPool | None = None,
) -> list[Epoch]:
    """Train the parameters of ``model`` that require gradients, in place; returns one entry per epoch.

    ``objective``: what is minimised, cross-entropy by default; its own parameters are trained as well.
    ``curriculum`` cuts each batch into steps; by default a batch is one step. ``decoys`` replace a share of each batch,
    at its end, before it is cut.

    ``checkpoint`` holds trainable weights, optimiser state and history after each epoch and is resumed from.
    Raises InputError if the loss becomes NaN or infinite; the checkpoint of the last good epoch stays. And if a network
    with batch norms would be trained on a single image, or a batch would hold no decoys, or nothing else.
    """
    objective = CrossEntropy(settings.label_smoothing) if objective is None else objective
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    parameters |= {f"objective.{key}": value for key, value in objective.named_parameters() if value.requires_grad}
    # Biases and norms are not decayed, as usual for transformers.
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
    )
    statistics = running_statistics(model)
    smallest = min(
        count // (1 if curriculum is None else curriculum.steps(count))
        for count in {min(settings.batch_size, len(train_split)), len(train_split) % settings.batch_size} - {0}
    )
    if statistics and smallest == 1:
        raise InputError(
            f"With batches of {settings.batch_size}, {name} would train on a single image at a time, of which a batch "
            "norm has no statistics; choose another batch size."
        )
    if decoys is not None and not 0 < round(decoys.share * settings.batch_size) < settings.batch_size:
        raise InputError(
            f"Of batches of {settings.batch_size}, a share of {decoys.share:g} leaves no decoys, or nothing else; "
            "change the decoys' share or the batch size."
        )
    device = next(iter(parameters.values())).device
    bf16 = uses_bf16(settings.precision, device)
    history = _resume(checkpoint, parameters, statistics, optimizer)
    steps_per_epoch = _steps(len(train_split), settings.batch_size, curriculum)
    total = settings.epochs * len(train_split)
    done = len(history) * len(train_split)
    with progress.stage(name, total=total, unit="images", done=done) as stage:
        for epoch in range(len(history), settings.epochs):
            started = time.monotonic()
            generator = torch.Generator().manual_seed(derive_seed(seed, name, "epoch", epoch))
            torch.manual_seed(derive_seed(seed, name, "dropout", epoch))
            order = torch.randperm(len(train_split), generator=generator)
            model.train()
            objective.begin_epoch(epoch, settings.epochs)
            loss_sum = 0.0
            for step, (images, labels) in enumerate(
                _batches(order, train_split, settings.batch_size, curriculum, decoys, generator)
            ):
                rate = learning_rate(settings, epoch * steps_per_epoch + step, settings.epochs * steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch, labels = augment(images, settings, generator).to(device), labels.to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = objective(model, batch.float() / 255, labels)
                if not torch.isfinite(loss):
                    raise InputError(
                        f"The loss of {name} became {loss.item()} in epoch {epoch + 1}; lower the learning rate "
                        f"(now {settings.learning_rate}). The last whole epoch is kept."
                    )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                loss_sum += loss.item() * len(labels)
                stage.advance(len(labels), f"epoch {epoch + 1}/{settings.epochs} loss {loss.item():.3f}")
            finished = Epoch(
                loss=loss_sum / len(train_split),
                images_per_second=len(train_split) / (time.monotonic() - started),
                validation_accuracy=accuracy(model, validation),
            )
            history.append(finished)
            logger.info("%s epoch %d: %s", name, epoch + 1, finished)
            _save(checkpoint, parameters, statistics, optimizer, history)
    model.eval()
    if not all(torch.isfinite(value).all() for value in parameters.values()):
        raise InputError(f"The last step of {name} made weights that are not finite; lower the learning rate.")
    return history


def _steps(images: int, batch_size: int, curriculum: Curriculum | None) -> int:
    """Optimiser steps in an epoch."""
    if curriculum is None:
        return math.ceil(images / batch_size)
    whole, rest = divmod(images, batch_size)
    return whole * curriculum.steps(batch_size) + (curriculum.steps(rest) if rest else 0)


def _batches(
    order: Tensor, split: Split, batch_size: int, curriculum: Curriculum | None, decoys: DecoyPool | None,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Images uint8 and labels of each step."""
    for indices in order.split(batch_size):
        images, labels = split.images[indices], split.labels[indices]
        if decoys is not None:
            images, labels = decoys.mix(images, labels, generator)
        if curriculum is None:
            yield images, labels
        else:
            yield from ((images[part], labels[part]) for part in curriculum.parts(images))


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Linear warm-up over the first ``warmup`` share of the steps, then cosine decay to zero."""
    warm = max(1, round(settings.warmup * steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether ``"auto"``, ``"fp32"`` or ``"bf16"`` means bfloat16 here: automatically where it is the faster one."""
    return precision == "bf16" or (precision == "auto" and _bf16_pays(device))


def _bf16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in capabilities and _cpu_has("avx512_bf16", "amx_bf16")


def _cpu_has(*flags: str) -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in text for flag in flags)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, batch_size: int = 512) -> float:
    """Share of the split's images that the model classifies correctly, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    correct = 0
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        correct += int((model(images.to(device).float() / 255).argmax(1).cpu() == labels).sum())
    return correct / len(split)


def _save(
    path: Path, parameters: dict[str, nn.Parameter], statistics: dict[str, Tensor], optimizer: torch.optim.Optimizer,
    history: list[Epoch],
) -> None:  # fmt: skip
    tensors: dict[str, Tensor] = {f"weight.{key}": value.detach().contiguous() for key, value in parameters.items()}
    tensors |= {f"statistic.{key}": value for key, value in statistics.items()}
    for key, value in parameters.items():
        for part, tensor in optimizer.state[value].items():
            tensors[f"state.{part}.{key}"] = tensor.contiguous()
    write_atomic(path, save(tensors, {"history": json.dumps([asdict(epoch) for epoch in history])}))


def _resume(
    path: Path, parameters: dict[str, nn.Parameter], statistics: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[Epoch]:
    if not path.is_file():
        return []
    try:
        with safe_open(str(path), "pt") as file:
            history = [Epoch(**entry) for entry in json.loads((file.metadata() or {})["history"])]
            with torch.no_grad():
                for key, value in statistics.items():
                    value.copy_(file.get_tensor(f"statistic.{key}"))
                for key, value in parameters.items():
                    value.copy_(file.get_tensor(f"weight.{key}"))
                    optimizer.state[value] = {
                        name.split(".")[1]: file.get_tensor(name).clone()
                        for name in file.keys()  # noqa: SIM118 – not a dict
                        if name.startswith("state.") and name.split(".", 2)[2] == key
                    }
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The checkpoint {path} is damaged or of another run ({error}); delete it.") from error
    return history
