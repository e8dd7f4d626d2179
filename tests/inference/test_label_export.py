"""Tests of the export: logits to label maps and files."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from model_folders import make_dataset_json, make_plans, read_array
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.utils._python_dispatch import TorchDispatchMode

from umamba.inference.export import resample_whole, write_prediction
from umamba.inference.labels import LabelMaker, argmax_first, label_dtype
from umamba.inference.probabilities import ProbabilityFile


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor made while it is active, views of `given` apart."""

    def __init__(self, given):
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            if result.untyped_storage().data_ptr() == self.given:
                return result
            self.n_bytes = max(self.n_bytes, result.numel() * result.element_size())
        return result


def managers(plans, dataset_json):
    plans_manager = PlansManager(plans)
    (name,) = plans["configurations"]
    configuration_manager = plans_manager.get_configuration(name)
    return plans_manager, configuration_manager, plans_manager.get_label_manager(dataset_json)


def properties_of(full_shape, cropped, spacing):
    """nnU-Net's record of a case: crop at `cropped` = ((start, stop), ...), transposed axes."""
    return {
        "spacing": list(spacing),
        "shape_before_cropping": tuple(full_shape),
        "bbox_used_for_cropping": [list(c) for c in cropped],
        "shape_after_cropping_and_before_resampling": tuple(b - a for a, b in cropped),
    }


SETTINGS = {
    "anisotropic": {"plans": {"spacing": (2.0, 1.0, 1.0)}, "spacing": (3.0, 0.8, 1.3)},
    "separate z": {"plans": {"spacing": (6.0, 1.0, 1.0)}, "spacing": (4.5, 0.7, 0.7)},
    "transposed": {
        "plans": {"spacing": (2.0, 1.0, 1.0), "transpose": (2, 0, 1)},
        "spacing": (0.8, 1.3, 3.0),
    },
    "2d": {
        "plans": {"spacing": (1.0, 1.0), "patch_size": (16, 12)},
        "spacing": (5.0, 0.8, 1.3),
    },
    "torch resampling": {"plans": {"spacing": (2.0, 1.0, 1.0)}, "spacing": (3.0, 0.8, 1.3)},
}


def make_case(name, regions=False, n_outputs=3):
    setting = SETTINGS[name]
    plans = make_plans(**setting["plans"])
    if name == "torch resampling":
        (configuration,) = plans["configurations"].values()
        configuration["resampling_fn_probabilities"] = "resample_torch_fornnunet"
        configuration["resampling_fn_probabilities_kwargs"] = {
            "is_seg": False,
            "force_separate_z": False,
            "memefficient_seg_resampling": False,
        }
    dataset_json = make_dataset_json(regions=regions)
    properties = properties_of((9, 23, 17), ((1, 8), (2, 21), (0, 17)), setting["spacing"])
    shape = (7, 15, 22) if name == "2d" else (10, 15, 22)
    logits = torch.from_numpy(
        np.random.default_rng(3).normal(0, 4, (n_outputs, *shape)).astype(np.float32)
    )
    return logits, properties, *managers(plans, dataset_json)


def logits_to_labels(
    logits,
    properties,
    plans_manager,
    configuration,
    label_manager,
    *,
    probabilities=None,
    **options,
):
    """The label map in the image's order of axes, of logits that are all there."""
    operator, logits = resample_whole(logits, properties, plans_manager, configuration)
    maker = LabelMaker(
        operator,
        logits.shape[1:],
        properties,
        label_manager,
        probabilities=probabilities,
        **options,
    )
    maker.add_whole(logits)
    return maker.labels.transpose(plans_manager.transpose_backward)


@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
@pytest.mark.parametrize("name", SETTINGS)
def test_labels_and_probabilities_equal_those_of_nnunet(tmp_path, name, regions):
    logits, properties, plans_manager, configuration, label_manager = make_case(
        name, regions, n_outputs=2 if regions else 3
    )
    expected, expected_probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.numpy().copy(), plans_manager, configuration, label_manager, properties, True, 1
    )
    file = ProbabilityFile.of_case(tmp_path, properties, plans_manager, label_manager)
    labels = logits_to_labels(
        logits, properties, plans_manager, configuration, label_manager,
        probabilities=file, memory_limit=5000,
    )  # fmt: skip
    file.save(tmp_path / "a.npz")
    probabilities = np.load(tmp_path / "a.npz")["probabilities"]
    assert labels.dtype == expected.dtype == np.uint8
    assert labels.shape == expected.shape
    np.testing.assert_allclose(probabilities, expected_probabilities, atol=1e-5)
    # an undecided voxel may fall to either side
    largest = np.sort(expected_probabilities, axis=0)
    margin = np.abs(expected_probabilities - 0.5).min(0) if regions else largest[-1] - largest[-2]
    undecided = margin < 1e-4
    assert (labels == expected)[~undecided].all()
    assert undecided.mean() < 0.01


def test_without_resampling_labels_equal_those_of_nnunet_bit_for_bit():
    plans = make_plans(spacing=(3.0, 0.8, 1.3))
    plans_manager, configuration, label_manager = managers(plans, make_dataset_json())
    properties = properties_of((9, 23, 17), ((1, 8), (2, 21), (0, 17)), (3.0, 0.8, 1.3))
    logits = torch.randn(3, 7, 19, 17)
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.numpy().copy(), plans_manager, configuration, label_manager, properties
    )
    labels = logits_to_labels(
        logits, properties, plans_manager, configuration, label_manager, memory_limit=1
    )
    assert np.array_equal(labels, expected)
    assert len(np.unique(labels)) == 3


def test_constant_logits_fill_the_crop_and_leave_background_around_it():
    _, properties, plans_manager, configuration, label_manager = make_case("anisotropic")
    logits = torch.tensor([0.0, 1.0, 3.0])[:, None, None, None].expand(3, 10, 15, 22)
    labels = logits_to_labels(logits, properties, plans_manager, configuration, label_manager)
    expected = np.zeros((9, 23, 17), np.uint8)
    expected[1:8, 2:21, :] = 2
    assert np.array_equal(labels, expected)


def test_all_classes_are_never_held_at_full_size():
    n_classes, full = 24, (40, 64, 64)
    plans = make_plans(spacing=(2.0, 2.0, 2.0))
    dataset_json = make_dataset_json()
    dataset_json["labels"] = {"background": 0} | {f"organ_{i}": i for i in range(1, n_classes)}
    plans_manager, configuration, label_manager = managers(plans, dataset_json)
    properties = properties_of(full, tuple((0, n) for n in full), (1.0, 1.0, 1.0))
    logits = torch.randn(n_classes, 20, 32, 32)
    whole = n_classes * np.prod(full) * 4
    with LargestTensor(logits):
        logits.sum()  # torch loads what watches its calls now, not within the measurement
    tracemalloc.start()
    with LargestTensor(logits) as largest:
        logits_to_labels(
            logits, properties, plans_manager, configuration, label_manager, memory_limit=2**20
        )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole > 10 * 2**20
    assert largest.n_bytes <= 2**20
    assert peak <= 2 * 2**20


def test_argmax_takes_the_first_of_equal_values_as_numpy_does():
    values = np.random.default_rng(0).integers(0, 4, (7, 50, 9)).astype(np.float32)
    labels = argmax_first(values, np.uint8)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, values.argmax(0))


@pytest.mark.parametrize(("n_labels", "dtype"), [(3, np.uint8), (256, np.uint16)])
def test_labels_take_sixteen_bits_only_where_eight_are_too_few(n_labels, dtype):
    dataset_json = make_dataset_json()
    dataset_json["labels"] = {"background": 0} | {f"l{i}": i for i in range(1, n_labels)}
    label_manager = managers(make_plans(), dataset_json)[2]
    assert label_dtype(label_manager) is dtype


def nifti_properties():
    return {
        "spacing": [3.0, 0.8, 1.3],
        "sitk_stuff": {
            "spacing": (1.3, 0.8, 3.0),
            "origin": (1.0, 2.0, 3.0),
            "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        },
    }


def test_label_map_and_probabilities_are_written_and_nothing_else(tmp_path):
    labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    probabilities = np.random.default_rng(0).random((2, 2, 3, 4)).astype(np.float32)
    output = tmp_path / "new" / "case.v2.nii.gz"
    write_prediction(
        output, labels, probabilities, nifti_properties(), PlansManager(make_plans()), ".nii.gz"
    )
    assert np.array_equal(read_array(output), labels)
    saved = np.load(output.with_name("case.v2.npz"))
    assert np.array_equal(saved["probabilities"], probabilities)
    names = {p.name for p in output.parent.iterdir()}
    assert names == {"case.v2.nii.gz", "case.v2.npz", "case.v2.pkl"}


def test_second_file_of_the_tiff_writer_arrives_too(tmp_path):
    labels = np.ones((2, 3, 4), np.uint8)
    plans_manager = PlansManager(make_plans(reader="Tiff3DIO"))
    write_prediction(
        tmp_path / "a.tif", labels, None, {"spacing": [3.0, 0.8, 1.3]}, plans_manager, ".tif"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"a.tif", "a.json"}
    assert json.loads((tmp_path / "a.json").read_text()) == {"spacing": [3.0, 0.8, 1.3]}


def test_failed_write_leaves_the_earlier_output_and_no_remains(tmp_path):
    output = tmp_path / "a.nii.gz"
    output.write_bytes(b"earlier")
    with pytest.raises(KeyError):
        write_prediction(
            output, np.ones((2, 3, 4)), None, {}, PlansManager(make_plans()), ".nii.gz"
        )
    assert output.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
