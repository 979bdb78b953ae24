"""Adversarial training: images in their balls, a deliberate mode of the model, the joint loss, and what it buys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from device_tests.accuracy import predict
from device_tests.attacks.pgd import PGD
from device_tests.crafting import craft
from device_tests.perturbation import Norm, Perturbation
from device_tests.threats import Source, Threat
from exporters.run_torch import TorchRuntime
from factory.adversarial_training import AdversarialTraining, TrainingAttack
from factory.classifier import ImageClassifier
from factory.data import Splits
from factory.objective import CrossEntropy, Objective
from factory.progress import Progress
from factory.recipes.adversarial_training import AdversarialTrainingPart
from factory.recipes.recipe import RecipeSettings
from factory.recipes.training import TrainingSettings
from factory.train import train


def cnn() -> ImageClassifier:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 5, 2, 2), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(16 * 49, 10),
    )  # fmt: skip
    return ImageClassifier(network, (0.3,), (0.3,))


@pytest.fixture(scope="module")
def batch(tiny_splits: Splits) -> tuple[Tensor, Tensor]:
    return tiny_splits.train.images[:64].float() / 255, tiny_splits.train.labels[:64]


@pytest.mark.parametrize(("steps", "start"), [(1, False), (4, True)])
def test_attacked_images_lie_in_their_balls_and_raise_the_loss(
    batch: tuple[Tensor, Tensor], steps: int, start: bool
) -> None:
    images, labels = batch
    model, objective = cnn().eval(), CrossEntropy()
    attack = TrainingAttack(0.1, 0.5, steps, start)
    torch.manual_seed(1)
    drawn = 0.1 + 0.4 * torch.rand(len(images), 1, 1, 1)
    torch.manual_seed(1)
    attacked = attack.generate(objective, model, images, labels)
    assert ((attacked - images).abs() <= drawn + 1e-6).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not attacked.requires_grad
    moved = (attacked - images).abs().flatten(1).max(dim=1).values
    assert moved.max() > 2 * moved.min() > 0  # one ε per image
    with torch.no_grad():
        assert objective(model, attacked, labels) > objective(model, images, labels)
    torch.manual_seed(1)
    assert torch.equal(attack.generate(objective, model, images, labels), attacked)


class Watching(Objective):
    """Cross-entropy that keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, bool, bool]] = []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        frozen = not any(p.requires_grad for p in model.parameters())
        self.asked.append((len(images), model.training, frozen))
        return self.weight * nn.functional.cross_entropy(model(images), labels)


def test_a_share_of_the_batch_is_attacked_in_place(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model, seen = cnn(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    watching = Watching()
    part = AdversarialTrainingPart(kind="pgd", steps=1, epsilon_low=0.1, epsilon_high=0.2, share=0.25)
    loss = part.build(watching)(model.train(), images, labels)
    assert loss.requires_grad
    # One step on a quarter at rest, then a batch as large as it was.
    assert watching.asked == [(16, False, True), (64, True, False)]
    trained = seen[-1]
    assert torch.equal(trained[16:], images[16:])
    change = (trained[:16] - images[:16]).abs().flatten(1).amax(1)
    assert (change > 0).all()
    assert change.max() <= 0.2 + 1e-6


def test_free_attacks_are_the_gradients_of_the_step_before(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model, seen = cnn(), list[Tensor]()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    watching = Watching()
    part = AdversarialTrainingPart(kind="free", epsilon_low=0.1, epsilon_high=0.2, share=0.25)
    training = part.build(watching)
    training.begin_epoch(0, 1)
    training(model.train(), images, labels).backward()
    assert torch.equal(seen[0].detach(), images)  # nothing stands before the first batch
    again = images.flip(0)
    training(model, again, labels.flip(0)).backward()
    # Two steps, and no other gradient.
    assert watching.asked == [(64, True, False), (64, True, False)]
    trained = seen[1].detach()
    assert torch.equal(trained[16:], again[16:])
    # The first quarter: the first images of the step before, moved by ε along the gradient which that step had.
    learnt = seen[0]
    assert learnt.requires_grad
    moved = trained[:16] - images[:16]
    largest = moved.abs().flatten(1).amax(1)
    assert (largest >= 0.1 - 1e-6).all()
    assert (largest <= 0.2 + 1e-6).all()
    with torch.no_grad():
        model.eval()
        raised = nn.functional.cross_entropy(model(trained[:16]), labels[:16])
        assert raised > nn.functional.cross_entropy(model(images[:16]), labels[:16])
    training.begin_epoch(1, 2)
    model.train()
    training(model, again, labels.flip(0))
    assert torch.equal(seen[-1].detach(), again)  # an epoch begins anew, so that it can be gone on with


def test_free_attacks_need_the_backward_pass_and_begin_after_the_warm_up(batch: tuple[Tensor, Tensor]) -> None:
    model, watching = cnn(), Watching()
    training = AdversarialTrainingPart(kind="free", warm_up=1).build(watching)
    training.begin_epoch(0, 2)
    training(model, *batch)
    training(model, *batch)
    training.begin_epoch(1, 2)
    training(model, *batch)
    with pytest.raises(RuntimeError, match="was not differentiated"):
        training(model, *batch)
    assert set(training.learned()) == {"weight"}


def test_it_attacks_at_rest_and_learns_both_halves_in_training_mode(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model, objective = cnn().train(), Watching()
    norm = model.network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    loss = AdversarialTraining(objective, TrainingAttack(0.1, 0.1, 3, True))(model, images, labels)
    # Three gradients of the model at rest, then one batch of clean and attacked images; statistics moved once.
    assert objective.asked == [(64, False, True)] * 3 + [(128, True, False)]
    assert int(norm.num_batches_tracked) == 1
    assert model.training
    assert all(p.requires_grad for p in [*model.parameters(), *objective.parameters()])
    assert all(p.grad is None for p in [*model.parameters(), *objective.parameters()])
    loss.backward()
    assert all(p.grad is not None for p in [*model.parameters(), *objective.parameters()])


def test_it_begins_after_the_warm_up_and_passes_epochs_on(batch: tuple[Tensor, Tensor]) -> None:
    objective = Watching()
    training = AdversarialTraining(objective, TrainingAttack(0.1, 0.1, 1, False), warm_up=2)
    for epoch, expected in ((0, [64]), (1, [64]), (2, [64, 128])):
        objective.asked.clear()
        training.begin_epoch(epoch, 3)
        training(cnn(), *batch)
        assert [count for count, _, _ in objective.asked] == expected
    assert set(training.learned()) == {"weight"}


class Opposite(Objective):
    """A loss that falls where the cross-entropy rises."""

    def forward(self, model: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(model(images), labels)


def test_the_attack_climbs_the_loss_that_is_minimised(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model, attack = cnn().eval(), TrainingAttack(0.05, 0.05, 1, False)
    up, down = (attack.generate(one, model, images, labels) - images for one in (CrossEntropy(), Opposite()))
    inside = (images > 0.05) & (images < 0.95) & (up != 0)
    assert inside.any()
    assert torch.equal(up[inside].sign(), -down[inside].sign())


def test_settings() -> None:
    assert RecipeSettings.model_validate({"adversarial": {"kind": "fgsm"}}).parts["adversarial"].name == "fgsm"
    with pytest.raises(ValueError, match="must not be above"):
        AdversarialTrainingPart(epsilon_low=0.2, epsilon_high=0.1)
    with pytest.raises(ValueError, match=r"at most 0\.5"):
        AdversarialTrainingPart(kind="free", share=0.6)
    assert "adversarial" not in RecipeSettings().model_dump()


def test_a_model_trained_on_attacks_is_fooled_less(tiny_splits: Splits, tmp_path: Path) -> None:
    """Accuracy under PGD on test images, after the same number of epochs; free attacks at the cost of plain steps."""
    settings = TrainingSettings(epochs=4, batch_size=50, learning_rate=5e-3, shift=0, flip=False, precision="fp32")
    part = AdversarialTrainingPart(epsilon_low=0.02, epsilon_high=0.1, steps=2)
    free = AdversarialTrainingPart(kind="free", epsilon_low=0.02, epsilon_high=0.1)
    images, labels = tiny_splits.test.images[:200].numpy(), tiny_splits.test.labels[:200].numpy()
    ball, right = Perturbation(Norm.LINF, 0.06), dict[str, float]()
    objectives = {"plain": CrossEntropy(), "attacked": part.build(CrossEntropy()), "free": free.build(CrossEntropy())}
    for name, objective in objectives.items():
        model = cnn()
        train(
            model, tiny_splits.train.take(1000), tiny_splits.validation.take(50), settings, seed=0, name=name,
            checkpoint=tmp_path / name, progress=Progress(quiet=True), objective=objective,
        )  # fmt: skip
        source = Source(name, Threat.TARGET_ITSELF, model, "itself")
        made = craft(source, [PGD(steps=10)], images, labels, perturbation=ball, seed=0)
        right[name] = float((predict(TorchRuntime(model), made.images["pgd"]) == labels).mean())
    assert right["attacked"] > right["plain"] + 0.1, right
    assert right["free"] > right["plain"] + 0.1, right
