"""How a copy of the base is made trainable: LoRA by peft, full fine-tuning, or patch embedding and head.

The paper puts LoRA on the patch embedding and on every qkv (here also on q, k and v where they are separate), and
trains the head in full (Section IV-C). Its figure of 1.38 M trainable parameters (Table II) is ViT-B/16 with r = 16
and 1,000 classes. Patch embedding and head are what its [67] trains of a ConvMixer.

The running statistics of batch norms follow the training images in every mode, also where their weights are frozen:
the activations behind a new patch embedding are others than the base's. They are part of what was trained.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from factory.low_rank_layers import merge_low_rank
from factory.networks import embedding_convolution, patch_embedding, running_statistics, traits
from factory.recipes.recipe import RecipeSettings, check_recipe
from factory.vits import KeyedVit, attention_projections, heads
from keys.errors import InputError
from keys.files import folder_being_written, sha256_file, write_atomic

_WEIGHTS = "adapter_model.safetensors"
_LEARNED = "objective.safetensors"


def adapt(network: nn.Module, recipe: RecipeSettings) -> nn.Module:
    """A copy of ``network`` in which exactly the recipe's parameters require gradients.

    A re-initialised patch embedding is drawn from torch's global generator, and trained in full. Raises InputError if
    the network lacks what the recipe needs.
    """
    check_recipe(recipe, traits(network), f"a {type(network).__name__}")
    model = copy.deepcopy(network)
    embedding = patch_embedding(model)
    if recipe.reinitialise_patch_embedding:
        embedding_convolution(model).reset_parameters()
    if recipe.adaptation == "lora":
        assert isinstance(network, KeyedVit)
        assert embedding is not None
        return get_peft_model(
            model,  # type: ignore[arg-type] – peft takes any module, its annotation says transformers' only
            LoraConfig(
                r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout,  # type: ignore[arg-type]
                target_modules=_targets(network, embedding, recipe),
                modules_to_save=[*heads(network), *([embedding] if recipe.whole_patch_embedding else [])],
            ),
        )  # fmt: skip
    trained = tuple(f"{name}." for name in (embedding, *heads(network)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = recipe.adaptation == "full" or name.startswith(trained)
    return model


def _targets(vit: KeyedVit, embedding: str, recipe: RecipeSettings) -> str:
    """The pattern of the layers that get LoRA: attention projections, and a patch embedding not trained whole."""
    layers = [] if recipe.whole_patch_embedding else [re.escape(embedding)]
    layers += [rf"attn\.{name}" for name in attention_projections(vit)]
    return r"(.*\.)?" + (layers[0] if len(layers) == 1 else f"({'|'.join(layers)})")


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters require gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merge(model: nn.Module) -> nn.Module:
    """The plain timm network with the adapter merged into its weights; ``model`` itself is left as it is.

    LoRA is merged by :mod:`exporters.low_rank`, so that a device can merge to the same bits.
    """
    merged = copy.deepcopy(model)
    if isinstance(merged, PeftModel):
        merge_low_rank(merged)
        merged = merged.unload()
    for parameter in merged.parameters():
        parameter.requires_grad = False
    return merged.eval()


def save_adapter(model: nn.Module, folder: Path, learned: Mapping[str, Tensor] | None = None) -> None:
    """Save what was trained: peft's own format for LoRA; for the other modes the trained tensors alone.

    Those are the parameters that require gradients, and the running statistics of all batch norms. ``learned``: the
    parameters of the objective by name, kept in a file beside them if there are any.
    """
    with folder_being_written(folder) as temporary:
        temporary.chmod(0o700)  # an adapter gives its device away, as the device's weights do
        if isinstance(model, PeftModel):
            model.save_pretrained(str(temporary))
            (temporary / "README.md").unlink()  # an empty template
        else:
            trained = {name: tensor.detach().contiguous() for name, tensor in _trained(model).items()}
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


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What training may have changed, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | running_statistics(model)


def load_adapter(network: nn.Module, recipe: RecipeSettings, folder: Path) -> nn.Module:
    """The adapted model that :func:`save_adapter` saved; raises InputError if it does not fit."""
    try:
        if recipe.adaptation == "lora":
            return PeftModel.from_pretrained(copy.deepcopy(network), str(folder)).eval()  # type: ignore[arg-type]
        model = adapt(network, recipe)
        stored = load_file(folder / _WEIGHTS)
        if stored.keys() != _trained(model).keys():
            raise InputError(f"The adapter in {folder} has other parameters than the recipe trains.")
        model.load_state_dict(stored, strict=False)
        return model.eval()
    except (SafetensorError, RuntimeError, ValueError, OSError, KeyError) as error:
        raise InputError(f"The adapter in {folder} is damaged or belongs to another base: {error}") from error


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the digests of the adapter's files, in the order of their names."""
    lines = [f"{path.name} {sha256_file(path)}\n" for path in sorted(folder.iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
