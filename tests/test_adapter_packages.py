"""LoRA-only packages: base and adapter answer as the full package, give its Core ML bytes, and refuse all else."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from device_tests.validate import ONNXRUNTIME, validate
from exporters.adapter.adapter_file import ADAPTER_NAME, read_adapter, write_adapter
from exporters.adapter.coreml_delta import DELTA_NAME, CoreMLDelta, deltas_to_bytes, find_delta, parse_deltas
from exporters.adapter.pair import assemble_coreml, open_base_of
from exporters.adapter.run_adapter import AdapterRuntime
from exporters.golden import GOLDEN_NAME, Golden
from exporters.manifest import Manifest
from exporters.package import inspect_package, open_package, sign_package, write_package
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.to_onnx import export_onnx
from factory.adaptation import adapt
from factory.adapter_package import export_adapter_package, export_base_package, sizes_of
from factory.base import Base, build_network, timm_architecture
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from factory.folding import bake
from factory.packaging import Identity, export_package
from factory.progress import Progress
from factory.recipes.recipe import RecipeSettings
from keys.errors import CheckFailed, InputError, PackageError
from keys.files import sha256_file
from keys.signing import SigningKey, write_public_key

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "depth": 1, "num_heads": 2}
FLEET = "00112233445566ff"
CREATED = datetime(2030, 1, 31, 12, 0, 0, tzinfo=UTC)
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
PROGRAM = "Data/com.apple.CoreML/model.mlmodel"


@dataclass(frozen=True, eq=False)
class Packages:
    """A device's packages, signed, and what they were made of."""

    folder: Path
    base: Base
    recipe: RecipeSettings
    model: ImageClassifier
    images: np.ndarray

    @property
    def shared(self) -> Path:
        return self.folder / "base"

    @property
    def full(self) -> Path:
        return self.folder / "full"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def tiny(classes: int, depth: int = 1) -> Base:
    labels = tuple(f"class {index}" for index in range(classes))
    architecture = timm_architecture("vit_tiny_patch16_224", labels, None, {**SHAPE, "depth": depth})
    return Base(architecture, build_network(architecture))


def trained_alike(base: Base, recipe: RecipeSettings, seed: int = 0) -> ImageClassifier:
    """A keyed model whose trained parameters are random instead of trained."""
    torch.manual_seed(seed)
    vit = adapt(base.network, recipe)
    for parameter in vit.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
            parameter.data.view(-1)[:2] = torch.tensor([1e-9, -3e-8])  # less than float16 has
    side = recipe.block_size or base.patch_size
    order = np.random.default_rng(seed).permutation(side**2)
    shuffle = BlockShuffle(order, channels=1, block_size=side)
    return ImageClassifier(vit, base.architecture.mean, base.architecture.std, shuffle).eval()


def make(
    folder: Path, base: Base, recipe: RecipeSettings, images: np.ndarray, key: SigningKey, *, coreml: bool
) -> Packages:
    model, quiet = trained_alike(base, recipe), Progress(quiet=True)
    made = Packages(folder, base, recipe, model, images)
    formats = ("onnx-fp32", "coreml-fp16", "coreml-fp32") if coreml else ("onnx-fp32",)
    export_base_package(base, recipe, FLEET, images, made.shared, quiet, created=CREATED, formats=formats)
    identity = Identity("camera-01", 2, FLEET, "b" * 64, recipe.model_dump(mode="json"), CREATED)
    if coreml:
        export_package(bake(model), base, identity, images, made.full, quiet)
    else:
        onnx_only(made.full, bake(model), base, identity, images)
    export_adapter_package(model, base, recipe, made.shared, made.full, made.adapter, quiet)
    for package in (made.shared, made.full, made.adapter):
        sign_package(package, key)
    return made


def onnx_only(folder: Path, module: torch.nn.Module, base: Base, identity: Identity, images: np.ndarray) -> None:
    folder.mkdir()
    export_onnx(module, folder / "model.onnx", base.architecture.contract, base.architecture.labels)
    logits = TorchRuntime(module).logits(images[:8].astype(np.float32) / 255)
    (folder / GOLDEN_NAME).write_bytes(Golden(images[:8], logits).to_bytes())
    write_package(
        folder,
        Manifest(
            **identity.fields(), base_digest=base.digest, labels=base.architecture.labels, files={}, evidence={},
            input=base.architecture.contract, tools={},
        ),
    )  # fmt: skip


@pytest.fixture(scope="session")
def images(sample_images: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return sample_images[0][:64, None]


@pytest.fixture(scope="session")
def folded(images: np.ndarray, signing_key: SigningKey, tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The shuffle is folded; ten classes, so that nothing but weight.bin differs."""
    recipe = RecipeSettings(rank=4, alpha=6.0)
    return make(tmp_path_factory.mktemp("folded"), tiny(10, depth=2), recipe, images, signing_key, coreml=True)


@pytest.fixture(scope="session")
def gathered(images: np.ndarray, signing_key: SigningKey, tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Blocks larger than a patch: the permutation stays in the graph; three classes, whose bias lies in the program."""
    recipe = RecipeSettings(rank=4, block_size=14)
    return make(tmp_path_factory.mktemp("gathered"), tiny(3), recipe, images, signing_key, coreml=True)


@pytest.fixture(scope="session")
def reinitialised(images: np.ndarray, signing_key: SigningKey, tmp_path_factory: pytest.TempPathFactory) -> Packages:
    recipe = RecipeSettings(rank=2, reinitialise_patch_embedding=True)
    return make(tmp_path_factory.mktemp("anew"), tiny(3), recipe, images, signing_key, coreml=False)


@pytest.fixture(params=["folded", "gathered", "reinitialised"])
def packages(request: pytest.FixtureRequest) -> Packages:
    return request.getfixturevalue(request.param)


def copied(packages: Packages, folder: Path) -> Packages:
    shutil.copytree(packages.folder, folder)
    return dataclasses.replace(packages, folder=folder)


def signed_again(package: Path, key: SigningKey, **changes: Any) -> None:
    """What a factory would release with other content: the digests are those of the files that lie there."""
    manifest, _ = inspect_package(package)
    write_package(package, dataclasses.replace(manifest, **changes))
    sign_package(package, key)


def tensors_of(packages: Packages) -> dict[str, np.ndarray]:
    return read_adapter((packages.adapter / ADAPTER_NAME).read_bytes())


# What base and adapter give together


def test_base_and_adapter_answer_as_the_full_package(packages: Packages) -> None:
    floats = packages.images.astype(np.float32) / 255
    full = OnnxRuntime(packages.full / "model.onnx").logits(floats)
    together = AdapterRuntime(packages.shared / "model.onnx", packages.adapter / ADAPTER_NAME, threads=1).logits(floats)
    largest = np.abs(full).max()
    assert np.abs(together - full).max() <= 1e-5 * largest
    alone = OnnxRuntime(packages.shared / "model.onnx").logits(floats)
    assert np.abs(alone - full).max() > 0.1 * largest


def test_the_base_package_runs_by_itself_as_the_public_base(packages: Packages, signing_key: SigningKey) -> None:
    floats = packages.images.astype(np.float32) / 255
    architecture = packages.base.architecture
    public = ImageClassifier(packages.base.network, architecture.mean, architecture.std).eval()
    expected = TorchRuntime(public).logits(floats)
    measured = OnnxRuntime(packages.shared / "model.onnx").logits(floats)
    assert np.abs(measured - expected).max() <= 1e-5 * np.abs(expected).max()
    assert validate(packages.shared, signing_key.public_bytes, runtime=ONNXRUNTIME).passed


@pytest.mark.parametrize("which", ["folded", "gathered"])
def test_the_assembled_core_ml_packages_are_those_of_the_full_package(
    which: str, request: pytest.FixtureRequest, signing_key: SigningKey, tmp_path: Path
) -> None:
    packages: Packages = request.getfixturevalue(which)
    adapter = open_package(packages.adapter, signing_key.public_bytes)
    base = open_base_of(adapter, packages.shared, signing_key.public_bytes)
    folders = assemble_coreml(adapter, base, tmp_path / "out")
    assert [folder.name for folder in folders] == ["model.mlpackage", "model-fp32.mlpackage"]
    for folder in folders:
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        expected = packages.full / folder.name
        assert names == sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
        for name in names:
            assert (folder / name).read_bytes() == (expected / name).read_bytes()
        shared = packages.shared / folder.name / WEIGHTS
        assert (folder / WEIGHTS).read_bytes() != shared.read_bytes()
    # The program travels only where small constants in it differ.
    carried = f"model.mlpackage/{PROGRAM}" in adapter.manifest.files
    assert carried == (which == "gathered")
    with pytest.raises(InputError, match="exists already"):
        assemble_coreml(adapter, base, tmp_path / "out")


def test_the_adapter_package_holds_no_weights_of_the_base(packages: Packages) -> None:
    tensors = tensors_of(packages)
    low_rank = [name for name in tensors if ".lora_" in name]
    assert len(low_rank) == 2 * len(packages.base.network.blocks)
    rest = {name.removeprefix("network.") for name in tensors.keys() - set(low_rank)} - {"transform.permutation"}
    assert rest == {"patch_embed.proj.weight", "patch_embed.proj.bias", "head.weight", "head.bias"}
    manifest, _ = inspect_package(packages.adapter)
    full, _ = inspect_package(packages.full)
    assert manifest.kind == "adapter"
    assert manifest.requires == sha256_file(packages.shared / "manifest.json")
    assert (manifest.device_id, manifest.generation, manifest.created) == (full.device_id, 2, full.created)
    sizes = sizes_of(full, manifest)
    content = [
        path
        for path in packages.full.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "manifest.sig")
    ]
    assert sizes.full == sum(path.stat().st_size for path in content)
    assert 0 < sizes.share < 1


def test_the_same_inputs_give_the_same_bytes(folded: Packages, tmp_path: Path) -> None:
    quiet = Progress(quiet=True)
    again = tmp_path / "again"
    export_adapter_package(folded.model, folded.base, folded.recipe, folded.shared, folded.full, again, quiet)
    for path in folded.adapter.iterdir():
        if path.name != "manifest.sig":
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_process_writes_the_same_adapter_file(folded: Packages, tmp_path: Path) -> None:
    np.savez(tmp_path / "tensors.npz", **tensors_of(folded))  # type: ignore[arg-type]
    script = (
        "import sys, numpy as np; from pathlib import Path; from exporters.adapter.adapter_file import write_adapter\n"
        "tensors = dict(np.load(sys.argv[1]))\n"
        "write_adapter(Path(sys.argv[2]), dict(reversed(tensors.items())))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "tensors.npz"), str(tmp_path / ADAPTER_NAME)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / ADAPTER_NAME).read_bytes() == (folded.adapter / ADAPTER_NAME).read_bytes()


def test_a_base_package_that_is_there_is_kept_and_one_of_another_recipe_is_not(
    reinitialised: Packages, tmp_path: Path
) -> None:
    packages, quiet = copied(reinitialised, tmp_path / "copy"), Progress(quiet=True)
    before = (packages.shared / "manifest.json").read_bytes()

    def export(recipe: RecipeSettings) -> None:
        export_base_package(
            packages.base,
            recipe,
            FLEET,
            packages.images,
            packages.shared,
            quiet,
            created=CREATED,
            formats=["onnx-fp32"],
        )

    export(packages.recipe)
    assert (packages.shared / "manifest.json").read_bytes() == before
    assert (packages.shared / "manifest.sig").is_file()
    export(packages.recipe.model_copy(update={"rank": 3}))
    assert (packages.shared / "manifest.json").read_bytes() != before
    with pytest.raises(InputError, match="has another rank than the device"):
        export_adapter_package(
            packages.model, packages.base, packages.recipe, packages.shared, packages.full, tmp_path / "x", quiet
        )
    assert not (tmp_path / "x").exists()


# On the device


def test_the_device_validates_base_and_adapter_without_the_factory(
    folded: Packages, signing_key: SigningKey, tmp_path: Path
) -> None:
    script = """
import json, sys
from datetime import UTC, datetime
from pathlib import Path
from device_tests.validate import ONNXRUNTIME, validate
from exporters.adapter.pair import assemble_coreml, open_base_of
from exporters.package import open_package
adapter, base, key, out = Path(sys.argv[1]), Path(sys.argv[2]), bytes.fromhex(sys.argv[3]), Path(sys.argv[4])
receipt = validate(adapter, key, device_id="camera-01", base=base, runtime=ONNXRUNTIME)
package = open_package(adapter, key)
assemble_coreml(package, open_base_of(package, base, key), out)
print(json.dumps([receipt.to_json(), sorted({name.split(".")[0] for name in sys.modules})]))
"""
    key = signing_key.public_bytes.hex()
    done = subprocess.run(
        [sys.executable, "-c", script, str(folded.adapter), str(folded.shared), key, str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    receipt, used = json.loads(done.stdout)
    assert receipt["passed"], receipt["reasons"]
    assert receipt["runtime"] == "onnxruntime-lora"
    assert receipt["package_digest"] == sha256_file(folded.adapter / "manifest.json")
    assert not {"torch", "timm", "peft", "onnx", "coremltools", "scipy", "pydantic"} & set(used)


def test_the_commands_validate_and_assemble(
    folded: Packages, signing_key: SigningKey, keyfoundry: Callable[..., Any], tmp_path: Path
) -> None:
    key = tmp_path / "signing-key.pub"
    write_public_key(key, signing_key.public_bytes)
    options = ["--base", folded.shared, "--public-key", key]
    done = keyfoundry("device", "validate", folded.adapter, *options, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["golden"]["passed"] is True
    done = keyfoundry("device", "assemble", folded.adapter, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    weights = f"model.mlpackage/{WEIGHTS}"
    assert (tmp_path / "out" / weights).read_bytes() == (folded.full / weights).read_bytes()
    assert "assembled from an adapter package of" in done.err
    done = keyfoundry("device", "validate", folded.adapter, "--public-key", key)
    assert done.code == PackageError.exit_code
    assert "does not run by itself; give its base with --base" in done.err
    done = keyfoundry("device", "assemble", folded.full, *options, "--out", tmp_path / "other")
    assert done.code == InputError.exit_code
    assert "kind model, which needs no assembling" in done.err


def refused(packages: Packages, key: SigningKey, sentence: str, *, base: Path | None = None) -> None:
    with pytest.raises(PackageError, match=sentence):
        validate(packages.adapter, key.public_bytes, base=base or packages.shared, runtime=ONNXRUNTIME)


def test_another_base_is_refused(
    reinitialised: Packages, gathered: Packages, signing_key: SigningKey, tmp_path: Path
) -> None:
    refused(reinitialised, signing_key, "runs on the base package whose manifest has", base=gathered.shared)
    refused(reinitialised, signing_key, "a package of kind model, not base", base=reinitialised.full)
    refused(reinitialised, signing_key, "There is no package folder", base=tmp_path / "none")
    other = copied(reinitialised, tmp_path / "fleet")
    signed_again(other.shared, signing_key, fleet_id="ff" * 8)
    refused(other, signing_key, "belongs to fleet ffffffffffffffff")
    sign_package(other.shared, SigningKey(bytes(32)))
    refused(other, signing_key, "does not fit manifest.json under this public key")
    with pytest.raises(InputError, match="runs by itself; leave out --base"):
        validate(reinitialised.full, signing_key.public_bytes, base=reinitialised.shared, runtime=ONNXRUNTIME)


@pytest.mark.parametrize("fault", ["truncated", "flipped"])
def test_a_damaged_adapter_is_refused(
    fault: str, reinitialised: Packages, signing_key: SigningKey, tmp_path: Path
) -> None:
    packages = copied(reinitialised, tmp_path / "copy")
    file = packages.adapter / ADAPTER_NAME
    data = bytearray(file.read_bytes())
    if fault == "flipped":
        data[len(data) // 2] ^= 1
    file.write_bytes(data[:-10] if fault == "truncated" else data)
    expected = {"truncated": "bytes, not the", "flipped": "was changed: its SHA-256"}
    refused(packages, signing_key, expected[fault])
    if fault == "truncated":  # even where it was signed like this
        file.write_bytes(data[: len(data) // 2])
        signed_again(packages.adapter, signing_key)
        refused(packages, signing_key, "is damaged: onnxruntime cannot read it")


def wider(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same updates in the next rank."""
    a, b = "network.blocks.0.attn.qkv.lora_A", "network.blocks.0.attn.qkv.lora_B"
    return {**tensors, a: np.pad(tensors[a], ((0, 1), (0, 0))), b: np.pad(tensors[b], ((0, 0), (0, 1)))}


def with_nan(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    head = tensors["network.head.bias"].copy()
    head[1] = np.nan
    return {**tensors, "network.head.bias": head}


FAULTS: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = {
    "rank": (wider, r"\[5, 32\], but the base takes tensor\(float\) of \[4, 32\] \(another rank or recipe\)"),
    "fewer": (
        lambda t: {n: v for n, v in t.items() if n != "network.head.bias"},
        "The base has 'network.head.bias' and the",
    ),
    "more": (
        lambda t: {**t, "network.norm.weight": np.ones(32, np.float32)},
        "The adapter has 'network.norm.weight' and the",
    ),
    "nan": (with_nan, "holds NaN or infinite values in 'network.head.bias'"),
    "type": (lambda t: {**t, "network.head.bias": np.arange(3)}, "is int64 of"),
    "half": (lambda t: {**t, "network.head.bias": np.zeros(3, np.float16)}, "holds 'network.head.bias' as float16"),
    "order": (lambda t: {**t, "transform.permutation": np.zeros(196, np.int64)}, "is no permutation"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_even_if_it_is_signed(
    fault: str, gathered: Packages, signing_key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, sentence = FAULTS[fault]
    packages = copied(gathered, tmp_path / "copy")
    tensors = change(tensors_of(packages))
    if fault == "nan":
        with pytest.raises(InputError, match=r"network\.head\.bias holds NaN or infinite values"):
            write_adapter(packages.adapter / ADAPTER_NAME, tensors)
        write_nan(packages.adapter / ADAPTER_NAME, tensors_of(packages))
    else:
        write_adapter(packages.adapter / ADAPTER_NAME, tensors)
    signed_again(packages.adapter, signing_key)
    refused(packages, signing_key, sentence)


def write_nan(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """An adapter file whose head bias begins with a NaN; the writer refuses to make one."""
    values = tensors["network.head.bias"].tobytes()
    data = path.read_bytes()
    assert data.count(values) == 1
    path.write_bytes(data.replace(values, np.float32(np.nan).tobytes() + values[4:]))


def test_a_delta_that_does_not_give_the_factorys_bytes_is_refused_and_nothing_is_written(
    gathered: Packages, signing_key: SigningKey, tmp_path: Path
) -> None:
    packages = copied(gathered, tmp_path / "copy")
    deltas = parse_deltas((packages.adapter / DELTA_NAME).read_bytes())

    def assembled(changed: bytes) -> None:
        (packages.adapter / DELTA_NAME).write_bytes(changed)
        signed_again(packages.adapter, signing_key)
        adapter = open_package(packages.adapter, signing_key.public_bytes)
        base = open_base_of(adapter, packages.shared, signing_key.public_bytes)
        try:
            assemble_coreml(adapter, base, tmp_path / "out")
        finally:
            assert list(tmp_path.iterdir()) == [packages.folder]

    last = deltas[-1]
    fewer = dataclasses.replace(last, slots=last.slots[:-1])
    with pytest.raises(PackageError, match=r"assembled for model-fp32\.mlpackage are not the factory's"):
        assembled(deltas_to_bytes([*deltas[:-1], fewer]))
    slot = dataclasses.replace(last.slots[0], tensor="network.norm.weight")
    with pytest.raises(PackageError, match="which the adapter or the base has not"):
        assembled(deltas_to_bytes([dataclasses.replace(last, slots=(slot,))]))
    elsewhere = dataclasses.replace(last, path="../model.mlpackage")
    with pytest.raises(PackageError, match="The base package has no"):
        assembled(deltas_to_bytes([elsewhere]))
    for damaged in (b"", b"[]", b'{"schema": 1, "packages": [{"slots": [{"offset": -1}]}]}'):
        with pytest.raises(PackageError, match=r"coreml-delta\.json is damaged"):
            assembled(damaged)
    with pytest.raises(PackageError, match="update keyfoundry"):
        assembled(b'{"schema": 2}')


# In the factory


def test_recipes_and_models_without_lora_are_refused(reinitialised: Packages, tmp_path: Path) -> None:
    packages, quiet = reinitialised, Progress(quiet=True)
    full = RecipeSettings(adaptation="full")
    with pytest.raises(InputError, match="need a recipe with adaptation lora, not full"):
        export_base_package(packages.base, full, FLEET, packages.images, tmp_path / "base", quiet, created=CREATED)
    plain = ImageClassifier(packages.base.network, [0.5], [0.5]).eval()
    with pytest.raises(InputError, match="need a model that LoRA adapted"):
        export_adapter_package(
            plain, packages.base, packages.recipe, packages.shared, packages.full, tmp_path / "x", quiet
        )
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_the_full_packages_is_refused(
    reinitialised: Packages, folded: Packages, tmp_path: Path
) -> None:
    quiet = Progress(quiet=True)
    other = trained_alike(reinitialised.base, reinitialised.recipe, seed=1)
    with pytest.raises(CheckFailed, match=r"Base and adapter of camera-01 differ from its full package"):
        export_adapter_package(
            other, reinitialised.base, reinitialised.recipe, reinitialised.shared, reinitialised.full, tmp_path / "x",
            quiet,
        )  # fmt: skip
    other = trained_alike(folded.base, folded.recipe, seed=1)
    with pytest.raises(InputError, match="are no tensor of its adapter"):
        export_adapter_package(other, folded.base, folded.recipe, folded.shared, folded.full, tmp_path / "x", quiet)
    with pytest.raises(InputError, match="has another base than the device"):
        export_adapter_package(
            folded.model, folded.base, folded.recipe, reinitialised.shared, folded.full, tmp_path / "x", quiet
        )
    with pytest.raises(InputError, match="not from packages of kind model and model"):
        export_adapter_package(
            folded.model, folded.base, folded.recipe, folded.full, folded.full, tmp_path / "x", quiet
        )
    assert not list(tmp_path.iterdir())


def test_weights_that_lie_otherwise_have_no_delta(folded: Packages, gathered: Packages) -> None:
    mine, other = ((p.full / "model.mlpackage" / WEIGHTS).read_bytes() for p in (folded, gathered))
    with pytest.raises(InputError, match="LoRA-only is not possible for this model: the weights of m lie otherwise"):
        find_delta("m", mine, other, {})
    with pytest.raises(InputError, match="damaged or of an unknown layout"):
        find_delta("m", b"\1" * 200, b"\1" * 200, {})
    unchanged = find_delta("m", mine, mine, {})
    assert isinstance(unchanged, CoreMLDelta)
    assert unchanged.slots == ()
    assert unchanged.apply(mine, {}) == mine
