"""Official checkpoints of every registered network become model folders that predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_plans, read_array, write_cases
from torch import nn

from umamba.cli.main import main
from umamba.inference import import_checkpoint as module
from umamba.inference.import_checkpoint import import_checkpoint
from umamba.networks import create_network, get_entry, list_networks, recognize_network

NETWORKS = list_networks(controls=False)
DERIVED = (  # their files tell their size
    *("mamba_unet", "msvm_unet", "swin_umamba", "swin_umamba_d", "vm_unet"),
)
FREE_STAGES = {
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 1]],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "features_per_stage": [4, 8, 10],
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "patch_size": [4, 12, 8],
}
OWN_STAGES = {
    "features_per_stage": [8, 8, 16, 24, 36],
    "depths": [1, 2, 1, 1],
    "inner_size": [4, 4],
    "n_groups": 2,
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_imported_and_recognized_as_itself(name: str, tmp_path: Path) -> None:
    network = tiny_network(name)
    files = write_files(tmp_path, name, network)
    official = torch.load(files["checkpoint"], weights_only=True)["state_dict"]
    assert recognize_network(official) == [name]
    assert recognize_network(network.state_dict()) == [name]
    other = NETWORKS[NETWORKS.index(name) - 1]
    with pytest.raises(ValueError, match=f"no checkpoint of {other}|it looks like {name}$"):
        import_checkpoint(other, **files, output_folder=tmp_path / "imported")
    report = import_checkpoint(name, **files, output_folder=tmp_path / "imported")
    assert len(report.matched) + len(report.adapted) == len(network.state_dict())
    file = tmp_path / "imported" / "fold_0" / "checkpoint_final.pth"
    weights = torch.load(file, weights_only=True)["network_weights"]
    assert all(torch.equal(weights[key], v) for key, v in network.state_dict().items())


@pytest.mark.parametrize("name", ["vm_unet", "umamba_enc"])
def test_other_channels_and_classes_are_told_in_a_sentence(name: str, tmp_path: Path) -> None:
    for counts, said in (
        ((2, 3), r"it has 2 input channels where dataset\.json has 1; give the dataset\.json"),
        ((1, 5), r"it has 5 classes where dataset\.json has 3"),
    ):
        files = write_files(tmp_path, name, tiny_network(name, *counts))
        with pytest.raises(ValueError, match=said):
            import_checkpoint(name, **files, output_folder=tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_a_checkpoint_with_our_own_names_is_told_apart(tmp_path: Path) -> None:
    network = tiny_network("vm_unet")
    files = write_files(tmp_path, "vm_unet", network)
    torch.save(network.state_dict(), files["checkpoint"])
    with pytest.raises(ValueError, match=r"it has umamba's own names \(vm_unet\): predict with"):
        import_checkpoint("vm_unet", **files, output_folder=tmp_path / "imported")


def test_a_network_prepared_in_its_own_way_needs_plans(tmp_path: Path) -> None:
    files = write_files(tmp_path, "vm_unet", tiny_network("vm_unet"))
    with pytest.raises(ValueError, match="umamba plan DATASET --network vm_unet") as error:
        import_checkpoint("vm_unet", **{**files, "plans": None}, output_folder=tmp_path / "i")
    assert "\n" not in str(error.value)


def test_an_imported_2d_network_predicts(tmp_path: Path) -> None:
    files = write_files(tmp_path, "swin_umamba_d", tiny_network("swin_umamba_d"))
    assert main(["models", "import", "--network", "swin_umamba_d", *words(files, tmp_path)]) == 0
    predicts(tmp_path)


def test_segmamba_is_imported_without_plans_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    official = module.OFFICIAL_PREPARATION["segmamba"]
    monkeypatch.setitem(official, "patch_size", [16, 32, 32])
    files = write_files(tmp_path, "segmamba", tiny_network("segmamba"))
    del files["plans"]
    arguments = ["--network-arg", "features_per_stage=[8,8,16,24,36]"]
    command = ["models", "import", "--network", "segmamba", *words(files, tmp_path)]
    assert main(command) == 1
    assert "the plans are not the checkpoint's" in capsys.readouterr().err
    assert main([*command, *arguments, "--network-arg", "depths=[1,2,1,1]"]) == 0
    assert "0 missing, 0 unused" in capsys.readouterr().out
    configuration = json.loads((tmp_path / "imported" / "plans.json").read_text())
    plans = configuration["configurations"]["3d_fullres"]
    assert plans["spacing"] == [1, 1, 1]
    assert plans["normalization_schemes"] == ["ZScoreNormalization"]
    predicts(tmp_path)


def predicts(folder: Path) -> None:
    """Predicts a case with the imported folder, on the command line."""
    write_cases(folder / "images", {"case": (9, 24, 20)}, spacing=(2.0, 1.0, 1.0))
    options = ["-f", "0", "-device", "cpu", "--disable_tta"]
    places = {"-m": folder / "imported", "-i": folder / "images", "-o": folder / "out"}
    given = [str(word) for pair in places.items() for word in pair]
    assert main(["predict", *given, *options]) == 0
    segmentation = read_array(folder / "out" / "case.nii.gz")
    assert segmentation.shape == (9, 24, 20)
    assert set(segmentation.ravel()) <= {0, 1, 2}


def words(files: dict[str, Path], folder: Path) -> list[str]:
    options = {f"--{name.replace('_', '-')}": str(file) for name, file in files.items()}
    return [word for pair in options.items() for word in pair] + ["-o", str(folder / "imported")]


def tiny_arguments(name: str) -> dict[str, Any]:
    entry = get_entry(name)
    stages = FREE_STAGES if entry.fixed_strides is None else OWN_STAGES
    known = {key: value for key, value in stages.items() if key in entry.keywords}
    if entry.fixed_strides is not None:
        known["features_per_stage"] = known["features_per_stage"][: len(entry.fixed_strides)]
    return known


def tiny_network(name: str, n_channels: int = 1, n_classes: int = 3) -> nn.Module:
    return create_network(name, n_channels, n_classes, **tiny_arguments(name))


def write_files(folder: Path, name: str, network: nn.Module) -> dict[str, Path]:
    """An official checkpoint, plans of one configuration, and dataset.json."""
    entry = get_entry(name)
    dims = max(entry.spatial_dims)
    patch = [4, 12, 8] if entry.fixed_strides is None else [32, 64, 64][-dims:]
    plans = make_plans(patch_size=tuple(patch), spacing=(1.0,) * dims)
    (settings,) = plans["configurations"].values()
    arguments = {} if name in DERIVED else tiny_arguments(name)
    if entry.fixed_strides is not None:
        arguments |= {"strides": [list(stride[-dims:]) for stride in entry.fixed_strides]}
    settings["architecture"] = {
        "network_class_name": entry.class_path,
        "arch_kwargs": arguments,
        "_kw_requires_import": [],
    }
    official = entry.cls.official_key_map().to_official(network.state_dict())
    torch.save({"state_dict": official, "epoch": 3}, folder / "checkpoint.pth")
    dataset = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "organ": 1, "vessel": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    files = {"checkpoint": folder / "checkpoint.pth"}
    for key, content in (("plans", plans), ("dataset_json", dataset)):
        files[key] = folder / f"{key}.json"
        files[key].write_text(json.dumps(content))
    return files
