"""Patches: how they are embedded, merged and expanded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from umamba.blocks.sampling import (
    ConvDownsample,
    ConvPatchEmbed,
    PatchEmbed,
    PatchExpand,
    PatchMerging,
)


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def test_merging_lays_the_rows_of_a_patch_side_by_side_first() -> None:
    layer = PatchMerging(1, 4)
    layer.norm = nn.Identity()
    with torch.no_grad():
        layer.reduction.weight.copy_(torch.eye(4))
    pixels = torch.arange(8.0).view(1, 2, 4, 1)
    assert layer(pixels).tolist() == [[[[0, 4, 1, 5], [2, 6, 3, 7]]]]


@pytest.mark.parametrize(("pad_odd", "shape"), [(False, (1, 2, 3, 8)), (True, (1, 3, 3, 8))])
def test_odd_extents_are_cropped_or_padded(pad_odd: bool, shape: tuple[int, ...]) -> None:
    layer = PatchMerging(4, pad_odd=pad_odd)
    features = torch.randn(1, 5, 6, 4)
    merged = layer(features)
    assert merged.shape == shape
    torch.testing.assert_close(merged[:, :2], layer(features[:, :4]))
    if pad_odd:
        padded = torch.cat([features, torch.zeros(1, 1, 6, 4)], dim=1)
        torch.testing.assert_close(merged, layer(padded))


def test_expanding_puts_the_channels_into_rows_then_columns() -> None:
    layer = PatchExpand(8, 2)
    layer.norm = nn.Identity()
    with torch.no_grad():
        layer.expand.weight.copy_(torch.eye(8))
    channels = torch.arange(16.0).view(1, 1, 2, 8)
    rows = [[[0, 1], [2, 3], [8, 9], [10, 11]], [[4, 5], [6, 7], [12, 13], [14, 15]]]
    assert layer(channels).tolist() == [rows]


def test_embeddings_and_strided_convolutions_reach_the_sizes_they_say() -> None:
    images = torch.randn(2, 3, 16, 24)
    assert PatchEmbed(3, 6)(images).shape == (2, 4, 6, 6)
    embedded = ConvPatchEmbed(3, 6)(images)
    assert embedded.shape == (2, 4, 6, 6)
    torch.testing.assert_close(embedded.mean(-1), torch.zeros(2, 4, 6), atol=1e-5, rtol=0)
    for kernel in (2, 3):
        assert ConvDownsample(6, 10, kernel)(embedded).shape == (2, 2, 3, 10)
