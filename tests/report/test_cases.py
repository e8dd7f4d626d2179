"""Pictures of cases: which slice, which way up, which cases."""

import io
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from matplotlib.image import imread

from umamba.evaluation.images import read_view
from umamba.report.cases import chosen_cases, draw_case


def summary_of(dice: dict[str, float | None]) -> dict:
    return {
        "metric_per_case": [
            {"case": case, "metrics": {"1": {"Dice": value}}} for case, value in dice.items()
        ]
    }


def write(file: Path, array: np.ndarray, direction: tuple[float, ...] | None = None) -> Path:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 2.0))
    if direction is not None:
        image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(file))
    return file


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ({}, []),
        ({"a": None}, []),
        ({"a": 0.5}, [("Only case", "a", 0.5)]),
        ({"a": 0.5, "b": 0.7}, [("Best", "b", 0.7), ("Worst", "a", 0.5)]),
        (
            {"a": 0.5, "b": 0.7, "c": None, "d": 0.1},
            [("Best", "b", 0.7), ("Median", "a", 0.5), ("Worst", "d", 0.1)],
        ),
    ],
    ids=["none", "undefined", "one", "two", "three"],
)
def test_best_median_and_worst_are_chosen_without_undefined_cases(
    dice: dict[str, float | None], expected: list[tuple[str, str, float]]
) -> None:
    assert chosen_cases(summary_of(dice)) == expected


def test_views_are_turned_to_the_patients_axes(tmp_path: Path) -> None:
    array = np.arange(3 * 5 * 7, dtype=np.int16).reshape(3, 5, 7)
    straight = read_view(write(tmp_path / "a.nii.gz", array))
    turned = read_view(write(tmp_path / "b.nii.gz", array, (-1, 0, 0, 0, 1, 0, 0, 0, -1)))
    assert straight.anatomical
    assert straight.spacing == (2.0, 1.0, 1.0)
    np.testing.assert_array_equal(straight.array, array)
    np.testing.assert_array_equal(turned.array, array[::-1, :, ::-1])


def test_slice_with_most_disagreement_is_drawn_head_up(tmp_path: Path) -> None:
    image = np.zeros((20, 24, 24), dtype=np.float32)
    image[15:] = 100  # bright above
    reference = np.zeros(image.shape, dtype=np.uint8)
    reference[8:12, 8:16, 8:16] = 1
    prediction = reference.copy()
    prediction[8:12, 8:16, 12] = 0  # wrong in one sagittal slice
    image[:, :, 12] += 50
    files = [
        write(tmp_path / f"{name}.nii.gz", array)
        for name, array in (("i", image), ("r", reference), ("p", prediction))
    ]
    pictures = draw_case(*files, [1])
    assert [plane for plane, _ in pictures] == ["axial", "coronal", "sagittal"]
    sagittal = imread(io.BytesIO(pictures[2][1]))[..., :3].mean(axis=-1)
    height, width = sagittal.shape
    assert height > width  # 20 slices of 2 mm against 24 pixels of 1 mm
    assert sagittal[: height // 8].mean() > sagittal[-height // 8 :].mean() + 0.3
    assert sagittal[-height // 8 :].mean() > 0.2  # of the slice that was made brighter


def test_maps_of_another_shape_than_the_image_are_refused(tmp_path: Path) -> None:
    image = write(tmp_path / "i.nii.gz", np.zeros((4, 5, 6), np.float32))
    labels = write(tmp_path / "r.nii.gz", np.zeros((4, 5, 7), np.uint8))
    with pytest.raises(ValueError, match=r"r\.nii\.gz: shape"):
        draw_case(image, labels, labels, [1])


def test_a_case_without_any_label_is_drawn_whole(tmp_path: Path) -> None:
    image = write(tmp_path / "i.nii.gz", np.ones((4, 5, 6), np.float32))
    labels = write(tmp_path / "r.nii.gz", np.zeros((4, 5, 6), np.uint8))
    assert len(draw_case(image, labels, labels, [1, (1, 2)])) == 3
