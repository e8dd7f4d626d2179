"""The choice of the scan backend: priority, being asked for one, reasons, and what is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from umamba.ops import chunked, cpu, dispatch, mamba_ssm_scan, reference
from umamba.ops.dispatch import BACKENDS, backend_name, choose, explain, find_backend, use_backend
from umamba.ops.remembered import Choice
from umamba.ops.selective_scan import selective_scan

CPU = torch.device("cpu")
FAKE_REASON = "no compiler was there: install one"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test chooses anew, without the user's environment variable."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    caches = (dispatch._choose, dispatch._announce, dispatch._from_environment)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_unavailable", lambda: FAKE_REASON)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_unavailable", lambda: None)


def test_every_backend_has_the_functions_of_a_backend():
    assert [backend_name(backend) for backend in BACKENDS] == [
        "cpu",
        "triton",
        "mamba_ssm",
        "chunked",
        "reference",
    ]
    functions = ("why_unavailable", "supports", "forward", "backward")
    for backend in BACKENDS:
        for name in (*functions, "conv_forward", "conv_backward"):
            assert callable(getattr(backend, name))


def test_the_library_comes_first_where_it_can_serve(library: None):
    assert choose(CPU, torch.float32, 16) is cpu
    assert choose(CPU, torch.bfloat16, 64) is cpu


def test_what_the_library_cannot_take_goes_to_the_chunked_backend(library: None):
    assert choose(CPU, torch.float64, 16) is chunked
    assert choose(CPU, torch.float32, 65) is chunked


def test_without_the_library_the_chunked_backend_serves_and_says_so_once(
    no_library: None, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "umamba.ops.dispatch"):
        for d_state in (16, 16, 8):
            assert choose(CPU, torch.float32, d_state) is chunked
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert FAKE_REASON in caplog.text
    assert "backend chunked" in caplog.text


def test_the_usual_choice_is_logged_quietly(library: None, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "umamba.ops.dispatch"):
        choose(CPU, torch.float32, 16)
        choose(CPU, torch.float32, 16)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_use_backend_holds_inside_the_block_only_and_nests(library: None):
    with use_backend("chunked"):
        assert choose(CPU, torch.float32, 16) is chunked
        with use_backend("reference"):
            assert choose(CPU, torch.float32, 16) is reference
        assert choose(CPU, torch.float32, 16) is chunked
    assert choose(CPU, torch.float32, 16) is cpu


def test_use_backend_covers_a_backward_of_another_forward():
    u = torch.randn(1, 4, 70, requires_grad=True)
    A, B = -torch.ones(4, 2), torch.randn(1, 2, 70)
    gradients = []
    for forward, backward in (("reference", "chunked"), ("chunked", "reference")):
        with use_backend(forward):
            out = selective_scan(u, torch.ones_like(u), A, B, B)
        with use_backend(backward):
            gradients.append(torch.autograd.grad(out.sum(), u)[0])
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_the_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch, library: None):
    monkeypatch.setenv("UMAMBA_SCAN", "Reference")
    assert choose(CPU, torch.float32, 16) is reference
    with use_backend("chunked"):
        assert choose(CPU, torch.float32, 16) is chunked


@pytest.fixture
def remembers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def make(name: str) -> None:
        monkeypatch.setattr(dispatch, "recall", lambda device: Choice(name, "2030-01-31"))

    return make


def test_the_remembered_backend_goes_before_the_list_and_after_what_is_asked_for(
    remembers: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, library: None
):
    remembers("chunked")
    assert choose(CPU, torch.float32, 16) is chunked
    with use_backend("cpu"):
        assert choose(CPU, torch.float32, 16) is cpu
    monkeypatch.setenv("UMAMBA_SCAN", "reference")
    dispatch._from_environment.cache_clear()
    assert choose(CPU, torch.float32, 16) is reference


def test_a_remembered_slow_backend_is_no_reason_to_warn(
    remembers: Callable[[str], None], library: None, caplog: pytest.LogCaptureFixture
):
    remembers("chunked")
    with caplog.at_level(logging.INFO, "umamba.ops.dispatch"):
        choose(CPU, torch.float32, 16)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "the fastest when `umamba doctor --bench` ran" in caplog.text


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("cpu", torch.float64, "not torch.float64"),
        ("mamba_ssm", torch.float32, "CUDA tensors only"),
        ("gone", torch.float32, "no such backend"),
    ],
    ids=["type", "device", "name"],
)
def test_a_remembered_backend_that_cannot_serve_gives_way_to_the_list(
    remembers: Callable[[str], None], library: None, caplog: pytest.LogCaptureFixture,
    name: str, dtype: torch.dtype, reason: str,
):  # fmt: skip
    expected = choose(CPU, dtype, 16)
    remembers(name)
    with caplog.at_level(logging.INFO, "umamba.ops.dispatch"):
        assert choose(CPU, dtype, 16) is expected
    assert f"{name} was fastest, but cannot serve now: " in caplog.text
    assert reason in caplog.text


def test_under_compile_the_remembered_backend_says_which_windows_it_takes(
    remembers: Callable[[str], None], library: None
):
    def asks(x: Tensor) -> Tensor:
        return x + int(dispatch.takes_window(x.device, x.dtype, 16, 8))

    for name, expected in (("cpu", 1), ("chunked", 0)):
        remembers(name)
        torch.compiler.reset()
        compiled = torch.compile(asks, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(())) == expected


def test_unknown_names_are_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch):
    known = "choose one of cpu, triton, mamba_ssm, chunked, reference"
    with pytest.raises(ValueError, match=known), use_backend("cuda"):
        pass
    monkeypatch.setenv("UMAMBA_SCAN", "fast")
    with pytest.raises(ValueError, match=f"UMAMBA_SCAN names the scan backend 'fast'; {known}"):
        choose(CPU, torch.float32, 16)


def test_files_names_and_hyphens_are_names_too():
    assert find_backend("mamba-ssm") is find_backend("mamba_ssm_scan") is mamba_ssm_scan


def test_a_backend_asked_for_is_never_replaced(library: None, monkeypatch: pytest.MonkeyPatch):
    with (
        use_backend("cpu"),
        pytest.raises(ValueError, match="cpu was asked for and cannot be used"),
    ):
        choose(CPU, torch.float64, 16)
    monkeypatch.setattr(cpu, "why_unavailable", lambda: FAKE_REASON)
    with pytest.raises(ValueError, match=FAKE_REASON), use_backend("cpu"):
        pass


def test_every_refusal_has_a_reason(no_library: None):
    reasons = explain(CPU, torch.float32, 16)
    assert reasons["cpu"] == FAKE_REASON
    assert "CUDA tensors only" in str(reasons["mamba_ssm"])
    assert reasons["chunked"] is None
    assert reasons["reference"] is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ImportError("none"), "mamba-ssm is not installed"),
        (OSError("undefined\nsymbol"), "does not load (undefined symbol)"),
        (RuntimeError("no kernel"), "does not load (no kernel)"),
    ],
    ids=["absent", "other_abi", "broken"],
)
def test_mamba_ssm_that_does_not_load_is_a_reason_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
):
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_ssm_scan.importlib, "import_module", fail)
    mamba_ssm_scan._load.cache_clear()
    reason = mamba_ssm_scan.why_unavailable()
    mamba_ssm_scan._load.cache_clear()
    assert expected in str(reason)


class FakeExtension:
    """Stands in for mamba-ssm's extension: its calling convention on the chunked backend."""

    @staticmethod
    def fwd(u, delta, A, B, C, D, z, bias, softplus):  # type: ignore[no-untyped-def]
        for tensor in (u, delta, B, C):
            assert tensor.stride(-1) == 1
            assert tensor.dtype == u.dtype
        out, last, _ = chunked.forward(
            u, delta, A, B, C, D, None, bias, softplus, None, False, False
        )
        kept = torch.stack([torch.zeros_like(last), last], -1).flatten(-2)[:, :, None]
        gated = [] if z is None else [out * torch.nn.functional.silu(z)]
        return [out, kept, *gated]

    @staticmethod
    def bwd(u, delta, A, B, C, D, z, bias, dout, kept, out, dz, softplus, recompute):  # type: ignore[no-untyped-def]
        leading = (u, delta, A, B, C, D, z, bias, softplus, None)
        _, _, states = chunked.forward(*leading, False, True)
        gradients = chunked.backward(dout, None, *leading, states, False)
        du, ddelta, dA, dB, dC, dD, dz, dbias, _ = gradients
        return [du, ddelta, dA, dB.float(), dC.float(), dD, dbias, *([] if dz is None else [dz])]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["bare", "all"])
def test_the_adapter_speaks_the_calling_convention_of_mamba_ssm(
    monkeypatch: pytest.MonkeyPatch, full: bool, reverse: bool
):
    monkeypatch.setattr(mamba_ssm_scan, "_extension", lambda: FakeExtension)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    B, D, L, N, G = 2, 8, 130, 4, 2
    extra = (normal(D), normal(B, D, L), normal(D)) if full else (None, None, None)
    inputs = (
        *(normal(B, D, L), normal(B, D, L).abs(), -normal(D, N).exp()),
        *(normal(B, G, N, L), normal(B, G, N, L), *extra, full, None),
    )
    expected_out, expected_last, states = chunked.forward(*inputs, reverse, True)
    out, last, kept = mamba_ssm_scan.forward(*inputs, reverse, True)
    assert torch.allclose(out, expected_out, rtol=1e-4, atol=1e-5)
    assert torch.allclose(last, expected_last, rtol=1e-4, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()
    assert kept.shape == states.shape
    dout = normal(B, D, L)
    expected = chunked.backward(dout, None, *inputs, states, reverse)
    actual = mamba_ssm_scan.backward(dout, None, *inputs, kept, reverse)
    for one, two in zip(actual, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-4)


def test_the_adapter_hands_on_what_mamba_ssm_cannot_do_and_says_so(
    caplog: pytest.LogCaptureFixture,
):
    mamba_ssm_scan._explain_detour.cache_clear()
    u, A, B = torch.randn(1, 4, 70), -torch.ones(4, 2), torch.randn(1, 1, 2, 70)
    state = torch.randn(1, 4, 2)
    inputs = (u, torch.ones_like(u), A, B, B, None, None, None, False, state)
    with caplog.at_level(logging.WARNING, "umamba.ops.mamba_ssm_scan"):
        for _ in range(2):
            out, _, states = mamba_ssm_scan.forward(*inputs, False, True)
    assert len(caplog.records) == 1
    assert torch.equal(out, chunked.forward(*inputs, False, True)[0])
    gradients = mamba_ssm_scan.backward(u, None, *inputs, states, False)
    assert gradients[-1].shape == state.shape
