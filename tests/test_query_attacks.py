"""Attacks by queries, and foolbox's attacks, on a trained model, and on a package that only answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.accuracy import predict
from device_tests.attacks.answers import AnsweringModel, Queries, margins
from device_tests.attacks.attack import Attack
from device_tests.attacks.foolbox_attack import FoolboxAttack, carlini_wagner, ddn, fast_minimum_l0
from device_tests.attacks.hop_skip_jump import HopSkipJump
from device_tests.attacks.square import Square
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from exporters.run_onnx import OnnxRuntime
from keys.errors import InputError

SIZES = {
    Norm.LINF: Perturbation(Norm.LINF, 80 / 255),
    Norm.L2: Perturbation(Norm.L2, 5.0),
    Norm.L0: Perturbation(Norm.L0, 16),
}
QUERY_ATTACKS: list[Attack] = [
    Square(queries=60), Square(Norm.L2, queries=60), HopSkipJump(queries=300, first_estimate=40),
    HopSkipJump(Norm.LINF, queries=300, first_estimate=40),
]  # fmt: skip
FOOLBOX_ATTACKS: list[Attack] = [carlini_wagner(steps=20, searches=2), ddn(steps=20), fast_minimum_l0(steps=30)]
query_attacks = pytest.mark.parametrize("attack", QUERY_ATTACKS, ids=lambda attack: attack.name)
foolbox_attacks = pytest.mark.parametrize("attack", FOOLBOX_ATTACKS, ids=lambda attack: attack.name)


class Counting(nn.Module):
    """A model that counts the images it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.asked += len(images)
        return self.model(images)


class LabelOnly(nn.Module):
    """A model that tells its label and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.model(images)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()


@pytest.fixture(scope="module")
def model(sample_images: tuple[np.ndarray, np.ndarray]) -> nn.Module:
    """A convolutional network on 2,000 real images, quick even when asked about one image at a time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 6, stride=2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(288, 10)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        x, labels = floats(sample_images[0][:2000, None]), torch.from_numpy(sample_images[1][:2000].astype(np.int64))
        for step in range(120):
            part = slice(50 * (step % 40), 50 * (step % 40) + 50)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), labels[part]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def onnx_runtime(device_package: Path) -> OnnxRuntime:
    """A linear model of 8×8 grey images and three classes, in onnxruntime."""
    return OnnxRuntime(device_package / "model.onnx", threads=1)


@pytest.fixture(scope="module")
def images(model: nn.Module, sample_images: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, torch.Tensor]:
    """The first ten test images that the model gets right: uint8, and their labels."""
    clean, labels = sample_images[0][2000:2100, None], sample_images[1][2000:2100].astype(np.int64)
    with torch.no_grad():
        right = model(floats(clean)).argmax(1).numpy() == labels
    return clean[right][:10], torch.from_numpy(labels[right][:10])


def floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(from_8bit(images))


def made(
    attack: Attack, model: nn.Module, images: tuple[np.ndarray, torch.Tensor], seed: int = 3,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, np.ndarray]:  # fmt: skip
    """An attack's candidates, and the 8-bit images that are judged."""
    size = SIZES[attack.norm]
    clean, labels = images
    candidates = attack.generate(model, floats(clean), labels, epsilon=size.radius, seed=seed, progress=progress)
    return candidates, size.to_8bit(candidates.numpy(), clean)


@query_attacks
def test_query_attacks_stay_in_their_set_count_every_query_and_fool(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], attack: Attack
) -> None:
    counting, heard = Counting(model), [0]

    def progress(asked: int) -> None:
        heard[0] += asked

    candidates, judged = made(attack, counting, images, progress=progress)
    clean, labels = images
    assert candidates.min() >= 0
    assert candidates.max() <= 1
    assert SIZES[attack.norm].contains(judged, clean).all()
    assert np.abs(judged / 255 - candidates.numpy()).max() <= 0.5 / 255 + 1e-6
    assert heard[0] == counting.asked <= attack.gradients_per_image * len(clean)
    with torch.no_grad():
        assert (model(floats(judged)).argmax(1) != labels).sum() >= 3


@query_attacks
def test_the_seed_alone_decides(model: nn.Module, images: tuple[np.ndarray, torch.Tensor], attack: Attack) -> None:
    images = (images[0][:4], images[1][:4])
    first, _ = made(attack, model, images)
    state = torch.random.get_rng_state()
    torch.rand(3)
    moved = torch.random.get_rng_state()
    again, _ = made(attack, model, images)
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), moved)
    assert not torch.equal(state, moved)
    assert not torch.equal(first, made(attack, model, images, seed=4)[0])


@query_attacks
def test_one_image_never_gets_more_than_the_budget(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], attack: Attack
) -> None:
    for index in range(2):
        counting = Counting(model)
        made(attack, counting, (images[0][index : index + 1], images[1][index : index + 1]))
        assert counting.asked <= attack.gradients_per_image


@query_attacks
def test_query_attacks_run_on_a_package_that_only_answers(onnx_runtime: OnnxRuntime, attack: Attack) -> None:
    clean = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)
    labels = predict(onnx_runtime, clean)
    _, judged = made(attack, AnsweringModel(onnx_runtime, "0" * 64), (clean, torch.from_numpy(labels)))
    assert (predict(onnx_runtime, judged) != labels).sum() >= 3


def test_a_runtime_answers_as_a_model(onnx_runtime: OnnxRuntime) -> None:
    answering = AnsweringModel(onnx_runtime, "ab12")
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = answering(x.requires_grad_(True))
    assert not logits.requires_grad
    assert np.array_equal(logits.numpy(), onnx_runtime.logits(x.detach().numpy()))
    # A cache tells two targets apart by what is printed.
    assert str(answering) != str(AnsweringModel(onnx_runtime, "cd34"))


def test_queries_count_images_and_none_for_none(model: nn.Module, images: tuple[np.ndarray, torch.Tensor]) -> None:
    queries = Queries(model)
    x = floats(images[0])
    assert queries.logits(x).shape == (10, 10)
    assert queries.logits(x[:0]).shape == (0, 10)
    # What is asked in 8 bits is what a device would be given.
    assert torch.equal(queries.logits_of_8bit(x + 0.4 / 255), queries.logits(x))
    assert queries.asked == 30


def test_a_margin_is_negative_where_the_model_is_wrong() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 3.0]])
    assert margins(logits, torch.tensor([0, 2])).tolist() == [1.0, -1.0]


def test_hop_skip_jump_needs_labels_only_and_proposes_what_fooled(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor]
) -> None:
    attack = HopSkipJump(queries=100, first_estimate=20)
    _, judged = made(attack, LabelOnly(model), images)
    moved = (judged != images[0]).any(axis=(1, 2, 3))
    with torch.no_grad():
        fooled = (model(floats(judged)).argmax(1) != images[1]).numpy()
    assert (moved == fooled).all()
    some = (images[0][:2], images[1][:2])
    assert torch.equal(made(attack, LabelOnly(model), some)[0], made(attack, model, some)[0])


def test_hop_skip_jump_goes_on_to_the_smallest_distance_if_asked(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor]
) -> None:
    x, labels, everything = floats(images[0][:6]), images[1][:6], Perturbation(Norm.L2, 28.0)
    any_image, nearest = (
        HopSkipJump(queries=600, first_estimate=40, smallest=smallest).generate(
            model, x, labels, epsilon=everything.radius, seed=0
        )
        for smallest in (False, True)
    )
    with torch.no_grad():
        right = model(x).argmax(1) == labels
        assert right.any()
        assert (model(nearest)[right].argmax(1) != labels[right]).all()
    far, near = ((made - x).flatten(1).norm(dim=1)[right] for made in (any_image, nearest))
    assert (near < 0.5 * far).all()
    assert torch.equal(nearest, torch.round(nearest * 255) / 255)  # 8-bit images, each seen to fool
    assert HopSkipJump().description != HopSkipJump(smallest=True).description  # caches tell them apart


def test_hop_skip_jump_starts_from_other_images_where_noise_gets_the_true_class(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor]
) -> None:
    with torch.no_grad():
        of_noise = int(model(torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))).argmax(1))
    alike, other = (int(torch.nonzero(chosen)[0]) for chosen in (images[1] == of_noise, images[1] != of_noise))
    some = (images[0][[alike, other]], images[1][[alike, other]])
    attack = HopSkipJump(queries=300, first_estimate=40)
    x, everything = floats(some[0]), Perturbation(Norm.L2, 28.0)
    candidates = attack.generate(model, x, some[1], epsilon=everything.radius, seed=0)
    with torch.no_grad():
        assert (model(candidates).argmax(1) != some[1]).all()
    # Alone, that image has no other to start from.
    alone = attack.generate(model, x[:1], some[1][:1], epsilon=everything.radius, seed=0)
    assert torch.equal(alone, x[:1])


@pytest.mark.parametrize(
    "build",
    [
        lambda: Square(Norm.L0), lambda: Square(queries=3), lambda: HopSkipJump(Norm.PATCH),
        lambda: HopSkipJump(queries=100, first_estimate=100),
    ],
)  # fmt: skip
def test_impossible_query_budgets_are_refused(build: Callable[[], Attack]) -> None:
    with pytest.raises(InputError):
        build()


@foolbox_attacks
def test_foolbox_attacks_stay_in_their_set_and_fool(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor], attack: Attack
) -> None:
    clean, labels = images
    numpy_state = np.random.get_state()[1].copy()
    candidates, judged = made(attack, model, images)
    assert torch.equal(candidates, made(attack, model, images)[0])
    assert (np.random.get_state()[1] == numpy_state).all()
    assert SIZES[attack.norm].contains(judged, clean).all()
    # Nothing had to be cut off: what does not fit is the clean image.
    assert np.abs(judged / 255 - candidates.numpy()).max() <= 1.5 / 255
    with torch.no_grad():
        assert (model(floats(judged)).argmax(1) != labels).sum() >= 4
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_minimisation_attack_proposes_the_clean_image_where_it_found_nothing_within_reach(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor]
) -> None:
    x = floats(images[0])
    candidates = ddn(steps=10).generate(model, x, images[1], epsilon=1 / 255, seed=0)
    assert torch.equal(candidates, x)


def test_foolbox_attacks_of_a_fixed_size_are_clipped_and_any_attack_may_be_named(
    model: nn.Module, images: tuple[np.ndarray, torch.Tensor]
) -> None:
    fgsm = FoolboxAttack("fgsm-foolbox", "LinfFastGradientAttack", {}, Norm.LINF, cost=1)
    candidates, judged = made(fgsm, model, images)
    assert (candidates - floats(images[0])).abs().max() == pytest.approx(80 / 255, abs=1e-6)
    assert (judged != images[0]).any(axis=(1, 2, 3)).all()
    # An attack without a distance of its own takes the norm's; it draws from the global generators.
    noise = FoolboxAttack("noise", "LinearSearchBlendedUniformNoiseAttack", {"steps": 5}, Norm.L2, cost=5)
    assert SIZES[Norm.L2].contains(made(noise, model, images)[1], images[0]).all()
    assert "steps=5" in noise.description
    assert noise.description != fgsm.description


@pytest.mark.parametrize(
    ("name", "arguments", "norm", "said"),
    [
        ("L2CarliniWagner", {}, Norm.L2, "L2CarliniWagnerAttack"),
        ("DDNAttack", {"step": 3}, Norm.L2, "step"),
        ("DDNAttack", {}, Norm.LINF, "linf"),
        ("DDNAttack", {}, Norm.PATCH, "patch"),
    ],
)
def test_foolbox_attacks_that_do_not_exist_are_refused(
    name: str, arguments: dict[str, int], norm: Norm, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        FoolboxAttack("x", name, arguments, norm)


def test_a_crash_inside_foolbox_names_the_batch(images: tuple[np.ndarray, torch.Tensor]) -> None:
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(9, 10))  # no model of these images
    with pytest.raises(InputError, match="failed on images 0 to 9"):
        made(ddn(steps=2), wrong, images)


def test_values_that_are_not_finite_are_refused(images: tuple[np.ndarray, torch.Tensor]) -> None:
    broken = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.init.constant_(broken[1].weight, float("nan"))
    with pytest.raises(InputError):
        made(FoolboxAttack("pgd", "L2ProjectedGradientDescentAttack", {"steps": 2}), broken, images)


def test_the_model_is_left_as_it_was(model: nn.Module, images: tuple[np.ndarray, torch.Tensor], tmp_path: Path) -> None:
    model.train()
    try:
        for attack in [*QUERY_ATTACKS[:1], HopSkipJump(queries=20, first_estimate=5), ddn(steps=2)]:
            made(attack, model, (images[0][:2], images[1][:2]))
            assert all(module.training for module in model.modules())
            assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()
