"""The scans of planned networks: found without a computation, for plans of either origin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umamba.planning import scan_calls
from umamba.planning.scan_calls import plans_calls, typical_calls

BOT = "umamba.networks.umamba.UMambaBot"
PATCHES = {"2d": [16, 24], "3d_fullres": [8, 16, 12]}


@pytest.fixture
def plans(tmp_path: Path) -> Callable[..., Path]:
    """Writes tiny plans of U-Mamba Bot with a 2D and a 3D configuration."""

    def write(
        class_name: str = BOT, planning: dict[str, int] | None = None, **changes: Any
    ) -> Path:
        configurations: dict[str, Any] = {}
        for name, patch in PATCHES.items():
            dims = len(patch)
            arguments = {
                "features_per_stage": [4, 8],
                "kernel_sizes": [[3] * dims] * 2,
                "strides": [[1] * dims, [2] * dims],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
            }
            configurations[name] = {
                "patch_size": patch,
                "batch_size": 2,
                "architecture": {
                    "network_class_name": class_name,
                    "arch_kwargs": arguments | changes,
                    "_kw_requires_import": [],
                },
                **({"planning": planning} if planning else {}),
            }
        content = {
            "dataset_name": "Dataset001_Tiny",
            "plans_name": "tiny",
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "transpose_forward": [0, 1, 2],
            "configurations": configurations,
        }
        path = tmp_path / "plans.json"
        path.write_text(json.dumps(content))
        return path

    return write


FACTS = {"input_channels": 3, "num_classes": 2}


def test_the_scan_of_a_configuration_has_its_batch_and_its_tokens(plans: Callable[..., Path]):
    calls = plans_calls(plans(planning=FACTS), "3d_fullres")
    scans = [call for call in calls if "A" in call.named()]
    assert len(scans) == 1
    delta = scans[0].named()["delta"]
    assert delta.shape[0] == 2
    assert delta.shape[-1] == 4 * 8 * 6
    assert delta.dtype == torch.float32
    assert any("convolution" in str(call) for call in calls)


def test_without_a_name_all_configurations_count(plans: Callable[..., Path]):
    path = plans(planning=FACTS)
    both = plans_calls(path)
    assert both == plans_calls(path, "2d") + plans_calls(path, "3d_fullres")


def test_plans_of_others_take_channels_and_classes_from_dataset_json(
    plans: Callable[..., Path],
):
    path = plans()
    with pytest.raises(FileNotFoundError, match=r"dataset\.json is missing: it tells the channels"):
        plans_calls(path)
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}
    path.with_name("dataset.json").write_text(json.dumps(content))
    assert plans_calls(path) == plans_calls(plans(planning=FACTS))


def test_plans_that_cannot_be_timed_are_one_sentence(plans: Callable[..., Path], tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no plans file"):
        plans_calls(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("text")
    with pytest.raises(ValueError, match="is not valid JSON"):
        plans_calls(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="is no plans file"):
        plans_calls(tmp_path / "list.json")
    with pytest.raises(ValueError, match="did you mean 3d_fullres"):
        plans_calls(plans(planning=FACTS), "3d_fulres")
    with pytest.raises(ValueError, match="which is not installed"):
        plans_calls(plans("umamba.networks.gone.Gone", FACTS))
    with pytest.raises(ValueError, match="has a scan to time"):
        plans_calls(plans(planning=FACTS, mixer="conv"))
    path = plans(planning=FACTS)
    content = json.loads(path.read_text())
    del content["configurations"]["2d"]["architecture"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2d of .* has no architecture: plan again"):
        plans_calls(path)


def test_typical_calls_are_those_of_several_networks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scan_calls, "TYPICAL", {"umamba_bot": 3})
    (scan,) = [call for call in typical_calls(on_gpu=True) if "A" in call.named()]
    (small,) = [call for call in typical_calls(on_gpu=False) if "A" in call.named()]
    assert scan.named()["delta"].shape[-1] == 8 * small.named()["delta"].shape[-1]
