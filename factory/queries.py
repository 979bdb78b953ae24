"""T4: attacks that only ask the target – its exported package, by labels or scores – and what they learn from it.

Square and HopSkipJump look for an adversarial image with the answers; the parametric bypass fits a differentiable
stand-in for the keyed stage to the answers and attacks that. Stated in every report, never counted by the rule: keys
do not hide what a model answers.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from device_tests.attacks.answers import AnsweringModel
from device_tests.attacks.attack import Attack
from device_tests.attacks.bypass import BATCH, BlockMap, StandIn, fit_bypass
from device_tests.attacks.hop_skip_jump import HopSkipJump
from device_tests.attacks.square import Square
from device_tests.crafting import content_key
from device_tests.perturbation import Norm
from device_tests.threats import Source, Threat
from exporters.runtime import Runtime
from factory.progress import Progress
from factory.settings import VerificationSettings
from keys.files import write_atomic

EPOCHS = 4
"""How often the stand-in sees each of the attacker's images."""


def asked_target(name: str, runtime: Runtime, digest: str) -> Source:
    """The target as something that answers; ``digest``: of the model file that does."""
    return Source(
        f"queries-{name}", Threat.QUERIES, AnsweringModel(runtime, digest), f"the answers of {name}", (name,),
        differentiable=False,
    )  # fmt: skip


def query_attacks(settings: VerificationSettings) -> tuple[Attack, ...]:
    """The attacks that need nothing but answers."""
    norm, queries = Norm.LINF, settings.queries
    return (Square(norm=norm, queries=queries), HopSkipJump(norm=norm, queries=queries))


def bypass_source(
    name: str,
    base: nn.Module,
    runtime: Runtime,
    images: np.ndarray,
    *,
    digest: str,
    block_size: int,
    seed: int,
    cache: Path,
    progress: Progress,
) -> Source:
    """A stand-in for the target, fitted to its scores on the attacker's ``images`` (uint8, not the judged ones).

    What was fitted before to the same answers is read from ``cache``.
    """
    steps = EPOCHS * len(images) // BATCH
    key = content_key(base, images, np.zeros(len(images)), "bypass", digest, block_size, steps, seed)
    path = cache / f"bypass-{name}" / "stand-in.safetensors"
    stored = _read(path, key, base, block_size)
    if stored is None:
        with progress.stage(f"fit a stand-in for {name}", total=steps * BATCH, unit="gradients") as stage:
            fitted = fit_bypass(
                base, runtime, images, block_size=block_size, kind=StandIn.DISTILLED, scores=True, steps=steps,
                seed=seed, progress=stage.advance,
            )  # fmt: skip
        words = f"{fitted.description}; the target's label on {fitted.agreement.value:.3f} of {fitted.agreement.n}"
        weights = {name: tensor.contiguous() for name, tensor in fitted.module.state_dict().items()}
        write_atomic(path, save(weights, {"key": key, "description": json.dumps(words)}))
        stored = (fitted.module, words)
    module, words = stored
    return Source(f"bypass-{name}", Threat.QUERIES, module, f"a learned stand-in for {name}: {words}", (name,))


def _read(path: Path, key: str, base: nn.Module, block_size: int) -> tuple[nn.Module, str] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            weights: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _rebuilt(weights, base, block_size), json.loads(metadata["description"])
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None


def _rebuilt(weights: dict[str, torch.Tensor], base: nn.Module, block_size: int) -> nn.Module:
    first = BlockMap(weights["0.matrix"], weights["0.shift"], block_size)
    module = nn.Sequential(first, copy.deepcopy(base))
    module.load_state_dict(weights)
    return module.eval()
