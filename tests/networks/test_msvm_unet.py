"""What is special about MSVM-UNet: counts, stages, gray images, drop rates, initialization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from umamba.blocks.mixer import count_parameters
from umamba.blocks.ss2d import DropPath, VSSBlock
from umamba.networks import create_network, get_entry, recognize_network
from umamba.networks.msvm_unet import MSVMUNet, MultiScaleMLP

CLASSIFIER = 2 * 768 + 768 * 1000 + 1000  # norm and head of the ImageNet networks


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("encoder", "count"), [("tiny_0230s", 30_249_064), ("small_0229s", 49_012_840)]
)
def test_the_encoders_have_as_many_parameters_as_the_published_ones(
    encoder: str, count: int
) -> None:
    network = official(enc_name=encoder)
    assert count_parameters(network.encoder) + CLASSIFIER == count


def test_the_defaults_are_the_official_tiny_network() -> None:
    with torch.device("meta"):
        network = create_network("msvm_unet", 3, 9)
    assert count_parameters(network) == 35_925_513
    assert network.state_dict().keys() == official().state_dict().keys()
    key_map = MSVMUNet.official_key_map()
    names = key_map.to_official(network.state_dict())
    assert len(names) == 450
    assert recognize_network(names) == recognize_network(network.state_dict()) == ["msvm_unet"]


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="tiny_0230s, small_0229s"):
        MSVMUNet.official_arguments({"num_classes": 2, "enc_name": "base"})


@pytest.mark.parametrize("n_stages", [2, 4])
def test_other_numbers_of_stages_and_uneven_widths_work(n_stages: int) -> None:
    network = MSVMUNet(2, 3, **small(n_stages)).eval()
    size = 2**n_stages
    logits = network(torch.randn(1, 2, 3 * size, 5 * size))
    assert logits.shape == (1, 3, 3 * size, 5 * size)
    with pytest.raises(ValueError, match=f"divisible by \\({size}, {size}\\)"):
        network(torch.zeros(1, 2, 3 * size, 5 * size // 2))


@pytest.mark.parametrize("strides", [[[1, 1], [2, 2], [2, 2]], [[1, 1]]])
def test_strides_that_the_network_does_not_have_are_refused(strides: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"strides like \[\[1, 1\], \[4, 4\]"):
        MSVMUNet(1, 2, **{**small(3), "strides": strides})


def test_numbers_per_stage_must_fit_the_stages() -> None:
    with pytest.raises(ValueError, match="features_per_stage has 2 entries"):
        MSVMUNet(1, 2, **{**small(3), "features_per_stage": [8, 8]})
    with pytest.raises(ValueError, match="depths has 3 entries"):
        MSVMUNet(1, 2, **{**small(3), "depths": [1, 1, 1]})
    with pytest.raises(ValueError, match="depths_decoder has 2 entries"):
        MSVMUNet(1, 2, **{**small(3), "depths_decoder": [1, 1]})


def test_a_gray_image_is_seen_as_three_equal_channels() -> None:
    gray = MSVMUNet(1, 2, **small(3)).eval()
    color = MSVMUNet(3, 2, **small(3)).eval()
    color.load_state_dict(gray.state_dict())
    image = torch.randn(1, 1, 16, 24)
    torch.testing.assert_close(gray(image), color(image.repeat(1, 3, 1, 1)))


def test_a_single_image_of_one_deepest_pixel_is_refused_in_training_only() -> None:
    network = MSVMUNet(1, 2, **small(3))
    with pytest.raises(ValueError, match="a batch of two"):
        network(torch.zeros(1, 1, 8, 8))
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 2, 8, 8)
    assert network(torch.randn(1, 1, 8, 16)).shape == (1, 2, 8, 16)
    assert network.eval()(torch.randn(1, 1, 8, 8)).shape == (1, 2, 8, 8)


def test_the_encoders_blocks_alone_follow_the_arguments() -> None:
    network = MSVMUNet(1, 2, **small(3), d_state=4, expand=2, mlp_ratio=3)
    encoder, decoder = network.encoder.stages[0][0], network.decoder.stages[0][0]
    assert encoder.mixer.A_log.shape == (4, 16, 4)
    assert encoder.mlp.fc1.out_features == 24
    assert decoder.mixer.A_log.shape == (4, 8, 1)
    assert decoder.mlp.fc1.out_features == 32
    assert network(torch.randn(2, 1, 16, 24)).shape == (2, 2, 16, 24)


def test_the_scales_of_an_mlp_are_added_to_its_hidden_map() -> None:
    mlp = MultiScaleMLP(3, 2).double()
    features = torch.randn(2, 4, 7, 3, dtype=torch.float64)
    hidden = functional.gelu(mlp.fc1(features)).movedim(-1, 1)
    scales = [
        functional.conv2d(hidden, kernel, padding=size // 2, groups=6)
        for kernel, size in zip(mlp.kernels, (1, 3, 5), strict=True)
    ]
    expected = mlp.fc2((hidden + sum(scales)).movedim(1, -1))
    torch.testing.assert_close(mlp(features), expected)


def test_drop_rates_rise_in_the_encoder_and_fall_in_the_decoder() -> None:
    network = official()
    rising, falling = (
        [block.drop_path.rate for block in blocks_of(part)]
        for part in (network.encoder, network.decoder)
    )
    assert rising == pytest.approx([0.2 * i / 13 for i in range(14)])
    assert falling == pytest.approx([0.2, 0.16, 0.12, 0.08, 0.04, 0])
    assert blocks_of(official(enc_name="small_0229s").encoder)[-1].drop_path.rate == 0.3
    assert sum(isinstance(module, DropPath) for module in network.modules()) == 20


def test_linear_layers_start_as_vmambas_in_the_encoder_and_as_torchs_in_the_decoder() -> None:
    network = MSVMUNet(1, 2, **small(3, width=32))
    encoder, decoder = network.encoder.stages[0][0], network.decoder.stages[0][0]
    for linear in (encoder.mlp.fc1, encoder.mixer.in_proj):
        assert abs(linear.weight.std().item() / 0.02 - 1) < 0.1
    assert not encoder.mlp.fc1.bias.any()
    for linear in (decoder.mlp.fc1, decoder.mixer.in_proj):
        assert linear.weight.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)
    assert decoder.mlp.fc1.bias.any()
    steps = functional.softplus(encoder.mixer.dt_proj_bias)
    assert 0.0009 < steps.min() < steps.max() < 0.101


def test_controls_keep_the_mlps_and_replace_the_scans() -> None:
    with torch.device("meta"):
        scan, conv, none = (
            create_network("msvm_unet" + suffix, 3, 9, **get_entry("msvm_unet" + suffix).arguments)
            for suffix in ("", "_convmix", "_noscan")
        )
    own, control = (
        sum(count_parameters(block.mixer) for block in blocks_of(network))
        for network in (scan, conv)
    )
    assert abs(control / own - 1) < 0.02
    norms = sum(count_parameters(block.norm) for block in blocks_of(scan))
    assert count_parameters(none) == count_parameters(scan) - own - norms
    assert all(block.mlp is not None for block in blocks_of(none))


def official(**config: Any) -> MSVMUNet:
    with torch.device("meta"):
        return MSVMUNet(**MSVMUNet.official_arguments({"num_classes": 9, **config}))


def small(n_stages: int, width: int = 8) -> dict[str, Any]:
    return {
        "strides": [[1, 1], [4, 4], *[[2, 2]] * (n_stages - 2)],
        "features_per_stage": [5, width, width + 3, width + 8][:n_stages],
        "depths": [1, 2, 1][: n_stages - 1],
        "depths_decoder": [1, 2][: n_stages - 2],
    }


def blocks_of(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, VSSBlock)]
