"""The Triton convolution along walks: in Triton's interpreter, and compiled for GPUs."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from umamba.ops import reference
from umamba.ops.triton_conv import conv_backward, conv_forward
from umamba.ops.walks import walk_positions

pytestmark = pytest.mark.triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPATIAL = (5, 3, 7)
LENGTH = 105
RASTER = (0, 1, 0, 1, 0, LENGTH, 1)
BACK = (LENGTH - 1, 1, 0, 1, 0, LENGTH, -1)
COLUMNS = (0, 1, 0, 21, 1, 5, 21)  # of a map of 5 x 21
AXES = (0, 7, 1, 3, 7, 5, 21)  # last axis slowest, first axis fastest
WALKS = {
    "raster": (RASTER,),
    "both ways": (RASTER, BACK),
    "four": (RASTER, BACK, COLUMNS, AXES),
}


def walked(walk: tuple[int, ...]) -> Tensor:
    return walk_positions(walk)


def flat(walks: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(number for walk in walks for number in walk)


def expected_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, walks: tuple[tuple[int, ...], ...]
) -> Tensor:
    """The definition in float64, on tokens gathered in the order of each walk."""
    results = []
    for k, walk in enumerate(walks):
        tokens = walked(walk)
        part = x[:, min(k, x.shape[1] - 1)].double()
        b = None if bias is None else bias[k].double()
        out = torch.empty_like(part)
        out[..., tokens] = reference.conv_forward(part[..., tokens], weight[k].double(), b, False)
        results.append(out)
    return torch.stack(results, 1)


def expected_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, walks: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx = torch.zeros(x.shape, dtype=torch.float64)
    dweight, dbias = [], []
    for k, walk in enumerate(walks):
        tokens = walked(walk)
        shared = min(k, x.shape[1] - 1)
        gradients = reference.conv_backward(
            dout[:, k].double()[..., tokens],
            x[:, shared].double()[..., tokens],
            weight[k].double(),
            None if bias is None else bias[k].double(),
            False,
        )
        dx[:, shared, :, tokens] += gradients[0]
        dweight.append(gradients[1])
        dbias.append(gradients[2])
    return dx, torch.stack(dweight), None if bias is None else torch.stack(dbias)


def case(
    n_walks: int, *, shared: bool = False, taps: int = 4, channels: int = 5, batch: int = 1,
    length: int = LENGTH,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dout, x, weight and bias."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = (channels, length)
    return (
        noise(batch, n_walks, *tokens),
        noise(batch, 1 if shared else n_walks, *tokens),
        noise(n_walks, channels, taps),
        noise(n_walks, channels),
    )


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    assert result.shape == expected.shape
    error = (result.cpu().double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


def check(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    walks: tuple[tuple[int, ...], ...], tolerance: float = 5e-6,
) -> None:  # fmt: skip
    """Compares forward and backward with the definition."""
    there = [None if t is None else t.to(DEVICE) for t in (dout, x, weight, bias)]
    out = conv_forward(*there[1:], flat(walks))
    assert out.dtype == x.dtype
    assert out.permute(1, 0, 3, 2).is_contiguous()
    assert_close(out, expected_forward(x, weight, bias, walks), tolerance)
    dx, dweight, dbias = conv_backward(*there, flat(walks))
    expected = expected_backward(dout, x, weight, bias, walks)
    assert dx.dtype == x.dtype
    assert dx.permute(1, 0, 3, 2).is_contiguous()
    assert_close(dx, expected[0], tolerance)
    assert dweight.is_contiguous()
    assert_close(dweight, expected[1])
    if bias is None:
        assert dbias is None
    else:
        assert_close(dbias, expected[2])


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("shared", [False, True], ids=["own x", "shared x"])
@pytest.mark.parametrize("walks", WALKS.values(), ids=WALKS)
def test_the_results_are_those_of_the_definition_along_each_walk(walks, shared):
    check(*case(len(walks), shared=shared, batch=2), walks)


@pytest.mark.parametrize("taps", [1, 2, 3, 5, 8])
def test_every_number_of_taps_is_taken(taps):
    check(*case(2, shared=True, taps=taps, channels=3), (BACK, COLUMNS))


@pytest.mark.parametrize("length", [1, 2, 17, 129])
def test_sequences_may_end_anywhere_in_a_tile(length):
    walks = ((0, 1, 0, 1, 0, length, 1), (length - 1, 1, 0, 1, 0, length, -1))
    check(*case(2, length=length, channels=3), walks)


@pytest.mark.parametrize("channels", [1, 67, 130])
def test_channels_may_fill_several_tiles(channels):
    walks = ((0, 1, 0, 5, 1, 7, 5),)
    check(*case(1, channels=channels, length=35), walks)


def test_no_bias_is_needed():
    dout, x, weight, _ = case(2, shared=True)
    check(dout, x, weight, None, (RASTER, AXES))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_is_rounded_once(dtype, tolerance):
    dout, x, weight, bias = case(4, shared=True)
    check(dout.to(dtype), x.to(dtype), weight, bias, WALKS["four"], tolerance)


def test_any_strides_are_taken():
    dout, x, weight, bias = case(2, channels=6, batch=2)
    wide = torch.randn(2, LENGTH, 2, 13)
    sliced = wide[..., 1::2].permute(0, 2, 3, 1)  # a view whose channels are two apart
    expanded = dout[:, :, :, :1].expand_as(dout)  # the gradient of a sum
    transposed_weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    check(expanded, sliced, transposed_weight, bias, (RASTER, AXES))
    check(dout.transpose(2, 3).contiguous().transpose(2, 3), x, weight, bias, (RASTER, BACK))


def test_runs_are_equal_to_the_bit():
    dout, x, weight, bias = (t.to(DEVICE) for t in case(4, shared=True))
    walks = flat(WALKS["four"])
    first, second = (
        (conv_forward(x, weight, bias, walks), *conv_backward(dout, x, weight, bias, walks))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 1, 3, 4), (2, 1, 3, 0)], ids=["no samples", "no tokens"])
def test_empty_tensors_give_empty_results_and_zero_gradients(shape):
    x, weight = torch.zeros(shape, device=DEVICE), torch.ones(2, 3, 4, device=DEVICE)
    length = shape[-1]
    walks = flat(((0, 1, 0, 1, 0, length, 1), (length - 1, 1, 0, 1, 0, length, -1)))
    out = conv_forward(x, weight, weight[..., 0], walks)
    assert out.shape == (shape[0], 2, *shape[2:])
    dx, dweight, dbias = conv_backward(out, x, weight, weight[..., 0], walks)
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()


COMPILE = """
import sys, tempfile, subprocess
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from umamba.ops import triton_conv as conv

dtype, taps = sys.argv[1], int(sys.argv[2])
block, steps = conv.MAX_CHANNELS, conv.STEPS
plain = {name: "i32" for name in ("batch", "channels", "length", "first")}
plain |= {f"{t}_{axis}": "i32" for t in ("x", "dout") for axis in ("batch", "direction", "token")}
pointers = dict.fromkeys(("weight", "bias", "parts", "total"), "*fp32") | {"table": "*i64"}
pointers |= dict.fromkeys(("x", "out", "dout", "dx"), f"*{dtype}")
constants = {"TAPS": taps, "HAS_BIAS": True, "STEPS": steps, "TILES": conv.TILES, "BLOCK": block,
             "ROWS": triton.next_power_of_2(taps + 1), "x_channel": 1, "dout_channel": 1}
for kernel, adds in ((conv._forward_kernel, [None]), (conv._backward_kernel, [False, True])):
    for value in adds:
        known = constants | {"ADDS": value}
        names = kernel.arg_names
        signature = {n: (plain | pointers).get(n, "constexpr") for n in names}
        chosen = {n: known[n] for n in names if signature[n] == "constexpr"}
        attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers}
        source = ASTSource(kernel, signature, chosen, attributes)
        options = {"num_warps": conv._warps(block)}
        for arch in (80, 90):
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "kernel.cubin"
                file.write_bytes(built.asm["cubin"])
                tool = triton.knobs.nvidia.cuobjdump.path
                usage = subprocess.run([tool, "--dump-resource-usage", file], check=True,
                                       capture_output=True, text=True).stdout
            line = next(line for line in usage.splitlines() if "REG:" in line)
            print(f"sm_{arch} {names[0]} {kernel.__name__} {value}: {line.strip()}")
"""


@pytest.mark.parametrize(("dtype", "taps"), [("fp32", 4), ("bf16", 4), ("fp32", 8)])
def test_the_kernels_compile_for_ampere_and_hopper_without_spills(dtype, taps):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", COMPILE, dtype, str(taps)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(" STACK:0 " in line and " LOCAL:0 " in line for line in lines), done.stdout
