"""Prototype conformity in training: depths of any network, hooks without a trace, device models that keep nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.to_coreml import export_coreml
from exporters.to_onnx import export_onnx
from factory.adaptation import adapt, read_learned
from factory.adapter_package import _plain  # type: ignore[reportPrivateUsage]
from factory.base import Base
from factory.classifier import ImageClassifier
from factory.data import Split, Splits
from factory.device_model import DeviceModel, make_device_model
from factory.folding import bake
from factory.progress import Progress, Stage
from factory.prototypes.depths import captured, find_depths, pooled
from factory.prototypes.nearest import NearestPrototype
from factory.prototypes.objective import ConformityObjective
from factory.recipes.prototype_conformity import PrototypeConformityPart
from factory.recipes.recipe import RecipeSettings
from keys.derive import fixed_guess
from keys.errors import InputError

TRAINING = {"epochs": 2, "batch_size": 50, "learning_rate": 0.01, "shift": 0, "flip": False, "precision": "fp32"}


def recipe(**objective: object) -> RecipeSettings:
    values: dict[str, object] = {"rank": 2, "training": TRAINING}
    if objective:
        values["objective"] = {"kind": "prototype-conformity", "dimension": 16, **objective}
    return RecipeSettings.model_validate(values)


class SmallCnn(nn.Module):
    """Two stages and two linear layers, as a convolutional network of the paper, without timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.PReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 12, 5, 2, 2), nn.PReLU(), nn.AvgPool2d(2))
        self.fc1 = nn.Sequential(nn.Flatten(), nn.Linear(12 * 9, 20), nn.PReLU())
        self.drop = nn.Dropout(0.3)
        self.fc2 = nn.Linear(20, 10)

    def get_classifier(self) -> nn.Module:
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.fc1(self.stage2(self.stage1(x)))))


@pytest.fixture(scope="module")
def few(tiny_splits: Splits) -> Splits:
    train = tiny_splits.train.take(400)
    return Splits("few", train, tiny_splits.validation.take(50), tiny_splits.test.take(100), tiny_splits.labels)


def make(base: Base, splits: Splits, folder: Path, settings: RecipeSettings, *, keyed: bool = True,
         progress: Progress | None = None) -> DeviceModel:  # fmt: skip
    return make_device_model(
        base, fixed_guess("a") if keyed else None, settings, splits, name="a", identity=["a"], seed=1, folder=folder,
        shared=folder / "shared",
        progress=progress or Progress(quiet=True),
    )  # fmt: skip


def test_depths_of_a_vit_are_its_blocks_and_what_its_head_sees(tiny_base: Base) -> None:
    depths = find_depths(tiny_base.network, [0.5, 1.0])
    assert [(d.module, d.before, d.width) for d in depths] == [("blocks.0", False, 48), ("head", True, 48)]
    named = find_depths(tiny_base.network, ["blocks.1", "blocks.0.mlp.fc1"])
    assert [d.width for d in named] == [48, 192]
    with pytest.raises(InputError, match=r"has no part 'blocks.7'; its stages are blocks.0, blocks.1"):
        find_depths(tiny_base.network, ["blocks.7"])
    with pytest.raises(InputError, match="one place of the network twice"):
        find_depths(tiny_base.network, [0.5, "blocks.0"])


def test_depths_of_convolutional_networks() -> None:
    cnn = find_depths(SmallCnn(), [0.5, 1.0, "fc1", "stage1"])
    assert [(d.module, d.width) for d in cnn] == [("stage2", 12), ("fc2", 20), ("fc1", 20), ("stage1", 8)]
    resnet = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    found = find_depths(resnet, [0.8, 0.99, 1.0])
    assert [(d.module, d.before) for d in found] == [("layer3", False), ("layer4", False), ("fc", True)]
    with captured(resnet, found) as features:
        resnet.eval()(torch.rand(2, 1, 32, 32))
    assert [pooled(features[d.name], d, resnet, "average").shape[1] for d in found] == [256, 512, 512]
    with pytest.raises(InputError, match="has no single layer that makes logits"):
        find_depths(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), [1.0])


def test_features_are_those_of_the_network_also_behind_peft_and_no_hook_stays(tiny_base: Base, few: Splits) -> None:
    images = few.test.images[:5].float() / 255
    adapted = adapt(tiny_base.network, recipe()).eval()  # LoRA's second matrix is zero: the same function
    depths = find_depths(adapted, [0.5, 1.0])
    found: list[dict[str, Tensor]] = []
    for network in (tiny_base.network, adapted):
        classifier = ImageClassifier(network, (0.3,), (0.3,))
        with torch.no_grad():
            before = classifier(images)
            with captured(classifier, depths) as features:
                assert torch.equal(classifier(images), before)
        found.append(features)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
        assert sum(hooks) == 0
    for depth in depths:
        assert torch.allclose(found[0][depth.name], found[1][depth.name], atol=1e-5)
    tokens = found[0]["0.5"]
    assert torch.equal(pooled(tokens, depths[0], adapted, "average"), tokens[:, 1:].mean(1))
    assert torch.equal(pooled(tokens, depths[0], adapted, "class"), tokens[:, 0])


def test_until_the_warm_up_is_over_it_is_cross_entropy(tiny_base: Base, few: Splits) -> None:
    part = PrototypeConformityPart(warm_up=1, dimension=16, auxiliary_cross_entropy=0.5)
    objective = part.build(tiny_base.network, 10, 0.1, tiny_base.network)
    classifier = ImageClassifier(tiny_base.network, (0.3,), (0.3,)).eval()
    images, labels = few.test.images[:20].float() / 255, few.test.labels[:20]
    plain = nn.functional.cross_entropy(classifier(images), labels, label_smoothing=0.1)
    objective.begin_epoch(0, 3)
    assert objective(classifier, images, labels).item() == plain.item()
    objective.begin_epoch(1, 3)
    joint = objective(classifier, images, labels)
    assert joint.item() != plain.item()
    joint.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())
    # 48 channels are projected to 16 before the last depth, and compared as they are at the last one.
    shapes = [tuple(p.shape) for name, p in objective.named_parameters() if "centroids" in name]
    assert shapes == [(10, 16), (10, 16), (10, 48)] or shapes == [(10, 16), (10, 48)]


@pytest.mark.parametrize("inference", ["softmax", "nearest-prototype"])
def test_a_device_model_keeps_neither_branches_nor_training_centroids(
    tiny_base: Base, few: Splits, tmp_path: Path, inference: str
) -> None:
    settings = recipe(depths=[0.5, 1.0], inference=inference)
    model = make(tiny_base, few, tmp_path, settings)
    baked = bake(model.classifier)
    names = set(baked.state_dict())
    if inference == "softmax":
        assert names == set(tiny_base.network.state_dict())
    else:
        own = {name for name in tiny_base.network.state_dict() if not name.startswith("head.")}
        assert names == own | {"head.centroids"}
    images = few.test.images.float() / 255
    again = make(tiny_base, few, tmp_path, settings)
    assert again.adapter_digest == model.adapter_digest
    with torch.no_grad():
        expected = baked(images)
        assert torch.equal(again.classifier(images), model.classifier(images))
        assert torch.allclose(model.classifier(images), expected, atol=1e-4)
    path = tmp_path / "model.onnx"
    export_onnx(baked, path, tiny_base.architecture.contract, tiny_base.architecture.labels)
    assert np.allclose(OnnxRuntime(path).logits(images.numpy()), expected.numpy(), atol=1e-4)
    # What was learned lies beside the adapter: a change of it is noticed.
    learned = tmp_path / "adapter" / "objective.safetensors"
    assert {name.split(".", 2)[2] for name in read_learned(tmp_path / "adapter")} == {
        "scaled_centroids", "branch.weight", "branch.bias",
    }  # fmt: skip
    data = learned.read_bytes()
    learned.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="was changed after training"):
        make(tiny_base, few, tmp_path, settings)


def test_the_nearest_prototype_is_equation_6(tiny_base: Base, tiny_splits: Splits, tmp_path: Path) -> None:
    settings = recipe(depths=[1.0], inference="nearest-prototype", bound="sphere", radius=2.0, centroid_rate=5.0)
    test = tiny_splits.test.take(100)
    model = make(tiny_base, tiny_splits, tmp_path, settings, keyed=False)
    head = model.classifier.network.get_base_model().head
    assert isinstance(head, NearestPrototype)
    centroids = 5.0 * read_learned(tmp_path / "adapter")["levels.0.scaled_centroids"].numpy()
    with captured(model.classifier, find_depths(tiny_base.network, [1.0])) as features, torch.no_grad():
        hook = head.register_forward_pre_hook(lambda _, inputs: features.update(seen=inputs[0]))
        logits = model.classifier(test.images.float() / 255).numpy()
        hook.remove()
    unit = [2.0 * part / np.linalg.norm(part, axis=1, keepdims=True) for part in (features["seen"].numpy(), centroids)]
    distances = np.linalg.norm(unit[0][:, None] - unit[1][None], axis=2)
    assert np.allclose(logits, -distances, atol=1e-4)
    assert (logits.argmax(1) == distances.argmin(1)).all()
    assert (logits.argmax(1) == test.labels.numpy()).mean() > 0.3  # it has learned something
    # The same answers from Core ML, as its evaluator here works them out.
    package, contract = tmp_path / "model.mlpackage", tiny_base.architecture.contract
    export_coreml(bake(model.classifier), package, contract, tiny_base.architecture.labels, precision="fp32")
    images = test.images[:8].numpy().astype(np.float32) / 255
    assert np.allclose(CoreMLEvaluator(package).logits(images), logits[:8], atol=1e-3)
    # A LoRA-only package has the base's graph, which ends in another layer.
    with pytest.raises(InputError, match="LoRA-only packages need the base's own graph"):
        _plain(tiny_base, settings)


def test_inference_by_prototypes_needs_the_last_depth() -> None:
    with pytest.raises(ValueError, match=r"needs 1\.0 as the last"):
        PrototypeConformityPart(depths=(1.0, 0.5), inference="nearest-prototype")
    with pytest.raises(InputError, match="only one class"):
        PrototypeConformityPart().build(SmallCnn(), 1, 0.0, SmallCnn())
    with pytest.raises(InputError, match="no class token"):
        PrototypeConformityPart(tokens="class").build(SmallCnn(), 10, 0.0, SmallCnn())


def separation(model: ImageClassifier, split: Split) -> float:
    """Mean distance between class means over the mean distance of images to their class mean, at the last depth."""
    with captured(model, find_depths(model.network, [1.0])) as found, torch.no_grad():
        model(split.images.float() / 255)
    features = found["1.0"]
    means = torch.stack([features[split.labels == label].mean(0) for label in range(10)])
    within = (features - means[split.labels]).norm(dim=1).mean()
    return float(torch.pdist(means).mean() / within)


def test_it_separates_the_classes_of_unseen_images_more_than_cross_entropy(
    tiny_base: Base, tiny_splits: Splits, tmp_path: Path
) -> None:
    found: dict[str, float] = {}
    for name, objective in (("plain", {}), ("prototypes", {"depths": [0.5, 1.0]})):
        settings = recipe(**objective).model_copy(update={"adaptation": "full"})
        model = make(tiny_base, tiny_splits, tmp_path / name, settings, keyed=False)
        found[name] = separation(model.classifier, tiny_splits.test)
    assert found["prototypes"] > 1.2 * found["plain"], found


class StoppedError(Exception):
    """Training was stopped."""


class Interrupting(Progress):
    """Stops a training run in the middle of its second epoch."""

    @contextlib.contextmanager
    def stage(self, name: str, *, total: int, unit: str, done: int = 0) -> Iterator[Stage]:
        with super().stage(name, total=total, unit=unit, done=done) as stage:
            seen = 0

            class Counting:
                def advance(self, count: int = 1, note: str = "") -> None:
                    nonlocal seen
                    seen += count
                    stage.advance(count, note)
                    if seen > 0.75 * total:
                        raise StoppedError

            yield Counting()  # type: ignore[misc]


@pytest.mark.parametrize("attack", [None, "pgd"])
def test_a_run_that_was_interrupted_ends_with_the_same_weights(
    tiny_base: Base, few: Splits, tmp_path: Path, attack: str | None
) -> None:
    adversarial = {"kind": attack, "epsilon_low": 0.02, "epsilon_high": 0.1, "steps": 2} if attack else None
    settings = RecipeSettings.model_validate(
        {
            **recipe(depths=[0.5, 1.0], inference="nearest-prototype", warm_up=1, dimension=8).model_dump(),
            "adversarial": adversarial, "dropout": 0.2,
        }
    )  # fmt: skip
    whole = make(tiny_base, few, tmp_path / "whole", settings, keyed=False)
    with pytest.raises(StoppedError):
        make(tiny_base, few, tmp_path / "killed", settings, keyed=False, progress=Interrupting(quiet=True))
    resumed = make(tiny_base, few, tmp_path / "killed", settings, keyed=False)
    assert resumed.adapter_digest == whole.adapter_digest
    assert [e.loss for e in resumed.history] == [e.loss for e in whole.history]


def test_the_objective_is_rebuilt_from_what_was_kept(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    settings = recipe(depths=[0.5, 1.0])
    model = make(tiny_base, few, tmp_path, settings, keyed=False)
    images, labels = few.test.images[:20].float() / 255, few.test.labels[:20]
    losses: list[float] = []
    for network in (model.classifier, bake(model.classifier)):
        objective = settings.objective.build(tiny_base.network, 10, 0.0, tiny_base.network)
        assert isinstance(objective, ConformityObjective)
        objective.load_state_dict(read_learned(tmp_path / "adapter"))
        with torch.no_grad():
            losses.append(objective(network, images, labels).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
