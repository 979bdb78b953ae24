"""Distillation: the base teaches from plain images, is left as it is, and goes into no adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from factory.adaptation import adapt
from factory.base import Base
from factory.classifier import ImageClassifier
from factory.data import Split, Splits
from factory.device_model import keyed_transform, make_device_model, public_model
from factory.distillation import Distillation
from factory.objective import CrossEntropy
from factory.progress import Progress
from factory.recipes.distillation import DistillationPart
from factory.recipes.recipe import RecipeSettings
from factory.recipes.training import TrainingSettings
from keys.derive import fixed_guess

TRAINING = TrainingSettings(epochs=1, batch_size=25, learning_rate=1e-2, shift=0, flip=False, precision="fp32")
RECIPE = RecipeSettings(rank=4, objective=DistillationPart(weight=0.75, temperature=2.0), training=TRAINING)


@pytest.fixture
def batch(tiny_splits: Splits) -> Split:
    return tiny_splits.train.take(64)


def student(base: Base, recipe: RecipeSettings) -> ImageClassifier:
    architecture = base.architecture
    transform = keyed_transform(base, recipe, fixed_guess("a"))
    return ImageClassifier(adapt(base.network, recipe), architecture.mean, architecture.std, transform).eval()


def test_the_loss_is_that_of_the_labels_and_of_the_bases_answers_to_plain_images(tiny_base: Base, batch: Split) -> None:
    model = student(tiny_base, RECIPE)
    images, labels = batch.images.float() / 255, batch.labels
    objective = RECIPE.objective.build(model.network, 10, 0.1, tiny_base.network)
    with torch.no_grad():
        found = objective(model, images, labels)
        ours, theirs = model(images), public_model(tiny_base, RECIPE)(images)
    assert not torch.allclose(ours, theirs, atol=0.1)  # the student sees shuffled images
    p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
    soft = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.25 * functional.cross_entropy(ours, labels, label_smoothing=0.1) + 0.75 * 4 * soft
    assert torch.allclose(found, expected, rtol=1e-5)


def test_a_student_like_its_teacher_has_only_the_labels_to_learn(tiny_base: Base, batch: Split) -> None:
    same = public_model(tiny_base, RECIPE)
    images = batch.images.float() / 255
    with torch.no_grad():
        loss = Distillation(tiny_base.network, 0.5, 1.0, 0.0)(same, images, batch.labels)
        assert torch.allclose(loss, 0.5 * CrossEntropy()(same, images, batch.labels), atol=1e-6)


def test_the_teacher_is_the_base_and_stays_so(tiny_base: Base, tiny_splits: Splits, tmp_path: Path) -> None:
    """Also where the student's patch embedding is drawn anew; and what is kept of the training is the adapter alone."""
    before = {name: value.clone() for name, value in tiny_base.network.state_dict().items()}
    anew = RECIPE.model_copy(update={"reinitialise_patch_embedding": True})
    objective = anew.objective.build(student(tiny_base, anew).network, 10, 0.0, tiny_base.network)
    assert isinstance(objective, Distillation)
    assert not any(parameter.requires_grad for parameter in objective.parameters())
    assert objective.learned() == {}
    assert all(torch.equal(objective.teacher.state_dict()[name], value) for name, value in before.items())
    few = Splits("few", tiny_splits.train.take(200), tiny_splits.validation, tiny_splits.test, tiny_splits.labels)
    make_device_model(
        tiny_base, fixed_guess("a"), RECIPE, few, name="device", identity=["a"], seed=0, folder=tmp_path / "device",
        shared=tmp_path / "shared", progress=Progress(quiet=True),
    )  # fmt: skip
    assert all(torch.equal(tiny_base.network.state_dict()[name], value) for name, value in before.items())
    assert {path.name for path in (tmp_path / "device" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_a_student_answers_more_like_the_base(tiny_base: Base, tiny_splits: Splits, tmp_path: Path) -> None:
    """Mean distance of the probabilities from the base's on test images, against the same training by labels."""
    images = tiny_splits.test.images[:300].float() / 255
    with torch.no_grad():
        theirs = public_model(tiny_base, RECIPE)(images).softmax(1)
    far = dict[str, float]()
    for name, recipe in (("taught", RECIPE), ("labels", RecipeSettings(rank=4, training=TRAINING))):
        made = make_device_model(
            tiny_base, fixed_guess("a"), recipe, tiny_splits, name=name, identity=["a"], seed=0,
            folder=tmp_path / name, shared=tmp_path / "shared", progress=Progress(quiet=True),
        )  # fmt: skip
        with torch.no_grad():
            far[name] = float((made.classifier(images).softmax(1) - theirs).abs().sum(1).mean())
    assert far["taught"] < 0.9 * far["labels"], far
