"""SS2D and its block: forward types, walks, precision, controls, stochastic depth."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional

from umamba.blocks.mixer import count_parameters
from umamba.blocks.ss2d import MLP, SS2D, DropPath, VSSBlock, initialize_linear, ss2d_options


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("forward_type", "expected"),
    [
        ("v0", ("cross", "silu", "layer", False)),
        ("v3", ("cross", "silu", "layer", False)),
        ("v05_noz", ("cross", "none", "layer", False)),
        ("v04_no32", ("cross", "silu", "layer", False)),
        ("v05_onnone_noz_no32", ("cross", "none", "none", False)),
        ("v05_oncnorm_nozact_oact", ("cross", "linear", "cnorm", True)),
        ("v05_nozact_noz", ("cross", "none", "layer", False)),
        ("v051d_onsoftmax", ("unidi", "silu", "softmax", False)),
        ("v052d_onsigmoid_oact_no32", ("bidi", "silu", "sigmoid", True)),
        ("v052dc_ondwconv3", ("cascade", "silu", "dwconv3", False)),
    ],
)
def test_forward_types_are_read(forward_type: str, expected: tuple[Any, ...]) -> None:
    names = ("directions", "gate", "out_norm", "out_gelu")
    assert ss2d_options(forward_type) == dict(zip(names, expected, strict=True))
    SS2D(4, d_state=2, **ss2d_options(forward_type))


@pytest.mark.parametrize(
    "forward_type",
    [
        *("", "v9", "xv1a", "m0", "v05_", "v05_on", "v05_onlayer", "v05_onbatch", "v05noz"),
        *("v05_noz_onnone", "v05_no32_noz", "v05_oact_noz", "v05_noz_nozact", "v05_noz_noz"),
        *("v0_noz", "v0_no32", "v0_onnone", "V05"),
    ],
)
def test_an_unknown_forward_type_is_refused_with_those_that_exist(forward_type: str) -> None:
    with pytest.raises(ValueError, match=f"forward type '{forward_type}'.*v052dc.*_onsigmoid"):
        ss2d_options(forward_type)


@pytest.mark.parametrize(
    "arguments",
    [{"directions": "spiral"}, {"gate": "relu"}, {"out_norm": "batch"}, {"d_conv": 4}],
)
def test_unknown_options_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        SS2D(4, **arguments)


def test_each_parameter_set_walks_its_own_direction() -> None:
    before = {
        0: lambda h, w: (h, w) < (2, 1),
        1: lambda h, w: (w, h) < (1, 2),
        2: lambda h, w: (h, w) > (2, 1),
        3: lambda h, w: (w, h) > (1, 2),
    }
    x = torch.randn(1, 8, 4, 3, dtype=torch.float64)
    changed = x.clone()
    changed[..., 2, 1] += 1
    for k, untouched in before.items():
        mixer = SS2D(4, d_state=3).double()
        with torch.no_grad():
            for other in {0, 1, 2, 3} - {k}:
                mixer.D[other] = 0
                mixer.x_proj_weight[other] = 0  # B = C = 0: nothing comes out
            moved = (mixer._scan(x) != mixer._scan(changed)).any(dim=1)[0]
        for h in range(4):
            for w in range(3):
                assert not (untouched(h, w) and moved[h, w]), (k, h, w)
        assert moved.sum() == 12 - sum(untouched(h, w) for h in range(4) for w in range(3))


def test_the_older_cascade_differs_by_its_norms() -> None:
    features = torch.randn(1, 3, 5, 4)
    newer, older = (SS2D(4, directions="cascade", cascade_norm=norm) for norm in (True, False))
    older.load_state_dict(newer.state_dict())
    assert newer(features).shape == features.shape
    assert not torch.allclose(newer(features), older(features))


def test_the_rank_of_dt_follows_the_width_unless_given() -> None:
    assert SS2D(40).dt_proj_weight.shape == (4, 80, 3)
    assert SS2D(40, dt_rank=7).dt_proj_weight.shape == (4, 80, 7)


def test_softmax_and_sigmoid_stand_where_the_norm_was() -> None:
    scanned = torch.randn(2, 3, 5, 8)
    soft, sigmoid = (SS2D(4, out_norm=kind).out_norm(scanned) for kind in ("softmax", "sigmoid"))
    torch.testing.assert_close(soft.sum(dim=(1, 2)), torch.ones(2, 8))
    torch.testing.assert_close(sigmoid, torch.sigmoid(scanned))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_block_computes_in_float32_even_under_autocast(dtype: torch.dtype) -> None:
    block = VSSBlock(4, functools.partial(SS2D, 4, d_state=2), mlp=functools.partial(MLP, 4))
    features = torch.randn(1, 3, 5, 4).to(dtype)
    exact = block(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = block(features)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact)
    assert block.double()(features.double()).dtype == torch.float64


def test_without_a_mixer_the_mlp_stays() -> None:
    features = torch.randn(1, 3, 5, 4)
    build = functools.partial(SS2D, 4)
    assert VSSBlock(4, build, mixer="none")(features) is features
    block = VSSBlock(4, build, mixer="none", mlp=functools.partial(MLP, 4))
    expected = features + block.mlp(functional.layer_norm(features, [4]))
    torch.testing.assert_close(block(features), expected)


@pytest.mark.parametrize("d_model", [16, 24, 96])
def test_the_convolution_control_is_as_large_as_the_scan(d_model: int) -> None:
    build = functools.partial(SS2D, d_model)
    with torch.device("meta"):
        scan, conv = (count_parameters(VSSBlock(d_model, build, mixer=m)) for m in ("scan", "conv"))
    assert abs(conv / scan - 1) < 0.02


def test_stochastic_depth_drops_whole_samples_in_training_and_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    branch = torch.ones(4000, 2, 3)
    dropped = drop(branch)
    kept = dropped[:, 0, 0]
    assert torch.equal(dropped, kept[:, None, None].expand_as(dropped))
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 4 / 3]))
    assert abs(kept.mean().item() - 1) < 0.05
    assert drop.eval()(branch) is branch
    assert DropPath(0.0)(branch) is branch


def test_linear_layers_start_narrow_and_the_scan_keeps_its_own_start() -> None:
    block = VSSBlock(64, functools.partial(SS2D, 64), mlp=functools.partial(MLP, 64))
    kept = {key: p.detach().clone() for key, p in block.named_parameters()}
    initialize_linear(block)
    for layer in (block.mixer.in_proj, block.mixer.out_proj, block.mlp.fc1, block.mlp.fc2):
        assert abs(layer.weight.std().item() / 0.02 - 1) < 0.05
    assert not block.mlp.fc1.bias.any()
    changed = {key for key, p in block.named_parameters() if not torch.equal(p, kept[key])}
    assert changed == {
        *("mixer.in_proj.weight", "mixer.out_proj.weight"),
        *(f"mlp.{fc}.{p}" for fc in ("fc1", "fc2") for p in ("weight", "bias")),
    }
    steps = functional.softplus(block.mixer.dt_proj_bias)
    assert 0.0009 < steps.min() < steps.max() < 0.101
