"""How a copy of the base is made trainable: LoRA by peft, full fine-tuning, or patch embedding and head.

The paper puts LoRA on the patch embedding and on every qkv (here also on q, k and v where they are separate), and
trains the head in full (Section IV-C). Its figure of 1.38 M trainable parameters (Table II) is ViT-B/16 with r = 16
and 1,000 classes.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from factory.low_rank_layers import merge_low_rank
from factory.recipes.recipe import RecipeSettings
from factory.vits import KeyedVit, attention_projections, heads
from keys.errors import InputError
from keys.files import folder_being_written, sha256_file, write_atomic

_WEIGHTS = "adapter_model.safetensors"
_LEARNED = "objective.safetensors"


def adapt(vit: KeyedVit, recipe: RecipeSettings) -> nn.Module:
    """A copy of ``vit`` in which exactly the recipe's parameters require gradients.

    A re-initialised patch embedding is drawn from torch's global generator, and trained in full.
    """
    model = copy.deepcopy(vit)
    if recipe.reinitialise_patch_embedding:
        projection = model.patch_embed.proj
        assert isinstance(projection, nn.Conv2d)
        projection.reset_parameters()
    if recipe.adaptation == "lora":
        return get_peft_model(
            model,  # type: ignore[arg-type] – peft takes any module, its annotation says transformers' only
            LoraConfig(
                r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout,  # type: ignore[arg-type]
                target_modules=_targets(vit, recipe),
                modules_to_save=[*heads(vit), *(["patch_embed.proj"] if recipe.reinitialise_patch_embedding else [])],
            ),
        )  # fmt: skip
    trained = tuple(f"{name}." for name in ("patch_embed.proj", *heads(vit)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = recipe.adaptation == "full" or name.startswith(trained)
    return model


def _targets(vit: KeyedVit, recipe: RecipeSettings) -> str:
    """The pattern of the layers that get LoRA: attention projections, and the patch embedding unless it is new."""
    layers = [] if recipe.reinitialise_patch_embedding else [r"patch_embed\.proj"]
    layers += [rf"attn\.{name}" for name in attention_projections(vit)]
    return r"(.*\.)?" + (layers[0] if len(layers) == 1 else f"({'|'.join(layers)})")


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters require gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merge(model: nn.Module) -> KeyedVit:
    """A plain timm ViT with the adapter merged into its weights; ``model`` itself is left as it is.

    LoRA is merged by :mod:`exporters.low_rank`, so that a device can merge to the same bits.
    """
    merged = copy.deepcopy(model)
    if isinstance(merged, PeftModel):
        merge_low_rank(merged)
        merged = merged.unload()
    assert isinstance(merged, KeyedVit)
    for parameter in merged.parameters():
        parameter.requires_grad = False
    return merged.eval()


def save_adapter(model: nn.Module, folder: Path, learned: Mapping[str, Tensor] | None = None) -> None:
    """Save what was trained: peft's own format for LoRA, the trained tensors alone for the other modes.

    ``learned``: the parameters of the objective by name, kept in a file beside them if there are any.
    """
    with folder_being_written(folder) as temporary:
        temporary.chmod(0o700)  # an adapter gives its device away, as the device's weights do
        if isinstance(model, PeftModel):
            model.save_pretrained(str(temporary))
            (temporary / "README.md").unlink()  # an empty template
        else:
            trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            write_atomic(temporary / _WEIGHTS, save(trained))
        if learned:
            tensors = {name: tensor.detach().contiguous() for name, tensor in learned.items()}
            write_atomic(temporary / _LEARNED, save(tensors))


def read_learned(folder: Path) -> dict[str, Tensor]:
    """What the objective learned, by name; nothing where it had no parameters. Raises InputError if it is damaged."""
    path = folder / _LEARNED
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def load_adapter(vit: KeyedVit, recipe: RecipeSettings, folder: Path) -> nn.Module:
    """The adapted model that :func:`save_adapter` saved; raises InputError if it does not fit."""
    try:
        if recipe.adaptation == "lora":
            return PeftModel.from_pretrained(copy.deepcopy(vit), str(folder)).eval()  # type: ignore[arg-type]
        model = adapt(vit, recipe)
        known = {name: p for name, p in model.named_parameters() if p.requires_grad}
        stored = load_file(folder / _WEIGHTS)
        if stored.keys() != known.keys():
            raise InputError(f"The adapter in {folder} has other parameters than the recipe trains.")
        model.load_state_dict(stored, strict=False)
        return model.eval()
    except (SafetensorError, RuntimeError, ValueError, OSError, KeyError) as error:
        raise InputError(f"The adapter in {folder} is damaged or belongs to another base: {error}") from error


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the digests of the adapter's files, in the order of their names."""
    lines = [f"{path.name} {sha256_file(path)}\n" for path in sorted(folder.iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
