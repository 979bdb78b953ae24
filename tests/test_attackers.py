"""Who attacks: the sources of every threat, and the groups of colluding devices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from device_tests.ensemble import members_of
from device_tests.threats import Threat
from factory.attackers import colluding_groups, who_attacks


def models(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for name in names}


@pytest.mark.parametrize("total", range(2, 13))
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_every_device_faces_one_group_that_it_is_not_in_and_there_are_few_groups(total: int, count: int) -> None:
    devices = [f"device-{index}" for index in range(total)]
    groups = colluding_groups(devices, count)
    if count >= total:
        assert groups == []
        return
    targets = [name for _, outside in groups for name in outside]
    assert sorted(targets) == sorted(devices)
    for members, outside in groups:
        assert len(set(members)) == count
        assert not set(members) & set(outside)
    assert len(groups) <= math.ceil(total / (total - count))


def test_every_threat_has_its_sources_and_each_is_judged_where_it_belongs() -> None:
    devices, guesses = models("a", "b", "c"), models("g1", "g2", "g3")
    sources = who_attacks(nn.Flatten(), guesses, devices, models("un-keyed"), colluding=(2, 5), twins=models("a"))
    by_threat: dict[Threat, list[str]] = {}
    for source in sources:
        by_threat.setdefault(source.threat, []).append(source.id)
    assert by_threat == {
        Threat.PUBLIC_BASE: ["base"],
        Threat.GUESSED_KEY: ["g1", "g2", "g3", "base-and-1-guesses", "base-and-2-guesses", "base-and-3-guesses"],
        Threat.SIBLING_DEVICE: ["a", "b", "c"],
        Threat.COLLUDING_DEVICES: ["2-devices-1", "2-devices-2", "2-devices-3"],
        Threat.TARGET_ITSELF: ["true-key-a"],
        Threat.UNKEYED_CONTROL: ["un-keyed"],
    }
    assert len({source.id for source in sources}) == len(sources)
    named = {source.id: source for source in sources}
    assert named["2-devices-1"].targets == ("c",)
    assert len(list(members_of(named["2-devices-1"].model))) == 3  # two devices and the base
    assert named["true-key-a"].is_judged_on("a")
    assert not named["true-key-a"].is_judged_on("b")
    assert all(named["base"].is_judged_on(name) for name in devices)


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    guesses = models("g1", "g2")
    base = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    sources = {source.id: source for source in who_attacks(base, guesses, {}, {})}
    images = torch.rand(5, 1, 2, 2)
    expected = (base(images) + guesses["g1"](images) + guesses["g2"](images)) / 3
    assert torch.allclose(sources["base-and-2-guesses"].model(images), expected)
