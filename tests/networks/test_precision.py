"""The precision: on a GPU bf16 where the hardware has it; on a CPU only where it is asked for."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch

from umamba.networks import precision
from umamba.networks.precision import (
    Precision,
    autocast,
    autocast_type,
    check_precision,
    computes_bfloat16,
)

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


def let_gpu_have_bf16(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    """A GPU that computes with bf16, or one where torch emulates it."""

    def supported(including_emulation: bool = True) -> bool:
        return has or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_bf16_where_the_gpu_computes_with_it_and_fp16_elsewhere(
    monkeypatch: pytest.MonkeyPatch, has: bool, dtype: torch.dtype
) -> None:
    let_gpu_have_bf16(monkeypatch, has)
    assert autocast_type("auto") == autocast_type() == dtype


def test_a_precision_asked_for_is_taken_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        let_gpu_have_bf16(monkeypatch, has)
        assert autocast_type("fp16") == torch.float16
        assert autocast_type("bf16") == torch.bfloat16
        assert autocast_type("fp32") is None


def test_autocast_is_of_that_type_on_a_gpu_and_absent_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_gpu_have_bf16(monkeypatch, True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, without a GPU
        region = autocast(torch.device("cuda"))
        plain = autocast(torch.device("cuda"), "fp32")
    assert isinstance(region, torch.autocast)
    assert region.fast_dtype == torch.bfloat16
    assert isinstance(plain, torch.autocast)
    assert not plain._enabled
    with autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


def test_what_a_prediction_asks_for_overrides_the_recipe_on_every_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, without a GPU
        region = autocast(CUDA, "fp16", "float32")
    assert isinstance(region, torch.autocast)
    assert not region._enabled
    with autocast(CPU, "fp32", "bfloat16"):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        with autocast(CPU, "bf16", "float32"):
            assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("has", [True, False])
def test_processors_compute_bfloat16_where_they_have_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not has)
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    assert computes_bfloat16(CPU) is has
    monkeypatch.setattr(precision.platform, "machine", lambda: "aarch64")
    assert computes_bfloat16(CPU) is not has
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not computes_bfloat16(CPU)


def test_a_torch_that_cannot_tell_is_taken_for_one_without_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(precision.platform, "machine", lambda: "AMD64")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert not computes_bfloat16(CPU)
    assert not computes_bfloat16(MPS)


@pytest.mark.parametrize(
    ("device", "exact", "asked", "match"),
    [
        (CPU, True, "bfloat16", "--nnunet-exact computes in .*; leave out --precision bfloat16"),
        (CUDA, True, "bfloat16", "leave out --precision bfloat16"),
        (CUDA, True, "float32", "--nnunet-exact computes in .*; leave out --precision float32"),
        (CPU, True, "float32", None),
        (CUDA, False, "float32", None),
        (CUDA, True, None, None),
        (CPU, False, "bfloat16", None),
    ],
)
def test_the_arithmetic_of_nnunet_admits_no_other_precision(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    exact: bool,
    asked: Precision | None,
    match: str | None,
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: True)
    with pytest.raises(ValueError, match=match) if match else nullcontext():
        check_precision(asked, device, exact)


@pytest.mark.parametrize(
    ("device", "kind"), [(CPU, "processor"), (CUDA, "GPU"), (MPS, "device")], ids=str
)
def test_bfloat16_is_refused_where_it_would_be_emulated(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, kind: str
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match=f"this {kind} does not compute bfloat16"):
        check_precision("bfloat16", device, False)
    check_precision("float32", device, False)
    check_precision(None, device, False)
