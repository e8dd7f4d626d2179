"""Tests of the final validation: preprocessed cases, one process, the trainer's network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import (
    make_dataset_json,
    make_image,
    make_model_folder,
    make_plans,
    read_array,
    write_nifti,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from umamba.inference import validation
from umamba.inference.cases import PredictionCase
from umamba.inference.predictor import UMambaPredictor
from umamba.inference.validation import predict_preprocessed_cases

CPU = torch.device("cpu")
SPACING = (3.0, 0.8, 1.3)
SHAPES = {"a": (7, 25, 19), "b": (5, 12, 27), "c": (6, 9, 14)}


@pytest.fixture
def fold(tmp_path):
    """Raw images, their preprocessed folder, plans, and a network in the midst of training."""
    plans, dataset_json = make_plans(), make_dataset_json()
    plans_manager = PlansManager(plans)
    configuration = plans_manager.get_configuration("3d_fullres")
    preprocessed = tmp_path / "preprocessed"
    preprocessed.mkdir()
    for i, (name, shape) in enumerate(SHAPES.items()):
        image = write_nifti(tmp_path / "raw" / f"{name}_0000.nii.gz", make_image(shape, i), SPACING)
        labels = (make_image(shape, i) > 60).astype(np.uint8)
        label = write_nifti(tmp_path / "labels" / f"{name}.nii.gz", labels, SPACING)
        DefaultPreprocessor(verbose=False).run_case_save(
            str(preprocessed / name),
            [str(image)],
            str(label),
            plans_manager,
            configuration,
            dataset_json,
        )
    model = make_model_folder(tmp_path / "model", plans, dataset_json, mirror_axes=(0, 2))
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=True,
    )
    weights = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    network.load_state_dict(weights["network_weights"], strict=False)
    network.train()
    return tmp_path, plans_manager, configuration, dataset_json, network, model


def validate(fold, cases, **options):
    root, plans_manager, configuration, dataset_json, network, _ = fold
    arguments = {
        "device": CPU,
        "use_mirroring": False,
        "mirror_axes": (0, 2),
        "progress": False,
    }
    return predict_preprocessed_cases(
        network,
        plans_manager,
        configuration,
        dataset_json,
        root / "preprocessed",
        cases,
        root / "fold_0" / "validation",
        **(arguments | options),
    )


@pytest.mark.parametrize("use_mirroring", [False, True])
def test_label_maps_equal_those_predicted_from_the_images(fold, use_mirroring):
    root, *_, model = fold
    files = validate(fold, ["a", "b"], use_mirroring=use_mirroring)
    assert [f.name for f in files] == ["a.nii.gz", "b.nii.gz"]
    predictor = UMambaPredictor(device=CPU, use_mirroring=use_mirroring)
    predictor.initialize_from_trained_model_folder(model)
    for file in files:
        name = file.name.removesuffix(".nii.gz")
        case = PredictionCase(
            name, (root / "raw" / f"{name}_0000.nii.gz",), root / f"{name}.nii.gz", ".nii.gz"
        )
        assert predictor.predict_cases([case]) == []
        expected, labels = read_array(case.output), read_array(file)
        assert labels.shape == SHAPES[name]
        # nnU-Net stores its preprocessed cases unrounded, so only rounding of ours is between
        assert (labels != expected).mean() < 0.002


def test_deep_supervision_and_train_mode_come_back(fold):
    network = fold[4]
    validate(fold, ["a"])
    assert network.training
    assert network.decoder.deep_supervision is True
    network.eval()
    network.decoder.deep_supervision = False
    validate(fold, ["a"])
    assert not network.training
    assert network.decoder.deep_supervision is False


def test_network_inside_a_wrapper_is_found(fold):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    wrapped = (*fold[:4], Wrapper(fold[4]), fold[5])
    assert len(validate(wrapped, ["c"])) == 1
    assert fold[4].decoder.deep_supervision is True


def test_failed_case_is_named_after_the_others_are_written(fold):
    root = fold[0]
    (root / "preprocessed" / "b.pkl").unlink()
    with pytest.raises(RuntimeError, match="1 of 3 cases failed: b: "):
        validate(fold, ["a", "b", "c"])
    written = {p.name for p in (root / "fold_0" / "validation").iterdir()}
    assert written == {"a.nii.gz", "c.nii.gz"}
    assert fold[4].decoder.deep_supervision is True


def test_probabilities_are_written_where_asked_for(fold):
    (file,) = validate(fold, ["c"], save_probabilities=True)
    probabilities = np.load(file.with_name("c.npz"))["probabilities"]
    assert probabilities.shape == (3, *SHAPES["c"])
    assert np.array_equal(probabilities.argmax(0), read_array(file))


def test_next_stage_gets_the_label_map_at_its_own_shape(fold):
    root = fold[0]
    target = root / "predicted_next_stage" / "3d_cascade_fullres"
    validate(fold, ["a"], next_stages={"3d_cascade_fullres": (root / "preprocessed", target)})
    dataset = nnUNetDatasetBlosc2(str(root / "preprocessed"), ["a"], str(target))
    data, _, previous, _ = dataset.load_case("a")
    assert previous.shape == data.shape[1:]
    assert set(np.unique(previous[:])) <= {0, 1, 2}


def test_a_label_map_for_the_next_stage_is_there_whole_or_not_at_all(fold, monkeypatch):
    root = fold[0]
    target = root / "predicted_next_stage" / "3d_cascade_fullres"

    def stop_half_way(logits, shape, file, *_):
        Path(f"{file}.b2nd").write_bytes(b"half")
        raise KeyError("stopped")

    monkeypatch.setattr(validation, "resample_and_save", stop_half_way)
    with pytest.raises(RuntimeError, match="stopped"):
        validate(fold, ["a"], next_stages={"3d_cascade_fullres": (root / "preprocessed", target)})
    assert list(target.iterdir()) == []


def test_second_stage_reads_the_label_maps_of_the_first(fold):
    root, plans_manager, _, dataset_json, _, _ = fold
    target = root / "predicted_next_stage" / "3d_cascade_fullres"
    validate(fold, ["a"], next_stages={"3d_cascade_fullres": (root / "preprocessed", target)})
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return x[:, :3]

    cascade = (root, *fold[1:4], Network(), None)
    assert plans_manager.get_label_manager(dataset_json).foreground_labels == [1, 2]
    validate(cascade, ["a"], previous_stage_folder=target)
    assert seen[0].shape[1] == 3
    assert set(seen[0][:, 1:].unique().tolist()) <= {0.0, 1.0}
