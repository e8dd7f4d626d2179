"""Gated and high-order convolutions are their equations and keep to their widths."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from umamba.blocks.gating import GatedSpatialConv, HGCNBlock, HighOrderConv
from umamba.blocks.norm import ChannelNorm


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_gated_spatial_convolution_adds_its_branches_and_its_input(dims: int) -> None:
    block = GatedSpatialConv(4, dims)
    p = dict(block.named_parameters())
    assert len(p) == 8
    conv = functional.conv2d if dims == 2 else functional.conv3d

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = p[f"{name}.weight"]
        y = conv(x, weight, p[f"{name}.bias"], padding=weight.shape[-1] // 2)
        return functional.relu(functional.instance_norm(y))

    images = torch.randn(2, 4, *(3, 7, 10)[3 - dims :])
    kept = images.clone()
    expected = layer("join", layer("conv2", layer("conv1", images)) + layer("side", images))
    torch.testing.assert_close(block(images), expected + images, rtol=1e-4, atol=1e-5)
    assert torch.equal(images, kept)


def test_channel_norm_is_a_layer_norm_of_each_voxel() -> None:
    norm = ChannelNorm(4, eps=1e-6)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    features = torch.randn(2, 4, 3, 5, 2)
    voxel = features[1, :, 2, 0, 1]
    expected = (voxel - voxel.mean()) / (voxel.var(correction=0) + 1e-6).sqrt()
    result = norm(features)
    torch.testing.assert_close(result[1, :, 2, 0, 1], expected * norm.weight + norm.bias)
    assert result.is_contiguous()


def test_the_convolution_of_order_two_is_its_equations() -> None:
    layer = HighOrderConv(4, [1, 3], 2).double()
    features = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    p, q = layer.in_proj(features).split([2, 6], dim=1)
    q = functional.conv2d(q, layer.depthwise.weight, layer.depthwise.bias, padding=(0, 1), groups=6)
    expected = layer.out_proj(layer.widen[0](p + q[:, :2]) + q[:, 2:])
    torch.testing.assert_close(layer(features), expected)


def test_the_widths_double_up_to_the_layers() -> None:
    layer = HighOrderConv(24, [3, 3], 4)
    assert layer.widths == [3, 6, 12, 24]
    assert [(conv.in_channels, conv.out_channels) for conv in layer.widen] == [
        (3, 6), (6, 12), (12, 24)
    ]  # fmt: skip


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_gates_add_so_that_the_layer_is_affine(order: int) -> None:
    layer = HighOrderConv(8, [3, 3, 3], order).double()
    one, other = torch.randn(2, 1, 8, 2, 3, 4, dtype=torch.float64)
    summed = layer(one) + layer(other) - layer(torch.zeros_like(one))
    torch.testing.assert_close(layer(one + other), summed)


@pytest.mark.parametrize(("width", "order"), [(6, 3), (4, 4)])
def test_a_width_that_cannot_be_halved_so_often_is_refused(width: int, order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order} needs a multiple of {2 ** (order - 1)}"):
        HighOrderConv(width, [3, 3], order)


def test_the_block_is_its_equations() -> None:
    block = HGCNBlock(8, [3, 3], 2).double()
    block.scale.data.normal_()
    features = torch.randn(1, 8, 4, 5, dtype=torch.float64)
    x = block.reduce(features)
    x = x + block.scale.view(4, 1, 1) * block.high_order(block.norm1(x))
    x = block.conv2(functional.leaky_relu(block.conv1(block.norm2(x)), 0.01))
    torch.testing.assert_close(block(features), features + x)


def test_a_dropped_path_leaves_the_samples_features() -> None:
    block = HGCNBlock(8, [3, 3], 2, drop_path=0.5)
    features = torch.randn(64, 8, 2, 2)
    kept = (block(features) == features).flatten(1).all(1)
    assert 16 < kept.sum() < 48
    assert not (block.eval()(features) == features).flatten(1).all(1).any()
