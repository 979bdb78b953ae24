"""Decoys: which images a batch gets, that a fleet makes its pool once, and that a pool of something else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from factory.base import Base
from factory.data import Splits
from factory.decoy_making import open_pool
from factory.decoys import DecoyPool, PoolOrigin, load_pool, save_pool
from factory.device_model import make_device_model, public_model
from factory.progress import Progress
from factory.recipes.decoys import DecoysPart
from factory.recipes.recipe import RecipeSettings
from factory.recipes.training import TrainingSettings
from factory.train import train
from keys.derive import fixed_guess
from keys.errors import InputError

TRAINING = TrainingSettings(epochs=1, batch_size=25, precision="fp32", flip=False, shift=0)
PLAIN = RecipeSettings(rank=2, training=TRAINING)
PART = DecoysPart(keys=1, images=30, steps=2, share=0.4)
ORIGIN = PoolOrigin("b" * 64, "d" * 64, {"keys": 1})


@pytest.fixture(scope="module")
def few(tiny_splits: Splits) -> Splits:
    train = tiny_splits.train.take(100)
    return Splits("few", train, tiny_splits.validation.take(50), tiny_splits.test.take(50), tiny_splits.labels)


@pytest.fixture(scope="module")
def shared(tiny_base: Base, few: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    open_pool(PART, tiny_base, PLAIN, few, folder, Progress(quiet=True))
    return folder


def numbered(count: int, start: int) -> torch.Tensor:
    """Images 1×2×2, each of one value."""
    return torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


def test_a_share_of_the_batch_becomes_decoys_with_their_own_labels() -> None:
    pool = DecoyPool(numbered(50, 200), torch.arange(50), share=0.4)
    images, labels = pool.mix(numbered(10, 0), torch.full((10,), 99), torch.Generator().manual_seed(0))
    values = images[:, 0, 0, 0].long()
    assert values[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert labels[:6].tolist() == [99] * 6
    assert (values[6:] >= 200).all()
    assert labels[6:].tolist() == (values[6:] - 200).tolist()


def test_the_pool_holds_attacks_on_the_base_and_on_each_decoy_key(tiny_base: Base, few: Splits, shared: Path) -> None:
    pool = open_pool(PART, tiny_base, PLAIN, few, shared, Progress(quiet=True))
    clean = few.train.images[:30].int()
    assert pool.images.shape == (60, *few.train.images.shape[1:])
    assert pool.labels.tolist() == few.train.labels[:30].tolist() * 2
    for source in pool.images.int().split(30):
        change = (source - clean).abs().flatten(1).amax(1)
        assert change.max() == 8
        assert (change > 0).all()
    assert not torch.equal(pool.images[:30], pool.images[30:])


def test_a_fleet_makes_its_pool_once(tiny_base: Base, few: Splits, shared: Path, tmp_path: Path) -> None:
    recipe = PLAIN.model_copy(update={"decoys": PART})
    progress = Progress(quiet=True)
    models = [
        make_device_model(
            tiny_base, fixed_guess(name), recipe, few, name=name, identity=[name], seed=1, folder=tmp_path / name,
            shared=shared, progress=progress,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    assert set(progress.seconds) == {"a", "b"}  # nothing else was trained or attacked
    assert models[0].adapter_digest != models[1].adapter_digest


def test_what_decoys_there_are_changes_the_weights(tiny_base: Base, few: Splits, shared: Path, tmp_path: Path) -> None:
    digests = {
        make_device_model(
            tiny_base, fixed_guess("a"), PLAIN.model_copy(update={"decoys": decoys}), few, name="a", identity=["a"],
            seed=1, folder=tmp_path / str(number), shared=shared, progress=Progress(quiet=True),
        ).adapter_digest
        for number, decoys in enumerate([None, PART, PART, PART.model_copy(update={"share": 0.8})])
    }  # fmt: skip
    assert len(digests) == 3  # the same settings give the same weights


def load(path: Path, origin: PoolOrigin = ORIGIN) -> DecoyPool:
    return load_pool(path, origin, 0.5, shape=(1, 2, 2), classes=4)


@pytest.mark.parametrize(
    ("origin", "what"),
    [
        (replace(ORIGIN, base="c" * 64), "another base"),
        (replace(ORIGIN, data="c" * 64), "another data set"),
        (replace(ORIGIN, settings={"keys": 2}), "another recipe"),
    ],
)
def test_decoys_of_something_else_are_refused(tmp_path: Path, origin: PoolOrigin, what: str) -> None:
    path = tmp_path / "pool.safetensors"
    save_pool(path, ORIGIN, [numbered(4, 0)], [torch.arange(4)])
    assert len(load(path).images) == 4
    with pytest.raises(InputError, match=what):
        load(path, origin)


def test_damaged_decoys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool.safetensors"
    with pytest.raises(InputError, match="missing or damaged"):
        load(path)
    save_pool(path, ORIGIN, [numbered(4, 0)], [torch.arange(4)])
    tensors, whole = load_file(path), path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(InputError, match="missing or damaged"):
        load(path)
    save_file({**tensors, "images": tensors["images"].float()}, path, {"origin": ORIGIN.text})
    with pytest.raises(InputError, match="no 8-bit images"):
        load(path)
    save_file({**tensors, "images": tensors["images"][..., :1].contiguous()}, path, {"origin": ORIGIN.text})
    with pytest.raises(InputError, match="no 8-bit images of the model's size"):
        load(path)
    for labels in ([0, 1, 2, 4], [0, 1, 2, -1]):
        save_file({**tensors, "labels": torch.tensor(labels)}, path, {"origin": ORIGIN.text})
        with pytest.raises(InputError, match="labels of no class"):
            load(path)
    save_file({**tensors, "labels": torch.full((4,), float("nan"))}, path, {"origin": ORIGIN.text})
    with pytest.raises(InputError, match="labels of no class"):
        load(path)
    for text, what in (("else", "missing or damaged"), ("[broken", "missing or damaged"), ("[]", "another base")):
        save_file(tensors, path, {"origin": text})
        with pytest.raises(InputError, match=what):
            load(path)


def test_what_makes_no_decoys_is_refused(tiny_base: Base, few: Splits, shared: Path, tmp_path: Path) -> None:
    for settings in ({"keys": 0, "generations": 2}, {"keys": 0, "ensemble": True}):
        with pytest.raises(ValueError, match="without decoy keys"):
            DecoysPart.model_validate(settings)
    recipe = PLAIN.model_copy(update={"decoys": PART.model_copy(update={"share": 0.01})})
    with pytest.raises(InputError, match="leaves no decoys"):
        make_device_model(
            tiny_base, fixed_guess("a"), recipe, few, name="a", identity=["a"], seed=1, folder=tmp_path / "a",
            shared=shared, progress=Progress(quiet=True),
        )  # fmt: skip


def test_a_syllabus_orders_a_batch_that_has_its_decoys(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    """Every image is as likely to be replaced, wherever a curriculum puts it."""
    seen: list[torch.Tensor] = []

    class Watched:
        def parts(self, images: torch.Tensor) -> list[torch.Tensor]:
            seen.append(images)
            return list(torch.arange(len(images)).split(5))

        def steps(self, count: int) -> int:
            return -(-count // 5)

    pool = DecoyPool(torch.zeros(3, *few.train.images.shape[1:], dtype=torch.uint8), torch.zeros(3).long(), 0.4)
    model = public_model(tiny_base, PLAIN)
    model.network.head.requires_grad_(True)
    train(
        model, few.train, few.validation, TRAINING, seed=0, name="a", checkpoint=tmp_path / "checkpoint",
        progress=Progress(quiet=True), curriculum=Watched(), decoys=pool,
    )  # fmt: skip
    assert [len(images) for images in seen] == [25] * 4
    assert all(int((images.flatten(1).amax(1) == 0).sum()) == 10 for images in seen)


def test_a_second_generation_attacks_models_that_were_trained_on_the_first(
    tiny_base: Base, few: Splits, shared: Path
) -> None:
    progress = Progress(quiet=True)
    first = open_pool(PART, tiny_base, PLAIN, few, shared, Progress(quiet=True))
    second = PART.model_copy(update={"generations": 2})
    pool = open_pool(second, tiny_base, PLAIN, few, shared, progress)
    assert torch.equal(pool.images[:60], first.images)  # made before, and kept
    assert len(pool.images) == 90
    assert set(progress.seconds) == {"decoy-2-1", "decoys from decoy-2-1"}
    record = json.loads((shared / "decoy-models" / "decoy-2-1" / "model.json").read_text())
    plain = json.loads((shared / "decoy-models" / "decoy-1" / "model.json").read_text())
    assert record["adapter_digest"] != plain["adapter_digest"]
    labels = few.train.labels[:30].tolist()
    assert pool.labels.tolist() == labels * 3
