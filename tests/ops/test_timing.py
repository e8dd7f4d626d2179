"""Calls of the operators: recorded without arithmetic, made again with tensors of the same kind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from umamba.ops import dispatch
from umamba.ops.selective_scan import selective_scan
from umamba.ops.self_check import make_inputs
from umamba.ops.timing import Call, Layout, record_calls, shortest_run

CPU = torch.device("cpu")


def scans_on_meta(n_times: int, length: int = 50) -> Counter[Call]:
    inputs = make_inputs(2, 6, length, 4, dtype=torch.float32)
    tensors = {
        name: x.to("meta").requires_grad_()
        for name, x in inputs.items()
        if not name.startswith("conv")
    }

    def run() -> None:
        for _ in range(n_times):
            selective_scan(**tensors, delta_softplus=True, reverse=True)

    return record_calls(run)


def test_equal_calls_are_counted_and_others_kept_apart():
    calls = scans_on_meta(3) + scans_on_meta(2, length=51)
    assert sorted(calls.values()) == [2, 3]
    assert {call.named()["u"].shape[-1] for call in calls} == {50, 51}
    assert all("4 states" in str(call) for call in calls)


def test_a_recorded_layout_is_that_of_the_tensor():
    (call,) = scans_on_meta(1)
    u = call.named()["u"]
    assert u.strides[-1] == 6  # channel-last
    assert u.dtype == torch.float32


@pytest.mark.parametrize(
    "layout",
    [
        Layout((2, 3, 5), (30, 1, 6), torch.float32),
        Layout((2, 3, 5), (0, 1, 3), torch.bfloat16),
        Layout((2, 0, 5), (5, 5, 1), torch.float32),
    ],
    ids=["slice", "expanded", "empty"],
)
def test_a_layout_is_filled_with_a_tensor_of_it(layout: Layout):
    tensor = layout.filled("u", CPU)
    assert tuple(tensor.shape) == layout.shape
    assert tensor.stride() == layout.strides
    assert tensor.dtype == layout.dtype
    assert tensor.requires_grad
    assert tensor.isfinite().all()


def test_rates_are_stable_and_steps_positive():
    layout = Layout((4, 3), (3, 1), torch.float32)
    assert (layout.filled("A", CPU) < 0).all()
    assert (layout.filled("delta", CPU) >= 0).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_call_runs_forward_and_backward_on_the_named_backend(
    backend: str, monkeypatch: pytest.MonkeyPatch
):
    used = []
    for name in ("forward", "backward"):
        module = dispatch.find_backend(backend)
        original = getattr(module, name)

        def spy(*arguments, _name=name, _original=original):  # type: ignore[no-untyped-def]
            used.append(_name)
            return _original(*arguments)

        monkeypatch.setattr(module, name, spy)
    (call,) = scans_on_meta(1)
    assert 0 < shortest_run(call, backend, CPU) < 60
    assert used[:2] == ["forward", "backward"]
