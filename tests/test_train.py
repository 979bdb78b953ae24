"""The training loop: killed and resumed is the same as not interrupted, a NaN is an error, the seeds are known."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporters.run_onnx import OnnxRuntime
from factory.augment import augment
from factory.base import Base, timm_architecture
from factory.data import Split, Splits
from factory.pretrain import pretrain, write_model_card
from factory.progress import Progress
from factory.recipes.training import TrainingSettings
from factory.seeds import derive_seed
from factory.train import Epoch, accuracy, learning_rate, train
from keys.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = TrainingSettings(epochs=3, batch_size=50)

# A run in a process of its own that dies by SIGKILL in the middle of its second epoch.
KILLED = """
import contextlib, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from factory.data import Split
from factory.progress import Progress
from factory.recipes.training import TrainingSettings
from factory.train import train

class Killer(Progress):
    @contextlib.contextmanager
    def stage(self, name, *, total, unit, done=0):
        with super().stage(name, total=total, unit=unit, done=done) as stage:
            images = 0
            class Counting:
                def advance(self, count=1, note=""):
                    nonlocal images
                    images += count
                    stage.advance(count, note)
                    if images > 1.5 * total / 3:
                        os.kill(os.getpid(), signal.SIGKILL)
            yield Counting()

folder = Path(sys.argv[1])
data = load_file(folder / "data.safetensors")
split = Split(data["images"], data["labels"])
torch.manual_seed(1)
nn = torch.nn
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.Dropout(0.2), nn.Linear(20, 10))
train(model, split, split, TrainingSettings(epochs=3, batch_size=50), seed=4, name="a test",
      checkpoint=folder / "killed.safetensors", progress=Killer(quiet=True))
"""


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.Dropout(0.2), nn.Linear(20, 10))


def run(
    model: nn.Module, split: Split, checkpoint: Path, settings: TrainingSettings = SETTINGS, **extra: int
) -> list[Epoch]:
    return train(
        model, split, split, settings, seed=extra.get("seed", 4), name="a test", checkpoint=checkpoint,
        progress=Progress(quiet=True),
    )  # fmt: skip


@pytest.fixture(scope="module")
def split(tiny_splits: Splits) -> Split:
    return tiny_splits.train.take(430)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_run_killed_in_its_second_epoch_ends_with_the_same_weights(
    split: Split, tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    save_file({"images": split.images.contiguous(), "labels": split.labels.contiguous()}, tmp_path / "data.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=subprocess_environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole, resumed = small_model(), small_model()
    expected = run(whole, split, tmp_path / "whole.safetensors")
    history = run(resumed, split, tmp_path / "killed.safetensors")
    assert same(whole, resumed)
    assert [epoch.loss for epoch in history] == [epoch.loss for epoch in expected]
    assert [epoch.validation_accuracy for epoch in history] == [epoch.validation_accuracy for epoch in expected]
    # It lost the running epoch only: the first one's rate is the killed process's own.
    assert history[0].images_per_second != expected[0].images_per_second
    assert not list(tmp_path.glob(".*.part"))


def test_a_finished_run_is_not_repeated(split: Split, tmp_path: Path) -> None:
    first, second = small_model(), small_model()
    history = run(first, split, tmp_path / "c.safetensors")
    assert run(second, split, tmp_path / "c.safetensors") == history
    assert same(first, second)


def test_another_seed_gives_other_weights(split: Split, tmp_path: Path) -> None:
    first, second = small_model(), small_model()
    run(first, split, tmp_path / "a.safetensors")
    run(second, split, tmp_path / "b.safetensors", seed=5)
    assert not same(first, second)


def test_a_run_disturbed_by_other_random_numbers_is_the_same(split: Split, tmp_path: Path) -> None:
    first, second = small_model(), small_model()
    run(first, split, tmp_path / "a.safetensors")
    torch.rand(17)
    np.random.default_rng().random(3)
    run(second, split, tmp_path / "b.safetensors")
    assert same(first, second)


def test_training_learns_and_counts_right(split: Split, tmp_path: Path) -> None:
    model = small_model()
    history = run(model, split, tmp_path / "c.safetensors", TrainingSettings(epochs=6, batch_size=50, shift=0))
    assert history[-1].loss < history[0].loss
    assert history[-1].validation_accuracy == accuracy(model, split) > 0.4
    with torch.no_grad():
        right = (model(split.images.float() / 255).argmax(1) == split.labels).sum()
    assert accuracy(model, split, batch_size=7) == int(right) / len(split)
    assert not model.training


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_whole_epoch(split: Split, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    good = TrainingSettings(epochs=1, batch_size=50)
    run(small_model(), split, checkpoint, good)
    kept = checkpoint.read_bytes()
    wild = TrainingSettings(epochs=2, batch_size=50, learning_rate=1e38)
    with pytest.raises(InputError, match=r"The loss of a test became (nan|inf) in epoch 2; lower the learning rate"):
        run(small_model(), split, checkpoint, wild)
    assert checkpoint.read_bytes() == kept
    assert len(run(small_model(), split, checkpoint, good)) == 1


def test_a_damaged_checkpoint_and_one_of_another_model_are_refused(split: Split, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    run(small_model(), split, checkpoint)
    with pytest.raises(InputError, match="is damaged or of another run"):
        run(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), split, checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-4])
    with pytest.raises(InputError, match="is damaged or of another run"):
        run(small_model(), split, checkpoint)


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    settings = TrainingSettings(learning_rate=0.8, warmup=0.25)
    rates = [learning_rate(settings, step, 8) for step in range(8)]
    cosine = [0.4 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([0.4, 0.8, *cosine])
    assert learning_rate(settings, 8, 8) == pytest.approx(0)
    assert learning_rate(TrainingSettings(learning_rate=0.8, warmup=0), 0, 1) == pytest.approx(0.8)


def test_seeds_are_the_same_on_every_machine() -> None:
    # SHA-256 of "0\0device-1\0epoch\03", its first eight bytes without the last bit.
    assert derive_seed(0, "device-1", "epoch", 3) == 3_002_968_200_305_196_801
    seeds = {derive_seed(seed, *labels) for seed in (0, 1) for labels in (("a",), ("b",), ("a", "b"), ("a", 1))}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_augmentation_shifts_by_whole_pixels_and_erases_rectangles(split: Split) -> None:
    def of(images: Tensor, **values: object) -> Tensor:
        settings = TrainingSettings.model_validate({"flip": False, "shift": 0, "erase": 0, **values})
        return augment(images, settings, torch.Generator().manual_seed(0))

    images = split.images[:50]
    assert torch.equal(of(images), images)
    flipped = of(images, flip=True)
    assert {bool(torch.equal(a, b)) for a, b in zip(flipped, images, strict=True)} == {True, False}
    for before, after in zip(images, of(images, flip=True), strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(2))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for index, after in enumerate(of(images, shift=2)):
        places = [padded[index, :, y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
        assert any(torch.equal(after, place) for place in places)
    assert not torch.equal(of(images, erase=0.9), images)
    assert of(images, flip=True, shift=2, erase=0.5).dtype == torch.uint8


def test_the_model_card_says_how_the_base_was_made(tiny_splits: Splits, silent: Progress, tmp_path: Path) -> None:
    arguments = {"in_chans": 1, "img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 1}
    architecture = timm_architecture("vit_tiny_patch16_224", tiny_splits.labels, None, arguments)
    settings, out = TrainingSettings(epochs=1, batch_size=100), tmp_path / "base.safetensors"
    result = pretrain(architecture, tiny_splits, settings, seed=12, out=out, progress=silent)
    command = "keyfoundry pretrain --seed 12"
    card = write_model_card(result, tiny_splits, settings, seed=12, out=out, command=command).read_text()
    for fact in ("**Seed** 12", f"`{command}`", tiny_splits.digest, result.base.digest, settings.model_dump_json()):
        assert fact in card
    assert f"{result.test_accuracy.value:.4f}" in card
    # The checkpoint and its card are all that is left; the resumable state is gone.
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "base.md"}


def test_an_unfinished_base_is_gone_on_with_by_its_own_run_only(
    tiny_base: Base, tiny_splits: Splits, silent: Progress, tmp_path: Path
) -> None:
    """Stopped in its second epoch: the same command goes on, another one under the same name begins anew."""

    class Stopping(Progress):
        @contextlib.contextmanager
        def stage(self, name: str, **settings: Any) -> Iterator[Any]:
            with super().stage(name, **settings) as stage:
                yield self
                assert stage

        def advance(self, count: int = 1, note: str = "") -> None:
            if note.startswith("epoch 2"):
                raise KeyboardInterrupt

    out, first = tmp_path / "base.safetensors", TrainingSettings(epochs=2, batch_size=100, learning_rate=0.01)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny_base, tiny_splits, first, seed=1, out=out, progress=Stopping(quiet=True))
    assert not out.exists()
    other = pretrain(
        tiny_base, tiny_splits, first.model_copy(update={"learning_rate": 1e-9}), seed=1, out=out, progress=silent
    )
    begun, gone_on = tiny_base.network.state_dict(), other.base.network.state_dict()
    assert all(torch.allclose(begun[name], gone_on[name], atol=1e-6) for name in begun)
    resumed = pretrain(tiny_base, tiny_splits, first, seed=1, out=out, progress=silent)
    whole = pretrain(tiny_base, tiny_splits, first, seed=1, out=tmp_path / "whole.safetensors", progress=silent)
    assert resumed.base.digest == whole.base.digest
    assert not list(tmp_path.glob("*.training-*"))


def test_a_fleets_seeds_are_recorded(tiny_fleet: Path) -> None:
    document = json.loads((tiny_fleet / "report.json").read_text())
    assert document["seed"] == document["settings"]["seed"] == 0
    seeds = [
        json.loads((tiny_fleet / "work" / "models" / name / "model.json").read_text())["seed"]
        for name in ("device-1", "device-2", "guessed-key", "un-keyed")
    ]
    assert len(set(seeds)) == 4
    assert seeds[2] == derive_seed(0, "guessed-key", "guessed-key")
    for device in ("device-1", "device-2"):
        manifest = json.loads((tiny_fleet / "devices" / device / "package" / "manifest.json").read_text())
        assert manifest["evidence"]["seed"] == 0


def test_what_was_trained_is_what_the_package_answers(tiny_fleet: Path, tiny_splits: Splits) -> None:
    """The last epoch's validation accuracy is that of the exported model, up to an image on the edge."""
    record = json.loads((tiny_fleet / "work" / "models" / "device-1" / "model.json").read_text())
    runtime = OnnxRuntime(tiny_fleet / "devices" / "device-1" / "package" / "model.onnx")
    validation = tiny_splits.validation
    right = runtime.logits(validation.images.numpy().astype(np.float32) / 255).argmax(1) == validation.labels.numpy()
    assert float(right.mean()) == pytest.approx(record["history"][-1]["validation_accuracy"], abs=2 / len(validation))
