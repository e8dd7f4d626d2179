"""Token orders: inverse, meaning, and the strides by which a kernel may walk them."""

from __future__ import annotations

import math

import pytest
import torch

from umamba.ops.token_orders import token_order

SPATIAL = (3, 5, 7)
BASES = (
    "raster",
    "transposed",
    "axes_012",
    "axes_021",
    "axes_102",
    "axes_120",
    "axes_201",
    "axes_210",
    "inter_slice_5",
    "inter_slice_1",
    "inter_slice_105",
)
NAMES = [*BASES, *(f"{base}_reversed" for base in BASES)]


def numbered(spatial: tuple[int, ...] = SPATIAL) -> torch.Tensor:
    """Features (2, 4, *spatial) whose values are the raster positions, shifted per channel."""
    positions = torch.arange(math.prod(spatial)).reshape(spatial)
    return positions + 1000 * torch.arange(8).reshape(2, 4, *[1] * len(spatial))


@pytest.mark.parametrize("name", NAMES)
def test_from_tokens_undoes_to_tokens(name: str):
    order, features = token_order(name), numbered()
    tokens = order.to_tokens(features)
    assert tokens.shape == (2, 4, 105)
    assert torch.equal(order.from_tokens(tokens, SPATIAL), features)


@pytest.mark.parametrize("name", NAMES)
def test_strides_describe_the_order(name: str):
    order = token_order(name)
    start, levels = order.strides(SPATIAL)
    positions = torch.tensor([start])
    for length, stride in levels:
        positions = (positions[:, None] + stride * torch.arange(length)).flatten()
    assert torch.equal(order.to_tokens(numbered())[0, 0], positions)


@pytest.mark.parametrize(
    ("name", "n_levels"),
    [("raster", 1), ("inter_slice_5", 2), ("axes_120", 2), ("axes_201", 2), ("transposed", 3)],
)
def test_strides_have_as_few_levels_as_the_order_needs(name: str, n_levels: int):
    assert len(token_order(name).strides(SPATIAL)[1]) == n_levels


def test_column_major_of_an_image_has_two_levels():
    height, width = 3, 5
    tokens = token_order("transposed").to_tokens(numbered((height, width)))[0, 0]
    expected = [h * width + w for w in range(width) for h in range(height)]
    assert tokens.tolist() == expected
    assert token_order("transposed").strides((height, width)) == (0, ((width, 1), (height, width)))


def test_inter_slice_reads_one_token_of_every_slice_in_turn():
    n_slices, per_slice = 5, 21
    tokens = token_order("inter_slice_5").to_tokens(numbered())[0, 0]
    for j in range(per_slice):
        for s in range(n_slices):
            assert tokens[j * n_slices + s] == s * per_slice + j


def test_reversed_orders_read_from_the_end():
    for base in BASES:
        forward = token_order(base).to_tokens(numbered())
        backward = token_order(f"{base}_reversed").to_tokens(numbered())
        assert torch.equal(backward, forward.flip(2))


def test_raster_order_copies_nothing_in_either_memory_layout():
    for features in (torch.rand(2, 3, 5, 7, 4).movedim(-1, 1), torch.rand(2, 4, 3, 5, 7)):
        tokens = token_order("raster").to_tokens(features)
        assert tokens.data_ptr() == features.data_ptr()
        back = token_order("raster").from_tokens(tokens, SPATIAL)
        assert back.data_ptr() == features.data_ptr()


def test_gathered_tokens_are_channel_last():
    features = torch.rand(2, 3, 5, 7, 4).movedim(-1, 1)
    for name in ("transposed", "axes_120", "inter_slice_5"):
        assert token_order(name).to_tokens(features).transpose(1, 2).is_contiguous()


def test_a_sequence_is_features_with_one_axis():
    sequence = torch.arange(12).reshape(1, 2, 6)
    assert torch.equal(token_order("raster").to_tokens(sequence), sequence)
    assert token_order("inter_slice_2").to_tokens(sequence)[0, 0].tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("name", ["zigzag", "axes_011", "axes_13", "inter_slice", "inter_slice_0"])
def test_unknown_names_are_refused_with_the_known_ones(name: str):
    with pytest.raises(ValueError, match="choose raster, transposed"):
        token_order(name)


@pytest.mark.parametrize("reversed_", ["", "_reversed"])
def test_inter_slice_fills_the_sequence_up_with_zero_tokens(reversed_: str):
    sequence = torch.arange(1, 11).reshape(1, 1, 10)
    order = token_order("inter_slice_4" + reversed_)
    tokens = order.to_tokens(sequence)
    expected = [1, 4, 7, 10, 2, 5, 8, 0, 3, 6, 9, 0]
    assert tokens[0, 0].tolist() == expected[:: -1 if reversed_ else 1]
    assert order.n_tokens((10,)) == 12
    assert torch.equal(order.from_tokens(tokens, (10,)), sequence)


@pytest.mark.parametrize("n_slices", [2, 4, 52, 104, 106, 300])
def test_any_number_of_slices_has_an_inverse(n_slices: int):
    order = token_order(f"inter_slice_{n_slices}")
    tokens = order.to_tokens(numbered())
    assert tokens.shape == (2, 4, order.n_tokens(SPATIAL))
    assert torch.equal(order.from_tokens(tokens, SPATIAL), numbered())


def test_orders_that_do_not_fit_the_shape_are_refused():
    with pytest.raises(ValueError, match="has zero tokens: no strides describe it"):
        token_order("inter_slice_4").strides(SPATIAL)
    with pytest.raises(ValueError, match="names 2 axes, the features have 3"):
        token_order("axes_10").to_tokens(numbered())
