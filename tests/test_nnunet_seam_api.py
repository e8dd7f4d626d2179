"""What umamba relies on in nnU-Net's planner, preprocessor, class search and predictor.

The facts on plans and trainer are in test_nnunet_seam.py.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nnunetv2
import pytest
from nnunetv2.experiment_planning import plan_and_preprocess_api
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities import find_class_by_name
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

PACKAGE = Path(nnunetv2.__path__[0])


def parameters_of(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


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
