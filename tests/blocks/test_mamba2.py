"""The Mamba-2 mixer: every option against its equations written as a loop."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from umamba.blocks.mamba2 import Mamba2
from umamba.blocks.mixer import build_mixer, count_parameters

SMALL = {"d_state": 4, "headdim": 3}
# name -> options beside SMALL; d_model 6, so d_inner 12
OPTIONS = {
    "defaults": {},
    "groups": {"ngroups": 2},
    "mlp_beside": {"d_ssm": 6},
    "mlp_beside_groups": {"d_ssm": 6, "ngroups": 2},
    "skip_per_channel": {"D_has_hdim": True},
    "no_norm": {"rmsnorm": False},
    "norm_before_gate": {"norm_before_gate": True, "ngroups": 2},
    "whole_norm": {"grouped_norm": False, "ngroups": 2},
    "init_states": {"learnable_init_states": True},
    "limited_steps": {"dt_limit": (0.3, 0.8)},
    "bias": {"bias": True},
    "no_conv_bias": {"conv_bias": False, "d_conv": 3},
    "wider": {"expand": 3},
}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def make(name: str) -> Mamba2:
    """A mixer in float64 whose parameters are all random, so that each of them shows."""
    mixer = Mamba2(6, **{**SMALL, **OPTIONS[name]}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return mixer


def by_hand(mixer: Mamba2, tokens: Tensor, options: dict[str, object]) -> Tensor:
    """The equations of the block, head by head and token by token."""
    n, p, groups = SMALL["d_state"], SMALL["headdim"], int(options.get("ngroups", 1))
    d_inner = int(options.get("expand", 2)) * 6
    d_ssm = int(options.get("d_ssm", d_inner))
    heads, d_mlp = d_ssm // p, d_inner - d_ssm
    parts = torch.split(
        mixer.in_proj(tokens), [d_mlp, d_mlp, d_ssm, d_ssm, groups * n, groups * n, heads], dim=-1
    )
    z0, x0, z, *xBC, dt = parts
    taps = mixer.conv_weight.shape[-1]
    padded = functional.pad(torch.cat(xBC, -1), (0, 0, taps - 1, 0))
    convolved = (padded.unfold(1, taps, 1) * mixer.conv_weight[:, 0]).sum(-1)
    if mixer.conv_bias is not None:
        convolved = convolved + mixer.conv_bias
    x, B, C = functional.silu(convolved).split([d_ssm, groups * n, groups * n], -1)
    low, high = options.get("dt_limit", (0, math.inf))
    delta = functional.softplus(dt + mixer.dt_bias).clamp(low, high)

    y = torch.zeros_like(x)
    for b in range(len(x)):
        for h in range(heads):
            mine = slice(h * p, (h + 1) * p)
            group = slice(h // (heads // groups) * n, (h // (heads // groups) + 1) * n)
            state = torch.zeros(p, n, dtype=x.dtype)
            if mixer.init_states is not None:
                state = mixer.init_states[h]
            skip = mixer.D[mine] if options.get("D_has_hdim") else mixer.D[h]
            for t in range(x.shape[1]):
                decay = torch.exp(-delta[b, t, h] * mixer.A_log[h].exp())
                state = decay * state + delta[b, t, h] * torch.outer(x[b, t, mine], B[b, t, group])
                y[b, t, mine] = state @ C[b, t, group] + skip * x[b, t, mine]

    gate = functional.silu(z)
    if mixer.norm is None:
        y = y * gate
    else:
        before = bool(options.get("norm_before_gate"))
        y = y if before else y * gate
        norm_groups = groups if options.get("grouped_norm", True) else 1
        chunks = [
            c / (c.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() for c in y.chunk(norm_groups, -1)
        ]
        y = torch.cat(chunks, -1) * mixer.norm.weight
        y = y * gate if before else y
    return mixer.out_proj(torch.cat([functional.silu(z0) * x0, y], -1))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_equations_written_as_a_loop(name: str) -> None:
    mixer = make(name)
    tokens = torch.randn(2, 11, 6, dtype=torch.float64)
    expected = by_hand(mixer, tokens, OPTIONS[name])
    torch.testing.assert_close(mixer(tokens), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_has_a_gradient(name: str) -> None:
    mixer = make(name)
    mixer(torch.randn(2, 11, 6, dtype=torch.float64)).pow(2).mean().backward()
    idle = [k for k, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max()]
    assert not idle


def test_the_step_limits_bite_on_both_sides() -> None:
    free, limited = make("defaults"), make("limited_steps")
    limited.load_state_dict(free.state_dict())
    tokens = torch.randn(1, 30, 6, dtype=torch.float64)
    steps = functional.softplus(free.in_proj(tokens)[..., -4:] + free.dt_bias)
    assert (steps < 0.3).any()
    assert (steps > 0.8).any()
    assert not torch.allclose(free(tokens), limited(tokens))


def test_the_default_block_has_the_official_number_of_parameters() -> None:
    with torch.device("meta"):
        assert count_parameters(Mamba2(768)) == 3_764_552


def test_a_feature_map_is_mixed_as_its_raster_sequence() -> None:
    mixer = Mamba2(6, **SMALL)
    features = torch.randn(2, 3, 4, 5, 6)
    expected = mixer(features.reshape(2, 60, 6)).reshape(features.shape)
    assert torch.equal(mixer(features), expected)


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        mixed = Mamba2(6, **SMALL, learnable_init_states=True)(torch.empty(2, 3, 50, 6))
    assert mixed.is_meta
    assert mixed.shape == (2, 3, 50, 6)


def test_the_chunk_size_does_not_change_the_function() -> None:
    mixer, other = make("defaults"), Mamba2(6, **SMALL, chunk_size=4).double()
    other.load_state_dict(mixer.state_dict())
    tokens = torch.randn(1, 23, 6, dtype=torch.float64)
    torch.testing.assert_close(other(tokens), mixer(tokens), rtol=1e-10, atol=1e-12)


def test_parameters_start_where_the_options_say() -> None:
    mixer = Mamba2(
        512,
        headdim=2,
        A_init_range=(2, 3),
        dt_min=0.01,
        dt_max=0.2,
        dt_init_floor=0.02,
        conv_init=0.125,
    )
    rates, steps = mixer.A_log.exp(), functional.softplus(mixer.dt_bias)
    assert 1.999 < rates.min() < 2.1 < 2.9 < rates.max() < 3.001
    assert steps.min().item() == pytest.approx(0.02)
    assert 0.18 < steps.max() < 0.201
    assert 0.12 < mixer.conv_weight.abs().max() <= 0.125
    assert torch.equal(mixer.D, torch.ones(512))
    assert not Mamba2(32, learnable_init_states=True).init_states.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_input_is_mixed_in_float32_even_under_autocast(dtype: torch.dtype) -> None:
    mixer = Mamba2(6, **SMALL)
    tokens = torch.randn(1, 20, 6).to(dtype)
    exact = mixer(tokens.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mixer(tokens)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, exact)


def test_large_features_stay_finite() -> None:
    assert torch.isfinite(Mamba2(6, **SMALL)(1e4 * torch.randn(1, 100, 6))).all()


def test_the_mixer_switch_knows_it() -> None:
    build = functools.partial(Mamba2, 64)
    scan = build_mixer("scan", build, 64, axes=3)
    control = build_mixer("conv", build, 64, axes=3)
    assert isinstance(scan, Mamba2)
    assert build_mixer("none", build, 64, axes=3) is None
    assert control is not None
    assert abs(count_parameters(control) / count_parameters(scan) - 1) < 0.02


def test_widths_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="headdim 64 does not divide the 60 scanned channels"):
        Mamba2(30)
    with pytest.raises(ValueError, match="choose 1 to expand \\* d_model = 64"):
        Mamba2(32, d_ssm=128)
    with pytest.raises(ValueError, match="ngroups is 3; it must divide the 4 heads"):
        Mamba2(32, headdim=16, ngroups=3)
