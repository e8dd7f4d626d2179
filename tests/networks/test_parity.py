"""Parity cases: official weights, imported, give the official outputs and gradients."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.fill import fill, image
from parity.losses import terms_of
from parity.subjects import NotRegisteredError, subject_of
from torch import Tensor, nn

from umamba.networks.state_dict import KeyMap, LoadReport

OUTPUT_TOLERANCE = 1e-4
FLOAT64_GRADIENT_TOLERANCE = 1e-4
FLOAT32_GRADIENT_TOLERANCE, FLOAT32_GRADIENT_SHARE = 1e-3, 0.97
LARGEST_GRADIENT_TOLERANCE = 0.02


def test_official_weights_give_the_official_outputs_and_gradients(parity_file: Path) -> None:
    case = read(parity_file)
    subject = subject_of(case)
    network = subject.build(case["config"])
    report = load_official(network, subject.key_map, case)
    check_parameters(network, report, case)
    network.eval()
    images = torch.from_numpy(image(case["name"], case["input_shape"]))

    def run(dtype: torch.dtype, images: Tensor) -> list[Tensor]:
        return as_list(subject.run(network.to(dtype), images.to(dtype)))

    with torch.no_grad():
        outputs = run(torch.float32, images)
    assert len(outputs) == len(case["outputs"])
    for output, expected in zip(outputs, case["outputs"], strict=True):
        assert list(output.shape) == expected["shape"]
        assert deviations(output, expected).max() < output_tolerance(case)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = images.to(dtype, copy=True).requires_grad_()
        torch.stack([(output**2).mean() for output in run(dtype, leaf)]).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    check_gradient(gradient, case)


def test_the_official_values_and_gradients_of_losses(loss_file: Path) -> None:
    for term in terms_of(read(loss_file)):
        logits = term.logits.requires_grad_()
        value = term.loss(logits, term.target)
        assert value.item() == pytest.approx(term.expected["value"], rel=term.tolerance), term.label
        if "gradient" in term.expected:
            value.backward()
            assert logits.grad is not None
            found = logits.grad.flatten()[term.expected["positions"]].numpy()
            expected = np.array(term.expected["gradient"])
            assert np.abs(found - expected).max() < term.tolerance * expected.std(), term.label


def marks_of_parity_file(file: Path) -> list[pytest.MarkDecorator]:
    """A case of a network or loss that we do not have is expected to fail, with its name."""
    try:
        case = read(file)
        if "state_dict" in case:
            subject_of(case)
        else:
            next(iter(terms_of(case)))
    except NotRegisteredError as error:
        return [pytest.mark.xfail(strict=True, raises=NotRegisteredError, reason=str(error))]
    return []


def load_official(network: nn.Module, key_map: KeyMap, case: dict[str, Any]) -> LoadReport:
    """Fills the official state dict and loads it strictly through the key map."""
    aliases = case.get("aliases", {})
    official = {
        key: torch.from_numpy(fill(aliases.get(key, key), shape))
        for key, shape in case["state_dict"]
    }
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    own, report = key_map.to_own(official, shapes)
    network.load_state_dict(own)
    assert len(report.aliases) == len(aliases)
    left_out = {*aliases, *report.ignored}
    assert key_map.to_official(own).keys() == official.keys() - left_out
    return report


def check_parameters(network: nn.Module, report: LoadReport, case: dict[str, Any]) -> None:
    """As many trainable values as the official network, less those without use."""
    shapes = dict(case["state_dict"])
    without_use = set(report.ignored) - set(case.get("constants", ()))
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trainable + sum(math.prod(shapes[key]) for key in without_use) == case["parameters"]


def check_gradient(gradient: Callable[[torch.dtype], Tensor], case: dict[str, Any]) -> None:
    """Everywhere where the values come from float64, else at 97 % of the positions.

    gradient(dtype): the input's; ours of float64 is compared. Only where rounding is measured to
    move ours at as many positions by more than the tolerance (ReLUs switch), ours of float32 may
    stand in for it, and the tolerance is twice that movement.
    """
    expected = dict(case["input_gradient"])
    exact = "float64" in case.get("values_from", "") or "values_float64" in expected
    expected["values"] = expected.get("values_float64", expected["values"])
    double = gradient(torch.float64)
    if exact:
        assert deviations(double, expected).max() < FLOAT64_GRADIENT_TOLERANCE
        return
    found, tolerance = typical_deviation(double, expected), FLOAT32_GRADIENT_TOLERANCE
    if found >= tolerance:
        single = gradient(torch.float32)
        own = double.flatten()[expected["positions"]].numpy()
        movement = typical_deviation(single, {**expected, "values": own})
        if movement > tolerance:
            found = min(found, typical_deviation(single, expected))
            tolerance = min(2 * movement, LARGEST_GRADIENT_TOLERANCE)
    assert found < tolerance


def typical_deviation(tensor: Tensor, expected: dict[str, Any]) -> float:
    """What 97 % of the recorded positions do not exceed."""
    return float(np.quantile(deviations(tensor, expected), FLOAT32_GRADIENT_SHARE))


def deviations(tensor: Tensor, expected: dict[str, Any]) -> np.ndarray:
    """Absolute differences at the recorded positions, in units of the tensor's std."""
    values = tensor.detach().double().flatten()[expected["positions"]].numpy()
    return np.abs(values - np.array(expected["values"])) / expected["std"]


def output_tolerance(case: dict[str, Any]) -> float:
    """1e-4 of the std, or twice the official code's own float32-float64 gap if that is larger."""
    names = ("float64_gap", "float32_vs_float64", "float64_max_difference")
    gaps = [case.get(name, 0.0) for name in names]
    gap = max(max(gap["outputs"]) if isinstance(gap, dict) else gap for gap in gaps)
    return 2 * gap if gap > OUTPUT_TOLERANCE else OUTPUT_TOLERANCE


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def read(file: Path) -> dict[str, Any]:
    with gzip.open(file, "rt") as stream:
        return json.load(stream)
