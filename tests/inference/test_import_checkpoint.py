"""Official checkpoints become model folders that stock nnU-Net loads; other files are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from umamba.inference.import_checkpoint import import_checkpoint, modern_plans
from umamba.inference.predictor import UMambaPredictor
from umamba.networks import create_network, get_entry

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 1]]
KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
PATCH = [4, 12, 8]
DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "organ": 1, "vessel": 2},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
NETWORKS = ("umamba_bot", "umamba_enc", "umamba_bot_v1", "umamba_enc_v1")


@pytest.mark.parametrize("plans_age", ["old", "new"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_imported_checkpoint_predicts_as_its_network_does_in_stock_nnunet(
    name: str, plans_age: str, tmp_path: Path, one_thread: None
) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    network = tiny_network(name)
    files = write_files(tmp_path, name, network, old_plans() if plans_age == "old" else new_plans())
    folder = tmp_path / "imported"
    report = import_checkpoint(name, **files, output_folder=folder)
    assert len(report.matched) == len(network.state_dict())
    assert report.aliases

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=None)
    assert type(predictor.network) is get_entry(name).cls
    assert predictor.allowed_mirroring_axes == (0, 2)
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    images = torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(images), network.eval()(images))

    own = UMambaPredictor(device=torch.device("cpu"))
    own.initialize_from_trained_model_folder(str(folder), use_folds=None)
    assert own.list_of_parameters[0].keys() == network.state_dict().keys()


def test_a_further_fold_of_the_same_plans_joins_the_folder(tmp_path: Path) -> None:
    files = write_files(tmp_path, "umamba_bot", tiny_network("umamba_bot"), new_plans())
    folder = tmp_path / "imported"
    for fold in (0, "all"):
        import_checkpoint("umamba_bot", **files, output_folder=folder, fold=fold)
    assert {p.name for p in folder.glob("fold_*")} == {"fold_0", "fold_all"}
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint.pth", "plans.json", "dataset.json", "imported",
    }  # fmt: skip
    with pytest.raises(ValueError, match="fold_0 exists already"):
        import_checkpoint("umamba_bot", **files, output_folder=folder)
    other = {**new_plans(), "plans_name": "others"}
    files["plans"].write_text(json.dumps(other))
    with pytest.raises(ValueError, match="other plans"):
        import_checkpoint("umamba_bot", **files, output_folder=folder, fold=1)


def test_old_plan_fields_become_arguments_and_configurations_inherit() -> None:
    plans = modern_plans(old_plans(), get_entry("umamba_enc"), Path("plans.json"))
    block = plans["configurations"]["3d_fullres"]["architecture"]
    assert block["network_class_name"] == "umamba.networks.umamba.UMambaEnc"
    assert block["_kw_requires_import"] == []
    assert block["arch_kwargs"] == {
        "patch_size": PATCH,
        "strides": STRIDES,
        "kernel_sizes": KERNELS,
        "features_per_stage": [4, 8, 10],
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
    }
    assert "UNet_base_num_features" not in plans["configurations"]["3d_fullres"]
    assert plans["configurations"]["3d_cascade_fullres"] == {"inherits_from": "3d_fullres"}
    larger = plans["configurations"]["3d_large"]["architecture"]["arch_kwargs"]
    assert larger == {**block["arch_kwargs"], "patch_size": [8, 12, 8]}


def test_a_network_of_fixed_strides_takes_no_stages_from_plans_of_nnunets_unet() -> None:
    entry = get_entry("swin_umamba_d")
    strides = [list(stride) for stride in entry.fixed_strides or ()]
    for plans in (old_plans(), new_plans()):
        flat = {**plans["configurations"]["3d_fullres"], "patch_size": [64, 96]}
        plans["configurations"] = {"2d": flat}
        planned = modern_plans(plans, entry, Path("plans.json"))["configurations"]["2d"]
        assert planned["architecture"]["network_class_name"] == entry.class_path
        own = {"strides": strides, "features_per_stage": [96, 96, 192, 384, 768]}
        assert planned["architecture"]["arch_kwargs"] == own
        own = {"strides": strides, "features_per_stage": [4, 4, 8, 16, 32]}
        planned["architecture"]["arch_kwargs"] = own
        again = modern_plans({"configurations": {"2d": planned}}, entry, Path("plans.json"))
        assert again["configurations"]["2d"]["architecture"]["arch_kwargs"] == own


@pytest.mark.parametrize("actual", NETWORKS)
@pytest.mark.parametrize("claimed", NETWORKS)
def test_a_checkpoint_of_another_network_is_named(
    actual: str, claimed: str, tmp_path: Path
) -> None:
    if actual == claimed:
        return
    files = write_files(tmp_path, actual, tiny_network(actual), new_plans())
    with pytest.raises(ValueError, match=f"not a checkpoint of {claimed}; it looks like {actual}$"):
        import_checkpoint(claimed, **files, output_folder=tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_files_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path) -> None:
    network = tiny_network("umamba_bot")
    files = write_files(tmp_path, "umamba_bot", network, new_plans())
    target = {"output_folder": tmp_path / "imported"}

    def refuses(message: str, name: str = "umamba_bot", **changed: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            import_checkpoint(name, **{**files, **target, **changed})
        assert "\n" not in str(error.value)

    refuses("no network is called", name="umamba_bog")
    refuses("there is no checkpoint", checkpoint=tmp_path / "absent.pth")
    refuses("no configuration '4d'; choose with -c one of 3d_fullres", configuration="4d")

    wider = new_plans()
    wider["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][
        2
    ] += 1
    refuses("the plans are not the checkpoint's", plans=write_json(tmp_path / "wide.json", wider))

    residual = new_plans()
    del residual["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_conv_per_stage"]
    refuses("does not tell n_conv_per_stage", plans=write_json(tmp_path / "res.json", residual))

    fast = new_plans()
    fast["configurations"]["3d_fullres"]["resampling_fn_seg"] = "fast_resample_data_or_seg_to_shape"
    refuses("write resample_data_or_seg_to_shape", plans=write_json(tmp_path / "fast.json", fast))

    for key in ("patch_size", "spacing"):
        partial = new_plans()
        del partial["configurations"]["3d_fullres"][key]
        refuses(f"does not tell {key}", plans=write_json(tmp_path / "part.json", partial))
    unnamed = {key: value for key, value in DATASET.items() if key != "labels"}
    refuses("channel_names and labels", dataset_json=write_json(tmp_path / "d.json", unnamed))
    refuses(r"no file .*gone\.json", dataset_json=tmp_path / "gone.json")
    refuses("is a file; choose a folder", output_folder=files["checkpoint"])

    whole = files["checkpoint"].read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    refuses(r"cut\.pth cannot be read, it seems truncated", checkpoint=tmp_path / "cut.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    refuses(r"text\.pth", checkpoint=tmp_path / "text.pth")
    (tmp_path / "text.pth").write_text("hello")
    refuses(r"text\.pth cannot be read", checkpoint=tmp_path / "text.pth")
    torch.save({"network_weights": network}, tmp_path / "code.pth")
    refuses(r"code\.pth is damaged or holds objects", checkpoint=tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    refuses("no network weights", checkpoint=tmp_path / "empty.pth")
    stranger = nn.Sequential(nn.Conv2d(1, 2, 3)).state_dict()
    torch.save(stranger, tmp_path / "stranger.pth")
    refuses("nor of any registered network", checkpoint=tmp_path / "stranger.pth")
    assert not (tmp_path / "imported").exists()


def tiny_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    patch = {"patch_size": PATCH} if name == "umamba_enc" else {}
    return create_network(
        name, 1, 3, strides=STRIDES, kernel_sizes=KERNELS, features_per_stage=[4, 8, 10], **patch
    )


def write_files(
    folder: Path, name: str, network: nn.Module, plans: dict[str, Any]
) -> dict[str, Path]:
    """An official training checkpoint, with its duplicates and wrappers, and its two JSON files."""
    key_map = get_entry(name).cls.official_key_map()
    official = key_map.to_official(network.state_dict())
    official |= {f"decoder.{k}": v for k, v in official.items() if k.startswith("encoder.")}
    for kind, index in (("conv", 0), ("norm", 1)):
        official |= {
            k.replace(f".{kind}.", f".all_modules.{index}."): v
            for k, v in list(official.items())
            if f"conv1.{kind}." in k or f"conv2.{kind}." in k
        }
    checkpoint = {
        "network_weights": {f"module.{key}": value for key, value in official.items()},
        "init_args": {"configuration": "3d_fullres", "fold": "all"},
        "trainer_name": "nnUNetTrainerUMamba",
        "inference_allowed_mirroring_axes": [0, 2],
        "current_epoch": 1000,
    }
    torch.save(checkpoint, folder / "checkpoint.pth")
    return {
        "checkpoint": folder / "checkpoint.pth",
        "plans": write_json(folder / "plans.json", plans),
        "dataset_json": write_json(folder / "dataset.json", DATASET),
    }


def write_json(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(json.dumps(content))
    return file


def common_plans() -> dict[str, Any]:
    return {
        "dataset_name": "Dataset007_Test",
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "configurations": {"3d_fullres": {"patch_size": PATCH, "spacing": [1, 1, 1]}},
    }


def old_plans() -> dict[str, Any]:
    """As nnU-Net 2.2 wrote them."""
    plans = common_plans()
    plans["configurations"]["3d_fullres"] |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 10,
        "n_conv_per_stage_encoder": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "num_pool_per_axis": [1, 2, 1],
        "pool_op_kernel_sizes": STRIDES,
        "conv_kernel_sizes": KERNELS,
    }
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres"}
    plans["configurations"]["3d_large"] = {"inherits_from": "3d_fullres", "patch_size": [8, 12, 8]}
    return copy.deepcopy(plans)


def new_plans() -> dict[str, Any]:
    """As nnU-Net 2.8 writes them."""
    plans = common_plans()
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 10],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": KERNELS,
            "strides": STRIDES,
            "n_conv_per_stage": [2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2],
            "conv_bias": True,
        },
        "_kw_requires_import": ["conv_op"],
    }
    return copy.deepcopy(plans)
