"""The base: which ones are taken, and a clear sentence for every one that is not."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from factory.base import (
    Base,
    build_network,
    load_base,
    read_architecture,
    read_checkpoint,
    save_checkpoint,
    timm_architecture,
)
from factory.data import FASHION_MNIST_LABELS
from factory.settings import BaseSettings
from keys.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
LABELS = tuple("abc")


def settings(name: object, **values: object) -> BaseSettings:
    return BaseSettings.model_validate({"name": str(name), **values})


def test_a_checkpoint_comes_back_bit_for_bit(tiny_base: Base, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_checkpoint(tiny_base, path, {"seed": 5})
    base = load_base(settings(path), tiny_base.architecture.labels, 0)
    assert base.architecture == tiny_base.architecture
    assert base.digest == tiny_base.digest
    assert base.patch_size == 7
    assert not base.network.training
    assert read_architecture(settings(path)) == base.architecture
    with safe_open(str(path), "pt") as file:
        assert json.loads(file.metadata()["keyfoundry"])["notes"] == {"seed": 5}


def test_the_tiny_base_has_learnt_something_and_knows_its_data(tiny_base: Base) -> None:
    """All other tests rest on it: its statistics are the training images' own, and its input is 28×28 grey."""
    assert tiny_base.architecture.mean == pytest.approx((0.286,), abs=0.02)
    assert tiny_base.architecture.std == pytest.approx((0.353,), abs=0.02)
    assert tiny_base.architecture.contract.shape == (1, 28, 28)
    assert tiny_base.architecture.labels == tuple("0123456789")


def test_one_changed_weight_changes_the_digest(tiny_base_path: Path) -> None:
    base = read_checkpoint(tiny_base_path)
    before = base.digest
    with torch.no_grad():
        base.network.head.bias[0] += 1e-6
    assert Base(base.architecture, base.network).digest != before


def test_random_weights_come_from_the_seed() -> None:
    small = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 1}
    architecture = timm_architecture("vit_tiny_patch16_224", LABELS, None, small)
    weights = [build_network(architecture, seed=seed).state_dict()["patch_embed.proj.weight"] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_timm_name_gets_a_head_for_the_data_and_its_own_statistics() -> None:
    base = load_base(settings("vit_tiny_patch16_224", random_weights=True, image_size=32), LABELS, 0)
    assert base.network.num_classes == 3
    assert base.architecture.contract.shape == (3, 32, 32)
    assert base.architecture.mean == base.architecture.std == (0.5, 0.5, 0.5)
    assert "bicubic" in base.architecture.contract.resize
    assert "32" in base.architecture.contract.resize


def test_the_size_may_be_given_as_an_argument_of_the_model() -> None:
    assert timm_architecture("vit_tiny_patch16_224", LABELS, None, {"img_size": 96}).contract.shape == (3, 96, 96)
    assert timm_architecture("vit_tiny_patch16_224", LABELS, None).contract.shape == (3, 224, 224)


def test_an_unknown_name_is_refused_with_names_close_to_it() -> None:
    with pytest.raises(InputError, match=r"nor a model timm knows \(close to it: .*vit_base_patch16"):
        load_base(settings("vit_base_patch16", random_weights=True), LABELS, 0)
    with pytest.raises(InputError, match="nor a model timm knows, nor one of cnn6, cnn6_flat, bottleneck_resnet"):
        load_base(settings("no-such-model", random_weights=True), LABELS, 0)


def test_a_name_with_a_typing_mistake_is_refused_with_names_close_to_it() -> None:
    with pytest.raises(InputError, match=r"close to it: .*vit_tiny_patch16_224"):
        load_base(settings("vit_tinny_patch16_224", random_weights=True), LABELS, 0)


@pytest.mark.parametrize("name", ["resnet18", "mixer_s32_224", "swin_tiny_patch4_window7_224"])
def test_what_is_no_vit_is_a_base_without_patches(name: str) -> None:
    base = load_base(settings(name, random_weights=True), LABELS, 0)
    assert base.default_block_size == 4
    with pytest.raises(InputError, match=f"Base {name} has no patch embedding by one convolution of the image"):
        _ = base.patch_size


def test_a_size_that_the_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="Patches of 16 pixels do not tile images of 28×28"):
        load_base(settings("vit_tiny_patch16_224", random_weights=True, image_size=28), LABELS, 0)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickled_checkpoint_is_refused_unread(tmp_path: Path, ending: str) -> None:
    trap = tmp_path / f"base{ending}"
    trap.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "sprung").encode() + b"'\ntR.")
    with pytest.raises(InputError, match=r"is a pickled checkpoint; give a .safetensors file"):
        load_base(settings(trap), LABELS, 0)
    with pytest.raises(InputError, match="is a pickled checkpoint"):
        read_architecture(settings(trap))
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_with_a_safe_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(pickle.dumps({"weights": [1.0]}))
    with pytest.raises(InputError, match="is not a base written by 'keyfoundry pretrain', or it is damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 7, 300, -1])
def test_a_truncated_checkpoint_is_refused(tiny_base_path: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(tiny_base_path.read_bytes()[:kept])
    with pytest.raises(InputError, match="or it is damaged"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The base .*no\.safetensors does not exist"):
        read_checkpoint(tmp_path / "no.safetensors")


def edited(base: Path, path: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other metadata."""
    with safe_open(str(base), "pt") as file:
        metadata = json.loads(file.metadata()["keyfoundry"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – not a dict
    save_file(tensors, path, {"keyfoundry": json.dumps(metadata | changes)})
    return path


def test_weights_that_are_not_finite_are_refused(tiny_base_path: Path, tmp_path: Path) -> None:
    base = read_checkpoint(tiny_base_path)
    with torch.no_grad():
        base.network.head.weight[0, 0] = float("nan")
    save_checkpoint(base, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="holds weights that are not finite"):
        read_checkpoint(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arguments": {"img_size": 28, "patch_size": 14, "in_chans": 1}}, "do not fit its architecture"),
        ({"labels": ["one", "two"]}, "do not fit its architecture"),
        ({"contract": {"channels": 1}}, "or it is damaged"),
        ({"contract": {"channels": 1, "height": 56, "width": 56, "resize": "?"}}, "does not take 1×56×56 images"),
        ({"contract": {"channels": 3, "height": 28, "width": 28, "resize": "?"}}, "does not take 3×28×28 images"),
        ({"mean": None}, "or it is damaged"),
        ({"name": "resnet18", "arguments": {}}, "'resnet18' does not take 1×28×28 images"),
        ({"name": "resnet18", "arguments": {"in_chans": 1}}, "do not fit its architecture resnet18"),
        ({"name": "no-such-model"}, "nor a model timm knows"),
    ],
)
def test_metadata_that_does_not_fit_the_weights_is_refused(
    tiny_base_path: Path, tmp_path: Path, changes: dict, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        read_checkpoint(edited(tiny_base_path, tmp_path / "edited.safetensors", **changes))


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is not a base written by 'keyfoundry pretrain'"):
        read_checkpoint(tmp_path / "other.safetensors")


def test_another_number_of_classes_than_the_data_is_refused(tiny_base_path: Path) -> None:
    with pytest.raises(InputError, match="has 10 classes, but the data set has 3"):
        load_base(settings(tiny_base_path), LABELS, 0)


def test_the_same_number_of_classes_with_other_names_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    """Packages would carry wrong labels; a data set that does not name its classes takes the base's."""
    named = Base(replace(tiny_base.architecture, labels=FASHION_MNIST_LABELS), tiny_base.network)
    save_checkpoint(named, tmp_path / "named.safetensors")
    other = (*FASHION_MNIST_LABELS[:-1], "Hat")
    with pytest.raises(InputError, match="name their classes differently: 'Ankle boot' and 'Hat'"):
        load_base(settings(tmp_path / "named.safetensors"), other, 0)
    base = load_base(settings(tmp_path / "named.safetensors"), tuple("0123456789"), 0)
    assert base.architecture.labels == FASHION_MNIST_LABELS


def test_pretrained_weights_without_a_network_are_one_clear_sentence(
    tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    """In a process of its own, because the hub's library reads its environment when it is imported."""
    environment = subprocess_environment | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "TORCH_HOME": str(tmp_path),
    }
    script = (
        "from factory.base import load_base\nfrom factory.settings import BaseSettings\n"
        "from keys.errors import InputError\n"
        "try:\n    load_base(BaseSettings(name='vit_tiny_patch16_224'), ('a', 'b'), 0)\n"
        "except InputError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment | {"PATH": os.environ["PATH"]}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "Base 'vit_tiny_patch16_224' could not be created: " in done.stdout
    assert "Where there is no network, give a checkpoint by path, or --random-weights for a dry run." in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
