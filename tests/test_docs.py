"""The documents against the code: settings, formats, commands, links, and the lock file."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from device_tests.report.document import ReportDocument
from device_tests.threats import Threat
from exporters.formats import FORMATS
from exporters.manifest import Manifest
from exporters.package_rules import SIGNATURE_CONTEXT
from factory.recipes.part import Part
from factory.recipes.recipe import PARTS, RecipeSettings, check_recipe
from factory.recipes.table import NETWORKS, markdown
from factory.settings import FleetSettings, parse
from factory.studies.spec import (
    ArmSettings,
    CollusionSpec,
    ConformitySpec,
    LocalizedSpec,
    PurifierSpec,
    ReplicationSpec,
    Spec,
    Table1Spec,
    VolumizationSpec,
    VolumizedArmSettings,
    WhiteboxSpec,
    read_spec,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of every table under a heading, without the tables' head rows."""
    part = text_of(name).split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^\|.*\n\|[-| ]+\|\n((?:\|.*\n?)+)", part, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for block in blocks for row in block.splitlines()]


def code_blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)


def codes(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of every setting."""
    for name, field in model.model_fields.items():
        if model is RecipeSettings and name in PARTS:
            yield prefix + name, field
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def default_of(field: FieldInfo) -> str:
    """The default as TOML writes it, which for these types is as JSON does."""
    if field.default is None:
        return "unset"
    if isinstance(field.default, Part):
        return f"`{field.default.name}`"
    return f"`{json.dumps(field.default)}`"


def allowed_of(field: FieldInfo) -> str:
    if any(field is RecipeSettings.model_fields[name] for name in PARTS):
        return "a [part](recipes.md)"
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    if kinds == (bool,):
        return "true, false"
    for kind in kinds:
        if get_origin(kind) is Literal:
            return ", ".join(get_args(kind))
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return ", ".join(bounds)


# The fleet file


def test_the_table_of_settings_is_that_of_the_code() -> None:
    written = {codes(row[0])[0]: (row[1], row[2]) for row in table("docs/fleet-file.md", "All settings")}
    actual = {name: (default_of(field), allowed_of(field)) for name, field in settings_of(FleetSettings)}
    wrong = [f"| `{name}` | {' | '.join(actual[name])} |" for name in actual if written.get(name) != actual[name]]
    assert not wrong, "docs/fleet-file.md needs these rows:\n" + "\n".join(wrong)
    assert list(written) == list(actual), "docs/fleet-file.md lists settings that are gone, or in another order"


def test_the_tables_of_parts_are_those_of_the_code() -> None:
    for part in markdown().split("\n\n"):
        assert part.strip() in text_of("docs/recipes.md"), "run python -m factory.recipes.table; paste what it prints"


@pytest.mark.parametrize(
    "name",
    ["README.md", "docs/recipes.md", "docs/key-based-defence.md", "docs/prototype-conformity.md"],
)
def test_the_recipes_in_the_documents_are_read(name: str) -> None:
    (block,) = code_blocks(name, "toml")
    recipe = parse(FleetSettings, tomllib.loads(block), name).recipe
    check_recipe(recipe, NETWORKS["ViT, Eva, Beit"], "the shipped base")


def test_every_setting_is_explained() -> None:
    for row in table("docs/fleet-file.md", "All settings"):
        assert len(row) == 4, row
        assert row[3], row


def test_the_fleet_files_in_the_documents_are_read_and_are_equal() -> None:
    (toml,) = code_blocks("docs/fleet-file.md", "toml")
    (yaml_text,) = code_blocks("docs/fleet-file.md", "yaml")
    settings = parse(FleetSettings, tomllib.loads(toml), "the document")
    assert settings == parse(FleetSettings, yaml.safe_load(yaml_text), "the document")
    assert settings != FleetSettings()


# Studies

NESTED = (
    "data", "base", "lora_training", "full_training", "training", "arms", "surrogate", "surrogate_training", "purifier",
)  # fmt: skip


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("Settings of every study", Spec), ("An arm", ArmSettings), ("`table1`", Table1Spec),
        ("`collusion`", CollusionSpec), ("`replication`", ReplicationSpec), ("`whitebox`", WhiteboxSpec),
        ("`localized`", LocalizedSpec),
        ("`volumization`", VolumizationSpec), ("An arm of `volumization`", VolumizedArmSettings),
        ("`conformity`", ConformitySpec),
        ("`purifier`", PurifierSpec),
    ],
)  # fmt: skip
def test_the_tables_of_a_spec_are_those_of_the_code(heading: str, model: type[BaseModel]) -> None:
    shared = Spec.model_fields if issubclass(model, Spec) and model is not Spec else {}
    fields = {name: field for name, field in model.model_fields.items() if name not in (*NESTED, *shared, "study")}
    actual = [[f"`{name}`", "needed" if field.is_required() else default_of(field)] for name, field in fields.items()]
    written = [row[:2] for row in table("docs/studies.md", heading) if row[0] != "`study`"]
    assert written == actual
    assert all(len(row) == 3 and row[2] for row in table("docs/studies.md", heading))


def test_the_spec_in_the_document_is_read(tmp_path: Path) -> None:
    (toml,) = code_blocks("docs/studies.md", "toml")
    (tmp_path / "spec.toml").write_text(toml)
    spec = read_spec("mine", tmp_path / "spec.toml")
    assert [(arm.name, arm.block_size) for arm in spec.arms] == [("keyed", 7), ("un-keyed", None)]


# Formats


def test_the_table_of_the_manifest_is_that_of_the_code() -> None:
    fields = [codes(row[0])[0] for row in table("docs/package-format.md", "The manifest")]
    assert fields == ["schema", *(field.name for field in dataclasses.fields(Manifest))]


def test_the_signature_context_is_written_down() -> None:
    assert SIGNATURE_CONTEXT.endswith(b"\0")
    assert f"`{SIGNATURE_CONTEXT[:-1].decode()}`, one zero byte" in text_of("docs/package-format.md")


def test_the_parity_limits_are_those_of_the_code() -> None:
    rows = table("docs/package-format.md", "Golden images")
    limits = {one.title: one.limits for one in FORMATS.values()}
    assert {row[0]: (float(row[1]), float(row[2])) for row in rows} == {
        name: (limit.difference, limit.top1) for name, limit in limits.items()
    }


def test_the_table_of_the_report_is_that_of_the_code() -> None:
    rows = table("docs/report.md", "Fields of `report.json`")
    names = [field.alias or name for name, field in ReportDocument.model_fields.items()]
    assert [codes(row[0])[0] for row in rows] == names


def test_every_threat_of_the_code_is_in_the_threat_model() -> None:
    rows = {row[0]: row[2] for row in table("docs/threat-model.md", "Who attacks")}
    for threat in Threat:
        if threat is not Threat.UNKEYED_CONTROL:
            assert "measured" in rows[threat.code] or "attacked" in rows[threat.code]
            assert ("not counted" not in rows[threat.code]) == threat.in_rule
    known = {threat.code for threat in Threat}
    assert all("**not measured**" in here for code, here in rows.items() if code not in known)


# Commands, versions, links


def test_ci_pre_commit_and_the_guide_run_the_same_commands() -> None:
    hooks = [hook for repo in yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    commands = [hook["entry"] for hook in hooks]
    assert commands == [line for line in text_of(".ci/run").splitlines() if line.startswith("uv run ")]
    assert "\n".join(commands) + "\n" in code_blocks("CONTRIBUTING.md", "sh")


def test_the_changelog_has_this_version() -> None:
    assert f"\n## [{PROJECT['project']['version']}] - " in text_of("CHANGELOG.md")


def test_decision_records_are_numbered_listed_and_complete() -> None:
    records = sorted((DOCS / "adr").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    listed = re.findall(r"\]\((\d{4}-[^)]+)\)", text_of("docs/adr/README.md"))
    assert listed == [path.name for path in records]
    for path in records:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.name[:4]}: ")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Alternatives", "Consequences"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(path: Path) -> set[str]:
    """The anchors that Markdown viewers give to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The lock file


def locked_requirements() -> list[str]:
    lines = text_of("requirements.lock").replace("\\\n", "").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_the_lock_file_names_no_host_and_no_path_and_has_a_hash_for_everything() -> None:
    text = text_of("requirements.lock")
    assert "://" not in text
    assert not re.search(r"(^|[\s=])[~.]*/\w", text), "an absolute or relative path"
    assert not re.search(r"^\s*-", text.replace("\\\n", ""), re.MULTILINE), "an option such as an index"
    for line in locked_requirements():
        assert re.fullmatch(r"[a-z0-9-]+==[^\s;]+( ;[^-]+)?(\s+--hash=sha256:[0-9a-f]{64})+\s*", line), line[:80]


def test_the_lock_file_satisfies_every_bound() -> None:
    versions = dict(line.split()[0].split("==") for line in locked_requirements())
    extras = PROJECT["project"]["optional-dependencies"]
    bounds = [*PROJECT["project"]["dependencies"], *extras["coreml"], *extras["factory"]]
    for bound in map(Requirement, [*bounds, *PROJECT["tool"]["uv"]["constraint-dependencies"]]):
        version = versions.get(canonicalize_name(bound.name))
        assert version is not None, f"requirements.lock lacks {bound.name}; CONTRIBUTING.md says how to refresh it"
        assert bound.specifier.contains(version), f"requirements.lock has {bound.name} {version}, not {bound.specifier}"
