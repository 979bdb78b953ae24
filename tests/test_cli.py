"""The commands: each explains itself with an example, prints JSON where it prints a table, and can be completed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factory.base import EMBEDDED, Base, read_checkpoint
from keys.errors import KeyfoundryError, exit_codes

Run = Callable[..., Any]
ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    "provision", "pretrain", "finetune", "export", "verify", "report", "study", "purify", "info", "diff", "keys init",
    "keys list", "keys rotate", "device assemble", "device validate",
]  # fmt: skip


def listed(help_text: str) -> set[str]:
    return set(re.findall(r"^  ([a-z]+)  ", help_text.split("Commands:")[1], re.MULTILINE))


def test_the_commands_are_those_that_are_tested(keyfoundry: Run) -> None:
    top = listed(keyfoundry("--help").out)
    assert top == {command.split()[0] for command in COMMANDS}
    for group in ("keys", "device"):
        below = {command.split()[1] for command in COMMANDS if command.startswith(f"{group} ")}
        assert listed(keyfoundry(group, "--help").out) == below


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_has_an_example_with_options_it_knows(keyfoundry: Run, command: str) -> None:
    result = keyfoundry(*command.split(), "--help")
    assert result.code == 0
    usage, options = result.out.split("Options:")
    example = re.search(r"Examples?:\s*(.*)", usage, re.DOTALL)
    assert example is not None
    text = example.group(1).split("Arguments:")[0]
    calls = text.split("keyfoundry ")[1:]
    assert calls
    for call in calls:
        words = shlex.split(call)
        assert " ".join(words).startswith(command)
        assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", options))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_prints_a_table_prints_json_too(keyfoundry: Run, command: str) -> None:
    assert "--json" in keyfoundry(*command.split(), "--help").out


def test_the_version_is_the_distributions(keyfoundry: Run) -> None:
    result = keyfoundry("--version")
    assert (result.code, result.out) == (0, f"keyfoundry {importlib.metadata.version('keyfoundry')}\n")


def test_without_a_command_the_help_is_shown(keyfoundry: Run) -> None:
    result = keyfoundry()
    assert "Usage: keyfoundry" in result.out + result.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(shell: str, subprocess_environment: dict[str, str]) -> None:
    environment = subprocess_environment | {"_KEYFOUNDRY_COMPLETE": f"source_{shell}"}
    command = [sys.executable, "-m", "factory.cli.main"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "keyfoundry" in done.stdout
    assert "_KEYFOUNDRY_COMPLETE" in done.stdout


def test_a_command_is_completed(subprocess_environment: dict[str, str]) -> None:
    words = {"COMP_WORDS": "keyfoundry pro", "COMP_CWORD": "1", "_KEYFOUNDRY_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "factory.cli.main"], cwd=ROOT, env=subprocess_environment | words, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["provision"]


def test_every_error_has_its_own_exit_code() -> None:
    table = exit_codes()
    codes = [error.exit_code for error in [KeyfoundryError, *KeyfoundryError.__subclasses__()]]
    assert len(set(codes)) == len(codes)
    assert set(table) == {0, 2, 130, *codes}
    assert all(table.values())


def test_help_starts_without_the_factorys_libraries(subprocess_environment: dict[str, str]) -> None:
    script = (
        "import sys\nfrom factory.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(' '.join({'torch', 'timm', 'coremltools', 'onnx', 'pydantic', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=subprocess_environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stderr.strip() == ""


# JSON, and what the commands do


def parsed(result: Any) -> Any:
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_fleet_speaks_json(fleet_copy: Path, keyfoundry: Run, tiny_settings: Path) -> None:
    where = ["--out", fleet_copy, "--json"]
    report = json.loads((fleet_copy / "report.json").read_text())
    assert parsed(keyfoundry("report", *where))["fleet_id"] == report["fleet_id"]
    made = parsed(keyfoundry("provision", "--config", tiny_settings, "--quiet", *where))
    assert made["fleet_id"] == report["fleet_id"]
    assert {target["id"] for target in made["targets"]} == {"device-1", "device-2", "un-keyed"}
    assert parsed(keyfoundry("verify", "--quiet", *where))["targets"] == made["targets"]
    tuned = parsed(keyfoundry("finetune", "--quiet", *where))
    assert [row["device_id"] for row in tuned] == ["device-1", "device-2"]
    assert tuned[0]["trainable_parameters"] > 0
    exported = parsed(keyfoundry("export", "device-2", "--quiet", *where))
    (row,) = exported
    assert (row["device_id"], row["package"]) == ("device-2", str(fleet_copy / "devices" / "device-2" / "package"))
    assert set(row["formats"]) == {"onnx-fp32", "coreml-fp16", "coreml-fp32"}
    assert row["signed"]
    assert row["bytes"] > 100_000
    assert parsed(keyfoundry("keys", "list", *where))["devices"] == {"device-1": 1, "device-2": 1}
    assert parsed(keyfoundry("keys", "rotate", "device-2", *where)) == {"device_id": "device-2", "generation": 2}
    assert parsed(keyfoundry("keys", "list", *where))["devices"] == {"device-1": 1, "device-2": 2}


def test_a_fleet_begins_with_a_preset_unless_its_base_is_named(
    keyfoundry: Run, tiny_settings: Path, tiny_base_path: Path, tmp_path: Path
) -> None:
    """Each run is refused for its data, after its settings were resolved and before anything is trained."""
    where = ["--data", "idx", "--data-root", tmp_path / "nowhere", "--out", tmp_path / "fleet", "--quiet"]
    for options, said in (
        (["--preset", "soft"], "no preset 'soft'; there are attractors, hardened, plain"),
        (["--preset", "plain", "--config", tiny_settings], "--preset and --config are both fleet files"),
        (["--block-size", 5], "Block size 5"),
        (["--base", tiny_base_path], "nowhere"),
        ([], "nowhere"),
    ):
        refused = keyfoundry("provision", *options, *where)
        assert refused.code == 3
        assert said in refused.err


def test_the_same_commands_speak_plainly(fleet_copy: Path, keyfoundry: Run) -> None:
    where = ["--out", fleet_copy]
    assert "device-1: released" in keyfoundry("report", *where).out
    assert "generation 1" in keyfoundry("keys", "list", *where).out
    assert "is at generation 2" in keyfoundry("keys", "rotate", "device-1", *where).out
    package = fleet_copy / "devices" / "device-2" / "package"
    assert "nothing was verified" in keyfoundry("info", package).out
    verified = keyfoundry("info", package, "--public-key", fleet_copy / "signing-key.pub").out
    assert "signature and digests verified" in verified
    assert "device-2" in verified


def test_a_package_speaks_json(tiny_fleet: Path, keyfoundry: Run) -> None:
    package, key = tiny_fleet / "devices" / "device-1" / "package", tiny_fleet / "signing-key.pub"
    shown = parsed(keyfoundry("info", package, "--public-key", key, "--json"))
    assert shown["manifest"] == json.loads((package / "manifest.json").read_text())
    assert shown["state"] == "signature and digests verified"


def test_a_device_validates_and_writes_its_receipt(
    tiny_fleet: Path, keyfoundry: Run, tiny_splits: Any, tmp_path: Path
) -> None:
    package, key = tiny_fleet / "devices" / "device-1" / "package", tiny_fleet / "signing-key.pub"
    images, labels = tiny_splits.test.images.numpy()[:50], tiny_splits.test.labels.numpy()[:50]
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    command = ["device", "validate", package, "--public-key", key, "--device-id", "device-1"]
    receipt = parsed(keyfoundry(*command, "--data", tmp_path / "data.npz", "--json"))
    assert receipt["passed"] is True
    result = keyfoundry(*command, "--receipt", tmp_path / "receipt.json")
    assert (result.code, result.out) == (0, "")
    assert "device-1: valid with onnxruntime" in result.err
    assert json.loads((tmp_path / "receipt.json").read_text())["passed"] is True
    strict = ["--data", tmp_path / "data.npz", "--minimum-accuracy", "1"]
    failed = keyfoundry(*command, *strict, "--receipt", tmp_path / "failed.json")
    assert failed.code == 6
    assert failed.err.splitlines()[-1].startswith("Error: ")
    assert json.loads((tmp_path / "failed.json").read_text())["passed"] is False
    unknown = keyfoundry(*command, "--runtime", "tflite")
    assert unknown.code == 3
    assert "onnxruntime" in unknown.err


def test_a_vault_is_made_and_says_where_its_secret_lies(keyfoundry: Run, tmp_path: Path) -> None:
    made = parsed(keyfoundry("keys", "init", "--out", tmp_path / "a", "--json"))
    assert len(made["fleet_id"]) == 16
    assert made["vault"] == str(tmp_path / "a" / "secrets" / "vault.json")
    result = keyfoundry("keys", "init", "--out", tmp_path / "b")
    passphrase = tmp_path / "b" / "secrets" / "passphrase"
    assert f"generated into {passphrase}" in result.out
    assert passphrase.read_text().strip() not in result.out + result.err
    assert (tmp_path / "b" / "signing-key.pub").is_file()


def test_a_base_is_pretrained(keyfoundry: Run, idx_folder: Path, tmp_path: Path) -> None:
    model = ["patch_size=14", "embed_dim=16", "depth=1", "num_heads=1"]
    arguments = [word for pair in model for word in ("--model-arg", pair)]
    out = tmp_path / "base.safetensors"
    where = ["--data", "idx", "--data-root", idx_folder, "--validation", 300, "--out", out]
    result = keyfoundry("pretrain", *where, *arguments, "--epochs", 1, "--json")
    assert parsed(result)["checkpoint"] == str(out)
    card = out.with_suffix(".md").read_text()
    assert "`keyfoundry pretrain --data idx" in card
    assert "--model-arg patch_size=14" in card
    bad = keyfoundry("pretrain", *where, "--model-arg", "depth")
    assert (bad.code, "'depth' is not name=value" in bad.err) == (3, True)


def test_a_base_is_hardened_from_another(
    keyfoundry: Run, idx_folder: Path, tiny_base_path: Path, tiny_base: Base, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "hardened.safetensors"
    recipe.write_text('[recipe]\nadversarial = { kind = "pgd", epsilon_low = 0.02, epsilon_high = 0.05, steps = 2 }\n')
    where = ["--data", "idx", "--data-root", idx_folder, "--validation", 1200, "--start", tiny_base_path, "--out", out]
    for option, value in (("--architecture", "vit_tiny_patch16_224"), ("--channels", 1)):
        refused = keyfoundry("pretrain", *where, option, value)
        assert (refused.code, f"says {option} already" in refused.err) == (3, True)
    for start, target, said in (
        ("resnet18", out, "must be 'shipped', 'hardened' or a .safetensors"),
        ("hardened", EMBEDDED["hardened"], "would be written over"),
        (tiny_base_path, tiny_base_path, "would be written over"),
    ):
        refused = keyfoundry("pretrain", "--start", start, "--out", target)
        assert (refused.code, said in refused.err) == (3, True)
    # At a learning rate next to nothing, only a base that went on from the other one is as accurate.
    accuracy = parsed(
        keyfoundry("pretrain", *where, "--recipe", recipe, "--epochs", 1, "--learning-rate", 1e-9, "--json")
    )["test_accuracy"]["value"]
    begun, hardened = read_checkpoint(tiny_base_path), read_checkpoint(out)
    assert begun.digest == tiny_base.digest
    assert hardened.architecture == begun.architecture
    first, second = begun.network.state_dict(), hardened.network.state_dict()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert accuracy > 0.2
    assert begun.digest in out.with_suffix(".md").read_text()


def test_a_base_is_not_trained_by_parts_that_only_devices_have(
    keyfoundry: Run, idx_folder: Path, tiny_base_path: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "base.safetensors", tmp_path / "recipe.toml"
    where = ["--data", "idx", "--data-root", idx_folder, "--validation", 1200, "--start", tiny_base_path]
    where += ["--out", out, "--recipe", recipe]
    for text, said in (
        ("[recipe]\nkeys = { count = 2 }\n", "A base has no keys"),
        ("[recipe.decoys]\nkeys = 1\n", "A base has no decoys"),
        ('[recipe]\nobjective = { kind = "distillation" }\n', "A base has no other base to learn from"),
        ('[objective]\nkind = "prototype-conformity"\n', "has no table [recipe]"),
    ):
        recipe.write_text(text)
        refused = keyfoundry("pretrain", *where)
        assert (refused.code, said in refused.err) == (3, True)
    assert not out.exists()
