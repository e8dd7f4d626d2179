"""The scan as an operator of torch: checks of its arguments, autograd, compile, export, meta."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from scan_cases import make_inputs
from torch import Tensor

from umamba.ops import selective_scan as scan_file
from umamba.ops.dispatch import takes_window
from umamba.ops.selective_scan import selective_scan


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("window", [0, 8], ids=["plain", "windows"])
def test_operators_pass_torch_opcheck(window: int, merged: bool):
    if window and not takes_window(torch.device("cpu"), torch.float32, 4, window):
        pytest.skip("without the C library the locally bidirectional scan is two plain ones")
    inputs = walked_inputs(("D", "z", "delta_bias", "delta_softplus", "initial_state"))
    tensors = [v.requires_grad_() if torch.is_tensor(v) else v for v in inputs]
    torch.library.opcheck(scan_file._scan_forward, (*tensors, WALKS, merged, True, window))
    plain = [v.detach() if torch.is_tensor(v) else v for v in tensors]
    forward = torch.ops.umamba.selective_scan_fwd
    out, last, states = forward(*plain, WALKS, merged, True, window)
    torch.library.opcheck(
        scan_file._scan_backward,
        (torch.randn_like(out), torch.randn_like(last), *plain, states, WALKS, window),
    )
    bare = walked_inputs(())
    torch.library.opcheck(scan_file._scan_forward, (*bare, WALKS, merged, False, window))


# raster, column-major and reversed column-major of 7 x 10 tokens
WALKS = [0, 1, 0, 1, 0, 70, 1, 0, 1, 0, 10, 1, 7, 10, 69, 1, 0, 10, -1, 7, -10]


def walked_inputs(options: tuple[str, ...]) -> list[Tensor | bool | None]:
    """Arguments of the operator for three directions, u and z shared."""
    arguments = make_inputs((2, 18, 70, 4, 6), options, torch.float32)
    values: list[Tensor | bool | None] = []
    for name in ORDER:
        value = arguments.get(name)
        if torch.is_tensor(value):
            axis = 0 if name in ("A", "D", "delta_bias") else 1
            value = value.unflatten(axis, (3, -1))
            value = value[:, :1] if name in ("u", "z") else value
        values.append(value)
    return values


ORDER = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")


def positional(arguments: dict[str, Tensor | bool]) -> list[Tensor | bool | None]:
    return [arguments.get(name) for name in ORDER]


class Scanner(torch.nn.Module):
    def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(u.sin(), delta, A, B, C, delta_softplus=True).cos()


def test_compiles_as_one_graph_with_gradients():
    inputs = [x.requires_grad_() for x in positional(make_inputs((1, 6, 70, 4, 1), (), torch.float32))[:5]]  # fmt: skip # noqa: E501
    expected = torch.autograd.grad(Scanner()(*inputs).sum(), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(Scanner(), backend="aot_eager", fullgraph=True)
        actual = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one, two)


def test_exports():
    inputs = tuple(positional(make_inputs((1, 6, 70, 4, 1), (), torch.float32))[:5])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(Scanner(), inputs)
    assert torch.equal(program.module()(*inputs), Scanner()(*inputs))
    assert "umamba.selective_scan_fwd" in str(program.graph)


def test_runs_on_the_meta_device_with_gradients():
    arguments = make_inputs((2, 6, 70, 4, 2), dtype=torch.float32)
    on_meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in arguments.items()}
    tensors = {k: v.requires_grad_() for k, v in on_meta.items() if torch.is_tensor(v)}
    out, last = selective_scan(**tensors, delta_softplus=True, return_last_state=True)
    assert out.is_meta
    assert last.shape == (2, 6, 4)
    gradients = torch.autograd.grad(out.sum() + last.sum(), list(tensors.values()))
    for gradient, tensor in zip(gradients, tensors.values(), strict=True):
        assert gradient.shape == tensor.shape


def test_runs_in_inference_mode():
    arguments = make_inputs((1, 6, 70, 4, 1), dtype=torch.float32)
    with torch.inference_mode():
        out = selective_scan(**arguments)
    assert torch.equal(out, selective_scan(**arguments))


def test_nothing_is_saved_for_a_backward_that_cannot_come(monkeypatch: pytest.MonkeyPatch):
    chosen = scan_file.choose(torch.device("cpu"), torch.float32, 4)
    asked: list[bool] = []
    forward: Callable = chosen.forward

    def spy(*arguments: object):
        asked.append(any(x is True for x in arguments[-2:]))
        return forward(*arguments)

    monkeypatch.setattr(chosen, "forward", spy)
    arguments = make_inputs((1, 4, 70, 4, 1), dtype=torch.float32)
    selective_scan(**arguments)
    arguments["A"] = arguments["A"].requires_grad_()
    with torch.no_grad():
        selective_scan(**arguments)
    selective_scan(**arguments)
    assert asked == [False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, "A is complex"),
        ({"delta": torch.zeros(2, 4, 8)}, r"delta has shape \(2, 4, 8\)"),
        ({"A": torch.zeros(5, 3)}, r"A has shape \(5, 3\)"),
        ({"C": torch.zeros(2, 2, 3, 9)}, r"C has shape \(2, 2, 3, 9\)"),
        ({"B": torch.zeros(2, 3, 3, 9)}, "not a multiple of the 3 groups"),
        ({"D": torch.zeros(3)}, "D has shape"),
        ({"z": torch.zeros(2, 4, 9, dtype=torch.int64)}, "z is torch.int64"),
        ({"delta_bias": torch.zeros(4, device="meta")}, "delta_bias is on meta"),
        ({"u": torch.zeros(4, 9)}, "u must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Tensor], message: str):
    B, D, L, N = 2, 4, 9, 3
    good = {
        "u": torch.zeros(B, D, L),
        "delta": torch.zeros(B, D, L),
        "A": torch.zeros(D, N),
        "B": torch.zeros(B, N, L),
        "C": torch.zeros(B, 1, N, L),
    }
    selective_scan(**good)
    with pytest.raises(ValueError, match=message):
        selective_scan(**good | change)
