"""Convolution blocks equal the layers that they stand for, in 2D and 3D, also strided."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from umamba.blocks.conv import ConvNormAct, ResidualBlock, convolution, initialize_convolutions
from umamba.blocks.norm import InstanceNorm
from umamba.blocks.sampling import NearestUpsample, TransposedUpsample
from umamba.blocks.unet_decoder import UNetDecoder

SHAPES = {2: (7, 10), 3: (3, 7, 10)}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dims", [2, 3])
def test_instance_norm_is_torchs(dims: int, offset: float) -> None:
    own = InstanceNorm(5)
    nn.init.normal_(own.weight)
    nn.init.normal_(own.bias)
    images = (torch.randn(2, 5, *SHAPES[dims]) + offset).requires_grad_()
    again = images.detach().clone().requires_grad_()
    expected = functional.instance_norm(again, weight=own.weight, bias=own.bias)
    result = own(images)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-5)
    direction = torch.randn_like(result)
    result.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(images.grad, again.grad, rtol=1e-4, atol=2e-5)


def test_instance_norm_of_float64_is_float64() -> None:
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = functional.instance_norm(images)
    torch.testing.assert_close(InstanceNorm(3).double()(images), expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_upsampling_before_or_after_the_pointwise_convolution_is_the_same(dims: int) -> None:
    stride = (2, 3, 1)[:dims]
    layer = NearestUpsample(4, 3, stride)
    images = torch.randn(2, 4, *SHAPES[dims])
    scale = tuple(map(float, stride))
    expected = layer.conv(functional.interpolate(images, scale_factor=scale, mode="nearest"))
    torch.testing.assert_close(layer(images), expected)


def test_the_transposed_convolution_multiplies_the_shape_by_its_stride() -> None:
    layer = TransposedUpsample(4, 3, (1, 2, 3))
    assert layer(torch.randn(2, 4, 3, 5, 2)).shape == (2, 3, 3, 10, 6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("n_in", "stride"), [(4, 1), (4, 2), (6, 1), (6, 2)])
def test_the_pooling_residual_block_is_nnunets(dims: int, n_in: int, stride: int) -> None:
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD

    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    official = BasicBlockD(
        conv, n_in, 4, [3] * dims, [stride] * dims, True, norm, {"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    own = ResidualBlock(n_in, 4, [3] * dims, [stride] * dims)
    source = {k: v for k, v in official.state_dict().items() if "all_modules" not in k}
    assert len(own.state_dict()) == len(source)
    renamed = {}
    for key, value in source.items():
        key = (
            key.replace(".conv.", ".").replace("conv1.norm", "norm1").replace("conv2.norm", "norm2")
        )
        parts = key.split(".")
        if parts[0] == "skip":
            part = "norm" if value.ndim == 1 else "conv"
            key = f"shortcut.{part}.{parts[-1]}"
        renamed[key] = value
    own.load_state_dict(renamed)
    shape = [2 * stride + 4] * dims
    images = torch.randn(2, n_in, *shape)
    torch.testing.assert_close(own(images), official(images), rtol=1e-4, atol=1e-5)


def test_the_convolution_shortcut_is_always_a_convolution_with_bias() -> None:
    block = ResidualBlock(4, 4, [3, 3], shortcut="conv")
    assert {"shortcut.weight", "shortcut.bias"} <= block.state_dict().keys()
    images = torch.randn(1, 4, 6, 6)
    kept = images.clone()
    block(images)
    assert torch.equal(images, kept)


def test_a_block_leaves_its_input_alone_though_it_works_in_place() -> None:
    for block in (ConvNormAct(3, 3, [3, 3]), ResidualBlock(3, 3, [3, 3])):
        images = torch.randn(1, 3, 5, 5)
        kept = images.clone()
        block(images)
        assert torch.equal(images, kept)


def test_initialization_leaves_linear_and_1d_layers_alone() -> None:
    network = nn.Sequential(convolution(2, 3, [3, 3]), nn.Conv1d(2, 2, 3), nn.Linear(2, 2))
    before = [p.detach().clone() for p in network.parameters()]
    initialize_convolutions(network)
    after = list(network.parameters())
    assert not torch.equal(before[0], after[0])
    assert not after[1].any()
    assert all(torch.equal(b, a) for b, a in zip(before[2:], after[2:], strict=True))


def test_the_decoder_returns_only_the_finest_logits_without_deep_supervision() -> None:
    decoder = UNetDecoder(
        2,
        features_per_stage=[3, 4, 5],
        strides=[[1, 1], [2, 1], [2, 2]],
        kernel_sizes=[[3, 3]] * 3,
        n_conv_per_stage=[1, 2],
        upsample=NearestUpsample,
        shortcut="conv",
    ).eval()
    skips = [torch.randn(1, 3, 8, 6), torch.randn(1, 4, 4, 6), torch.randn(1, 5, 2, 3)]
    finest = decoder(skips)
    decoder.deep_supervision = True
    both = decoder(skips)
    assert torch.equal(finest, both[0])
    assert [tuple(b.shape) for b in both] == [(1, 2, 8, 6), (1, 2, 4, 6)]
