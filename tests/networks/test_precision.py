"""The precision on a GPU: bf16 where the hardware has it; asked for by name, or none."""

from __future__ import annotations

import warnings

import pytest
import torch

from umamba.networks.precision import autocast, autocast_type


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
