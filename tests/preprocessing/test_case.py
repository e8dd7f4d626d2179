"""One case's arithmetic equals nnU-Net's DefaultPreprocessor: data to 1e-5, the rest exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from umamba.planning.preprocess import location_classes
from umamba.preprocessing.case import CaseSettings, preprocess_case
from umamba.preprocessing.reading import ReadCase, read_case

FACTS = {
    "mean": 40.0,
    "std": 25.0,
    "percentile_00_5": -20.0,
    "percentile_99_5": 90.0,
}
LABELS = {"background": 0, "a": 1, "b": 2, "c": 3}
RESAMPLE = "resample_data_or_seg_to_shape"

# name: shape, spacing of the files, spacing of the plans, what else differs from the usual
CASES: dict[str, tuple[tuple[int, ...], tuple[float, ...], list[float], dict[str, Any]]] = {
    "isotropic": ((21, 18, 17), (1.0, 1.0, 1.1), [0.7, 0.8, 0.9], {}),
    "same spacing": ((21, 18, 17), (1.0, 1.0, 1.0), [1.0, 1.0, 1.0], {}),
    "doubled, so that labels tie": ((9, 11, 10), (2.0, 2.0, 2.0), [1.0, 1.0, 1.0], {}),
    "halved": ((18, 22, 20), (1.0, 1.0, 1.0), [2.0, 2.0, 2.0], {}),
    "thick slices": ((9, 30, 27), (5.0, 0.8, 0.8), [3.3, 1.0, 0.7], {}),
    "thick slices kept": ((9, 30, 27), (5.0, 0.8, 0.8), [5.0, 0.4, 0.4], {}),
    "thick in x": ((27, 30, 9), (0.8, 0.8, 5.0), [1.0, 0.7, 3.0], {}),
    "transposed": ((27, 30, 9), (0.8, 0.8, 5.0), [3.0, 0.7, 1.0], {"axes": [2, 0, 1]}),
    "two dimensions": ((9, 30, 27), (5.0, 0.8, 0.8), [1.1, 0.5], {}),
    "a flat image": ((1, 40, 37), (1.0, 0.8, 0.9), [0.6, 0.7], {}),
    "low resolution": ((24, 30, 27), (1.0, 0.8, 0.8), [2.3, 1.9, 1.9], {}),
    "mask": ((19, 20, 18), (1.0, 1.0, 1.0), [0.8, 1.0, 1.2], {"mask": True, "hole": True}),
    "regions": (
        (19, 20, 18), (1.0, 1.0, 1.0), [0.8, 1.0, 1.2],
        {"labels": {"background": 0, "whole": [1, 2, 3], "core": [3, 1], "rim": 2}},
    ),
    "ignored voxels": (
        (19, 20, 18), (1.0, 1.0, 1.0), [0.8, 1.0, 1.2],
        {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}},
    ),
    "three channels": (
        (17, 20, 18), (3.5, 1.0, 1.0), [2.0, 1.0, 1.3],
        {"schemes": ["CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization"]},
    ),
    "raw and colour": (
        (17, 20, 18), (1.0, 1.0, 1.0), [1.3, 1.0, 1.3],
        {"schemes": ["NoNormalization", "RGBTo01Normalization"], "low": 0, "high": 255},
    ),
}  # fmt: skip


def write_files(folder: Path, name: str) -> tuple[list[str], str]:
    """Blobs of labels in noise, with a border of zeros and, if asked for, a hole."""
    shape, spacing, _, extra = CASES[name]
    generator = np.random.default_rng(len(name))
    coarse = generator.integers(0, 4, [-(-n // 4) for n in shape])
    label = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)[tuple(slice(n) for n in shape)]
    speckled = generator.random(shape) < 0.05
    label[speckled] = generator.integers(0, 4, int(speckled.sum()))
    files = []
    for channel, _ in enumerate(extra.get("schemes", ["ZScoreNormalization"])):
        low, high = extra.get("low", -100), extra.get("high", 200)
        image = generator.uniform(low, high, shape).astype(np.float32)
        image[:, :3], image[:, :, -2:] = 0, 0
        if shape[0] > 1:
            image[-2:] = 0
        if extra.get("hole"):
            image[5:7, 6:9, 7:9] = 0
            image[3, 5:, 4] = 0
        files.append(write(folder / f"case_{channel:04d}.nii.gz", image, spacing))
    return files, write(folder / "case.nii.gz", label.astype(np.uint8), spacing)


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...]) -> str:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((3.0, -2.0, 1.5))
    SimpleITK.WriteImage(image, str(path))
    return str(path)


def make_plans(name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans with the one configuration `it`, and dataset.json."""
    _, _, spacing, extra = CASES[name]
    schemes = extra.get("schemes", ["ZScoreNormalization"])
    options = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "spacing": spacing,
        "patch_size": [8] * len(spacing),
        "preprocessor_name": "DefaultPreprocessor",
        "normalization_schemes": schemes,
        "use_mask_for_norm": [extra.get("mask", False)] * len(schemes),
        "resampling_fn_data": RESAMPLE,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **options},
        "resampling_fn_seg": RESAMPLE,
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **options},
        "architecture": {},
    }
    plans = {
        "plans_name": "it",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": extra.get("axes", [0, 1, 2]),
        "foreground_intensity_properties_per_channel": {str(i): FACTS for i in range(len(schemes))},
        "configurations": {"it": configuration | changes},
    }
    labels = extra.get("labels", LABELS)
    return plans, {"labels": labels, "regions_class_order": [1, 2, 3], "file_ending": ".nii.gz"}


def assert_same(ours: Any, stock: Any) -> None:
    """Equal values of equal types, all the way down."""
    assert type(ours) is type(stock)
    if isinstance(stock, dict):
        assert list(ours) == list(stock)
        for key in stock:
            assert_same(ours[key], stock[key])
    elif isinstance(stock, list | tuple):
        assert len(ours) == len(stock)
        for one, other in zip(ours, stock, strict=True):
            assert_same(one, other)
    elif isinstance(stock, np.ndarray):
        assert ours.dtype == stock.dtype
        np.testing.assert_array_equal(ours, stock)
    else:
        assert ours == stock


@pytest.mark.parametrize("name", CASES)
def test_a_case_equals_that_of_nnunet(tmp_path, name):
    files, label = write_files(tmp_path, name)
    plans, dataset_json = make_plans(name)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("it")
    stock = DefaultPreprocessor(verbose=False)
    data, seg, properties = stock.run_case(files, label, manager, configuration, dataset_json)
    assert len(np.unique(seg)) > 2

    settings = CaseSettings.from_plans(plans, plans["configurations"]["it"])
    assert settings is not None
    classes = location_classes(manager.get_label_manager(dataset_json))
    (ours,) = preprocess_case(read_case(files, label, "SimpleITKIO"), [settings], classes)
    assert ours.data.dtype == np.float32
    np.testing.assert_allclose(ours.data, data, atol=1e-5 * max(1, np.abs(data).max()))
    np.testing.assert_array_equal(ours.labels, seg[0])
    assert_same(ours.properties, properties)


@pytest.mark.parametrize("name", ["isotropic", "thick slices", "three channels", "same spacing"])
def test_torch_on_a_device_resamples_as_numpy_does(tmp_path, name):
    files, label = write_files(tmp_path, name)
    plans, _ = make_plans(name)
    settings = CaseSettings.from_plans(plans, plans["configurations"]["it"])
    assert settings is not None
    by_numpy, by_torch = (
        preprocess_case(read_case(files, label, "SimpleITKIO"), [settings], [1], device)[0]
        for device in (None, "cpu")
    )
    assert by_torch.data.dtype == np.float32
    np.testing.assert_allclose(by_torch.data, by_numpy.data, atol=1e-5)
    np.testing.assert_array_equal(by_torch.labels, by_numpy.labels)


@pytest.mark.parametrize("name", ["isotropic", "mask", "two dimensions"])
def test_a_case_without_a_label_equals_that_of_nnunet(tmp_path, name):
    files, _ = write_files(tmp_path, name)
    plans, dataset_json = make_plans(name)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("it")
    stock = DefaultPreprocessor(verbose=False)
    data, _, properties = stock.run_case(files, None, manager, configuration, dataset_json)
    settings = CaseSettings.from_plans(plans, plans["configurations"]["it"])
    assert settings is not None
    (ours,) = preprocess_case(read_case(files, None, "SimpleITKIO"), [settings], None)
    np.testing.assert_allclose(ours.data, data, atol=1e-5)
    assert ours.labels is None
    assert_same(ours.properties, properties)


@pytest.mark.parametrize("labelled", [True, False])
def test_an_image_of_zeros_under_a_mask_stays_zeros(labelled):
    plans, _ = make_plans("mask")
    settings = CaseSettings.from_plans(plans, plans["configurations"]["it"])
    assert settings is not None
    labels = np.zeros((6, 5, 4), np.uint8) if labelled else None
    image, properties = np.zeros((1, 6, 5, 4), np.float32), {"spacing": [0.8, 1.0, 1.2]}
    (empty,) = preprocess_case(ReadCase(image, labels, properties), [settings], [1])
    assert empty.data.shape == (1, 6, 5, 4) and not empty.data.any()
    assert not labelled or (empty.labels == -1).all()


def test_a_case_thinner_than_half_a_voxel_of_the_plans_keeps_one():
    plans, _ = make_plans("isotropic", spacing=[2.5, 1.0, 1.0])
    settings = CaseSettings.from_plans(plans, plans["configurations"]["it"])
    assert settings is not None
    image, labels = np.ones((1, 1, 6, 5), np.float32), np.ones((1, 6, 5), np.uint8)
    case = ReadCase(image, labels, {"spacing": [1.0, 1.0, 1.0]})
    (thin,) = preprocess_case(case, [settings], [1])
    assert thin.data.shape == (1, 1, 6, 5)
    assert thin.labels is not None and (thin.labels == 1).all()


def test_configurations_that_agree_share_their_arrays(tmp_path):
    files, label = write_files(tmp_path, "isotropic")
    plans, _ = make_plans("isotropic")
    first = CaseSettings.from_plans(plans, plans["configurations"]["it"])
    plans, _ = make_plans("isotropic", spacing=[0.8, 0.9])
    flat = CaseSettings.from_plans(plans, plans["configurations"]["it"])
    assert first is not None and flat is not None
    case = read_case(files, label, "SimpleITKIO")
    one, two, three = preprocess_case(case, [first, flat, first], [1])
    assert one.data is three.data and one.labels is three.labels
    assert one.data.shape != two.data.shape


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessor_name": "ResencUNetPreprocessor"},
        {"resampling_fn_data": "resample_torch_fornnunet"},
        {"resampling_fn_seg_kwargs": {"is_seg": True, "order": 0}},
        {"resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 1}},
        {"normalization_schemes": ["SomeNormalization"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_known_here_is_left_to_nnunet(changes):
    plans, _ = make_plans("isotropic", **changes)
    assert CaseSettings.from_plans(plans, plans["configurations"]["it"]) is None


def test_a_label_of_fractions_is_an_error(tmp_path):
    files, label = write_files(tmp_path, "isotropic")
    array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(label)).astype(np.float32)
    write(Path(label), array + 0.5, (1.0, 1.0, 1.1))
    plans, _ = make_plans("isotropic")
    settings = CaseSettings.from_plans(plans, plans["configurations"]["it"])
    assert settings is not None
    with pytest.raises(ValueError, match=r"holds \d\.5, and labels are whole numbers"):
        preprocess_case(read_case(files, label, "SimpleITKIO"), [settings], [1])


def test_the_modules_of_a_worker_load_no_torch():
    program = "import umamba.preprocessing.saving, umamba.preprocessing.statistics, sys\n"
    program += "assert not {'torch', 'pandas', 'skimage'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
