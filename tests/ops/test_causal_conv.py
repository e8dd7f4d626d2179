"""The causal convolution with SiLU against torch's padded convolution in float64."""

from __future__ import annotations

import pytest
import torch
from scan_cases import is_interpreted, skip_unless_usable
from torch import Tensor
from torch.nn import functional

from umamba.ops import causal_conv as conv_file
from umamba.ops.causal_conv import causal_conv1d_silu
from umamba.ops.dispatch import BACKENDS, backend_name, use_backend


@pytest.fixture(params=[backend_name(backend) for backend in BACKENDS])
def backend(request: pytest.FixtureRequest):
    skip_unless_usable(request.param)
    with use_backend(request.param):
        yield request.param


def expected_conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """torch's own convolution of the left-padded sequence."""
    if reverse:
        return expected_conv(x.flip(-1), weight, bias, False).flip(-1)
    padded = functional.pad(x, (weight.shape[1] - 1, 0))
    return functional.silu(functional.conv1d(padded, weight[:, None], bias, groups=len(weight)))


def make(B: int, D: int, L: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, D, L), (D, K), (D,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return x.to(dtype), weight.float(), bias.float()


@pytest.mark.parametrize("reverse", [False, True], ids=["causal", "anticausal"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 33, 4), (1, 17, 300, 4), (1, 8, 2, 4), (2, 16, 1, 3), (1, 3, 40, 1), (1, 20, 70, 8)],
    ids=str,
)
def test_result_and_gradients_equal_torch_in_float64(
    backend: str, shape: tuple[int, int, int, int], with_bias: bool, reverse: bool
):
    x, weight, bias = make(*shape, torch.float32)
    tensors = [x, weight, bias] if with_bias else [x, weight]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def differentiate(function, inputs: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        out = function(*inputs[:2], inputs[2] if with_bias else None, reverse)
        gradients = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
        return [out.detach(), *gradients]

    actual = differentiate(causal_conv1d_silu, tensors)
    expected = differentiate(expected_conv, [tensor.double() for tensor in tensors])
    for one, two in zip(actual, expected, strict=True):
        assert (one - two).abs().max() < 5e-6 * two.abs().max()


def test_half_precision_is_rounded_only_at_input_and_output(backend: str):
    x, weight, bias = make(2, 9, 50, 4, torch.bfloat16)
    out = causal_conv1d_silu(x, weight, bias)
    expected = expected_conv(x.double(), weight.double(), bias.double(), False)
    assert out.dtype == torch.bfloat16
    step = 2**-7 if is_interpreted(backend) else 2**-8  # Triton's interpreter cuts bits off
    assert (out - expected).abs().max() < step * expected.abs().max()


def test_float64_is_computed_in_float64():
    x, weight, bias = make(1, 4, 20, 4, torch.float64)
    expected = expected_conv(x, weight.double(), bias.double(), False)
    assert torch.allclose(causal_conv1d_silu(x, weight, bias), expected, rtol=1e-12, atol=1e-14)


def test_result_is_channel_last_whatever_the_strides(backend: str):
    x, weight, bias = make(2, 6, 30, 4, torch.float32)
    expected = causal_conv1d_silu(x, weight, bias)
    wide = torch.full((2, 12, 61), float("nan"))
    wide[:, ::2, 1::2] = x
    for strided in (x.transpose(1, 2).contiguous().transpose(1, 2), wide[:, ::2, 1::2]):
        out = causal_conv1d_silu(strided, weight, bias)
        assert torch.equal(out, expected)
        assert out.transpose(1, 2).is_contiguous()


def test_weights_of_conv1d_are_taken_as_they_are():
    x, weight, bias = make(2, 6, 30, 4, torch.float32)
    expected = causal_conv1d_silu(x, weight, bias)
    assert torch.equal(causal_conv1d_silu(x, weight.unsqueeze(1), bias), expected)


def test_gradients_equal_finite_differences():
    x, weight, bias = (t.double().requires_grad_() for t in make(1, 3, 6, 3, torch.float64))
    for reverse in (False, True):

        def convolve(*tensors: Tensor, reverse: bool = reverse) -> Tensor:
            return causal_conv1d_silu(*tensors, reverse)

        assert torch.autograd.gradcheck(convolve, (x, weight, bias))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_operators_pass_torch_opcheck(shared: bool):
    walks = [0, 1, 0, 1, 0, 30, 1, 29, 1, 0, 6, -1, 5, -6]  # raster, and columns of 5 x 6 reversed
    x, weight, bias = make(2, 12, 30, 4, torch.float32)
    x = x[:, :6].unsqueeze(1) if shared else x.unflatten(1, (2, 6))
    weight, bias = weight.unflatten(0, (2, 6)), bias.unflatten(0, (2, 6))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(conv_file._conv_forward, (*leaves, walks))
    torch.library.opcheck(conv_file._conv_forward, (x, weight, None, walks))
    dout = torch.randn(2, 2, 6, 30)
    torch.library.opcheck(conv_file._conv_backward, (dout, x, weight, None, walks))
    torch.library.opcheck(conv_file._conv_backward, (dout, x, weight, bias, walks))


def test_runs_on_the_meta_device():
    out = causal_conv1d_silu(*(t.to("meta") for t in make(2, 6, 30, 4, torch.float32)))
    assert out.is_meta
    assert out.shape == (2, 6, 30)


def test_arguments_that_do_not_fit_are_named():
    x, weight, bias = make(2, 6, 30, 4, torch.float32)
    with pytest.raises(ValueError, match="9 taps; 1 to 8 are allowed"):
        causal_conv1d_silu(x, torch.zeros(6, 9))
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d_silu(x, weight[:5])
    with pytest.raises(ValueError, match="bias has shape"):
        causal_conv1d_silu(x, weight, bias[:5])
