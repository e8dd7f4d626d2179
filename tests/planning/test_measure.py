"""The measured cost of a training step, and what is said where the memory does not suffice."""

import pytest
import torch
from torch import nn

from umamba.planning import measure
from umamba.planning.footprint import count_footprint
from umamba.planning.measure import NoiseStep, measure_step


@pytest.mark.usefixtures("one_thread")
def test_the_counted_memory_of_a_step_is_near_its_measured_peak():
    def build() -> nn.Module:
        layers = [nn.Conv2d(1, 64, 3, padding=1), nn.InstanceNorm2d(64), nn.LeakyReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.InstanceNorm2d(64), nn.LeakyReLU()]
        return nn.Sequential(*layers, nn.Conv2d(64, 3, 1))

    counted = count_footprint(build, 1, (136, 160)).training_bytes(8)
    step = measure_step(lambda: NoiseStep(build(), torch.randn(8, 1, 136, 160)), "cpu", counted)
    assert step.finite
    assert step.seconds > 0
    # The convolution library's own code and buffers come on top, whatever the size of the network.
    assert 0.7 * counted < step.peak_bytes < 1.4 * counted + 300e6


class Failing:
    network, image = torch.nn.Identity(), torch.zeros(1)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self) -> bool:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_running_out_of_memory_is_told_from_other_faults(error):
    with pytest.raises(MemoryError, match="memory"):
        measure_step(lambda: Failing(error), "cpu", 0)
    with pytest.raises(RuntimeError, match="shape"):
        measure_step(lambda: Failing(RuntimeError("a wrong shape")), "cpu", 0)


def test_a_step_that_the_system_would_kill_is_not_begun(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda: 2**30)
    with pytest.raises(MemoryError, match=r"takes 3\.0 GB and 1\.0 GB are free"):
        measure_step(lambda: pytest.fail("begun"), "cpu", 3 * 2**30)
