"""Who attacks: the models that an attacker of each threat holds, as sources for the judge.

Rules: surrogates are the same recipe with other keys; every source is attacked once and judged on every target it
concerns. Groups of colluding devices are shared by all targets outside of them, so that a fleet of any size needs
only a few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from device_tests.ensemble import Ensemble
from device_tests.threats import Source, Threat
from factory.attractors import without_attractors

BASE, WHOLE = "base", "whole-"


def who_attacks(
    base: nn.Module,
    guesses: Mapping[str, nn.Module],
    devices: Mapping[str, nn.Module],
    controls: Mapping[str, nn.Module],
    *,
    colluding: Sequence[int] = (),
    twins: Mapping[str, nn.Module] | None = None,
) -> list[Source]:
    """Every source that is a model; names → models from images in [0, 1] to logits.

    ``guesses``: the attacker's guessed-key models; with two or more of them, or ``colluding`` devices, the ensembles
    of :func:`ensembles_of_guesses` and :func:`colluding_groups` come in. ``twins``: device → a second model with the
    device's own key. A ``colluding`` number that leaves no device to attack is skipped. Whoever attacks others leaves
    out the attractors of the models that he holds; a device with attractors itself is attacked as it is.
    """
    guesses, held = _held(guesses), _held(devices)
    sources = [Source(BASE, Threat.PUBLIC_BASE, base, "the public base")]
    for name, model in guesses.items():
        sources.append(Source(name, Threat.GUESSED_KEY, model, "the same recipe with a guessed key"))
    for count in ensembles_of_guesses(len(guesses)):
        members = [base, *list(guesses.values())[:count]]
        words = f"the public base and {count} guessed keys at once"
        sources.append(Source(f"base-and-{count}-guesses", Threat.GUESSED_KEY, Ensemble(members), words))
    judged = (*devices, *controls)
    for name, model in devices.items():
        words = f"extracted {name}"
        sources += _extracted(Source(name, Threat.SIBLING_DEVICE, held[name], words), model, judged)
    for count in colluding:
        for number, (members, targets) in enumerate(colluding_groups(tuple(devices), count), start=1):
            model = Ensemble([base, *(held[name] for name in members)])
            words = f"{', '.join(members)} and the public base at once"
            sources.append(Source(f"{count}-devices-{number}", Threat.COLLUDING_DEVICES, model, words, targets))
    for name, model in (twins or {}).items():
        words = f"the same recipe with the true key of {name}, another seed"
        sources.append(Source(f"true-key-{name}", Threat.TARGET_ITSELF, model, words, (name,)))
    for name, model in controls.items():
        alone = Source(name, Threat.UNKEYED_CONTROL, without_attractors(model), "a control: no key")
        sources += _extracted(alone, model, judged)
    return sources


def _held(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: without_attractors(model) for name, model in models.items()}


def _extracted(source: Source, whole: nn.Module, judged: Sequence[str]) -> list[Source]:
    if whole is source.model:
        return [source]
    # Attacks on a model with attractors follow them to where no other model is weak.
    others = tuple(name for name in judged if name != source.id)
    words = f"{source.description}, without its attractors"
    itself = Source(f"{WHOLE}{source.id}", Threat.TARGET_ITSELF, whole, f"{source.id} itself", (source.id,))
    return [replace(source, description=words, targets=others), itself]


def ensembles_of_guesses(guesses: int) -> list[int]:
    """Numbers of guessed keys beside the base: 1, 2, 4, … and all of them; none where there is but one guess.

    >>> ensembles_of_guesses(1), ensembles_of_guesses(4), ensembles_of_guesses(6)
    ([], [1, 2, 4], [1, 2, 4, 6])
    """
    if guesses < 2:
        return []
    return sorted({2**power for power in range(guesses.bit_length()) if 2**power <= guesses} | {guesses})


def colluding_groups(devices: Sequence[str], count: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """As few groups of ``count`` devices as give every device a group that it is not in: (members, targets) each.

    Windows on the ring of devices, each moved on by as many as it leaves outside; every device is a target once.

    >>> colluding_groups(["a", "b", "c", "d"], 2)
    [(('a', 'b'), ('c', 'd')), (('c', 'd'), ('a', 'b'))]
    >>> colluding_groups(["a", "b", "c"], 2)
    [(('a', 'b'), ('c',)), (('b', 'c'), ('a',)), (('c', 'a'), ('b',))]
    >>> colluding_groups(["a", "b"], 2)
    []
    """
    total = len(devices)
    groups: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    pending, start = list(devices), 0
    while pending and count < total:
        members = tuple(devices[(start + offset) % total] for offset in range(count))
        groups.append((members, tuple(name for name in pending if name not in members)))
        pending = [name for name in pending if name in members]
        if pending:
            # The next window begins behind as many of those that still wait as a window leaves outside.
            last = pending[min(total - count, len(pending)) - 1]
            start = (devices.index(last) + 1) % total
    return groups
