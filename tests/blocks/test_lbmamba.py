"""LBMamba: Mamba's parameters, another scan; and layers whose walk turns instead of the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umamba.blocks.lbmamba import AlternatingLayers, LBMamba
from umamba.blocks.mamba import Mamba
from umamba.blocks.mixer import ConvMixer
from umamba.ops.token_orders import token_order


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def test_it_has_the_parameters_of_mamba_and_with_windows_of_one_token_its_function() -> None:
    mamba, plain, local = Mamba(6).double(), LBMamba(6, window=1).double(), LBMamba(6).double()
    for mixer in (plain, local):
        mixer.load_state_dict(mamba.state_dict())
    tokens = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(plain(tokens), mamba(tokens))
    assert not torch.allclose(local(tokens), mamba(tokens))


@pytest.mark.parametrize(("length", "window"), [(20, 4), (140, 8), (300, 16)])
def test_the_window_follows_the_number_of_tokens_unless_given(length: int, window: int) -> None:
    local, fixed = LBMamba(4), LBMamba(4, window=window)
    fixed.load_state_dict(local.state_dict())
    features = torch.randn(1, length // 10, 10, 4)
    assert torch.equal(local(features), fixed(features))


def test_a_token_is_seen_from_its_window_and_from_all_that_follow() -> None:
    mixer = LBMamba(5, window=4).double()
    tokens = torch.randn(1, 15, 5, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 6] += 1
    moved = (mixer(tokens) != mixer(changed)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(4, 15))


def flipped_after_every_layer(layers: AlternatingLayers, features: Tensor, name: str) -> Tensor:
    """The tokens in that order through LBVim's recurrence, where all layers walk forwards."""
    order = token_order(name)
    x = order.to_tokens(features.movedim(-1, 1)).transpose(1, 2)  # (B, L, C)
    for layer in layers.layers:
        forwards = LBMamba(x.shape[-1], d_state=4, window=4).to(x.dtype)
        forwards.load_state_dict(layer.mixer.state_dict())
        x = (x + forwards(layer.norm(x))).flip(1)
    return order.from_tokens(x.transpose(1, 2), tuple(features.shape[1:-1])).movedim(1, -1)


@pytest.mark.parametrize("order", ["raster", "raster_reversed", "axes_120", "inter_slice_5"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_turning_the_walk_equals_flipping_the_tokens_after_every_layer(
    depth: int, order: str
) -> None:
    layers = AlternatingLayers(6, depth=depth, order=order, d_state=4, window=4).double()
    features = torch.randn(2, 3, 5, 2, 6, dtype=torch.float64)
    expected = flipped_after_every_layer(layers, features, order)
    torch.testing.assert_close(layers(features), expected)


def test_an_odd_depth_ends_in_the_order_of_the_input_where_that_is_asked() -> None:
    layers = AlternatingLayers(6, depth=3)
    restored = AlternatingLayers(6, depth=3, restore_order=True)
    restored.load_state_dict(layers.state_dict())
    features = torch.randn(1, 3, 5, 6)
    assert torch.equal(restored(features), layers(features).flip(1, 2))


def test_two_layers_let_every_token_reach_every_other() -> None:
    layers = AlternatingLayers(5, depth=2).double()
    tokens = torch.randn(1, 12, 5, dtype=torch.float64)
    before = layers(tokens)
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] += 1
        assert (layers(changed) != before).any(-1).all()


@pytest.mark.parametrize("mixer", ["scan", "conv"])
def test_half_precision_input_is_mixed_in_float32_even_under_autocast(mixer: str) -> None:
    layers = AlternatingLayers(6, spatial_dims=2, mixer=mixer)
    features = torch.randn(1, 4, 5, 6).bfloat16()
    exact = layers(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layers(features)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, exact)


def test_controls_keep_the_order_and_without_a_mixer_the_input_comes_back() -> None:
    features = torch.randn(1, 3, 4, 5, 6)
    none = AlternatingLayers(6, depth=3, spatial_dims=3, mixer="none")
    assert none(features) is features
    assert not list(none.parameters())
    conv = AlternatingLayers(6, depth=1, spatial_dims=3, mixer="conv")
    layer = conv.layers[0]
    assert isinstance(layer.mixer, ConvMixer)
    torch.testing.assert_close(conv(features), features + layer.mixer(layer.norm(features)))


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        mixed = AlternatingLayers(6, depth=3)(torch.empty(2, 3, 50, 6))
    assert mixed.is_meta
    assert mixed.shape == (2, 3, 50, 6)


def test_a_window_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        LBMamba(4, window=0)
