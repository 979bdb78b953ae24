"""The block shuffle against the paper's steps, written out literally, and by its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factory.block_shuffle import BlockShuffle, check_block_size
from factory.classifier import ImageClassifier
from keys.errors import InputError
from keys.permutation import permutation

SIZE = {2: 28, 4: 28, 7: 28, 8: 32, 14: 28, 16: 32, 28: 28}


def literal_shuffle(image: np.ndarray, permutation: list[int], m: int) -> np.ndarray:
    """Section III-D step by step, value by value; ``image`` C×H×W."""
    channels, height, width = image.shape
    result = np.empty_like(image)
    # 1. Divide the image into non-overlapping blocks of M×M.
    for top in range(0, height, m):
        for left in range(0, width, m):
            # 2. Flatten the block to a vector of c·M·M values.
            vector = [
                image[channel, top + row, left + column]
                for channel in range(channels)
                for row in range(m)
                for column in range(m)
            ]
            # 3. Permute the vector with the key (Eq. 2).
            permuted = [vector[permutation[position]] for position in range(len(vector))]
            # 4. Put the values back into the block, and the block back to its place.
            for position, value in enumerate(permuted):
                channel, inside = divmod(position, m * m)
                result[channel, top + inside // m, left + inside % m] = value
    return result


def shuffle_of(key: bytes, channels: int, m: int) -> BlockShuffle:
    return BlockShuffle(permutation(key, channels * m * m), channels=channels, block_size=m)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("m", SIZE)
def test_it_is_what_the_papers_steps_give(sample_images: tuple[np.ndarray, np.ndarray], channels: int, m: int) -> None:
    pixels = np.zeros((2, channels, SIZE[m], SIZE[m]), np.float32)
    pixels[..., :28, :28] = sample_images[0][: 2 * channels].reshape(2, channels, 28, 28) / 255
    shuffle = shuffle_of(key(1), channels, m)
    expected = [literal_shuffle(image, shuffle.permutation.tolist(), m) for image in pixels]
    assert np.array_equal(shuffle(torch.from_numpy(pixels)).numpy(), np.stack(expected))


def test_the_steps_by_hand() -> None:
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    by_hand = [[[1, 0, 3, 2], [4, 5, 6, 7], [9, 8, 11, 10], [12, 13, 14, 15]]]
    assert literal_shuffle(image, [1, 0, 2, 3], 2).tolist() == by_hand


shapes = st.tuples(
    st.integers(0, 2**62), st.sampled_from([1, 3]), st.sampled_from([1, 2, 3, 4, 7]),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip


def distinct(count: int, channels: int, height: int, width: int) -> Tensor:
    return torch.arange(count * channels * height * width, dtype=torch.float64).view(count, channels, height, width)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_it_is_a_bijection_inside_every_block(shape: tuple[int, ...]) -> None:
    number, channels, m, rows, columns, count = shape
    images = distinct(count, channels, rows * m, columns * m)
    shuffled = shuffle_of(key(number), channels, m)(images)
    for top in range(0, rows * m, m):
        for left in range(0, columns * m, m):
            block = (slice(None), slice(None), slice(top, top + m), slice(left, left + m))
            before, after = images[block].flatten(1), shuffled[block].flatten(1)
            assert torch.equal(after.sort(1).values, before.sort(1).values)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_an_image_is_shuffled_alike_alone_and_in_any_batch_and_the_inverse_undoes_it(shape: tuple[int, ...]) -> None:
    number, channels, m, rows, columns, count = shape
    images = distinct(count, channels, rows * m, columns * m)
    shuffle = shuffle_of(key(number), channels, m)
    shuffled = shuffle(images)
    for index in range(count):
        assert torch.equal(shuffle(images[index : index + 1])[0], shuffled[index])
    undo = BlockShuffle(np.argsort(shuffle.permutation.numpy()), channels=channels, block_size=m)
    assert torch.equal(undo(shuffled), images)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 255))
def test_one_bit_of_the_key_makes_another_shuffle(number: int, bit: int) -> None:
    other = (int.from_bytes(key(number), "big") ^ (1 << bit)).to_bytes(32, "big")
    images = distinct(1, 1, 14, 14)
    first, second = shuffle_of(key(number), 1, 7)(images), shuffle_of(other, 1, 7)(images)
    # 49 values agree by chance in one place on average; in twelve, once in a billion.
    assert int((first[..., :7, :7] == second[..., :7, :7]).sum()) < 12


def test_every_block_gets_the_same_permutation() -> None:
    block = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    shuffled = shuffle_of(key(5), 3, 4)(block.repeat(1, 1, 3, 2))
    assert torch.equal(shuffled, shuffle_of(key(5), 3, 4)(block).repeat(1, 1, 3, 2))


@pytest.mark.parametrize(
    ("mean", "std", "same"),
    [
        ((0.4, 0.4, 0.4), (0.2, 0.2, 0.2), True),
        ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), False),
        ((0.4, 0.4, 0.4), (0.3, 0.2, 0.1), False),
    ],
)
def test_the_order_of_shuffle_and_normalisation_matters_unless_all_channels_have_the_same_statistics(
    sample_images: tuple[np.ndarray, np.ndarray], mean: tuple[float, ...], std: tuple[float, ...], same: bool
) -> None:
    images = torch.from_numpy(sample_images[0][:12]).reshape(4, 3, 28, 28).double() / 255
    shuffle = shuffle_of(key(2), 3, 7)
    model = ImageClassifier(torch.nn.Identity(), mean, std, shuffle).double()
    after = shuffle((images - model.mean) / model.std)
    # The classifier shuffles first, whatever the statistics are.
    assert torch.equal(model(images), (shuffle(images) - model.mean) / model.std)
    assert torch.equal(model(images), after) == same
    assert (float((model(images) - after).abs().max()) > 0.1) == (not same)


def test_grey_images_may_be_normalised_before_or_after(sample_images: tuple[np.ndarray, np.ndarray]) -> None:
    images = torch.from_numpy(sample_images[0][:4, None]).double() / 255
    shuffle = shuffle_of(key(2), 1, 7)
    model = ImageClassifier(torch.nn.Identity(), (0.286,), (0.353,), shuffle).double()
    assert torch.equal(model(images), shuffle((images - model.mean) / model.std))


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [0, 1, 2, 3, 4]])
def test_what_is_no_permutation_of_a_block_is_refused(values: list[int]) -> None:
    with pytest.raises(InputError, match="needs a permutation of 4 values"):
        BlockShuffle(np.array(values), channels=1, block_size=2)


@pytest.mark.parametrize("m", [1, 2, 4, 7, 14, 28])
def test_every_divisor_of_the_image_is_a_block_size(m: int) -> None:
    check_block_size(m, 28, 28)


@pytest.mark.parametrize(("m", "height", "width"), [(5, 28, 28), (56, 28, 28), (8, 32, 28), (8, 28, 32)])
def test_other_block_sizes_are_refused_with_those_that_fit(m: int, height: int, width: int) -> None:
    with pytest.raises(InputError, match=rf"Block size {m} does not divide .* {height}×{width} .* choose one of 2, 4"):
        check_block_size(m, height, width)
