"""What makes images transfer: changed inputs, regularised tokens, ensembles; each against a plain version of itself."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from device_tests.attacks.attack import Attack
from device_tests.attacks.block_shuffle_rotation import BlockShuffleRotation
from device_tests.attacks.catalogue import named_attacks, suited
from device_tests.attacks.gradients import at_rest, loss_gradient
from device_tests.attacks.input_diversity import InputDiversity
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.attacks.operator_perturbation import OperatorPerturbation
from device_tests.attacks.resampling import resize_and_pad, rotate, shuffle_and_rotate_blocks
from device_tests.attacks.token_gradient import ATTENTION, MLP, QKV, TokenGradient, regularised
from device_tests.ensemble import Ensemble, members_of
from keys.errors import InputError

SHAPES = [(4, 1, 28, 28), (2, 3, 64, 64), (1, 3, 224, 224), (3, 1, 20, 30)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(5)).mul_(0.9).add_(0.05)


def tiny_vit(seed: int, classes: int = 4) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, embed_dim=24, depth=2, num_heads=2,
            num_classes=classes,
        )  # fmt: skip
    assert isinstance(model, VisionTransformer)
    return model.eval()


class Wrapped(nn.Module):
    """A ViT inside another module, as the project's classifiers hold theirs."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"vit": vit})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner["vit"]((images - 0.3) / 0.35)


@shapes
def test_resizing_and_padding_is_bilinear_and_leaves_zeros_around(shape: tuple[int, ...]) -> None:
    images = pictures(*shape)
    made = resize_and_pad(images, 0.5, 1.0, seeded(1))
    where = resize_and_pad(torch.ones(shape), 0.5, 1.0, seeded(1))
    assert made.shape == images.shape
    for image, changed, mask in zip(images, made, where, strict=True):
        rows, columns = (mask[0] > 0.5).any(1).nonzero()[:, 0], (mask[0] > 0.5).any(0).nonzero()[:, 0]
        top, left, height, width = int(rows[0]), int(columns[0]), len(rows), len(columns)
        assert 0.5 * shape[2] - 1 <= height <= shape[2]
        assert abs(height / shape[2] - width / shape[3]) < 1 / min(shape[2:])
        small = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
        padded = F.pad(small, (left, shape[3] - left - width, top, shape[2] - top - height))
        assert torch.allclose(changed, padded, atol=1e-4)


def test_only_the_wanted_share_is_resized() -> None:
    images = pictures(400, 1, 10, 10)
    changed = (resize_and_pad(images, 0.5, 0.3, seeded()) - images).abs().flatten(1).amax(1) > 1e-6
    assert 0.2 < changed.float().mean() < 0.35
    assert torch.allclose(resize_and_pad(images, 0.5, 0.0, seeded()), images, atol=1e-6)
    assert torch.allclose(resize_and_pad(images, 1.0, 1.0, seeded()), images, atol=1e-6)


def test_quarter_turns_are_exact() -> None:
    images = pictures(2, 3, 9, 9)
    assert torch.allclose(rotate(images, 0), images, atol=1e-6)
    turned = [rotate(images, angle) for angle in (90, 180, -90)]
    either = [torch.rot90(images, k, (2, 3)) for k in (1, 3)]
    assert min((turned[0] - one).abs().max() for one in either) < 1e-5
    assert torch.allclose(turned[1], images.flip(2, 3), atol=1e-5)
    assert torch.allclose(rotate(turned[0], -90), images, atol=1e-5)
    wide = pictures(1, 1, 6, 10)
    assert torch.allclose(rotate(wide, 180), wide.flip(2, 3), atol=1e-5)


@shapes
def test_blocks_are_moved_whole(shape: tuple[int, ...]) -> None:
    images = pictures(*shape)
    made = shuffle_and_rotate_blocks(images, 3, 0.0, seeded(2))
    assert not torch.allclose(made, images)
    assert torch.allclose(made.flatten(2).sort(-1).values, images.flatten(2).sort(-1).values, atol=1e-4)
    assert torch.allclose(shuffle_and_rotate_blocks(images, 1, 0.0, seeded(2)), images, atol=1e-4)
    turned = shuffle_and_rotate_blocks(images, 2, 24.0, seeded(3))
    assert turned.shape == images.shape
    assert (turned == 0).any()
    assert turned.max() <= images.max() + 1e-5


@pytest.mark.parametrize(
    "attack",
    [InputDiversity(3), BlockShuffleRotation(2, copies=2), OperatorPerturbation(2, samples=3), TokenGradient(3)],
    ids=lambda attack: attack.name,
)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 64)])
def test_transfer_attacks_run_on_grey_and_colour_vits(attack: Attack, channels: int, size: int) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=size // 4, in_chans=channels, embed_dim=24, depth=1,
        num_heads=2, num_classes=5,
    ).eval()  # fmt: skip
    images, labels = pictures(3, channels, size, size), torch.tensor([0, 1, 4])
    made = attack.generate(model, images, labels, epsilon=8 / 255, seed=0)
    assert torch.isfinite(made).all()
    assert 0 < (made - images).abs().max() <= 8 / 255 + 1e-6


class _Regularise(torch.autograd.Function):
    """The identity; on the way back the regularisation written out, one image and one channel or head at a time."""

    @staticmethod
    def forward(ctx: object, values: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return values.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        out = gradient * ctx.factor  # type: ignore[attr-defined]
        for index, one in enumerate(gradient):
            if one.ndim == 2:
                for channel in range(one.shape[1]):
                    out[index, one[:, channel].argmax(), channel] = 0
                    out[index, one[:, channel].argmin(), channel] = 0
                continue
            for head, scores in enumerate(one):
                for extreme in (scores.argmax(), scores.argmin()):
                    row, column = divmod(int(extreme), scores.shape[1])
                    out[index, head, row, :] = 0
                    out[index, head, :, column] = 0
        return out, None


def forward_by_hand(vit: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    tokens = vit.patch_embed(images)
    tokens = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], 1) + vit.pos_embed
    for block in vit.blocks:
        attention, (n, length, width) = block.attn, tokens.shape
        qkv = _Regularise.apply(attention.qkv(block.norm1(tokens)), QKV)
        q, k, v = qkv.reshape(n, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = _Regularise.apply(q * attention.scale @ k.transpose(-2, -1), ATTENTION)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
        tokens = tokens + attention.proj(mixed)
        tokens = tokens + _Regularise.apply(block.mlp(block.norm2(tokens)), MLP)
    return vit.head(vit.norm(tokens)[:, 0])


@pytest.mark.parametrize("fused", [False, True])
def test_token_gradients_are_regularised_as_written(fused: bool) -> None:
    vit, images, labels = tiny_vit(0), pictures(5, 1, 28, 28), torch.tensor([0, 1, 2, 3, 0])
    for block in vit.blocks:
        block.attn.fused_attn = fused
    leaf = images.clone().requires_grad_(True)
    F.cross_entropy(forward_by_hand(vit, leaf), labels, reduction="sum").backward()
    assert leaf.grad is not None
    with at_rest(vit):
        before, plain = vit(images), loss_gradient(vit, images, labels)
        with regularised(vit):
            assert torch.allclose(vit(images), before, atol=1e-5)
            made = loss_gradient(vit, images, labels)
        assert torch.equal(loss_gradient(vit, images, labels), plain)
    assert torch.allclose(made, leaf.grad, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(made, plain, rtol=0.1)
    assert all(block.attn.fused_attn is fused for block in vit.blocks)
    assert not any(module._forward_hooks for module in vit.modules())


def test_tokens_are_regularised_in_wrappers_and_in_every_member() -> None:
    vit, images, labels = tiny_vit(0), pictures(2, 1, 28, 28), torch.tensor([0, 1])
    ensemble = Ensemble([Wrapped(vit), Ensemble([Wrapped(tiny_vit(1))])])
    plain = MomentumFGSM(1).generate(ensemble, images, labels, epsilon=0.03, seed=0)
    made = TokenGradient(1).generate(ensemble, images, labels, epsilon=0.03, seed=0)
    assert (made != plain).any()
    with at_rest(ensemble), regularised(ensemble):
        both = loss_gradient(ensemble, images, labels)
    with at_rest(ensemble), regularised(Wrapped(vit)):
        assert not torch.allclose(both, loss_gradient(ensemble, images, labels), rtol=0.1)


def test_a_model_without_vit_blocks_is_refused() -> None:
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 4))
    images, labels = pictures(2, 1, 28, 28), torch.tensor([0, 1])
    for model in (convolutions, Ensemble([tiny_vit(0), convolutions])):
        with pytest.raises(InputError, match=r"Vision Transformer.*Sequential has none"):
            TokenGradient().generate(model, images, labels, epsilon=0.03, seed=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_attack_is_left_out_where_its_source_is_no_vit() -> None:
    attacks = named_attacks(["pgd", "mi-tgr"], pgd_steps=2, momentum_steps=2)
    vit_and_linear = Ensemble([tiny_vit(0), nn.Sequential(nn.Flatten(), nn.Linear(784, 10))])
    assert suited(attacks, tiny_vit(0), "base") == (attacks, ())
    left, sentences = suited(attacks, vit_and_linear, "base")
    assert [attack.name for attack in left] == ["pgd"]
    assert len(sentences) == 1
    assert sentences[0].startswith("mi-tgr is left out on base: Token gradient regularisation needs a Vision Transf")
    with pytest.raises(InputError, match=r"No attack is left for base\. Token gradient"):
        suited(attacks[1:], vit_and_linear, "base")


def test_an_ensembles_gradient_is_the_sum_of_its_members_parts() -> None:
    members, images, labels = [tiny_vit(seed) for seed in range(3)], pictures(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    ensemble = Ensemble(members)
    logits = torch.stack([member(images) for member in members])
    assert torch.allclose(ensemble(images), logits.mean(0), atol=1e-6)
    # d CE/d logits = softmax − one-hot, of the fused logits; each member hands a third of it to the image.
    slope = (logits.mean(0).softmax(1) - F.one_hot(labels, 4)).detach() / 3
    expected = torch.zeros_like(images)
    for member in members:
        leaf = images.clone().requires_grad_(True)
        expected += torch.autograd.grad(member(leaf), leaf, slope)[0]
    with at_rest(ensemble):
        assert torch.allclose(loss_gradient(ensemble, images, labels), expected, rtol=1e-4, atol=1e-7)


def test_averaging_log_probabilities_is_the_same_attack() -> None:
    members, images, labels = [tiny_vit(seed) for seed in range(3)], pictures(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])

    class MeanLogProbability(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(members)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([member(images).log_softmax(1) for member in self.members]).mean(0)

    ensemble, other = Ensemble(members), MeanLogProbability()
    with at_rest(ensemble), at_rest(other):
        gradients = [loss_gradient(model, images, labels) for model in (ensemble, other)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_an_ensembles_members_are_found_at_every_depth() -> None:
    first, second, third = (nn.Linear(2, 2) for _ in range(3))
    assert list(members_of(Ensemble([first, Ensemble([second, third])]))) == [first, second, third]
    assert list(members_of(first)) == [first]


def test_an_ensemble_that_cannot_be_fused_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        Ensemble([])
    with pytest.raises(InputError, match=r"\[4, 5\] classes"):
        Ensemble([tiny_vit(0), tiny_vit(1, classes=5)])(pictures(1, 1, 28, 28))
