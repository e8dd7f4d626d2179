"""The partner networks: counts, sizes, windows, dropout, key maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from umamba.blocks.mixer import count_parameters
from umamba.networks import create_module
from umamba.networks.partners import SwinUNet, UNetSmall, WindowAttention

SWIN: dict[str, Any] = {
    "features_per_stage": [6, 12, 24],
    "depths": [2, 2, 1],
    "n_heads": [1, 2, 3],
    "window_sizes": [4, 4, 2],
}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def test_parameter_counts_are_the_official_ones() -> None:
    with torch.device("meta"):
        small = create_module("unet_small", input_channels=1, num_classes=4)
        swin = create_module("swin_unet", input_channels=1, num_classes=4)
    assert count_parameters(small) == 1_813_764
    assert count_parameters(swin) == 27_168_420


def test_sizes_that_do_not_fit_are_refused_with_the_next_that_does() -> None:
    with torch.device("meta"):
        small, swin = UNetSmall(1, 2), SwinUNet(1, 2)
        assert swin(torch.empty(1, 1, 224, 448)).shape == (1, 2, 224, 448)
        with pytest.raises(ValueError, match=r"divisible by \(16, 16\).*is \(48, 48\)"):
            small(torch.empty(1, 1, 40, 48))
        with pytest.raises(ValueError, match=r"divisible by \(224, 224\).*is \(448, 224\)"):
            swin(torch.empty(1, 1, 225, 224))


def test_windows_of_each_stage_make_the_divisor() -> None:
    network = SwinUNet(2, 3, **SWIN).eval()
    assert network.divisor == (32, 32)  # 4 * 4, 8 * 4 and 16 * 2
    assert network(torch.randn(1, 2, 32, 64)).shape == (1, 3, 32, 64)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("swin_unet", {"n_heads": [1, 2]}, "n_heads has 2 entries"),
        ("swin_unet", {"window_sizes": [4]}, "window_sizes has 1 entries"),
        ("swin_unet", {"n_heads": [1, 2, 5]}, "5 heads do not divide 24 channels"),
        ("unet_small", {"dropout": [0.1]}, "dropout has 1 entries"),
    ],
)
def test_what_does_not_fit_the_stages_is_refused(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    rest = SWIN if name == "swin_unet" else {}
    with pytest.raises(ValueError, match=message):
        create_module(name, input_channels=1, num_classes=2, **{**rest, **arguments})


def test_gray_images_are_repeated_to_three_channels() -> None:
    color, gray = SwinUNet(3, 2, **SWIN).eval(), SwinUNet(1, 2, **SWIN).eval()
    gray.load_state_dict(color.state_dict())
    images = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(gray(images), color(images.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("shifted", "shape", "pixel", "rows", "columns"),
    [
        (False, (12, 16), (5, 5), (4, 8), (4, 8)),  # its window
        (True, (12, 16), (5, 5), (2, 6), (2, 6)),  # shifted by half of a window
        (True, (12, 16), (0, 11), (0, 2), (10, 14)),  # the other end of the map is no neighbor
        (True, (12, 4), (5, 1), (4, 8), (0, 4)),  # one window wide: it does not shift
    ],
)
def test_a_pixel_sees_its_window(
    shifted: bool,
    shape: tuple[int, int],
    pixel: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    attention = WindowAttention(6, 2, 4, shifted=shifted)
    features = torch.randn(1, *shape, 6, requires_grad=True)
    attention(features)[0, pixel[0], pixel[1]].sum().backward()
    assert features.grad is not None
    seen = features.grad[0].abs().sum(-1) > 1e-12
    expected = torch.zeros_like(seen)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(seen, expected)


def test_official_windows_are_no_larger_than_their_maps() -> None:
    config = {"in_chans": 1, "num_classes": 2, "img_size": 128, "window_size": 8}
    arguments = SwinUNet.official_arguments(config)
    assert arguments["window_sizes"] == [8, 8, 8, 4]
    assert SwinUNet.official_arguments({"num_classes": 4})["window_sizes"] == [7, 7, 7, 7]


def test_the_small_network_drops_in_training_only() -> None:
    network = UNetSmall(2, 3, features_per_stage=[4, 8, 12], dropout=[0.5, 0.5, 0.5])
    images = torch.randn(2, 2, 8, 12)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))
    assert network(images).shape == (2, 3, 8, 12)


@pytest.mark.parametrize(
    ("network", "prefix", "computed"),
    [
        (UNetSmall(1, 2, features_per_stage=[4, 4, 4, 4, 4]), "encoder.", []),
        (
            SwinUNet(1, 2, **SWIN),
            "swin_unet.",
            [
                "swin_unet.layers.0.blocks.1.attn_mask",
                "swin_unet.layers_up.1.blocks.0.attn.relative_position_index",
            ],
        ),
    ],
    ids=["unet_small", "swin_unet"],
)
def test_keys_go_both_ways_without_what_is_computed(
    network: UNetSmall | SwinUNet, prefix: str, computed: list[str]
) -> None:
    own, key_map = network.state_dict(), network.official_key_map()
    official = key_map.to_official(own)
    assert any(key.startswith(prefix) for key in official)
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    extra = {key: torch.zeros(1) for key in computed}
    back, report = key_map.to_own({**official, **extra}, shapes)
    assert report.ignored == computed
    assert all(torch.equal(back[key], own[key]) for key in own)
