"""The conformity study on a tiny base: every table, adaptive attacks, verdicts, a second run from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from device_tests.report.study_document import StudyDocument, Table
from factory.progress import Progress
from factory.studies.catalogue import run_study
from factory.studies.order import gain, order_verdict
from factory.studies.spec import ConformityArm, ConformitySpec, read_spec
from keys.errors import InputError

SPEC = """\
study: conformity
seed: 3
data: {{name: idx, root: {data}, validation: 300}}
base: {{name: {base}}}
surrogate: {{name: shipped}}
images: 30
training_images: 1000
epsilon: linf:0.1
further: [linf:0.05]
carlini_wagner_steps: 3
autoattack_steps: 3
autoattack_targets: 1
autoattack_queries: 10
strong_images: 20
strong_steps: 5
strong_targets: 1
full_training: {{epochs: 1, batch_size: 50, learning_rate: 0.003, shift: 0, flip: false, precision: fp32}}
arms:
- {{name: softmax, adaptation: full, tables: [training, depths]}}
- {{name: last, adaptation: full, tables: [depths], objective: {{kind: prototype-conformity, depths: [1.0]}}}}
- name: both
  adaptation: full
  tables: [training, depths]
  objective: {{kind: prototype-conformity, depths: [0.5, 1.0], inference: nearest-prototype}}
- name: both-fgsm
  adaptation: full
  objective: {{kind: prototype-conformity, depths: [0.5, 1.0]}}
  adversarial: {{kind: fgsm, epsilon_low: 0.05, epsilon_high: 0.2}}
"""


@pytest.fixture(scope="module")
def study(
    idx_folder: Path, tiny_base_path: Path, silent: Progress, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ConformitySpec, StudyDocument]:
    out = tmp_path_factory.mktemp("conformity")
    path = out / "spec.yaml"
    path.write_text(SPEC.format(data=idx_folder, base=tiny_base_path))
    spec = read_spec("conformity", path)
    assert isinstance(spec, ConformitySpec)
    return out, spec, run_study(spec, "conformity", out, silent, "keyfoundry study conformity")


def rows(document: StudyDocument, title: str) -> dict[str, dict[str, object]]:
    found = next(block for block in document.blocks if isinstance(block, Table) and block.title == title)
    return {str(row[0]): dict(zip(found.columns, row, strict=True)) for row in found.rows}


def test_the_papers_tables_have_autoattack_beside_every_attack(
    study: tuple[Path, ConformitySpec, StudyDocument],
) -> None:
    document = study[2]
    for ball in ("L∞ 0.1", "L∞ 0.05"):
        for words in ("white-box", "black-box"):
            table = rows(document, f"Table 2, {words}, {ball}")
            assert set(table) == {"softmax", "both", "both-fgsm"}
            assert list(table["both"])[1:] == ["no attack", "FGSM", "BIM", "C&W", "MIM", "PGD", "AutoAttack"]
    white, black = (rows(document, f"Table 2, {words}, L∞ 0.1")["softmax"] for words in ("white-box", "black-box"))
    assert white["PGD"].value < white["no attack"].value  # type: ignore[attr-defined]
    assert white["PGD"].value < black["PGD"].value  # type: ignore[attr-defined]
    adaptive = rows(document, "Table 3, L∞ 0.1")
    assert set(adaptive) == {"both", "both-fgsm"}
    line = adaptive["both-fgsm"]
    assert line["PGD, joint loss"].value <= line["no attack"].value  # type: ignore[attr-defined]
    assert line["worst of all"].value <= line["AutoAttack"].value  # type: ignore[attr-defined]
    for attack in ("PGD", "AutoAttack"):
        matrix = rows(document, f"Table 6, {attack}, L∞ 0.1")
        assert list(matrix) == ["surrogate", "softmax", "both", "both-fgsm"]
        assert list(matrix["both"])[1:] == ["surrogate", "softmax", "both", "both-fgsm"]
    assert rows(document, "Table 6, PGD, L∞ 0.1")["softmax"]["softmax"] == white["PGD"]
    assert list(rows(document, "Table 7, L∞ 0.1")) == ["softmax", "last", "both"]


def test_verdicts_are_in_words(study: tuple[Path, ConformitySpec, StudyDocument]) -> None:
    said = " ".join(study[2].conclusion)
    for attack in ("PGD", "AutoAttack"):
        assert f"Under {attack} at L∞ 0.1 the order of Table 7" in said
    assert "both keeps, white-box at L∞ 0.1, under PGD" in said


def test_a_second_run_trains_and_attacks_nothing(study: tuple[Path, ConformitySpec, StudyDocument]) -> None:
    out, spec, document = study
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = run_study(spec, "conformity", out, Progress(quiet=True), "keyfoundry study conformity")
    assert again.sections == document.sections
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_an_order_is_judged_by_intervals() -> None:
    rank = np.arange(300)
    weak, middle, strong = rank < 30, rank < 150, rank < 280
    assert order_verdict([weak, middle, strong]) == "holds"
    # A step that cannot be told from none, and one the other way within its interval.
    assert order_verdict([weak, middle, rank < 151, strong]) == "holds in trend"
    assert order_verdict([weak, strong, rank < 278]) == "holds in trend"
    assert order_verdict([weak, strong, middle]) == "does not hold"
    assert order_verdict([middle, middle]) == "does not hold"
    by, low, high = gain(weak, middle)
    assert by == pytest.approx(0.4)
    assert low < by < high
    with pytest.raises(ValueError, match="two or more"):
        order_verdict([weak])


def test_a_surrogate_for_other_images_is_refused(
    study: tuple[Path, ConformitySpec, StudyDocument], tmp_path: Path
) -> None:
    spec = study[1]
    values = spec.model_dump(mode="json") | {"surrogate": {"name": "vit_tiny_patch16_224", "random_weights": True}}
    with pytest.raises(InputError, match="takes images of another shape than the base"):
        run_study(ConformitySpec.model_validate(values), "other", tmp_path, Progress(quiet=True), "keyfoundry study")


def test_an_arms_recipe_may_hold_its_objective_and_may_not_say_it_twice() -> None:
    pgd = {"kind": "pgd", "steps": 2}
    recipe = {"objective": {"kind": "prototype-conformity"}, "adversarial": pgd}
    arm = ConformityArm.model_validate({"name": "a", "adaptation": "full", "recipe": recipe})
    spec = ConformitySpec(study="conformity", arms=(arm,))
    found = spec.arm(arm).recipe
    assert found.objective.name == "prototype-conformity"
    assert found.adversarial is not None
    assert found.adversarial.steps == 2
    for beside in ({"objective": {"kind": "cross-entropy"}}, {"adversarial": pgd}):
        twice = ConformityArm.model_validate({"name": "a", "recipe": recipe, **beside})
        with pytest.raises(ValueError, match="twice: in its recipe and beside it"):
            ConformitySpec(study="conformity", arms=(twice,))


def test_a_base_of_volumes_is_refused(tmp_path: Path) -> None:
    base, arms = {"name": "vgg3d", "random_weights": True}, [{"name": "a", "adaptation": "full"}]
    spec = ConformitySpec.model_validate({"study": "conformity", "base": base, "arms": arms})
    with pytest.raises(InputError, match="takes volumes, which the study volumization is for"):
        run_study(spec, "volumes", tmp_path, Progress(quiet=True), "keyfoundry study")
