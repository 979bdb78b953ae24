"""The volumization study: its spec, every attack on tiny networks trained here, resuming, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.attacks.momentum import MomentumFGSM
from device_tests.report.study_document import Curve, StudyDocument, Table
from device_tests.report.study_render import write_study
from exporters.measured import NotMeasured
from factory.progress import Progress
from factory.studies.catalogue import run_study
from factory.studies.spec import VolumizationSpec, VolumizedArmSettings, read_spec
from factory.studies.volumization import AVERAGED, WORST, open_volumization, volumization
from factory.studies.volumized_arms import arm_trainer
from factory.studies.volumized_judgement import TrainedArm
from keys.errors import InputError

SPEC = """\
study: volumization
seed: 3
data: {{name: idx, root: {data}, validation: 300}}
image_size: 28
patch_size: 14
images: 60
queries: 12
pixels: [1, 30, 260]
patches: [0.05, 0.25]
patch_steps: 8
patch_images: 64
pgd_steps: 4
autoattack_steps: 3
autoattack_targets: 1
autoattack_queries: 10
order_queries: 15
training: {{epochs: 1, batch_size: 25, learning_rate: 0.005, shift: 0, flip: false, precision: fp32}}
train_images: 700
"""
ARMS = """\
arms:
  - {name: undefended, network: vgg}
  - {name: lgs, network: vgg, defence: lgs}
  - {name: by-entropy, network: vgg, defence: volumized, order: entropy}
  - {name: raster, network: vgg, defence: volumized, order: raster, models: 2}
"""
PLAIN = """\
arms:
  - {name: undefended, network: vgg}
  - {name: jpeg, network: vgg, defence: jpeg}
"""


class Stack(nn.Module):
    """Four patches, darkest first or row by row, and one layer over all of them: a volumized network in small."""

    def __init__(self, sorts: bool) -> None:
        super().__init__()
        self.sorts = sorts
        self.layer = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))

    def order(self, images: torch.Tensor) -> torch.Tensor:
        if not self.sorts:
            return torch.arange(4).expand(len(images), -1)
        return nn.functional.avg_pool2d(images, 14).flatten(1).argsort(dim=1, stable=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.unfold(images, 14, stride=14).transpose(1, 2)
        ordered = patches.gather(1, self.order(images)[:, :, None].expand(-1, -1, 196))
        return self.layer(ordered.flatten(1))

    def extra_repr(self) -> str:
        return f"sorts={self.sorts}"


class Trainer:
    """The function that the study is given: trains in seconds and counts how often it is asked."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = torch.from_numpy(images[:700, None]).float() / 255, torch.from_numpy(labels[:700])
        self.asked: list[tuple[str, str, int]] = []

    def __call__(self, arm: VolumizedArmSettings, index: int) -> TrainedArm:
        self.asked.append((arm.name, arm.defence, index))
        with torch.random.fork_rng():
            torch.manual_seed(index)
            model: nn.Module = Stack(arm.order == "entropy")
            if arm.defence == "none":
                model = nn.Sequential(nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for step in range(84):
                part = slice(50 * (step % 14), 50 * (step % 14) + 50)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(self.images[part]), self.labels[part].long()).backward()
                optimizer.step()
        if not isinstance(model, Stack):
            return TrainedArm(model.eval())
        return TrainedArm(model.eval(), order=model.order, order_flip=MomentumFGSM(6) if model.sorts else None)


@pytest.fixture(scope="module")
def spec(idx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> VolumizationSpec:
    return written_spec(tmp_path_factory.mktemp("spec") / "spec.yaml", idx_folder, ARMS)


@pytest.fixture(scope="module")
def run(
    spec: VolumizationSpec, sample_images: tuple[np.ndarray, np.ndarray], silent: Progress,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Trainer, StudyDocument]:  # fmt: skip
    out, trainer = tmp_path_factory.mktemp("studies"), Trainer(*sample_images)
    return out, trainer, judged(out, spec, trainer, silent)


def written_spec(path: Path, data: Path, arms: str) -> VolumizationSpec:
    path.write_text(SPEC.format(data=data) + arms)
    spec = read_spec("volumization", path)
    assert isinstance(spec, VolumizationSpec)
    return spec


def judged(out: Path, spec: VolumizationSpec, trainer: Trainer, silent: Progress) -> StudyDocument:
    with open_volumization(out, spec, silent) as bench:
        return volumization(bench, trainer, "keyfoundry study volumization")


def rows(document: StudyDocument, title: str) -> list[dict[str, Any]]:
    found = next(block for block in document.blocks if isinstance(block, Table) and block.title == title)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def share(figure: Any) -> float:
    return figure.mean if hasattr(figure, "mean") else figure.value


def test_every_arm_is_judged_and_a_defence_of_the_input_has_the_undefended_network_behind_it(
    run: tuple[Path, Trainer, StudyDocument],
) -> None:
    _, trainer, document = run
    assert trainer.asked == [
        ("undefended", "none", 1), ("lgs", "none", 1), ("by-entropy", "volumized", 1), ("raster", "volumized", 1),
        ("raster", "volumized", 2),
    ]  # fmt: skip
    first = rows(document, "Accuracy under 1 pixel")
    assert [(row["arm"], row["places"]) for row in first] == [
        (arm, places) for arm in ("undefended", "lgs", "by-entropy", "raster") for places in ("drawn", "searched")
    ]
    assert [base.name for base in document.bases] == ["undefended-1", "lgs-1", "by-entropy-1", "raster-1"]
    assert document.bases[0].parameters == document.bases[1].parameters


def test_the_worst_of_five_stands_beside_the_average_and_is_never_above_it(
    run: tuple[Path, Trainer, StudyDocument],
) -> None:
    document = run[2]
    for title, count in (("N pixels in numbers", 4 * 2 * 3), ("Patches in numbers", 4 * 2 * 2)):
        found = rows(document, title)
        assert len(found) == count
        for row in found:
            assert share(row["accuracy, worst of five"]) <= share(row["accuracy, averaged"])
            assert share(row["β, worst of five"]) <= share(row["β, averaged"])
            assert row["δ, worst of five"].difference <= row["δ, averaged"].difference
    assert any(share(row["β, worst of five"]) < share(row["β, averaged"]) - 0.1 for row in found)
    assert "flatters every defence" in document.sections[0].prose[0]
    assert "worst of five" in document.conclusion[-1]


def test_the_measures_agree_with_each_other(run: tuple[Path, Trainer, StudyDocument]) -> None:
    clean = {row["arm"]: row["clean"] for row in rows(run[2], "Accuracy under 1 pixel")}
    for row in rows(run[2], "N pixels in numbers"):
        delta, accuracy = row["δ, averaged"], row["accuracy, averaged"]
        assert delta.difference == pytest.approx(share(accuracy) - share(clean[row["arm"]]))
        one = row["arm"] != "raster"
        assert delta.devices == ((1, 1) if one else (2, 2))
        if one:
            assert row["β, averaged"].n == clean[row["arm"]].successes
    largest = {row["N"]: share(row["accuracy, worst of five"]) for row in rows(run[2], "N pixels in numbers")[:3]}
    assert largest["260 pixels"] < largest["1 pixel"]


def test_figure_3_has_both_protocols(run: tuple[Path, Trainer, StudyDocument]) -> None:
    curves = [block for block in run[2].blocks if isinstance(block, Curve)]
    assert len(curves) == 8
    for answer in (AVERAGED, WORST):
        assert sum(curve.title.endswith(answer) for curve in curves) == 4
    assert curves[0].xs == (1, 30, 260)
    assert curves[4].xs == (5, 25)
    assert all(len(curve.series) == 4 for curve in curves)


def test_the_whole_image_is_attacked_by_gradient_by_bpda_and_by_its_order(
    run: tuple[Path, Trainer, StudyDocument],
) -> None:
    whole = {row["arm"]: row for row in rows(run[2], "Accuracy under attacks of the whole image")}
    for row in whole.values():
        assert share(row["PGD"]) < share(row["clean"])
    assert isinstance(whole["undefended"]["BPDA-PGD"], NotMeasured)
    assert share(whole["lgs"]["BPDA-PGD"]) < share(whole["lgs"]["clean"])
    assert share(whole["undefended"]["AutoAttack"]) < share(whole["undefended"]["clean"])
    # A defence with a gradient of its own meets AutoAttack by that one too, and has to withstand both.
    for attacked in ("lgs-1-autoattack", "lgs-1-autoattack-bpda"):
        assert any(path.name == attacked for path in run[0].rglob("*"))
    assert isinstance(whole["undefended"]["order search"], NotMeasured)
    assert share(whole["by-entropy"]["order search"]) < share(whole["by-entropy"]["clean"])
    assert share(whole["by-entropy"]["order flip"]) < share(whole["by-entropy"]["clean"])
    assert isinstance(whole["raster"]["order flip"], NotMeasured)
    # A fixed order is the control: the same search moves nothing.
    assert whole["raster"]["moved by the order search"] == "0.0 % of the patches"
    assert whole["by-entropy"]["moved by the order search"] != "0.0 % of the patches"


def test_a_second_run_makes_no_attack_again_and_says_the_same(
    run: tuple[Path, Trainer, StudyDocument], spec: VolumizationSpec, silent: Progress
) -> None:
    out, trainer, document = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = judged(out, spec, trainer, silent)
    assert again.sections == document.sections
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert len([path for path in before if path.parent.name == "patches"]) == 5 * 2


def test_it_is_written_as_every_study_is(run: tuple[Path, Trainer, StudyDocument], tmp_path: Path) -> None:
    write_study(tmp_path / "study", run[2], {})
    assert StudyDocument.model_validate_json((tmp_path / "study" / "study.json").read_bytes()) == run[2]
    text = (tmp_path / "study" / "study.md").read_text()
    assert "flatters every defence" in text
    assert len(list((tmp_path / "study" / "figures").glob("*.svg"))) >= 8


def test_the_catalogue_runs_the_plain_arms_and_trains_each_network_once(
    idx_folder: Path, tmp_path: Path, silent: Progress
) -> None:
    spec = written_spec(tmp_path / "spec.yaml", idx_folder, PLAIN).model_copy(
        update={"images": 12, "pixels": (1,), "patches": (0.1,), "places": ("drawn",), "queries": 3, "patch_steps": 2}
    )
    document = run_study(spec, "volumization", tmp_path / "studies", silent, "keyfoundry study volumization")
    assert {path.name for path in (tmp_path / "studies" / "volumization").iterdir()} == {
        "study.md", "study.json", "study.html", "figures",
    }  # fmt: skip
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 1
    assert share(rows(document, "Accuracy under 1 pixel")[0]["clean"]) > 0.2
    again = run_study(spec, "volumization", tmp_path / "studies", silent, "keyfoundry study volumization")
    assert again.sections == document.sections


@pytest.mark.parametrize("data", ["fashion-mnist", "cifar10"])
def test_the_specs_of_the_whole_data_sets_have_the_papers_rows_and_the_controls(data: str) -> None:
    spec = read_spec("mine", Path(__file__).parent.parent / "docs" / "results" / f"volumization-{data}.toml")
    assert isinstance(spec, VolumizationSpec)
    assert [arm.order or arm.defence for arm in spec.arms] == [
        "none", "lgs", "mutual-information", "kl", "entropy", "psnr", "raster", "key",
    ]  # fmt: skip
    assert (spec.image_size // spec.patch_size) ** 2 == 4
    assert spec.pixels[-1] == 2 * spec.patch_size**2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pixels: [1, 400]\n", "at most 2·p² = 392"),
        ("pixels: [4, 1]\n", "pixels ascend"),
        ("pixels: []\n", "pixels ascend"),
        ("patches: [0.3]\n", "at most 0.25"),
        ("patch_size: 5\n", "do not tile"),
        ("places: [drawn, drawn]\n", "one kind twice"),
        ("arms: [{name: a, defence: volumized}]\n", "names its order"),
        ("arms: [{name: a, order: kl}]\n", "names its order"),
        ("arms: [{name: a, defence: volumized, order: mi}]\n", "order"),
        ("arms: [{name: a, network: tower}]\n", "'vgg', 'resnet' or 'efficientnet'"),
        ("arms: [{name: a}, {name: a, defence: lgs}]\n", "two arms have one name"),
    ],
)
def test_a_faulty_spec_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    given = {"patch_size": "14", "arms": "[{name: a}]"}
    given |= dict([text.strip().split(": ", 1)])
    path = tmp_path / "spec.yaml"
    path.write_text("study: volumization\n" + "".join(f"{name}: {value}\n" for name, value in given.items()))
    with pytest.raises(InputError) as caught:
        read_spec("mine", path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_volumized_arms_are_trained_by_their_recipe_and_attacked_through_their_order(
    idx_folder: Path, tmp_path: Path, silent: Progress
) -> None:
    arms = "arms: [{name: mse, defence: volumized, order: mse}, {name: key, defence: volumized, order: key}]\n"
    spec = written_spec(tmp_path / "spec.yaml", idx_folder, arms).model_copy(
        update={"train_images": 100, "images": 6, "pixels": (1,), "patches": (0.1,), "places": ("drawn",), "queries": 2,
                "patch_steps": 1, "pgd_steps": 2, "order_queries": 2}
    )  # fmt: skip
    with open_volumization(tmp_path / "studies", spec, silent) as bench:
        sorting, keyed = (arm_trainer(bench)(arm, 1) for arm in spec.arms)
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert sorting.order is not None
    assert keyed.order is not None
    assert len(sorting.order(images).unique(dim=0)) > 1
    assert len(keyed.order(images).unique(dim=0)) == 1
    assert sorting.order_flip is not None
    attacked = sorting.order_flip.generate(sorting.model, images, torch.zeros(8).long(), epsilon=0.03, seed=0)
    assert 0 < (attacked - images).abs().max() <= 0.0301
