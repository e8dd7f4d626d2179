"""Parity cases: official weights, imported, give the official outputs and gradients."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.fill import fill, image
from torch import Tensor, nn

from umamba.blocks.mamba import Mamba
from umamba.networks import get_entry
from umamba.networks.state_dict import KeyMap, mamba_rows

OUTPUT_TOLERANCE = 1e-4
FLOAT64_GRADIENT_TOLERANCE = 1e-4
FLOAT32_GRADIENT_TOLERANCE, FLOAT32_GRADIENT_SHARE = 1e-3, 0.97


class NotRegisteredError(LookupError):
    """No network of ours answers to this case yet."""


@dataclass
class Subject:
    """What a case tests: how to build it from the official arguments, and its key map."""

    build: Callable[[dict[str, Any]], nn.Module]
    key_map: KeyMap


def test_official_weights_give_the_official_outputs_and_gradients(parity_file: Path) -> None:
    case = read(parity_file)
    subject = subject_of(case)
    network = subject.build(case["config"])
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trainable == case["parameters"]
    load_official(network, subject.key_map, case)
    network.eval()
    images = torch.from_numpy(image(case["name"], case["input_shape"]))

    with torch.no_grad():
        outputs = as_list(network(images))
    assert len(outputs) == len(case["outputs"])
    for output, expected in zip(outputs, case["outputs"], strict=True):
        assert list(output.shape) == expected["shape"]
        assert deviations(output, expected).max() < output_tolerance(case)

    images = images.double().requires_grad_()
    outputs = as_list(network.double()(images))
    torch.stack([(output**2).mean() for output in outputs]).sum().backward()
    assert images.grad is not None
    check_gradient(images.grad, case)


def marks_of_parity_file(file: Path) -> list[pytest.MarkDecorator]:
    """A case of a network that is not registered is expected to fail, with that network's name."""
    try:
        subject_of(read(file))
    except NotRegisteredError as error:
        return [pytest.mark.xfail(strict=True, raises=NotRegisteredError, reason=str(error))]
    return []


def subject_of(case: dict[str, Any]) -> Subject:
    """The network or block of ours that a case is about."""
    config = case.get("config") or {}
    if case["reference"].startswith("state-spaces/mamba@") and "headdim" not in config:
        return Subject(lambda config: Mamba(**config), KeyMap(mamba_rows("", "")))
    wanted = case.get("network", case["reference"])
    try:
        network = get_entry(wanted).cls
    except ValueError:
        raise NotRegisteredError(f"{wanted} is not registered") from None
    return Subject(lambda c: network(**network.official_arguments(c)), network.official_key_map())


def load_official(network: nn.Module, key_map: KeyMap, case: dict[str, Any]) -> None:
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
    assert key_map.to_official(own).keys() == official.keys() - aliases.keys()


def check_gradient(gradient: Tensor, case: dict[str, Any]) -> None:
    """Everywhere where the values come from float64, else at 97 % of the positions."""
    expected = dict(case["input_gradient"])
    exact = "float64" in case.get("values_from", "") or "values_float64" in expected
    expected["values"] = expected.get("values_float64", expected["values"])
    found = deviations(gradient, expected)
    if exact:
        assert found.max() < FLOAT64_GRADIENT_TOLERANCE
    else:
        assert (found < FLOAT32_GRADIENT_TOLERANCE).mean() >= FLOAT32_GRADIENT_SHARE


def deviations(tensor: Tensor, expected: dict[str, Any]) -> np.ndarray:
    """Absolute differences at the recorded positions, in units of the tensor's std."""
    values = tensor.detach().double().flatten()[expected["positions"]].numpy()
    return np.abs(values - np.array(expected["values"])) / expected["std"]


def output_tolerance(case: dict[str, Any]) -> float:
    """1e-4 of the std, or twice the official code's own float32-float64 gap if that is larger."""
    gap = case.get("float64_gap", 0.0)
    return 2 * gap if gap > OUTPUT_TOLERANCE else OUTPUT_TOLERANCE


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def read(file: Path) -> dict[str, Any]:
    with gzip.open(file, "rt") as stream:
        return json.load(stream)
