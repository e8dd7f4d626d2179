"""Makes tiny model folders and images for the tests of prediction."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

PLAIN_UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
UMAMBA_BOT = "umamba.networks.umamba.UMambaBot"


def architecture(class_path: str, dim: int) -> dict[str, Any]:
    """The network block of the plans: two stages, a few features."""
    shape = {
        "features_per_stage": [4, 8],
        "kernel_sizes": [[3] * dim] * 2,
        "strides": [[1] * dim, [2] * dim],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
    }
    if class_path != PLAIN_UNET:
        return {
            "network_class_name": class_path,
            "arch_kwargs": shape,
            "_kw_requires_import": [],
        }
    operations = {
        "n_stages": 2,
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": class_path,
        "arch_kwargs": shape | operations,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_plans(
    *,
    class_path: str = PLAIN_UNET,
    spacing: tuple[float, ...] = (2.0, 1.0, 1.0),
    patch_size: tuple[int, ...] = (8, 16, 12),
    n_channels: int = 1,
    transpose: tuple[int, int, int] = (0, 1, 2),
    reader: str = "SimpleITKIO",
    configuration: str | None = None,
) -> dict[str, Any]:
    """Plans with one configuration, in nnU-Net's form."""
    dim = len(patch_size)
    name = configuration or ("2d" if dim == 2 else "3d_fullres")
    intensities = {"mean": 50.0, "std": 20.0, "percentile_00_5": 0.0, "percentile_99_5": 100.0}
    resampling = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "Dataset999_Tiny",
        "plans_name": "tiny",
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": [int(i) for i in np.argsort(transpose)],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(i): intensities for i in range(n_channels)
        },
        "configurations": {
            name: {
                "data_identifier": f"tiny_{name}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch_size),
                "spacing": list(spacing),
                "normalization_schemes": ["ZScoreNormalization"] * n_channels,
                "use_mask_for_norm": [False] * n_channels,
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling | {"order": 3},
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
                "architecture": architecture(class_path, dim),
                "batch_dice": False,
            }
        },
    }


def make_dataset_json(n_channels: int = 1, regions: bool = False, ending: str = ".nii.gz") -> dict:
    labels: dict[str, Any] = {"background": 0, "left": 1, "right": 2}
    content: dict[str, Any] = {
        "channel_names": {str(i): f"channel_{i}" for i in range(n_channels)},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ending,
    }
    if regions:
        content["labels"] = {"background": 0, "whole": [1, 2], "core": [2]}
        content["regions_class_order"] = [1, 2]
    return content


def make_model_folder(
    folder: Path,
    plans: dict[str, Any] | None = None,
    dataset_json: dict[str, Any] | None = None,
    *,
    folds: tuple[int | str, ...] = (0,),
    mirror_axes: tuple[int, ...] | None = (2,),
    checkpoint_name: str = "checkpoint_final.pth",
) -> Path:
    """A model folder with random weights, its checkpoints as the stock trainer writes them."""
    plans = plans or make_plans()
    dataset_json = dataset_json or make_dataset_json()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    ((configuration, settings),) = plans["configurations"].items()
    n_outputs = len(dataset_json["labels"]) - (1 if "regions_class_order" in dataset_json else 0)
    block = copy.deepcopy(settings["architecture"])
    n_channels = len(dataset_json["channel_names"])
    if settings.get("previous_stage"):
        n_channels += len(dataset_json["labels"]) - 1
    for fold in folds:
        torch.manual_seed(17 + (fold if isinstance(fold, int) else 99))
        network = get_network_from_plans(
            block["network_class_name"],
            block["arch_kwargs"],
            block["_kw_requires_import"],
            n_channels,
            n_outputs,
            deep_supervision=False,
        )
        for layer in network.decoder.seg_layers:
            # spread the logits, so that every label occurs and few voxels are undecided
            layer.weight.data -= layer.weight.data.mean(1, keepdim=True)
            layer.weight.data *= 20
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": {},
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)]},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1,
            "init_args": {
                "plans": plans,
                "configuration": configuration,
                "fold": fold,
                "dataset_json": dataset_json,
                "device": torch.device("cpu"),
            },
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": mirror_axes,
        }
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(checkpoint, folder / f"fold_{fold}" / checkpoint_name)
    return folder


def make_image(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Blobs and noise (z, y, x), zero in a margin, so that nnU-Net crops it."""
    random = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.sqrt(sum((g - 0.1) ** 2 for g in grid))
    image = 60 * (radius < 0.5) + 30 * np.sin(5 * grid[-1]) + random.normal(40, 8, shape)
    image[(slice(None), slice(0, 2))] = 0
    return np.asarray(image, dtype=np.float32)


def write_nifti(file: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> Path:
    """Writes (z, y, x) with the spacing (z, y, x) in mm, an origin and an oblique direction."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    image.SetOrigin((10.0, -20.0, 5.0))
    image.SetDirection((0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    SimpleITK.WriteImage(image, str(file))
    return file


def write_cases(
    folder: Path,
    shapes: dict[str, tuple[int, int, int]],
    spacing: tuple[float, float, float] = (3.0, 0.8, 1.3),
    n_channels: int = 1,
) -> Path:
    """Input cases `<name>_0000.nii.gz` ... of the given shapes."""
    for i, (name, shape) in enumerate(shapes.items()):
        for channel in range(n_channels):
            image = make_image(shape, seed=10 * i + channel)
            write_nifti(folder / f"{name}_{channel:04d}.nii.gz", image, spacing)
    return folder


def read_array(file: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
