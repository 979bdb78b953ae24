"""Kept results: computed once per key, and again whenever what is stored cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factory.record import kept


class Counter:
    """Computes 1, 2, 3, …"""

    calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def ask(path: Path, key: str, compute: Counter) -> int:
    return kept(
        path, key, compute=compute, to_json=lambda value: {"number": value}, from_json=lambda value: value["number"]
    )


def test_what_is_kept_is_not_computed_again(tmp_path: Path) -> None:
    path, compute = tmp_path / "record.json", Counter()
    assert [ask(path, "a", compute), ask(path, "a", compute)] == [1, 1]
    assert compute.calls == 1
    assert json.loads(path.read_text()) == {"key": "a", "value": {"number": 1}}


def test_another_key_replaces_the_record(tmp_path: Path) -> None:
    path, compute = tmp_path / "record.json", Counter()
    assert [ask(path, "a", compute), ask(path, "b", compute), ask(path, "a", compute)] == [1, 2, 3]


@pytest.mark.parametrize(
    "damaged",
    [
        "", "{", "[]", "7", "null", '{"key": "a"}', '{"key": "a", "value": 3}', '{"key": "a", "value": {}}',
        '{"key": "a", "value": []}', '{"value": {"number": 9}}', "\0\xff", "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_record_or_one_of_another_version_is_replaced(tmp_path: Path, damaged: str) -> None:
    path, compute = tmp_path / "record.json", Counter()
    path.write_text(damaged)
    assert ask(path, "a", compute) == 1
    assert ask(path, "a", compute) == 1


def test_nothing_is_written_where_computing_fails(tmp_path: Path) -> None:
    def fails() -> int:
        raise RuntimeError("no result")

    with pytest.raises(RuntimeError):
        kept(tmp_path / "record.json", "a", compute=fails, to_json=str, from_json=int)
    assert list(tmp_path.iterdir()) == []
