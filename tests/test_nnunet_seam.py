"""Every fact of nnU-Net that umamba relies on, as an assertion on the installed nnunetv2.

An upgrade of nnU-Net fails here, with a sentence, instead of in the middle of a training.
"""

import copy
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nnunetv2
import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning import plan_and_preprocess_api
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities import find_class_by_name
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

PACKAGE = Path(nnunetv2.__path__[0])
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


# --- planner and preprocessing -----------------------------------------------------------------


def test_the_planner_has_the_methods_that_ours_extends():
    assert parameters_of(ExperimentPlanner.get_plans_for_configuration) == [
        "self",
        "spacing",
        "median_shape",
        "data_identifier",
        "approximate_n_voxels_dataset",
        "_cache",
    ]
    assert parameters_of(ExperimentPlanner.static_estimate_VRAM_usage) == [
        "patch_size",
        "input_channels",
        "output_channels",
        "arch_class_name",
        "arch_kwargs",
        "arch_kwargs_req_import",
    ]
    assert parameters_of(ExperimentPlanner.generate_data_identifier) == [
        "self",
        "configuration_name",
    ]
    assert parameters_of(ExperimentPlanner.save_plans) == ["self", "plans"]
    assert parameters_of(ExperimentPlanner.plan_experiment) == ["self"]
    assert parameters_of(ExperimentPlanner.__init__) == [
        "self",
        "dataset_name_or_id",
        "gpu_memory_target_in_gb",
        "preprocessor_name",
        "plans_name",
        "overwrite_target_spacing",
        "suppress_transpose",
    ]


def test_planning_reads_the_memory_target_from_an_attribute_that_may_change():
    source = inspect.getsource(ExperimentPlanner.get_plans_for_configuration)
    assert "self.UNet_vram_target_GB / self.UNet_reference_val_corresp_GB" in source


def test_the_planning_api_takes_the_planner_class_itself():
    signature = inspect.signature(plan_and_preprocess_api.plan_experiment_dataset)
    assert signature.parameters["experiment_planner_class"].default is ExperimentPlanner


def test_planner_names_are_searched_only_inside_nnunetv2(monkeypatch):
    folder = PACKAGE / "experiment_planning"
    searched = record_imports(monkeypatch)
    found = recursive_find_python_class(
        str(folder), "UMambaPlanner", "nnunetv2.experiment_planning"
    )
    assert found is None
    assert searched
    assert all(name.startswith("nnunetv2.") for name in searched)


def test_the_preprocessor_saves_one_case_at_a_time_without_a_pool():
    assert parameters_of(DefaultPreprocessor.run_case_save) == [
        "self",
        "output_filename_truncated",
        "image_files",
        "seg_file",
        "plans_manager",
        "configuration_manager",
        "dataset_json",
    ]


def test_a_foreign_file_inside_a_preprocessed_folder_stops_the_dataset_class(tmp_path):
    for name in ("a.b2nd", "a_seg.b2nd", "a.pkl"):
        (tmp_path / name).touch()
    assert infer_dataset_class(str(tmp_path)).__name__ == "nnUNetDatasetBlosc2"
    (tmp_path / "stamp.json").touch()
    with pytest.raises(AssertionError, match="more than one file ending"):
        infer_dataset_class(str(tmp_path))


def test_the_three_folders_are_read_when_they_are_used(monkeypatch):
    from nnunetv2.paths import nnUNet_preprocessed

    monkeypatch.setenv("nnUNet_preprocessed", "/first")
    assert Path(nnUNet_preprocessed) == Path("/first")
    monkeypatch.setenv("nnUNet_preprocessed", "/second")
    assert Path(nnUNet_preprocessed) == Path("/second")


# --- how trainers are found --------------------------------------------------------------------


def record_imports(monkeypatch) -> list[str]:
    """Makes nnU-Net's search import nothing; returns the list of what it would have imported."""
    searched: list[str] = []

    def import_module(name: str) -> SimpleNamespace:
        searched.append(name)
        return SimpleNamespace()

    monkeypatch.setattr(
        find_class_by_name, "importlib", SimpleNamespace(import_module=import_module)
    )
    return searched


def test_an_external_trainer_is_searched_after_every_trainer_of_nnunet(monkeypatch, tmp_path):
    (tmp_path / "outside.py").write_text("")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    searched = record_imports(monkeypatch)
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        recursive_find_trainer_class_by_name("UMambaTrainer")
    primus = [i for i, name in enumerate(searched) if ".primus." in name]
    variants = [i for i, name in enumerate(searched) if ".variants." in name]
    assert searched[-1] == "outside"
    assert len(variants) >= 10
    assert max(primus) < min(variants)


def test_the_stock_trainer_is_found_before_anything_else_is_imported(monkeypatch):
    real = importlib.import_module
    imported: list[str] = []

    def import_module(name: str):
        imported.append(name)
        return real(name)

    monkeypatch.setattr(
        find_class_by_name, "importlib", SimpleNamespace(import_module=import_module)
    )
    assert recursive_find_trainer_class_by_name("nnUNetTrainer") is nnUNetTrainer
    assert imported == ["nnunetv2.training.nnUNetTrainer.nnUNetTrainer"]


def find_outside(folder: Path, name: str) -> type:
    return recursive_find_python_class(
        str(folder), name, None, base_folder=str(folder), cleanup_imports_from_base_folder=True
    )


def write_package(tmp_path: Path) -> Path:
    package = tmp_path / "outer"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "training" / "__init__.py").touch()
    (package / "training" / "seam_trainer.py").write_text("class SeamTrainer: ...\n")
    leaf = tmp_path / "leaf"
    leaf.mkdir()
    (leaf / "seam_leaf.py").write_text(
        "from outer.training.seam_trainer import SeamTrainer as SeamTrainer\n"
    )
    relative = tmp_path / "relative"
    relative.mkdir()
    (relative / "seam_relative.py").write_text("from .other import SeamTrainer\n")
    return package


def test_a_package_folder_gives_another_class_at_every_lookup(tmp_path):
    package = write_package(tmp_path)
    first, second = (find_outside(package, "SeamTrainer") for _ in range(2))
    assert first.__module__ == "training.seam_trainer"
    assert first is not second
    assert "training.seam_trainer" not in sys.modules


def test_a_folder_with_relative_imports_cannot_be_searched(tmp_path):
    write_package(tmp_path)
    with pytest.raises(ImportError):
        find_outside(tmp_path / "relative", "SeamTrainer")


def test_a_leaf_folder_that_re_exports_gives_the_same_right_class(tmp_path, monkeypatch):
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("outer.training.seam_trainer")
    found = [find_outside(tmp_path / "leaf", "SeamTrainer") for _ in range(2)]
    assert found == [module.SeamTrainer] * 2
    for name in [name for name in sys.modules if name.split(".")[0] == "outer"]:
        del sys.modules[name]


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


# --- the predictor -----------------------------------------------------------------------------


def test_the_predictor_can_be_given_a_network_and_looks_a_trainer_up_only_from_a_folder():
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    assert parameters_of(nnUNetPredictor.initialize_from_trained_model_folder) == [
        "self",
        "model_training_output_dir",
        "use_folds",
        "checkpoint_name",
    ]
    assert parameters_of(nnUNetPredictor.manual_initialization) == [
        "self",
        "network",
        "plans_manager",
        "configuration_manager",
        "parameters",
        "dataset_json",
        "trainer_name",
        "inference_allowed_mirroring_axes",
    ]
    assert "recursive_find_trainer" not in inspect.getsource(nnUNetPredictor.manual_initialization)


def test_stock_prediction_accumulates_in_half_precision():
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    source = inspect.getsource(nnUNetPredictor._internal_predict_sliding_window_return_logits)
    assert "dtype=torch.half" in source
