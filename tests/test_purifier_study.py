"""The study ``purifier`` on a tiny base: three images, few steps, twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_tests.report.study_document import StudyDocument, Table
from factory.progress import Progress
from factory.purifier.settings import PurifierSettings
from factory.studies.catalogue import run_study
from factory.studies.spec import PurifierSpec, read_spec
from keys.errors import InputError

SPEC = """\
study: purifier
data: {{name: idx, root: {data}, validation: 300}}
base: {{name: {base}}}
images: 3
purifier: {{steps: 30, width: 4, every: 5, recognisable: 15.0}}
attack_steps: 3
aware_images: 2
aware_steps: 2
aware_batch: 1
aware_queries: 5
autoattack_steps: 2
autoattack_targets: 1
autoattack_queries: 5
rank: 4
lora_training: {{epochs: 1, batch_size: 25, learning_rate: 0.01, shift: 0, flip: false, precision: fp32}}
"""
ARM = "arms: [{name: keyed, block_size: 7}]\n"


@pytest.fixture(scope="module")
def spec_path(idx_folder: Path, tiny_base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "purifier.yaml"
    path.write_text(SPEC.format(data=idx_folder, base=tiny_base_path) + ARM)
    return path


@pytest.fixture(scope="module")
def study(spec_path: Path, silent: Progress, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyDocument]:
    out = tmp_path_factory.mktemp("studies")
    return out, run_study(read_spec("purifier", spec_path), "purifier", out, silent, "keyfoundry study purifier")


def rows_of(document: StudyDocument, section: str, title: str) -> list[tuple[object, ...]]:
    found = next(one for one in document.sections if one.title == section)
    return list(next(block for block in found.blocks if isinstance(block, Table) and block.title == title).rows)


@pytest.mark.parametrize("victim", ["the public base", "keyed-1"])
def test_every_attack_is_answered_behind_every_defence(study: tuple[Path, StudyDocument], victim: str) -> None:
    out, document = study
    rows = rows_of(document, f"Accuracy: {victim}", "The same in numbers")
    assert [row[0] for row in rows] == [
        "clean", "PGD", "AutoAttack", "BPDA with EOT", "BPDA on the trajectory", "Square through the purifier",
        "PGD, the first 2 images",
    ]  # fmt: skip
    counts = [cell.n for row in rows for cell in row[1:5]]  # type: ignore[attr-defined]
    assert counts == [3] * 12 + [2] * 16
    quality = rows_of(document, f"Picture quality: {victim}", "Against the clean images")
    assert [row[:2] for row in quality][:2] == [("clean", "no defence"), ("clean", "JPEG")]
    assert quality[0][2:4] == ("no image differs", "3 of 3")
    assert {path.name for path in (out / "purifier").iterdir()} == {"study.md", "study.json", "study.html", "figures"}


def test_a_second_run_makes_nothing_anew(study: tuple[Path, StudyDocument], spec_path: Path, silent: Progress) -> None:
    out, document = study
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert before
    again = run_study(read_spec("purifier", spec_path), "purifier", out, silent, "keyfoundry study purifier")
    assert again.sections == document.sections
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert not list(out.rglob("*.unfinished"))


def test_the_shipped_spec_is_read() -> None:
    spec = read_spec("purifier")
    assert isinstance(spec, PurifierSpec)
    assert spec.arms == ()
    assert 30 <= spec.images <= 50
    assert spec.purifier == PurifierSettings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("purifier: {stepz: 3}\n", "stepz"),
        ("purifier: {steps: 3}\n", "keeps nothing of 3 steps"),
        ("jpeg_quality: 99\n", "jpeg_quality"),
    ],
)
def test_a_faulty_spec_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("study: purifier\n" + text)
    with pytest.raises(InputError, match=said) as caught:
        read_spec("purifier", path)
    assert "\n" not in str(caught.value)
