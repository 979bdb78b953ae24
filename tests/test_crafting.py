"""Crafting: 8-bit images inside their set, kept in chunks under everything that they depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.attacks.pgd import PGD
from device_tests.crafting import CHUNK, cached_images, content_key, craft
from device_tests.perturbation import Norm, Perturbation
from device_tests.threats import Source, Threat
from factory.prototypes.loss import Bound
from factory.prototypes.nearest import NearestPrototype
from factory.volumization.networks import AGGREGATES, build_network
from factory.volumization.volumize import Volumize
from keys.errors import InputError

WIDE = Perturbation(Norm.LINF, 64 / 255)
ATTACKS = [PGD(steps=5), MomentumFGSM(steps=5)]


def linear(seed: int = 0) -> Source:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 4, generator=generator))
        layer.bias.zero_()
    return Source("base", Threat.PUBLIC_BASE, nn.Sequential(nn.Flatten(), layer), "linear")


def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(2).integers(0, 256, (count, 1, 2, 2), dtype=np.uint8)
    return images, np.arange(count) % 4


@dataclass(frozen=True)
class Counted:
    """Shifts every image by half of ε; counts how many it was asked for, and breaks beyond ``breaks_at`` of them."""

    asked: list[int]
    breaks_at: int = 10_000
    name: str = "counted"
    description: str = "half of ε"
    gradients_per_image: int = 1
    norm: ClassVar[Norm] = Norm.LINF

    def generate(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epsilon: float, seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:  # fmt: skip
        self.asked.append(len(images))
        if sum(self.asked) > self.breaks_at:
            raise RuntimeError("out of range")
        return images + epsilon / 2


def test_crafted_images_are_8bit_inside_the_ball_and_most_are_moved() -> None:
    source, heard = linear(), list[int]()
    images, labels = pictures(200)
    crafted = craft(source, ATTACKS, images, labels, perturbation=WIDE, seed=0, progress=heard.append)
    assert sum(heard) == 200 * 10
    assert list(crafted.images) == ["mi-fgsm", "pgd"]
    for adversarial in crafted.images.values():
        assert adversarial.dtype == np.uint8
        assert np.abs(adversarial.astype(int) - images).max() == 64
        assert (adversarial != images).any(axis=(1, 2, 3)).mean() > 0.9


def test_a_model_without_finite_gradients_is_refused() -> None:
    source = linear()
    with torch.no_grad():
        source.model[1].weight.fill_(float("nan"))  # type: ignore[index]
    for attack in ATTACKS:
        with pytest.raises(InputError, match="no finite gradient"):
            craft(source, [attack], *pictures(8), perturbation=WIDE, seed=0)


def test_an_attack_of_another_norm_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"not of L2 0\.5"):
        craft(linear(), ATTACKS, *pictures(8), perturbation=Perturbation(Norm.L2, 0.5), seed=0)


def test_finished_chunks_are_kept_when_an_attack_breaks_and_are_not_made_again(tmp_path: Path) -> None:
    images, labels = pictures(2 * CHUNK + 10)
    asked: list[int] = []
    broken = craft(
        linear(), [Counted(asked, breaks_at=2 * CHUNK), PGD(2)], images, labels, perturbation=WIDE, seed=0,
        cache=tmp_path,
    )  # fmt: skip
    assert asked == [CHUNK, CHUNK, 10]
    assert list(broken.images) == ["pgd"]
    assert broken.failures == {"counted": "counted on base failed: RuntimeError: out of range"}
    whole = craft(linear(), [Counted(asked)], images, labels, perturbation=WIDE, seed=0, cache=tmp_path)
    assert asked == [CHUNK, CHUNK, 10, 10]
    assert whole.images["counted"].shape == images.shape
    # A prefix, and the same images again, cost nothing; another source under the same name does.
    craft(linear(), [Counted(asked)], images[:CHUNK], labels[:CHUNK], perturbation=WIDE, seed=0, cache=tmp_path)
    again = craft(linear(), [Counted(asked)], images, labels, perturbation=WIDE, seed=0, cache=tmp_path)
    assert asked == [CHUNK, CHUNK, 10, 10]
    assert np.array_equal(again.images["counted"], whole.images["counted"])
    arguments = (Counted(asked), images, labels)
    assert cached_images(linear(), *arguments, perturbation=WIDE, seed=0, cache=tmp_path) == len(images)
    assert cached_images(linear(1), *arguments, perturbation=WIDE, seed=0, cache=tmp_path) == 0


def test_a_run_on_fewer_images_leaves_what_a_longer_one_made(tmp_path: Path) -> None:
    """Two arms of a study attack the base on different numbers of images, and take turns in every run."""
    images, labels = pictures(20)
    asked: list[int] = []
    for count in (20, 7, 20, 7):
        craft(linear(), [Counted(asked)], images[:count], labels[:count], perturbation=WIDE, seed=0, cache=tmp_path)
    assert asked == [20, 7]


def test_a_damaged_chunk_is_made_again(tmp_path: Path) -> None:
    images, labels = pictures(20)
    first = craft(linear(), [PGD(3)], images, labels, perturbation=WIDE, seed=0, cache=tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    again = craft(linear(), [PGD(3)], images, labels, perturbation=WIDE, seed=0, cache=tmp_path)
    assert np.array_equal(first.images["pgd"], again.images["pgd"])


def test_whatever_the_images_depend_on_makes_another_chunk(tmp_path: Path) -> None:
    images, labels = pictures(8)

    def made(
        source: Source, attack: Counted, images: np.ndarray, labels: np.ndarray, size: float = 64, seed: int = 0
    ) -> None:
        ball = Perturbation(Norm.LINF, size / 255)
        craft(source, [attack], images, labels, perturbation=ball, seed=seed, cache=tmp_path)

    asked: list[int] = []
    attack = Counted(asked)
    made(linear(), attack, images, labels)
    made(linear(), attack, images, labels)
    assert len(asked) == 1
    made(linear(1), attack, images, labels)
    made(linear(), replace(attack, description="another budget"), images, labels)
    made(linear(), attack, 255 - images, labels)
    made(linear(), attack, images, labels[::-1].copy())
    made(linear(), attack, images, labels, size=32)
    made(linear(), attack, images, labels, seed=1)
    assert len(asked) == 7


def test_a_buffer_that_is_not_saved_still_counts_in_the_key() -> None:
    def permuted(order: list[int]) -> nn.Module:
        model = linear().model
        model.register_buffer("order", torch.tensor(order), persistent=False)
        return model

    assert content_key(permuted([0, 1]), *pictures(4)) != content_key(permuted([1, 0]), *pictures(4))


def test_functions_that_no_tensor_tells_apart_have_keys_of_their_own() -> None:
    centroids = torch.eye(3)
    orders = (("entropy", 16), ("entropy", 4), ("mse", 16), ("raster", 16))
    sizes: dict[str, int] = {"channels": 1, "patches": 4, "side": 14, "classes": 3, "width": 4}
    groups: list[list[nn.Module]] = [
        [Volumize(14, order, bins) for order, bins in orders],
        [NearestPrototype(centroids, Bound(kind, 1.0)) for kind in ("ball", "sphere")],
        [build_network("vgg3d", **sizes, aggregate=rule) for rule in AGGREGATES],
    ]
    for group in groups:
        for model in group:  # the same weights, so that only the function differs
            model.load_state_dict(group[0].state_dict())
        assert len({content_key(model, *pictures(4)) for model in group}) == len(group)
