"""Studies: specs, the shared zoo, and the studies of keys on a tiny base, twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import clean_difference
from device_tests.report.study_document import StudyDocument, Table
from device_tests.threats import Threat
from device_tests.transfer import TargetJudgement
from factory.progress import Progress
from factory.studies.catalogue import run_study
from factory.studies.spec import read_spec, shipped_studies
from factory.studies.workbench import Workbench
from keys.errors import InputError

SHARED = """\
seed: 3
data: {{name: idx, root: {data}, validation: 300}}
base: {{name: {base}}}
rank: 4
images: 100
momentum_steps: 10
strong_images: 20
strong_steps: 5
strong_targets: 1
lora_training: &quick {{epochs: 1, batch_size: 25, learning_rate: 0.01, shift: 0, flip: false, precision: fp32}}
full_training: *quick
"""
ARMS = "arms: [{name: keyed, block_size: 7, models: 3, in_depth: true}, {name: plain, models: 2}]\n"
KINDS = {
    "table1": "study: table1\nperturbation: linf:8/255\nperturbation_l2: l2:0.5\nensembles: [1, 2]\n"
    "transfer_attacks: [pgd]\nscreened_ensemble: 1\nautoattack_images: 90\nautoattack_targets: 1\n"
    "autoattack_queries: 10\n",
    "collusion": "study: collusion\ncolluding: [1, 2]\nattacks: [pgd]\nfleet_size: 100\n",
    "replication": "study: replication\nqueries: 120\nsources: 1\n",
    "whitebox": "study: whitebox\nepsilon: linf:0.1\nautoattack: false\ncarlini_wagner_steps: 3\n",
    "localized": "study: localized\npixels: [1, 4]\npatches: [0.1]\nqueries: 50\npatch_steps: 3\npatch_images: 64\n",
}


@pytest.fixture(scope="module")
def spec_paths(idx_folder: Path, tiny_base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("specs")
    paths: dict[str, Path] = {}
    for kind, values in KINDS.items():
        paths[kind] = folder / f"{kind}.yaml"
        paths[kind].write_text(values + SHARED.format(data=idx_folder, base=tiny_base_path) + ARMS)
    return paths


@pytest.fixture(scope="module")
def studies(
    spec_paths: dict[str, Path], silent: Progress, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, StudyDocument]]:
    out = tmp_path_factory.mktemp("studies")
    return out, {
        kind: run_study(read_spec(kind, path), kind, out, silent, f"keyfoundry study {kind}")
        for kind, path in spec_paths.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_writes_markdown_json_a_page_and_figures(
    studies: tuple[Path, dict[str, StudyDocument]], kind: str
) -> None:
    out, documents = studies
    assert {path.name for path in (out / kind).iterdir()} == {"study.md", "study.json", "study.html", "figures"}
    assert StudyDocument.model_validate_json((out / kind / "study.json").read_bytes()) == documents[kind]
    text = (out / kind / "study.md").read_text()
    assert "keyed" in text
    assert "plain" in text
    assert any((out / kind / "figures").glob("*.svg"))


def table(document: StudyDocument, title: str) -> dict[str, dict[str, object]]:
    found = next(block for block in document.blocks if isinstance(block, Table) and block.title == title)
    return {str(row[0]): dict(zip(found.columns, row, strict=True)) for row in found.rows}


def test_table1_measures_the_papers_columns_on_every_arm(studies: tuple[Path, dict[str, StudyDocument]]) -> None:
    rows = table(studies[1]["table1"], "Accuracy")
    assert set(rows) == {"plain (the public base)", "keyed", "plain"}
    keyed = rows["keyed"]
    for attacked in ("AutoAttack on the base, L∞ 8/255", "AutoAttack on the guessed key, L∞ 8/255"):
        figure, clean = keyed[attacked], keyed["clean"]
        assert figure.devices == clean.devices == 3  # type: ignore[attr-defined]
        assert figure.mean <= clean.mean  # type: ignore[attr-defined]
    base = rows["plain (the public base)"]
    attacked_base, clean_base = base["AutoAttack on the base, L∞ 8/255"], base["clean"]
    assert attacked_base.value < clean_base.value  # type: ignore[attr-defined]
    every = table(studies[1]["table1"], "Clean accuracy")
    assert set(every) == set(rows)
    assert every["keyed"]["clean"].devices == 3  # type: ignore[attr-defined]
    assert every["keyed"]["clean"].images > keyed["clean"].images  # type: ignore[attr-defined]
    agreement = table(studies[1]["table1"], "Keys and agreement")
    assert agreement["keyed"]["another key"].value < agreement["keyed"]["own key"].value  # type: ignore[attr-defined]
    assert agreement["plain"]["another key"] == "no key"


def test_two_arms_clean_accuracies_have_a_difference(
    studies: tuple[Path, dict[str, StudyDocument]], spec_paths: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    record = tmp_path / "difference.json"
    of = f"{spec_paths['table1']}:"
    arguments = [of + "keyed", of + "plain", "--studies", str(studies[0]), "--json", str(record)]
    assert clean_difference.main([*arguments, "--limit", "1"]) == 0
    assert clean_difference.main([*arguments, "--limit", "-1"]) == 1
    values = json.loads(record.read_text())
    every = table(studies[1]["table1"], "Clean accuracy")
    assert values["first"]["mean"] == every["keyed"]["clean"].mean  # type: ignore[attr-defined]
    found = values["difference"]
    assert found["difference"] == pytest.approx(values["first"]["mean"] - values["second"]["mean"])
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert found["devices"] == [3, 2]
    assert clean_difference.main([of + "keyed", of + "none", "--studies", str(studies[0])]) == 3
    assert "no arm 'none'; there are keyed, plain" in capsys.readouterr().err
    assert clean_difference.main([*arguments[:-1], str(tmp_path / "none" / "difference.json")]) == 3
    assert "There is no folder" in capsys.readouterr().err


def test_collusion_says_why_it_has_no_trend_from_two_points(studies: tuple[Path, dict[str, StudyDocument]]) -> None:
    prose = " ".join(words for section in studies[1]["collusion"].sections for words in section.prose)
    assert "a trend takes 5 numbers of colluding devices" in prose
    rows = table(studies[1]["collusion"], "The same in numbers")
    assert rows["plain"]["2 devices"].reason.startswith("the arm has too few models")  # type: ignore[attr-defined]


def test_white_box_attacks_beat_attacks_from_the_base(studies: tuple[Path, dict[str, StudyDocument]]) -> None:
    white = table(studies[1]["whitebox"], "Accuracy, white-box")["keyed"]["worst of all"]
    black = table(studies[1]["whitebox"], "Accuracy, black-box, from the base")["keyed"]["worst of all"]
    assert white.mean < black.mean  # type: ignore[attr-defined]


def test_replication_counts_what_the_asked_model_was_fooled_by(
    studies: tuple[Path, dict[str, StudyDocument]],
) -> None:
    rows = table(studies[1]["replication"], "Replication")
    assert set(rows) == {"keyed", "plain"}
    for row in rows.values():
        found, on_base = row["found"], row["on the public base"]
        assert 0 < found.successes <= found.n <= 100  # type: ignore[attr-defined]
        assert 0 < on_base.n <= found.successes  # type: ignore[attr-defined]
        assert float(str(row["median distance"]).removeprefix("L2 ")) > 0
    keyed, plain = rows["keyed"]["replicates on another device"], rows["plain"]["replicates on another device"]
    assert keyed.devices == 2  # type: ignore[attr-defined]
    assert plain.n <= rows["plain"]["found"].successes  # type: ignore[attr-defined]
    gained = table(studies[1]["replication"], "Against the controls")["keyed"]["control minus keyed"]
    assert gained.reason.startswith("a difference takes two targets")  # type: ignore[attr-defined]


def test_whoever_knows_of_attractors_asks_in_low_frequencies(
    spec_paths: dict[str, Path], studies: tuple[Path, dict[str, StudyDocument]], silent: Progress, tmp_path: Path
) -> None:
    path = tmp_path / "low.yaml"
    path.write_text(spec_paths["replication"].read_text() + "low_frequencies: true\n")
    document = run_study(read_spec("replication", path), "replication", tmp_path / "out", silent, "a test")
    assert "takes the frequencies that they are made of out" in document.sections[0].prose[0]
    before, after = (table(of, "Replication")["keyed"] for of in (studies[1]["replication"], document))
    assert after["found"].successes > 0  # type: ignore[attr-defined]
    assert after["median distance"] != before["median distance"]


def test_models_with_attractors_also_meet_patterns(
    spec_paths: dict[str, Path], silent: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "perturbation_l2: l2:0.5\n": "",
        "autoattack_images: 90": "autoattack_images: 5",
        "in_depth: true": "in_depth: false",
        "block_size: 7, models: 3": "recipe: {block_size: 7, attractors: {}}, models: 2",
    }
    text = spec_paths["table1"].read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    path = tmp_path / "attracted.yaml"
    path.write_text(text)
    judge, judged = Workbench.judge, list[TargetJudgement]()

    def remembered(*arguments: Any) -> TargetJudgement:
        judged.append(judge(*arguments))
        return judged[-1]

    monkeypatch.setattr(Workbench, "judge", remembered)
    document = run_study(read_spec("table1", path), "table1", tmp_path / "out", silent, "a test")
    assert "All models also met 10 patterns" in document.sections[1].prose[-1]
    met = {one.target: [cell.threat for cell in one.cells if cell.source == "keyless-patterns"] for one in judged}
    assert met == {
        "plain": [], **{name: [Threat.PUBLIC_BASE] * 10 for name in ("plain-1", "plain-2", "keyed-1", "keyed-2")}
    }  # fmt: skip


def test_patches_stand_beside_grey_ones(studies: tuple[Path, dict[str, StudyDocument]]) -> None:
    rows = table(studies[1]["localized"], "Patch against grey patch")
    assert set(rows) == {"keyed", "plain"}
    assert rows["keyed"]["grey patch fools"].devices == 3  # type: ignore[attr-defined]


def test_a_second_run_attacks_nothing_and_finds_the_same(
    studies: tuple[Path, dict[str, StudyDocument]], spec_paths: dict[str, Path], silent: Progress
) -> None:
    out, documents = studies
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = run_study(read_spec("table1", spec_paths["table1"]), "table1", out, silent, "keyfoundry study table1")
    assert again.sections == documents["table1"].sections
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_all_studies_share_one_zoo(studies: tuple[Path, dict[str, StudyDocument]]) -> None:
    models = sorted(path.parent.name.rsplit("-", 1)[0] for path in studies[0].rglob("model.json"))
    assert models == ["keyed-1", "keyed-2", "keyed-3", "plain-1", "plain-2"]


def test_the_shipped_specs_are_read_and_an_unknown_name_is_refused() -> None:
    assert shipped_studies() == (
        "collusion", "conformity", "localized", "purifier", "replication", "table1", "volumization", "whitebox",
    )  # fmt: skip
    assert [read_spec(name).study for name in shipped_studies()] == list(shipped_studies())
    with pytest.raises(InputError, match="no study 'table2'; there are collusion"):
        read_spec("table2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("study: table1\n", "arms"),
        ("study: tabel1\narms: []\n", "tabel1"),
        ("study: table1\narms: [{name: a, models: 1}]\n", "models"),
        ("study: table1\narms: [{name: a}, {name: a}]\n", "two arms have one name"),
        ("study: table1\narms: [{name: ../a}]\n", "an arm's name"),
        ("study: table1\narms: [{name: a}, {name: b, models: 5}]\n", "the arms a and b are one recipe"),
        ("study: collusion\nperturbation: linf:9\narms: [{name: a}]\n", "perturbation"),
        ("study: replication\nsources: 2\narms: [{name: a, models: 2}]\n", "no model left to be a target"),
        ("study: replication\nperturbation: l0:4\narms: [{name: a}]\n", "made for l2 and linf"),
        ("study: collusion\nextra: 1\narms: [{name: a}]\n", "extra"),
    ],
)
def test_a_faulty_spec_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_spec("mine", path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_refuses_an_unknown_study_in_one_sentence(keyfoundry: Callable[..., Any]) -> None:
    done = keyfoundry("study", "table2")
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert (
        "there are collusion, conformity, localized, purifier, replication, table1, volumization, whitebox" in done.err
    )


def test_the_command_prints_the_document(
    keyfoundry: Callable[..., Any], studies: tuple[Path, dict[str, StudyDocument]], spec_paths: dict[str, Path]
) -> None:
    done = keyfoundry("study", "collusion", "--spec", spec_paths["collusion"], "--out", studies[0], "--json", "--quiet")
    assert done.code == 0, done.err
    assert json.loads(done.out)["study"] == "collusion"
