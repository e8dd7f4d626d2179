"""Convolution blocks equal the layers that they stand for, in 2D and 3D, also strided."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from umamba.blocks.conv import (
    BatchNormBlock,
    ConvNormAct,
    DoubleConv,
    ResidualBlock,
    convolution,
    initialize_convolutions,
)
from umamba.blocks.norm import ChannelNorm, InstanceNorm
from umamba.blocks.sampling import LinearUpsample, NearestUpsample, TransposedUpsample
from umamba.blocks.unet_decoder import UNetDecoder

SHAPES = {2: (7, 10), 3: (3, 7, 10)}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dims", [2, 3])
def test_instance_norm_is_torchs(dims: int, offset: float, affine: bool) -> None:
    own = InstanceNorm(5, affine)
    assert len(own.state_dict()) == 2 * affine
    for parameter in own.parameters():
        nn.init.normal_(parameter)
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
def test_channel_norm_normalizes_each_voxel(dims: int) -> None:
    own = ChannelNorm(5, eps=0.1)
    for parameter in own.parameters():
        nn.init.normal_(parameter)
    images = 3 + torch.randn(2, 5, *SHAPES[dims])
    variance = images.var(dim=1, correction=0, keepdim=True)
    expected = (images - images.mean(dim=1, keepdim=True)) / (variance + 0.1).sqrt()
    weight, bias = (parameter.view(5, *[1] * dims) for parameter in (own.weight, own.bias))
    torch.testing.assert_close(own(images), expected * weight + bias)


def test_a_residual_block_takes_another_norm_and_a_bias_in_its_shortcut() -> None:
    block = ResidualBlock(4, 6, (3, 3), norm=ChannelNorm, shortcut_bias=True)
    images = torch.randn(2, 4, 7, 10)
    inner = functional.leaky_relu(block.norm1(block.conv1(images)), 0.01)
    branch = block.norm2(block.conv2(inner))
    shortcut = block.shortcut.norm(block.shortcut.conv(images))
    torch.testing.assert_close(block(images), functional.leaky_relu(branch + shortcut, 0.01))
    assert isinstance(block.norm1, ChannelNorm) and isinstance(block.shortcut.norm, ChannelNorm)
    assert block.shortcut.conv.bias is not None
    assert ResidualBlock(4, 6, (3, 3), norm=ChannelNorm).shortcut.conv.bias is None


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


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("n_in", [4, 6])
def test_the_block_without_affine_parts_is_monais(dims: int, n_in: int) -> None:
    block = ResidualBlock(n_in, 4, [3] * dims, affine=False)
    weights = dict(block.named_parameters())
    projects = {"shortcut.conv.weight"} if n_in != 4 else set()
    assert weights.keys() == {"conv1.weight", "conv2.weight"} | projects
    conv = functional.conv2d if dims == 2 else functional.conv3d
    images = torch.randn(2, n_in, *SHAPES[dims])
    kept = images.clone()
    expected = functional.instance_norm(conv(images, weights["conv1.weight"], padding=1))
    expected = functional.leaky_relu(expected, 0.01)
    expected = functional.instance_norm(conv(expected, weights["conv2.weight"], padding=1))
    shortcut = images
    if projects:
        shortcut = functional.instance_norm(conv(images, weights["shortcut.conv.weight"]))
    expected = functional.leaky_relu(expected + shortcut, 0.01)
    torch.testing.assert_close(block(images), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(images, kept)


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


@pytest.mark.parametrize("stride", [(2, 2), (1, 2, 2)])
def test_linear_upsampling_of_a_ramp_is_a_finer_ramp(stride: tuple[int, ...]) -> None:
    upsample = LinearUpsample(1, 1, stride)
    nn.init.ones_(upsample.conv.weight)
    ramp = torch.arange(6.0).expand(1, 1, *[3] * (len(stride) - 1), 6)
    finer = upsample(ramp)
    assert finer.shape[2:] == tuple(s * n for s, n in zip(stride, ramp.shape[2:], strict=True))
    # Voxel centers, so that the new ramp goes in quarters and stops at the outermost old centers.
    expected = (torch.arange(12) / 2 - 0.25).clamp(0, 5)
    torch.testing.assert_close(finer, expected.expand_as(finer))


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


def test_a_decoder_may_have_outputs_of_the_finest_stages_alone() -> None:
    stages = {"features_per_stage": [3, 4, 5], "strides": [[1, 1], [2, 1], [2, 2]]}
    kernels = {"kernel_sizes": [[3, 3]] * 3, "n_conv_per_stage": [1, 2]}
    upsample = functools.partial(TransposedUpsample, bias=False)
    build = functools.partial(
        UNetDecoder, 2, **stages, **kernels, upsample=upsample, shortcut="pool", affine=False
    )
    decoder = build(n_outputs=1, deep_supervision=True)
    keys = decoder.state_dict().keys()
    assert [key for key in keys if "bias" in key] == ["seg_layers.1.bias"]
    assert not any("norm" in key or key.startswith("seg_layers.0") for key in keys)
    skips = [torch.randn(1, 3, 8, 6), torch.randn(1, 4, 4, 6), torch.randn(1, 5, 2, 3)]
    (finest,) = decoder(skips)
    assert finest.shape == (1, 2, 8, 6)
    decoder.deep_supervision = False
    assert torch.equal(decoder(skips), finest)
    with pytest.raises(ValueError, match="n_outputs is 3; choose 1 to 2"):
        build(n_outputs=3)


@pytest.mark.parametrize("stride", [None, 1, [2, 1]])
def test_the_batch_norm_block_is_a_basic_block_with_a_further_branch(stride) -> None:
    block = BatchNormBlock(4, 4, [3, 3], stride)
    assert len(block.shortcut) == (0 if stride is None else 2)
    images = torch.randn(2, 4, 7, 10)
    kept = images.clone()
    result = functional.conv2d(images, block.conv1.weight, stride=stride or 1, padding=1)
    result = functional.relu(functional.batch_norm(result, None, None, training=True))
    result = functional.conv2d(result, block.conv2.weight, padding=1)
    result = functional.batch_norm(result, None, None, training=True)
    shortcut = images
    if stride is not None:
        shortcut = functional.conv2d(images, block.shortcut[0].weight, stride=stride)
        shortcut = functional.batch_norm(shortcut, None, None, training=True)
    branch = torch.randn_like(result)
    expected = functional.relu(result + shortcut + branch)
    torch.testing.assert_close(block(images, branch), expected, rtol=1e-4, atol=1e-5)
    expected = functional.relu(result + shortcut)
    torch.testing.assert_close(block(images), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_double_convolution_strides_first_and_normalizes_twice(dims: int) -> None:
    layer = DoubleConv(4, 6, [3] * dims, 2)
    conv = functional.conv2d if dims == 2 else functional.conv3d
    images = torch.randn(2, 4, *SHAPES[dims])
    expected = conv(images, layer.conv1.weight, layer.conv1.bias, 2, 1)
    expected = functional.relu(functional.batch_norm(expected, None, None, training=True))
    expected = conv(expected, layer.conv2.weight, layer.conv2.bias, 1, 1)
    expected = functional.relu(functional.batch_norm(expected, None, None, training=True))
    torch.testing.assert_close(layer(images), expected, rtol=1e-4, atol=1e-5)
