"""Which parts there are, and which go with which network, as Markdown; docs/recipes.md holds what this prints.

Run ``python -m factory.recipes.table`` after a part was added or changed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from factory.recipes.part import Part, Trait
from factory.recipes.recipe import ADAPTATION_NEEDS, PARTS, RecipeSettings

NETWORKS: dict[str, frozenset[Trait]] = {
    "ViT, Eva, Beit": frozenset({Trait.IMAGES, Trait.PATCH_EMBEDDING, Trait.ATTENTION}),
    "ConvMixer": frozenset({Trait.IMAGES, Trait.PATCH_EMBEDDING}),
    "ResNet, VGG, CNN-6": frozenset({Trait.IMAGES}),
    "3D (volumes)": frozenset({Trait.VOLUMES, Trait.PATCH_LOGITS}),
}
"""Kinds of network as :func:`factory.networks.traits` sees them."""


def part_types(setting: str) -> tuple[type[Part], ...]:
    """The parts that a recipe's setting can name."""
    return tuple(_parts(RecipeSettings.model_fields[setting].annotation))


def markdown() -> str:
    """Both tables."""
    lines = ["| setting | part | what it is | its settings |", "|---|---|---|---|"]
    for setting in PARTS:
        for part in part_types(setting):
            summary = (inspect.getdoc(part) or "").split("\n\n")[0].replace("\n", " ")
            lines.append(f"| `{setting}` | {_kind(part)} | {summary} | {_settings(part)} |")
    lines += ["", f"| part | {' | '.join(NETWORKS)} |", f"|---|{'---|' * len(NETWORKS)}"]
    rows = [
        (f"`adaptation = {name!r}`".replace("'", '"'), frozenset(needs)) for name, needs in ADAPTATION_NEEDS.items()
    ]
    rows += [(f"`{setting}` {_kind(part)}", part.needs) for setting in PARTS for part in part_types(setting)]
    for name, needs in rows:
        lines.append(f"| {name} | {' | '.join('yes' if needs <= has else '–' for has in NETWORKS.values())} |")
    return "\n".join(lines) + "\n"


def _parts(annotation: Any) -> Iterator[type[Part]]:
    if isinstance(annotation, type):
        if issubclass(annotation, Part):
            yield annotation
        return
    if get_origin(annotation) in (Union, UnionType, Annotated):
        for one in get_args(annotation):
            yield from _parts(one)


def _kind(part: type[Part]) -> str:
    field = part.model_fields.get("kind")
    return "" if field is None else ", ".join(f"`{kind}`" for kind in (field.default, *_others(field)))


def _settings(part: type[Part]) -> str:
    fields = {name: field for name, field in part.model_fields.items() if name != "kind"}
    return ", ".join(f"`{name}` ({_values(field)})" for name, field in fields.items()) or "–"


def _values(field: FieldInfo) -> str:
    """The default, and behind it what else can be chosen."""
    return " or ".join(json.dumps(to_jsonable_python(value)) for value in (field.default, *_others(field)))


def _others(field: FieldInfo) -> list[Any]:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return [value for value in choices if value != field.default]


if __name__ == "__main__":
    print(markdown(), end="")
