"""What kinds of network can be a base, and what each has that the parts of a recipe may need.

Any network of images to logits can be a base and be fine-tuned in full; what needs more says so by a trait.
"""

from __future__ import annotations

from timm.layers.patch_embed import PatchEmbed
from timm.models.convmixer import ConvMixer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] – torch exports no such name

from factory.recipes.part import Trait
from factory.vits import KeyedVit, has_projections


def traits(network: nn.Module) -> frozenset[Trait]:
    """What ``network`` has of all that parts may need.

    A network of this program that takes no images, or has what cannot be seen from outside, says so by a class
    attribute ``TRAITS``, a frozenset of traits.
    """
    found = set(getattr(network, "TRAITS", {Trait.IMAGES}))
    if patch_embedding(network) is not None:
        found.add(Trait.PATCH_EMBEDDING)
        if isinstance(network, KeyedVit) and has_projections(network):
            found.add(Trait.ATTENTION)
    return frozenset(found)


def patch_embedding(network: nn.Module) -> str | None:
    """The name of the one convolution that makes patches of the image into tokens; None if there is none.

    timm's plain ViTs (DeiT, DeiT III, DINOv2 and distilled DeiT among them), its Eva and Beit, and ConvMixer are built
    so; a hybrid ViT has a network there.
    """
    if isinstance(network, KeyedVit):
        # timm builds it by a function that is handed in.
        plain = isinstance(network.patch_embed, PatchEmbed)
        return (
            "patch_embed.proj" if plain and isinstance(network.get_submodule("patch_embed.proj"), nn.Conv2d) else None
        )
    return "stem.0" if isinstance(network, ConvMixer) else None


def embedding_convolution(network: nn.Module) -> nn.Conv2d:
    """The convolution that :func:`patch_embedding` names."""
    name = patch_embedding(network)
    assert name is not None
    convolution = network.get_submodule(name)
    assert isinstance(convolution, nn.Conv2d)
    return convolution


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Name → mean, variance or count of every batch norm: what training changes without a gradient."""
    return {
        f"{name}.{part}".removeprefix("."): tensor
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for part, tensor in module.named_buffers(recurse=False)
    }
