"""Attractors: what they add by hand and on real images, what a search by answers then finds, packages, refusals."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from device_tests.attacks.hop_skip_jump import HopSkipJump
from device_tests.threats import Threat
from exporters.export import ExportPlan, Templates, export
from exporters.formats import FORMATS
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from factory.adapter_package import export_base_package
from factory.attackers import who_attacks
from factory.attractors import Attracted, Attractors, LowPass, highest_frequencies, without_attractors
from factory.base import Base, load_base
from factory.classifier import ImageClassifier
from factory.data import Splits
from factory.device_model import DeviceModel, make_device_model, public_model
from factory.folding import bake
from factory.keyed_transforms.key_ensemble import KeyEnsemble
from factory.keyless_patterns import draw_patterns, keyless_patterns
from factory.progress import Progress
from factory.recipes.attractors import AttractorsPart
from factory.recipes.part import Trait
from factory.recipes.recipe import RecipeSettings, check_recipe
from factory.settings import BaseSettings, FleetSettings
from keys.derive import DeviceKey, fixed_guess
from keys.errors import InputError
from tests.conftest import Finished

KEY, OTHER = fixed_guess("device"), fixed_guess("other")
GREY, COLOUR = (1, 28, 28), (3, 32, 32)


def attractors_of(key: DeviceKey | None = KEY, shape: tuple[int, int, int] = GREY, block: int = 7) -> Attractors:
    return AttractorsPart().build(key, shape, block, 10)


def directions(attractors: Attractors, reach: float = 1.0) -> Tensor:
    """The unit directions of the whole image, n×C×H×W."""
    block = attractors.carriers.shape[2]
    signs = attractors.signs.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, None] * reach
    rows, columns = attractors.signs.shape[1:]
    return attractors.carriers.repeat(1, 1, rows, columns) * signs


def hardened() -> torch.nn.Module:
    """The shipped hardened base."""
    base = load_base(BaseSettings(name="hardened"), tuple(map(str, range(10))), 0)
    return bake(public_model(base, RecipeSettings()))


@pytest.fixture(scope="module")
def real(sample_images: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    """600 real images float32 N×1×28×28 in [0, 1], of 8 bits, and their labels."""
    pixels, labels = sample_images
    return torch.from_numpy(pixels[:600, None]).float() / 255, torch.from_numpy(labels[:600].astype(np.int64))


@pytest.fixture(scope="module")
def few(tiny_splits: Splits) -> Splits:
    train = tiny_splits.train.take(100)
    return Splits("few", train, tiny_splits.validation.take(50), tiny_splits.test.take(50), tiny_splits.labels)


def make(base: Base, splits: Splits, folder: Path, *, attracted: bool, key: DeviceKey | None = KEY) -> DeviceModel:
    values = {"rank": 2, "training": {"epochs": 1, "batch_size": 50}} | ({"attractors": {}} if attracted else {})
    return make_device_model(
        base, key, RecipeSettings.model_validate(values), splits, name="a", identity=["fleet", "a", 1], seed=1,
        folder=folder, shared=folder / "shared", progress=Progress(quiet=True),
    )  # fmt: skip


# What they add


@pytest.mark.parametrize(("shape", "block"), [(GREY, 7), (COLOUR, 8)])
def test_an_image_moved_along_an_attractor_gets_the_square_at_its_class(
    shape: tuple[int, int, int], block: int
) -> None:
    attractors = attractors_of(shape=shape, block=block)
    along = directions(attractors)
    assert torch.allclose(along.flatten(1).norm(dim=1), torch.ones(20), atol=1e-5)
    # Orthogonal to what is flat, so that brightness does nothing.
    assert float(attractors(torch.full((1, *shape), 0.5)).abs().max()) < 1e-6
    distance = 0.6
    added = attractors(0.5 + distance * along[3:4])[0]
    others = torch.stack([along[index].flatten() @ along[3].flatten() for index in range(20)])
    expected = (16 * (others * distance) ** 2) @ (attractors.aims / 16)
    assert torch.allclose(added, expected, atol=1e-4)
    assert int(added.argmax()) == int(attractors.aims[3].argmax())
    assert float(added.max()) == pytest.approx(16 * 0.6**2, rel=0.05)


def test_real_images_and_what_is_done_to_them_without_the_key_are_left_nearly_as_they_are(
    real: tuple[Tensor, Tensor],
) -> None:
    """Noise, and patterns of the carriers' frequencies whose energy nobody aimed at this key."""
    network, images = hardened(), real[0]
    aimless = draw_patterns(GREY, 7, len(images), 0) * 8 / 255
    noisy = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    keyed = [attractors_of(fixed_guess(name)) for name in ("a", "b", "c", "d")]
    for moved, least in ((images, 0.98), ((images + noisy).clamp(0, 1), 0.95), ((images + aimless).clamp(0, 1), 0.97)):
        with torch.no_grad():
            logits = network(moved)
            same = [(logits + attractors(moved)).argmax(1) == logits.argmax(1) for attractors in keyed]
        assert float(torch.stack(same).float().mean()) > least


def test_the_farthest_image_stays_within_float16_and_has_a_slope() -> None:
    attractors = attractors_of()
    along = directions(attractors)
    extreme = (along > 0).float().requires_grad_()
    added = attractors(extreme)
    # Beyond the reach logits grow with the distance itself.
    farthest = float(along[0].clamp(min=0).sum())
    assert float(added[0].detach().max()) >= 16 * (2 * farthest - 1) > 16 * farthest
    assert float(added.detach().max()) < 65504
    assert torch.isfinite(added.detach().half()).all()
    (gradient,) = torch.autograd.grad(added.max(dim=1).values.sum(), extreme)
    assert float(gradient.flatten(1).norm(dim=1).min()) > 16


def test_a_key_means_the_same_attractors_for_ever_and_another_key_others() -> None:
    one, other = attractors_of(), attractors_of(OTHER)
    digest = hashlib.sha256()
    for tensor in (one.carriers, one.signs, one.aims):
        digest.update(np.round(tensor.numpy(), 4).astype("<f4").tobytes())
    assert digest.hexdigest() == "2126c00e54d90ec3caf4929ee369bcf60476bd234c1f29c3b0c8d0c89bdaac5a"
    across = directions(one).flatten(1) @ directions(other).flatten(1).T
    assert float(across.abs().max()) < 0.7
    assert float(across.square().mean().sqrt()) < 0.2
    # Without a key every model has the same.
    assert torch.equal(attractors_of(None).signs, attractors_of(None).signs)
    assert not torch.equal(attractors_of(None).signs, one.signs)


# Training and answers


def test_training_is_the_same_with_and_without(tiny_base: Base, few: Splits, tmp_path: Path) -> None:
    plain = make(tiny_base, few, tmp_path, attracted=False)
    assert isinstance(plain.classifier, ImageClassifier)
    assert plain.classifier.attractors is None
    trained = (tmp_path / "model.json").read_bytes()
    attracted = make(tiny_base, few, tmp_path, attracted=True)
    assert (tmp_path / "model.json").read_bytes() == trained
    assert attracted.adapter_digest == plain.adapter_digest
    images = few.test.images.float() / 255
    with torch.no_grad():
        expected = plain.classifier(images) + attractors_of()(images)
        assert torch.allclose(attracted.classifier(images), expected, atol=1e-5)
        baked = bake(attracted.classifier)
        assert isinstance(baked, Attracted)
        assert torch.allclose(baked(images), expected, atol=1e-4)


def test_what_answers_lead_to_fools_the_device_alone(real: tuple[Tensor, Tensor]) -> None:
    """One network with the attractors of two keys: without them every image would fool both."""
    network = hardened()
    asked, other = (Attracted(network, attractors_of(key)).eval() for key in (KEY, OTHER))
    images, labels = real[0][:16], real[1][:16]
    with torch.no_grad():
        kept = (asked(images).argmax(1) == labels) & (other(images).argmax(1) == labels)
        attack = HopSkipJump(queries=700, smallest=True)
        found = attack.generate(asked, images[kept], labels[kept], epsilon=10.0, seed=0)
        fooled = asked(found).argmax(1) != labels[kept]
        replicated = (other(found).argmax(1) != labels[kept]) & fooled
    assert int(fooled.sum()) >= 10
    assert int(replicated.sum()) <= 0.25 * int(fooled.sum())


def test_a_filter_takes_out_what_carriers_are_made_of_and_nothing_else(real: tuple[Tensor, Tensor]) -> None:
    attractors = attractors_of(shape=COLOUR, block=8)
    low = LowPass(torch.nn.Identity(), 3, 8).eval()
    colour = real[0][:8].repeat(1, 3, 1, 1)
    images = torch.nn.functional.interpolate(colour, size=(32, 32)) * 0.6 + 0.2
    moved = images + 0.3 * directions(attractors)[:8]
    assert torch.allclose(low(moved), low(images), atol=1e-5)
    assert torch.allclose(low(low(images)), low(images), atol=1e-5)
    components = torch.einsum("nchw,kchw->nk", low(moved), directions(attractors))
    assert float(components.abs().max()) < 1e-4
    smooth = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    assert torch.allclose(low(smooth), smooth, atol=0.02)


def test_gradients_are_those_of_the_whole_device() -> None:
    """Whoever attacks the device itself is shown its attractors: nothing is masked."""
    attractors = attractors_of().double()
    images = (0.5 + 0.3 * directions(attractors)[:2]).requires_grad_()
    assert torch.autograd.gradcheck(attractors, images, nondet_tol=0.0)
    (gradient,) = torch.autograd.grad(attractors(images).max(dim=1).values.sum(), images)
    assert float(gradient.abs().max()) > 0


def test_whoever_attacks_others_leaves_attractors_out() -> None:
    network = torch.nn.Identity()
    attracted = {name: Attracted(network, attractors_of(fixed_guess(name))) for name in ("a", "b", "c")}
    sources = who_attacks(
        torch.nn.Identity(), {"guess": attracted["a"]}, attracted, {"control": attracted["b"]}, colluding=[2],
        twins={"a": attracted["a"]},
    )  # fmt: skip
    held = {source.id: source for source in sources}
    assert len(held) == len(sources)
    for name in ("guess", "a", "b", "c", "control"):
        assert held[name].model is network
    assert not any(isinstance(part, Attractors) for part in held["2-devices-1"].model.modules())
    assert [name for name in ("a", "b", "c", "control") if held["a"].is_judged_on(name)] == ["b", "c", "control"]
    # A device itself is attacked as it is, and so is a model made with its own key.
    for name in ("whole-a", "true-key-a"):
        assert held[name].model is attracted["a"]
        assert held[name].threat is Threat.TARGET_ITSELF
        assert held[name].targets == ("a",)
    assert held["whole-control"].targets == ("control",)


def test_members_of_a_key_ensemble_lose_their_attractors_too() -> None:
    network = torch.nn.Flatten()
    ensemble = KeyEnsemble([Attracted(network, attractors_of(key)) for key in (KEY, OTHER)])
    alone = without_attractors(ensemble)
    assert not any(isinstance(part, Attractors) for part in alone.modules())
    assert any(isinstance(part, Attractors) for part in ensemble.modules())
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone(images), images.flatten(1))
    assert without_attractors(network) is network


# Patterns that need no key


def test_patterns_are_drawn_without_looking_at_a_model() -> None:
    shape = (3, 16, 16)
    images = torch.full((4, *shape), 0.5)
    source, attacks = keyless_patterns(torch.nn.Identity(), 8)
    assert (source.threat, source.differentiable, source.targets) == (Threat.PUBLIC_BASE, False, None)
    assert [attack.name for attack in attacks] == [f"pattern-{number:02}" for number in range(1, 11)]
    made = [attack.generate(source.model, images, torch.zeros(4), epsilon=0.125, seed=3) for attack in attacks]
    for one in made:
        assert torch.equal(one, one[:1].expand_as(one))
        assert set((one - 0.5).unique().tolist()) == {-0.125, 0.125}
    assert not any(torch.equal(*two) for two in itertools.combinations(made, 2))
    again = attacks[0].generate(source.model, images, torch.zeros(4), epsilon=0.125, seed=4)
    assert not torch.equal(again, made[0])
    # Half of a pattern's energy and more lies in the quarter of the frequencies that attractors are made of.
    waves = torch.from_numpy(highest_frequencies(8).astype(np.float32)).unsqueeze(1).repeat(3, 1, 1, 1)
    parts = functional.conv2d(made[0] - 0.5, waves, stride=8, groups=3)
    assert float(parts.square().sum()) > 0.5 * float((made[0] - 0.5).square().sum())


def test_the_judge_of_a_fleet_with_attractors_counts_them(
    tiny_settings: Path, tmp_path: Path, keyfoundry: Callable[..., Finished]
) -> None:
    settings = yaml.safe_load(tiny_settings.read_text())
    settings |= {"devices": 1, "export": {"formats": ["onnx-fp32"]}}
    # So strong, and so near, that hardly any pattern can miss.
    settings["recipe"]["attractors"] = {"count": 96, "reach": 0.05, "gain": 1}
    settings["verification"]["images"] = 60
    path = tmp_path / "fleet.yaml"
    path.write_text(json.dumps(settings))
    finished = keyfoundry("provision", "--config", path, "--out", tmp_path / "fleet")
    assert finished.code == 0, finished.err
    report = json.loads((tmp_path / "fleet" / "report.json").read_text())
    assert "no model is attacked" in json.dumps(next(s for s in report["sources"] if s["id"] == "keyless-patterns"))
    page = (tmp_path / "fleet" / "report.html").read_text()
    assert "pattern-10" in page
    for target in report["targets"]:
        cells = [cell for cell in target["cells"] if cell["source"] == "keyless-patterns"]
        assert [cell["threat"] for cell in cells] == ["T0"] * 10
        fooled = max(cell["fooled"]["successes"] for cell in cells)
        assert fooled > 0.3 * cells[0]["fooled"]["n"]
        assert target["worst_case"]["successes"] >= fooled


# Packages


def test_a_package_answers_as_the_model_and_comes_from_a_template(
    tiny_base: Base, few: Splits, real: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    told: list[str] = []
    templates = Templates(tmp_path / "templates", {"fleet_id": "0" * 16}, told.append)
    formats = ("onnx-fp32", "onnx-int8", "coreml-fp32", "coreml-fp16")
    plan = ExportPlan(tiny_base.architecture.contract, tiny_base.architecture.labels, formats)
    first, second = (
        make(tiny_base, few, tmp_path / name, attracted=True, key=key) for name, key in (("a", OTHER), ("b", KEY))
    )
    for name in ("first", "second", "full"):
        (tmp_path / name).mkdir()
    export(bake(first.classifier), tmp_path / "first", plan, templates)
    baked = bake(second.classifier)
    done = export(baked, tmp_path / "second", plan, templates)
    assert told == []
    assert done.from_template
    assert dict(export(baked, tmp_path / "full", plan, None).digests) == dict(done.digests)
    assert told == []
    along = directions(attractors_of())
    images = torch.cat([real[0][:32], (real[0][:8] + along[:8]).clamp(0, 1)])
    images = torch.round(images * 255) / 255
    with torch.no_grad():
        reference = second.classifier(images).numpy()
    for name in formats:
        path = tmp_path / "second" / FORMATS[name].path
        runtime = OnnxRuntime(path) if path.suffix == ".onnx" else CoreMLEvaluator(path)
        difference = np.abs(runtime.logits(images.numpy()) - reference).max() / np.abs(reference).max()
        assert difference <= FORMATS[name].limits.difference


# Refusals


def test_what_cannot_be_is_refused_in_a_sentence(tiny_base: Base, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    for block in (1, 2, 3):
        with pytest.raises(InputError, match=f"of which blocks of {block} pixels have too few; take 4 or more"):
            AttractorsPart().build(KEY, (1, 12, 12), block, 10)
        with pytest.raises(InputError, match="have too few"):
            LowPass(torch.nn.Identity(), 1, block)
    with pytest.raises(InputError, match=r"may add 6.9e\+04 to a logit, which float16 does not hold"):
        AttractorsPart(gain=1600).build(KEY, GREY, 7, 10)
    with pytest.raises(ValidationError, match="the base's own graph, which has no attractors"):
        FleetSettings.model_validate({"recipe": {"attractors": {}}, "export": {"adapters": True}})
    recipe = RecipeSettings.model_validate({"attractors": {}, "transform": {"kind": "volumize"}})
    with pytest.raises(InputError, match="attractors 'high-frequency' needs images as its input"):
        check_recipe(recipe, frozenset({Trait.VOLUMES, Trait.PATCH_EMBEDDING, Trait.ATTENTION}), "vgg3d")
    recipe = RecipeSettings.model_validate({"attractors": {}})
    images = (real[0][:8] * 255).to(torch.uint8).numpy()
    with pytest.raises(InputError, match="has no attractors; send full packages"):
        export_base_package(
            tiny_base, recipe, "0" * 16, images, tmp_path / "base", Progress(quiet=True),
            created=datetime(2030, 1, 1, tzinfo=UTC),
        )  # fmt: skip
