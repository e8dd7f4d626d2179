"""Every fact of nnU-Net that umamba relies on, as an assertion on the installed nnunetv2.

An upgrade of nnU-Net fails here, with a sentence, instead of in the middle of a training.
Plans and trainer are here, planner, search of classes and predictor in test_nnunet_seam_api.py.
"""

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

DATASET = "Dataset703_Seam"
PATCH = [8, 16, 16]
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]


class Foreign(nn.Module):
    """A network outside nnU-Net that remembers how it was called."""

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool, **arguments):
        super().__init__()
        self.received = arguments | {
            "input_channels": input_channels,
            "num_classes": num_classes,
            "deep_supervision": deep_supervision,
        }
        self.stem = nn.Conv3d(input_channels, 4, 3, padding=1)
        self.decoder = nn.Module()
        self.decoder.deep_supervision = deep_supervision
        self.decoder.seg_layers = nn.ModuleList([nn.Conv3d(4, num_classes, 1) for _ in range(2)])
        self.under_autocast: list[bool] = []

    def forward(self, image):
        self.under_autocast.append(torch.is_autocast_enabled(image.device.type))
        features = self.stem(image)
        logits = self.decoder.seg_layers[0](features)
        if not self.decoder.deep_supervision:
            return logits
        smaller = nn.functional.avg_pool3d(features, (1, 2, 2))
        return [logits, self.decoder.seg_layers[1](smaller)]


class Initialized(nn.Module):
    """A network with the attribute that ours must not have."""

    def __init__(self, **_):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    @staticmethod
    def initialize(module):
        module.was_initialized = True


def make_plans() -> dict[str, Any]:
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "median_image_size_in_voxels": PATCH,
        "spacing": [2.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True},
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {
            "network_class_name": f"{__name__}.Foreign",
            "arch_kwargs": {"strides": STRIDES, "width": 4},
            "_kw_requires_import": [],
        },
        "batch_dice": False,
        "recipe": {"optimizer": "adamw"},
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "seam",
        "original_median_spacing_after_transp": [2.0, 1.0, 1.0],
        "original_median_shape_after_transp": PATCH,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": configuration,
            "3d_child": {"inherits_from": "3d_fullres", "batch_size": 3},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0}},
        "umamba": {"network": "foreign"},
    }


DATASET_JSON = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "organ": 1},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}


@pytest.fixture
def make_trainer(tmp_path, monkeypatch) -> Callable[..., nnUNetTrainer]:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    data = tmp_path / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()

    def make(cls: type[nnUNetTrainer] = nnUNetTrainer, **changes: Any) -> nnUNetTrainer:
        plans = make_plans() | {"continue_training": False}
        plans["configurations"]["3d_fullres"]["architecture"] |= changes
        return cls(plans, "3d_fullres", 0, copy.deepcopy(DATASET_JSON), torch.device("cpu"))

    return make


def parameters_of(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


# --- plans -------------------------------------------------------------------------------------


def test_the_stock_trainer_builds_any_class_that_the_plans_name(make_trainer):
    trainer = make_trainer()
    trainer.initialize()
    assert type(trainer.network) is Foreign
    assert trainer.network.received == {
        "input_channels": 1,
        "num_classes": 2,
        "deep_supervision": True,
        "strides": STRIDES,
        "width": 4,
    }


def test_unknown_keys_of_a_configuration_survive_and_are_inherited():
    manager = PlansManager(make_plans())
    for name in ("3d_fullres", "3d_child"):
        configuration = manager.get_configuration(name).configuration
        assert configuration["recipe"] == {"optimizer": "adamw"}
    assert manager.get_configuration("3d_child").batch_size == 3
    assert manager.plans["umamba"] == {"network": "foreign"}


def test_an_attribute_initialize_is_applied_to_every_submodule():
    name = f"{__name__}.Initialized"
    network = get_network_from_plans(name, {}, [], 1, 2, allow_init=True)
    assert network.layer.was_initialized
    assert not hasattr(get_network_from_plans(name, {}, [], 1, 2, False).layer, "was_initialized")


# --- the trainer -------------------------------------------------------------------------------


class WithOption(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=None, option=1):
        super().__init__(plans, configuration, fold, dataset_json, device)


class WithStar(nnUNetTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("cls", [WithOption, WithStar])
def test_a_trainer_with_another_signature_is_a_key_error(make_trainer, cls):
    with pytest.raises(KeyError):
        make_trainer(cls)


def test_plans_without_continue_training_are_a_key_error(make_trainer):
    with pytest.raises(KeyError, match="continue_training"):
        nnUNetTrainer(make_plans(), "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))


def test_the_results_folder_is_named_after_trainer_plans_and_configuration(make_trainer, tmp_path):
    folder = tmp_path / "results" / DATASET / "nnUNetTrainer__seam__3d_fullres" / "fold_0"
    assert Path(make_trainer().output_folder) == folder


def test_a_checkpoint_names_the_trainer_and_holds_what_prediction_reads(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    checkpoint = torch.load(tmp_path / "c.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert set(checkpoint) == {
        "network_weights",
        "optimizer_state",
        "grad_scaler_state",
        "logging",
        "_best_ema",
        "current_epoch",
        "init_args",
        "trainer_name",
        "inference_allowed_mirroring_axes",
    }
    assert checkpoint["init_args"]["configuration"] == "3d_fullres"


def test_the_scales_of_deep_supervision_come_from_the_strides(make_trainer):
    scales = make_trainer()._get_deep_supervision_scales()
    assert scales == [[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]]
    with pytest.raises(KeyError, match="strides"):
        make_trainer(arch_kwargs={})._get_deep_supervision_scales()


def test_the_weights_of_deep_supervision_halve_and_the_last_is_zero(make_trainer):
    strides = [[1, 1, 1], *[[1, 2, 2]] * 4]
    loss = make_trainer(arch_kwargs={"strides": strides})._build_loss()
    weights = np.array(loss.weight_factors)
    np.testing.assert_allclose(weights, np.array([4, 2, 1, 0]) / 7)


def test_the_switch_of_deep_supervision_is_an_attribute_of_the_decoder(make_trainer):
    trainer = make_trainer()
    trainer.initialize()
    for enabled in (False, True):
        trainer.set_deep_supervision_enabled(enabled)
        assert trainer.network.decoder.deep_supervision is enabled


def test_final_validation_switches_deep_supervision_on_whatever_the_trainer_wants():
    source = inspect.getsource(nnUNetTrainer.perform_actual_validation)
    assert "self.set_deep_supervision_enabled(False)" in source
    assert source.rindex("self.set_deep_supervision_enabled(True)") > source.rindex("summary.json")


def test_the_trainer_has_the_methods_that_ours_overrides():
    for name in (
        "save_checkpoint",
        "load_checkpoint",
        "get_training_transforms",
        "perform_actual_validation",
        "on_epoch_end",
        "configure_optimizers",
        "on_train_start",
        "on_train_epoch_start",
        "train_step",
    ):
        assert callable(getattr(nnUNetTrainer, name)), name
    assert parameters_of(nnUNetTrainer.__init__) == [
        "self",
        "plans",
        "configuration",
        "fold",
        "dataset_json",
        "device",
    ]


def test_a_step_on_the_cpu_runs_without_autocast_and_lowers_the_loss(make_trainer):
    trainer = make_trainer()
    trainer.initialize()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, *PATCH, generator=generator)
    target = (image > 0).float()
    batch = {"data": image, "target": [target, target[..., ::2, ::2]]}
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(6)]
    assert trainer.network.under_autocast == [False] * 6
    assert losses[-1] < losses[0]


def test_autocast_and_the_gradient_clip_of_a_step_cannot_be_set():
    source = inspect.getsource(nnUNetTrainer.train_step)
    assert "autocast(self.device.type, enabled=True) if self.device.type == 'cuda'" in source
    assert source.count("clip_grad_norm_(self.network.parameters(), 12)") == 2


def test_the_network_is_wrapped_for_several_gpus_by_a_name_of_the_trainers_file():
    source = inspect.getsource(nnUNetTrainer.initialize)
    assert "self.network = DDP(self.network, device_ids=[self.local_rank])" in source
    module = vars(inspect.getmodule(nnUNetTrainer))
    assert module["DDP"] is nn.parallel.DistributedDataParallel


def test_networks_are_compiled_on_cuda_and_not_on_the_cpu(make_trainer, monkeypatch):
    monkeypatch.delenv("nnUNet_compile", raising=False)
    trainer = make_trainer()
    assert not trainer._do_i_compile()
    trainer.device = torch.device("cuda", 0)
    assert trainer._do_i_compile()


def test_a_module_that_leaves_autocast_stays_in_float32_under_an_outer_autocast():
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            inner = a @ b
        outer = a @ b
    assert (inner.dtype, outer.dtype) == (torch.float32, torch.bfloat16)


def test_autocast_without_a_dtype_takes_the_global_one():
    before = torch.get_autocast_dtype("cpu")
    try:
        torch.set_autocast_dtype("cpu", torch.float16)
        with torch.autocast("cpu", enabled=True):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
    finally:
        torch.set_autocast_dtype("cpu", before)


def test_pretrained_weights_skip_the_segmentation_layers_and_demand_all_others(tmp_path):
    source, target = (Foreign(1, 2, True) for _ in range(2))
    head = target.decoder.seg_layers[0].weight.detach().clone()
    path = tmp_path / "pretrained.pth"
    torch.save({"network_weights": source.state_dict()}, path)
    load_pretrained_weights(target, str(path))
    torch.testing.assert_close(target.stem.weight, source.stem.weight)
    torch.testing.assert_close(target.decoder.seg_layers[0].weight, head)
    torch.save({"network_weights": {}}, path)
    with pytest.raises(AssertionError, match=r"Key stem\.weight is missing"):
        load_pretrained_weights(target, str(path))


# --- our plans under the stock trainer ---------------------------------------------------------


@pytest.mark.parametrize("name", ["umamba_bot", "umamba_enc"])
def test_the_stock_trainer_builds_and_steps_our_networks(make_trainer, name):
    from umamba.networks import get_entry

    entry = get_entry(name)
    arguments = {"strides": STRIDES, "features_per_stage": [4, 8, 8], "d_state": 4}
    if "patch_size" in entry.keywords:
        arguments["patch_size"] = PATCH
    trainer = make_trainer(
        network_class_name=entry.class_path, arch_kwargs=json.loads(json.dumps(arguments))
    )
    trainer.initialize()
    assert type(trainer.network) is entry.cls
    image = torch.randn(2, 1, *PATCH, generator=torch.Generator().manual_seed(0))
    target = (image > 0).float()
    batch = {"data": image, "target": [target, target[..., ::2, ::2]]}
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(2)]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", ["swin_umamba", "swin_umamba_d"])
def test_the_stock_trainers_targets_fit_networks_of_fixed_strides(make_trainer, name):
    from umamba.networks import get_entry

    entry = get_entry(name)
    arguments = {
        "strides": [list(stride) for stride in entry.fixed_strides],
        "features_per_stage": [4, 6, 8, 10, 12],
        "depths": [1, 1, 1, 1],
        "d_state": 4,
    }
    trainer = make_trainer(network_class_name=entry.class_path, arch_kwargs=arguments)
    trainer.initialize()
    scales = trainer._get_deep_supervision_scales()
    assert scales == [list(scale) for scale in trainer.network.deep_supervision_scales]
    image = torch.randn(2, 1, 32, 64, generator=torch.Generator().manual_seed(0))
    target = (image > 0).float()
    steps = [[round(1 / share) for share in scale] for scale in scales]
    batch = {"data": image, "target": [target[..., ::y, ::x] for y, x in steps]}
    assert np.isfinite(float(trainer.train_step(batch)["loss"]))


# --- our trainer --------------------------------------------------------------------------------


class OneOutput(Foreign):
    """A network that declares a single output."""

    deep_supervision_scales = ((1.0, 1.0, 1.0),)


def test_our_trainer_takes_the_scales_that_a_network_declares(make_trainer):
    from umamba.training.trainer import UMambaTrainer

    trainer = make_trainer(UMambaTrainer)
    trainer.initialize()
    assert trainer._get_deep_supervision_scales() == [[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]]
    trainer.network.deep_supervision_scales = ((1.0, 1.0, 1.0), (0.5, 0.25, 0.25))
    assert trainer._get_deep_supervision_scales() == [[1.0, 1.0, 1.0], [0.5, 0.25, 0.25]]
    trainer.enable_deep_supervision = False
    assert trainer._get_deep_supervision_scales() is None


def test_our_trainer_takes_a_network_of_one_output_without_deep_supervision(make_trainer):
    from umamba.training.trainer import UMambaTrainer

    trainer = make_trainer(UMambaTrainer, network_class_name=f"{__name__}.OneOutput")
    trainer.initialize()
    assert trainer.enable_deep_supervision is False
    assert trainer._get_deep_supervision_scales() is None
    assert not hasattr(trainer.loss, "weight_factors")
