"""scan_directions against the composition of its parts, written out."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops import directions
from umamba.ops.directions import DirectionParameters, scan_directions
from umamba.ops.dispatch import use_backend
from umamba.ops.local_scan import local_scan
from umamba.ops.selective_scan import selective_scan
from umamba.ops.token_orders import token_order

SPATIAL = (3, 4, 5)
WIDTH, STATES, RANK, TAPS = 6, 4, 2, 3
TRI = ("raster", "raster_reversed", "inter_slice_5")
CROSS = ("raster", "transposed", "raster_reversed", "transposed_reversed")


def make_parameters(
    seed: int, conv: bool = True, width: int = WIDTH, dtype: torch.dtype = torch.float64
) -> DirectionParameters:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return 0.5 * torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return DirectionParameters(
        conv_weight=normal(width, 1, TAPS) if conv else None,
        conv_bias=normal(width) if conv else None,
        x_proj_weight=normal(RANK + 2 * STATES, width),
        dt_proj_weight=normal(width, RANK),
        A_log=normal(width, STATES),
        D=normal(width),
        delta_bias=normal(width) - 1,
    )


def make_features(
    spatial: tuple[int, ...] = SPATIAL, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    shape = (2, *spatial, WIDTH)
    x, gate = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype).movedim(-1, 1), gate.to(dtype).movedim(-1, 1)


def written_out(
    name: str, x: Tensor, p: DirectionParameters, gate: Tensor | None, scan=selective_scan
) -> Tensor:
    """One direction as the papers say it: read in order, then a plain forward Mamba."""
    order = token_order(name)
    spatial = tuple(x.shape[2:])
    x = order.to_tokens(x)
    if p.conv_weight is not None:
        padded = functional.pad(x, (TAPS - 1, 0))
        x = functional.silu(functional.conv1d(padded, p.conv_weight, p.conv_bias, groups=WIDTH))
    dt, B, C = (p.x_proj_weight @ x).split([RANK, STATES, STATES], dim=1)
    y = scan(
        x,
        p.dt_proj_weight @ dt,
        -p.A_log.exp(),
        B,
        C,
        p.D,
        delta_bias=p.delta_bias,
        delta_softplus=True,
    )
    if gate is not None:
        y = y * functional.silu(order.to_tokens(gate))
    return order.from_tokens(y, spatial)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize(
    ("orders", "conv"),
    [
        (("raster",), True),
        (TRI, True),
        (CROSS, False),
        (("axes_120", "axes_021_reversed"), True),
        (("raster", "inter_slice_7", "inter_slice_7_reversed", "transposed"), True),
    ],
    ids=["one", "tri", "cross", "axes", "filled_up"],
)
def test_directions_equal_their_parts_written_out(orders: tuple[str, ...], conv: bool, gated: bool):
    x, gate = make_features()
    parameters = [make_parameters(k, conv) for k in range(len(orders))]
    actual = scan_directions(x, orders, parameters, gate if gated else None, merge="stack")
    assert actual.shape == (2, len(orders), WIDTH, *SPATIAL)
    for k, name in enumerate(orders):
        expected = written_out(name, x, parameters[k], gate if gated else None)
        assert torch.allclose(actual[:, k], expected, rtol=1e-10, atol=1e-12)


def test_merges_agree_with_the_list_of_results():
    x, gate = make_features()
    parameters = [make_parameters(k) for k in range(3)]
    single = scan_directions(x, TRI, parameters, gate, merge=None)
    assert torch.equal(scan_directions(x, TRI, parameters, gate), single[0] + single[1] + single[2])
    mean = scan_directions(x, TRI, parameters, gate, merge="mean")
    assert torch.allclose(mean, sum(single) / 3)
    stack = scan_directions(x, TRI, parameters, gate, merge="stack")
    assert torch.equal(stack, torch.stack(single, 1))


def test_merges_of_half_precision_are_rounded_once():
    x, gate = make_features(dtype=torch.bfloat16)
    parameters = [make_parameters(k, dtype=torch.bfloat16) for k in range(3)]
    merged = scan_directions(x, TRI, parameters, gate)
    single = scan_directions(x, TRI, parameters, gate, merge=None)
    exact = sum(part.double() for part in single)
    assert merged.dtype == torch.bfloat16
    error = (merged.double() - exact).abs().max()
    assert error < 6e-3 * exact.abs().max()  # of the parts and of the sum, each once


@pytest.mark.parametrize("orders", [CROSS, TRI], ids=["cross", "tri"])
@pytest.mark.parametrize("conv", [False, True], ids=["shared", "convolved"])
def test_gradients_of_one_call_equal_those_of_one_call_per_direction(
    orders: tuple[str, ...], conv: bool
):
    x, gate = make_features()
    count = len(orders)
    inputs = [x, gate, *(t for k in range(count) for t in make_parameters(k, conv=conv))]
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    size = len(DirectionParameters._fields)
    parameters = [
        DirectionParameters(*inputs[2 + size * k : 2 + size * (k + 1)]) for k in range(count)
    ]

    def one_by_one() -> Tensor:
        return sum(
            scan_directions(inputs[0], [order], [p], inputs[1])
            for order, p in zip(orders, parameters, strict=True)
        )

    leaves = [t for t in inputs if t is not None]
    together = scan_directions(inputs[0], orders, parameters, inputs[1])
    gradients = [
        torch.autograd.grad(out.square().sum(), leaves) for out in (together, one_by_one())
    ]
    for one, two in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-10)


def test_directions_of_different_shapes_go_together():
    x, gate = make_features()
    odd = make_parameters(5)
    odd = odd._replace(
        x_proj_weight=torch.randn(3 + 2 * STATES, WIDTH, dtype=torch.float64),
        dt_proj_weight=torch.randn(WIDTH, 3, dtype=torch.float64),
    )
    parameters = [make_parameters(0), odd, make_parameters(1)]
    orders = ("raster", "transposed", "transposed")
    total = scan_directions(x, orders, parameters, gate)
    expected = sum(
        scan_directions(x, [order], [p], gate) for order, p in zip(orders, parameters, strict=True)
    )
    assert torch.allclose(total, expected)


def test_sequences_are_features_with_one_axis():
    x, gate = make_features()
    parameters = [make_parameters(0)]
    expected = scan_directions(x, ("raster",), parameters, gate).flatten(2)
    actual = scan_directions(x.flatten(2), ("raster",), parameters, gate.flatten(2))
    assert torch.equal(actual, expected)


def test_result_is_channel_last_and_independent_of_the_memory_layout():
    x, gate = make_features(dtype=torch.float32)
    parameters = [make_parameters(k, dtype=torch.float32) for k in range(3)]
    out = scan_directions(x, TRI, parameters, gate)
    assert out.movedim(1, -1).is_contiguous()
    dense = scan_directions(x.contiguous(), TRI, parameters, gate.contiguous())
    assert torch.allclose(out, dense, rtol=1e-5, atol=1e-6)


def test_no_samples_are_allowed():
    x, gate = make_features()
    parameters = [make_parameters(k) for k in range(3)]
    assert scan_directions(x[:0], TRI, parameters, gate[:0]).shape == x[:0].shape


def test_absent_biases_and_skip_are_allowed():
    x, gate = make_features()
    p = make_parameters(0)._replace(conv_bias=None, D=None, delta_bias=None)
    zeros = torch.zeros(WIDTH, dtype=torch.float64)
    full = p._replace(conv_bias=zeros, D=zeros, delta_bias=zeros)
    one = scan_directions(x, ("raster",) * 2, [p] * 2, gate)
    two = scan_directions(x, ("raster",) * 2, [full] * 2, gate)
    assert torch.allclose(one, two)


def test_backends_agree_on_a_feature_map():
    x, gate = make_features(dtype=torch.float32)
    parameters = [make_parameters(k, dtype=torch.float32) for k in range(3)]
    results = []
    for name in ("reference", "chunked"):
        with use_backend(name):
            results.append(scan_directions(x, TRI, parameters, gate))
    results.append(scan_directions(x, TRI, parameters, gate))
    for result in results[1:]:
        assert (result - results[0]).abs().max() < 5e-6 * results[0].abs().max()


def test_compiles_as_one_graph():
    x, gate = make_features(dtype=torch.float32)
    parameters = [make_parameters(k, dtype=torch.float32) for k in range(3)]

    def mix(x: Tensor, gate: Tensor) -> Tensor:
        return scan_directions(x, TRI, parameters, gate)

    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, gate), mix(x, gate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": ("diagonal",)}, "unknown token order 'diagonal'"),
        ({"orders": ("raster", "raster")}, "2 orders but 1 sets"),
        ({"merge": "max"}, "merge is 'max'"),
        ({"gate": torch.zeros(2, WIDTH, 3, 4, 6)}, "must agree in shape"),
        ({"parameters": [make_parameters(0, width=7)]}, r"x_proj_weight of the direction raster"),
        ({"features": torch.zeros(2, WIDTH)}, r"features must be \(B, E"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], message: str):
    x, gate = make_features()
    good = {"features": x, "orders": ("raster",), "parameters": [make_parameters(0)], "gate": gate}
    with pytest.raises(ValueError, match=message):
        scan_directions(**good | change)


@pytest.mark.parametrize("window", [7, 8], ids=["by_copies", "in_place"])
def test_with_a_window_every_scan_is_locally_bidirectional(window: int) -> None:
    x, gate = make_features(dtype=torch.float32)
    parameters = [make_parameters(seed, dtype=torch.float32) for seed in range(len(CROSS))]
    actual = scan_directions(x, CROSS, parameters, gate, merge=None, window=window)
    scan = functools.partial(local_scan, window=window)
    for name, p, out in zip(CROSS, parameters, actual, strict=True):
        expected = written_out(name, x, p, gate, scan)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_a_gpu_projection_hold_the_same_values():
    x = torch.randn(2, 1, WIDTH, 10)
    parameters = [make_parameters(k, dtype=torch.float32) for k in range(3)]
    plain = directions._project(x, parameters, aligned=False)
    aligned = directions._project(x, parameters, aligned=True)
    for one, two in zip(plain, aligned, strict=True):
        torch.testing.assert_close(one, two)
    assert all(part.stride(2) % directions.ROW_MULTIPLE == 0 for part in aligned[1:])
