"""The Mamba mixer and the layer around it: token order, causality, precision, controls."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from umamba.blocks.mamba import Mamba
from umamba.blocks.mixer import (
    ConvMixer,
    MixerLayer,
    PointwiseMixerLayer,
    ProjectedMixerLayer,
    count_parameters,
)


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("d_model", "counts"),
    [
        (48, (19_680, 25_536, 31_392)),
        (96, (68_160, 81_024, 93_888)),
        (192, (251_520, 281_856, 312_192)),
        (384, (963_840, 1_042_944, 1_122_048)),
    ],
)
def test_parameter_counts_of_mamba_are_the_official_ones(
    d_model: int, counts: tuple[int, ...]
) -> None:
    orders = ("raster", "raster_reversed", "inter_slice_5")
    with torch.device("meta"):
        found = [count_parameters(Mamba(d_model, orders=orders[: k + 1])) for k in range(3)]
    assert found == list(counts)


def test_mamba_equals_its_equations_written_as_a_loop() -> None:
    mixer = Mamba(6, d_state=4, d_conv=3, expand=2, dt_rank=2).double()
    tokens = torch.randn(2, 11, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(tokens), mamba_by_hand(mixer, tokens))


def test_a_token_reaches_only_those_that_come_later_in_raster_order() -> None:
    layer = MixerLayer(5, spatial_dims=3).double()
    features = torch.randn(1, 5, 2, 3, 4, dtype=torch.float64)
    changed = features.clone()
    changed[..., 1, 0, 2] += 1
    moved = (layer(features) != layer(changed)).any(dim=1).flatten()
    position = 1 * 12 + 0 * 4 + 2
    assert not moved[:position].any()
    assert moved[position:].any()
    assert moved[position]


def test_the_layer_has_no_residual_unless_asked() -> None:
    plain = MixerLayer(4, spatial_dims=2)
    residual = MixerLayer(4, spatial_dims=2, residual=True)
    residual.load_state_dict(plain.state_dict())
    features = torch.randn(1, 4, 3, 5)
    torch.testing.assert_close(residual(features), features + plain(features))


def test_channel_tokens_are_the_channels_as_wide_as_the_map() -> None:
    layer = MixerLayer(15, spatial_dims=2, tokens="channels")
    features = torch.randn(2, 7, 3, 5)
    expected = layer.mixer(layer.norm(features.reshape(2, 7, 15))).reshape(features.shape)
    torch.testing.assert_close(layer(features), expected)


@pytest.mark.parametrize("mixer", ["scan", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_mixed_in_float32_even_under_autocast(
    mixer: str, dtype: torch.dtype
) -> None:
    layer = MixerLayer(6, spatial_dims=2, mixer=mixer)
    features = torch.randn(1, 6, 4, 5).to(dtype)
    exact = layer(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(features)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact)


def test_the_scan_of_large_features_stays_finite() -> None:
    layer = MixerLayer(6, spatial_dims=2)
    assert torch.isfinite(layer(1e4 * torch.randn(1, 6, 9, 7))).all()


def test_no_mixer_means_no_parameters_and_the_input_itself() -> None:
    layer = MixerLayer(6, spatial_dims=3, mixer="none", residual=True)
    features = torch.randn(1, 6, 2, 3, 4)
    assert layer(features) is features
    assert not list(layer.parameters())


def test_the_projected_layer_uses_its_norm_twice_and_scales_the_skip_inside() -> None:
    layer = ProjectedMixerLayer(4, 6, spatial_dims=2, skip="inside").double()
    for parameter in (layer.norm.weight, layer.norm.bias, layer.skip_scale):
        nn.init.normal_(parameter)
    features = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    tokens = features.flatten(2).transpose(1, 2)
    mixed = layer.mixer(layer.norm(tokens)) + layer.skip_scale * tokens
    expected = layer.proj(layer.norm(mixed)).transpose(1, 2).reshape(2, 6, 3, 5)
    torch.testing.assert_close(layer(features), expected)


def test_the_projected_layer_adds_its_input_outside_and_gives_the_scale_a_zero_gradient() -> None:
    layer = ProjectedMixerLayer(4, 4, spatial_dims=3, skip="outside").double()
    for parameter in (layer.norm.weight, layer.norm.bias, layer.skip_scale):
        nn.init.normal_(parameter)
    features = torch.randn(2, 4, 3, 2, 5, dtype=torch.float64)
    tokens = features.flatten(2).transpose(1, 2)
    branch = layer.proj(layer.norm(layer.mixer(layer.norm(tokens)))).transpose(1, 2)
    result = layer(features)
    torch.testing.assert_close(result, features + branch.reshape(features.shape))
    result.square().sum().backward()
    assert layer.skip_scale.grad == 0


@pytest.mark.parametrize("skip", ["inside", "outside"])
def test_the_projected_layer_works_in_float32_under_autocast(skip: str) -> None:
    layer = ProjectedMixerLayer(6, 6, spatial_dims=2, skip=skip)
    features = torch.randn(1, 6, 4, 5, dtype=torch.bfloat16)
    exact = layer(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(features)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact)


def test_without_a_mixer_the_projected_layer_keeps_only_what_carries_its_input() -> None:
    features = torch.randn(1, 6, 2, 3)
    outside = ProjectedMixerLayer(6, 6, spatial_dims=2, skip="outside", mixer="none")
    assert outside(features) is features
    assert not list(outside.parameters())
    inside = ProjectedMixerLayer(6, 9, spatial_dims=2, skip="inside", mixer="none")
    expected = inside.proj(inside.norm(features.movedim(1, -1))).movedim(-1, 1)
    torch.testing.assert_close(inside(features), expected)
    assert inside.skip_scale is None


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_convolution_mixer_sees_the_neighbours_of_a_voxel_and_no_others(dims: int) -> None:
    mixer = ConvMixer(4, spatial_dims=dims, n_parameters=500).double()
    shape = (5, 6, 7)[:dims]
    tokens = torch.randn(1, *shape, 4, dtype=torch.float64)
    changed = tokens.clone()
    changed[0, *[2] * dims] += 1
    moved = (mixer(tokens) != mixer(changed)).any(dim=-1)[0]
    neighbours = torch.zeros(shape, dtype=torch.bool)
    neighbours[*[slice(1, 4)] * dims] = True
    assert torch.equal(moved, neighbours)


@pytest.mark.parametrize("d_model", [24, 32, 64, 210, 320])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_convolution_mixer_is_as_large_as_mamba(d_model: int, dims: int) -> None:
    with torch.device("meta"):
        size = count_parameters(Mamba(d_model))
        control = count_parameters(ConvMixer(d_model, spatial_dims=dims, n_parameters=size))
    assert abs(control / size - 1) < 0.02


def mamba_by_hand(mixer: Mamba, tokens: torch.Tensor) -> torch.Tensor:
    p = mixer.directions[0]
    n_state, rank = p.A_log.shape[1], p.dt_proj_weight.shape[1]
    u, z = mixer.in_proj(tokens).chunk(2, dim=-1)  # (B, L, E)
    taps = p.conv_weight.shape[-1]
    padded = functional.pad(u, (0, 0, taps - 1, 0))
    windows = padded.unfold(1, taps, 1)  # (B, L, E, K)
    u = functional.silu((windows * p.conv_weight[:, 0]).sum(-1) + p.conv_bias)
    dt, b, c = (u @ p.x_proj_weight.t()).split([rank, n_state, n_state], dim=-1)
    delta = functional.softplus(dt @ p.dt_proj_weight.t() + p.dt_proj_bias)
    decay = -p.A_log.exp()
    state = torch.zeros(*u.shape[::2], n_state, dtype=u.dtype)
    results = []
    for t in range(u.shape[1]):
        inflow = (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        state = torch.exp(delta[:, t, :, None] * decay) * state + inflow
        results.append((state * c[:, t, None]).sum(-1) + p.D * u[:, t])
    return mixer.out_proj(torch.stack(results, 1) * functional.silu(z))


def test_each_order_has_its_own_parameters_and_only_the_first_spreads_its_steps() -> None:
    with torch.device("cpu"):
        mixer = Mamba(32, orders=("raster", "raster_reversed"))
    assert len(mixer.directions) == 2
    steps = [nn.functional.softplus(d.dt_proj_bias).median().item() for d in mixer.directions]
    assert steps[0] < 0.1 < 0.4 < steps[1]
    assert count_parameters(mixer) == count_parameters(Mamba(32)) + count_parameters(
        mixer.directions[1]
    )


def test_tied_orders_share_one_set_of_parameters() -> None:
    orders = ("raster", "raster_reversed")
    mixer = Mamba(6, orders=orders, merge="mean", tied=True).double()
    plain = Mamba(6).double()
    plain.load_state_dict(mixer.state_dict())
    tokens = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    back = plain(tokens.flip(1, 2)).flip(1, 2)
    torch.testing.assert_close(mixer(tokens), (plain(tokens) + back) / 2)


def test_four_views_are_the_mean_over_flipped_tokens_and_channels() -> None:
    layer = pointwise_layer(four_views=True, projects=True)
    plain = Mamba(6).double()
    plain.load_state_dict(layer.mixer.state_dict())
    features = torch.randn(2, 6, 2, 3, 4, dtype=torch.float64)
    x = functional.relu(layer.norm(layer.in_conv(features)))
    tokens = x.flatten(2).transpose(1, 2)  # (B, L, C)
    views = [plain(tokens.flip(axes)).flip(axes) for axes in ((), (1,), (2,), (1, 2))]
    mixed = torch.stack(views).mean(0).transpose(1, 2).reshape(x.shape)
    expected = functional.relu(layer.out_norm(layer.out_conv(x + mixed)))
    torch.testing.assert_close(layer(features), expected)


def test_a_pointwise_layer_of_one_view_is_its_mixer_behind_a_convolution() -> None:
    layer = pointwise_layer()
    features = torch.randn(1, 6, 2, 3, 4, dtype=torch.float64)
    x = functional.relu(layer.norm(layer.in_conv(features)))
    expected = layer.mixer(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(layer(features), expected)
    layer.residual = True
    torch.testing.assert_close(layer(features), features + expected)


def test_a_pointwise_layer_mixes_in_float32_under_autocast() -> None:
    layer = pointwise_layer(four_views=True).float()
    seen: list[torch.dtype] = []
    layer.mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(torch.randn(1, 6, 2, 3, 4))
    assert [*seen, mixed.dtype] == [torch.float32] * 2


def pointwise_layer(four_views: bool = False, projects: bool = False) -> PointwiseMixerLayer:
    layer = PointwiseMixerLayer(6, four_views=four_views, projects=projects)
    for key, value in layer.state_dict().items():
        if "norm" in key and value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return layer.double().eval()


def test_only_the_first_direction_starts_with_spread_step_sizes() -> None:
    mixer = Mamba(64, orders=("raster", "raster_reversed", "inter_slice_5"))
    first, *others = mixer.directions
    steps = functional.softplus(first.dt_proj_bias)
    assert 0.0009 < steps.min() < 0.003 < 0.03 < steps.max() < 0.1001
    for other in others:  # as a plain linear layer of 4 inputs
        assert 0.4 < other.dt_proj_bias.abs().max() <= 0.5
    for direction in mixer.directions:
        assert (direction.D == 1).all()
        assert 0.48 < direction.dt_proj_weight.abs().max() <= 0.5
        assert 0.08 < direction.x_proj_weight.abs().max() <= 128**-0.5
        torch.testing.assert_close(direction.A_log.exp()[5], torch.arange(1.0, 17))


@pytest.mark.parametrize("spatial", [(6, 5), (4, 6, 5)], ids=["2d", "3d"])
def test_channels_last_maps_stay_so_without_a_copy(spatial: tuple[int, ...]) -> None:
    layer = MixerLayer(8, spatial_dims=len(spatial))
    layout = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
    plain = torch.randn(2, 8, *spatial)
    features = plain.contiguous(memory_format=layout)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mixed = layer(features)
    assert mixed.is_contiguous(memory_format=layout)
    assert not {event.name for event in profile.events()} & {"aten::clone", "aten::contiguous"}
    expected = layer(plain)
    assert expected.is_contiguous()
    torch.testing.assert_close(mixed, expected)
