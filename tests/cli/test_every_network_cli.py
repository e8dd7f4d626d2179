"""Every network through the commands: `umamba run` with three steps of training, then `predict`.

One dataset is 3D with voxels three times as thick as wide, two channels, regions and an ignore
label; the other is RGB pictures. Images are smaller than the patches of the large divisors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from skimage import io

from umamba.cli.main import main
from umamba.networks import list_networks
from umamba.planning import fingerprint, planner
from umamba.planning.upstream import find_entry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

N_CASES = 5
UPSTREAM_NETWORKS = ("plainconv_unet", "resenc_m")  # the large ones differ in the patch alone
VOLUME, PICTURE = (9, 37, 20), (50, 70)
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


@pytest.fixture(autouse=True)
def three_steps(monkeypatch):
    """No variable of nnU-Net's is set, loaders run in this process, an epoch has three steps."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(fingerprint, "SAMPLED_VOXELS", 5_000)
    brief = {"num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 1}
    plan_dataset = planner.plan_dataset

    def plan(*arguments: Any, recipe: dict[str, Any], **request: Any) -> dict[str, Any]:
        return plan_dataset(*arguments, recipe=recipe | brief, **request)

    monkeypatch.setattr(planner, "plan_dataset", plan)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes") / "Dataset811_Volumes"
    generator = np.random.default_rng(3)
    for index in range(N_CASES):
        label = np.zeros(VOLUME, np.uint8)
        label[2:7, 8 + index : 26, 4:15] = 1
        label[3:6, 14:20, 7:12] = 2
        label[:, :3] = 3
        channels = label + generator.normal(size=(2, *VOLUME))
        for array, name in (
            *((x, f"imagesTr/case_{index}_{c:04d}") for c, x in enumerate(channels)),
            (label, f"labelsTr/case_{index}"),
        ):
            image = SimpleITK.GetImageFromArray(
                array.astype(np.float32 if "images" in name else np.uint8)
            )
            image.SetSpacing((1.0, 1.0, 3.0))
            path = folder / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(image, str(path))
    return describe(folder, ["T1", "T2"], REGIONS, ".nii.gz", regions_class_order=[1, 2])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "Dataset812_Pictures"
    generator = np.random.default_rng(4)
    for index in range(N_CASES):
        label = np.zeros(PICTURE, np.uint8)
        label[10:30, 8 + index : 40] = 1
        label[20:44, 45:66] = 2
        pixels = 60 * label[..., None] + generator.integers(0, 60, (*PICTURE, 3))
        for part, array in (
            (f"imagesTr/case_{index}_0000", pixels),
            (f"labelsTr/case_{index}", label),
        ):
            path = folder / f"{part}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            io.imsave(str(path), array.astype(np.uint8), check_contrast=False)
    return describe(folder, ["R", "G", "B"], {"background": 0, "a": 1, "b": 2}, ".png")


def describe(
    folder: Path, channels: list[str], labels: dict[str, Any], ending: str, **more: Any
) -> Path:
    content = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": labels,
        "numTraining": N_CASES,
        "file_ending": ending,
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def run_and_predict(dataset: Path, name: str, arguments: dict[str, Any], out: Path) -> Path:
    """Runs both commands; returns the folder of the trained configuration."""
    words = ["run", str(dataset), "--network", name, "--epochs", "1", "--memory", "1"]
    for key, value in arguments.items():
        words += ["--network-arg", f"{key}={json.dumps(value)}"]
    assert main([*words, "-p", name, "-device", "cpu", "--debug"]) == 0
    (fold,) = dataset.glob(f"umamba-work/results/*/*__{name}__*/fold_0")
    assert (fold / "validation" / "summary.json").is_file()
    assert json.loads((fold / "training.json").read_text())["iterations"] == 3
    images = sorted((dataset / "imagesTr").glob("case_0_*"))
    predict = ["predict", "-m", str(fold.parent), "-device", "cpu", "--disable_tta", "-o", str(out)]
    assert main([*predict, "-i", *map(str, images)]) == 0
    return fold.parent


@pytest.mark.parametrize("name", [*list_networks(controls=False), *UPSTREAM_NETWORKS])
def test_a_network_learns_regions_of_anisotropic_volumes(
    volumes, tmp_path, name, shallow_arguments: Callable[[str], dict[str, Any]]
):
    out = tmp_path / "out.nii.gz"
    model = run_and_predict(volumes, name, shallow_arguments(name), out)
    planned = "3d_fullres" if 3 in find_entry(name).spatial_dims else "2d"
    assert model.name.endswith(f"__{planned}")
    predicted = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(out)))
    assert predicted.shape == VOLUME
    assert set(np.unique(predicted)) <= {0, 1, 2}
    if name == "segmamba":
        plans = json.loads((model / "plans.json").read_text())
        patch = plans["configurations"][planned]["patch_size"]
        assert all(size > extent for size, extent in zip(patch, VOLUME, strict=True))


def test_stock_nnunet_reads_the_model_folder_of_its_own_network(
    volumes, tmp_path, shallow_arguments: Callable[[str], dict[str, Any]]
):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    ours, name = tmp_path / "ours.nii.gz", "plainconv_unet"
    model = run_and_predict(volumes, name, shallow_arguments(name), ours)
    predictor = nnUNetPredictor(
        use_mirroring=False, device=torch.device("cpu"), perform_everything_on_device=False
    )
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    images = [str(file) for file in sorted((volumes / "imagesTr").glob("case_0_*"))]
    predictor.predict_from_files_sequential([images], [str(tmp_path / "stock")])
    first, second = (
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
        for file in (ours, tmp_path / "stock.nii.gz")
    )
    assert (first != second).mean() < 0.01


@pytest.mark.parametrize("name", [*list_networks(2, controls=False), *UPSTREAM_NETWORKS])
def test_a_network_learns_labels_of_pictures(
    pictures, tmp_path, name, shallow_arguments: Callable[[str], dict[str, Any]]
):
    out = tmp_path / "out.png"
    run_and_predict(pictures, name, shallow_arguments(name), out)
    assert io.imread(str(out)).shape == PICTURE


def test_a_3d_network_on_pictures_is_refused_with_networks_that_fit(pictures, capsys):
    assert main(["run", str(pictures), "--network", "segmamba", "--epochs", "1"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "segmamba" in line
    assert "umamba_bot" in line
    assert "nnmamba" not in line
