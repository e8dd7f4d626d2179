"""Evaluation of folders: nnU-Net's figures and format, empty masks, faults all at once."""

import csv
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from umamba.evaluation import evaluate_folder, labels_of_dataset, read_summary
from umamba.evaluation.images import read_label_map
from umamba.evaluation.surface import surface_metrics
from umamba.evaluation.tables import mean_per_case, values_per_case

SPACING = (2.5, 0.8, 1.1)


def write(file: Path, labels: np.ndarray, spacing: tuple[float, ...] = SPACING) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(labels)
    if file.suffix != ".png":
        image.SetSpacing(spacing[::-1])
        image.SetOrigin((10.0, -20.0, 3.0)[: labels.ndim])
    SimpleITK.WriteImage(image, str(file))


def blocks(shift: int = 0, missing: tuple[int, ...] = ()) -> np.ndarray:
    """Three boxes with labels 1, 2, 3 in an odd, anisotropic volume, moved along x."""
    labels = np.zeros((7, 15, 22), dtype=np.uint8)
    labels[1:4, 2:8, 2 + shift : 9 + shift] = 1
    labels[3:6, 9:14, 4 + shift : 12 + shift] = 2
    labels[5, 1:6, 12 + shift : 17 + shift] = 3
    labels[np.isin(labels, missing)] = 0
    return labels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four cases; label 3 is missing in both of b, in the prediction of c, the reference of d."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for case, shift, absent, missed in (
        ("a", 1, (), ()),
        ("b", 2, (3,), (3,)),
        ("c", 0, (), (3,)),
        ("d", 1, (3,), ()),
    ):
        write(references / f"{case}.nii.gz", blocks(0, absent))
        write(predictions / f"{case}.nii.gz", blocks(shift, missed))
    return predictions, references


def test_overlap_and_means_equal_nnunet_and_nnunet_reads_the_file(
    folders: tuple[Path, Path],
) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics, load_summary_json
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    labels = [1, 2, 3, (1, 3)]
    evaluate_folder(*folders, labels)
    loaded = load_summary_json(str(folders[0] / "summary.json"))
    assert list(loaded["mean"]) == labels
    stock = [
        compute_metrics(e["reference_file"], e["prediction_file"], SimpleITKIO(), labels)
        for e in loaded["metric_per_case"]
    ]
    for label in labels:
        for name in ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref"):
            theirs = [case["metrics"][label][name] for case in stock]
            ours = [entry["metrics"][label][name] for entry in loaded["metric_per_case"]]
            assert [np.nan if v is None else v for v in ours] == pytest.approx(theirs, nan_ok=True)
            assert loaded["mean"][label][name] == pytest.approx(np.nanmean(theirs))
    dice = [loaded["mean"][label]["Dice"] for label in labels]
    assert loaded["foreground_mean"]["Dice"] == pytest.approx(np.mean(dice))


def test_surface_metrics_use_the_spacing_and_the_whole_image(folders: tuple[Path, Path]) -> None:
    summary = evaluate_folder(*folders, {"slab": 3}, tolerance_mm=1.0)
    expected = surface_metrics(blocks() == 3, blocks(1) == 3, SPACING, 1.0)
    entry = summary["metric_per_case"][0]["metrics"]["3"]
    assert {name: entry[name] for name in expected} == pytest.approx(expected)
    assert expected["HD95"] == pytest.approx(1.1)


def test_empty_masks_are_excluded_counted_and_the_rule_is_written(
    folders: tuple[Path, Path],
) -> None:
    summary = evaluate_folder(*folders, [3])
    by_case = {e["case"]: e["metrics"]["3"] for e in summary["metric_per_case"]}
    assert [by_case["b"][name] for name in ("Dice", "NSD", "HD95")] == [None] * 3
    for case in "cd":
        assert [by_case[case][name] for name in ("Dice", "NSD", "HD95")] == [0.0, 0.0, None]
    assert summary["empty"]["3"] == {
        "cases": 4,
        "both_empty": 1,
        "only_prediction_empty": 1,
        "only_reference_empty": 1,
    }
    assert summary["spread"]["3"]["Dice"]["n"] == 3
    assert summary["spread"]["3"]["HD95"]["n"] == 1
    assert summary["mean"]["3"]["HD95"] == by_case["a"]["HD95"]
    assert "counted" in summary["rules"]["one_empty"]


def test_the_diagonal_stands_for_hd95_by_option(folders: tuple[Path, Path]) -> None:
    summary = evaluate_folder(*folders, [3], one_empty_hd95="diagonal")
    diagonal = float(np.linalg.norm(np.array([7, 15, 22]) * SPACING))
    assert values_per_case(summary, "3", "HD95")["c"] == pytest.approx(diagonal)
    assert "diagonal" in summary["rules"]["one_empty"]


def test_a_label_that_no_case_has_leaves_the_foreground_mean_alone(
    folders: tuple[Path, Path],
) -> None:
    summary = evaluate_folder(*folders, [1, 2, 9])
    assert summary["mean"]["9"]["Dice"] is None
    expected = np.mean([summary["mean"][label]["Dice"] for label in "12"])
    assert summary["foreground_mean"]["Dice"] == pytest.approx(expected)
    assert summary["spread"]["9"]["Dice"]["n"] == 0


def test_ignored_voxels_change_no_metric(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = tmp_path / "p", tmp_path / "r"
    reference, prediction = blocks(), blocks()
    reference[:, 8:] = 4
    prediction[6, 12:, :] = 2  # wrong, but where nobody annotated
    write(references / "a.nii.gz", reference)
    write(predictions / "a.nii.gz", prediction)
    summary = evaluate_folder(predictions, references, [1, 2, 3], ignore_label=4)
    for label in "13":
        assert summary["mean"][label]["Dice"] == 1.0
        assert summary["mean"][label]["NSD"] == 1.0
    assert summary["empty"]["2"]["both_empty"] == 1


def test_tolerances_per_label_are_used_and_recorded(folders: tuple[Path, Path]) -> None:
    labels = {"box": 1, "other": 2, "slab": 3}
    tight = evaluate_folder(*folders, labels, tolerance_mm={"box": 0.1, "2": 0.5, "default": 9.0})
    assert tight["rules"]["tolerance_mm"] == {"1": 0.1, "2": 0.5, "3": 9.0}
    assert tight["mean"]["1"]["NSD"] < evaluate_folder(*folders, labels)["mean"]["1"]["NSD"]
    with pytest.raises(ValueError, match="no such label"):
        evaluate_folder(*folders, labels, tolerance_mm={"liver": 1.0})


def test_csv_holds_a_row_per_case_and_label_with_empty_cells_for_undefined(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    evaluate_folder(*folders, {"box": 1, "slab": 3}, output=tmp_path / "out" / "scores.json")
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["case"], row["name"]) for row in rows][:3] == [
        ("a", "box"),
        ("a", "slab"),
        ("b", "box"),
    ]
    assert rows[3]["Dice"] == ""
    assert float(rows[0]["Dice"]) < 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "scores.csv",
        "scores.json",
    ]


def test_written_json_is_strict_and_reading_forgives_nnunets_nan(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    evaluate_folder(*folders, [1, 3])
    text = (folders[0] / "summary.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    old = tmp_path / "summary.json"
    old.write_text(
        '{"mean": {}, "foreground_mean": {}, "metric_per_case": [{"prediction_file": '
        '"x/case_1.nii.gz", "metrics": {"1": {"Dice": NaN}, "2": {"Dice": 0.5}}}]}'
    )
    assert mean_per_case(read_summary(old)) == {"case_1": 0.5}
    old.write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json: is not a summary"):
        read_summary(old)


def test_workers_give_the_same_summary(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_folder(*folders, [1, 2, 3], n_workers=1)
    monkeypatch.setattr("umamba.evaluation.summary._SMALL", 0)
    seen: list[tuple[int, int]] = []
    parallel = evaluate_folder(
        *folders, [1, 2, 3], n_workers=2, progress=lambda done, total: seen.append((done, total))
    )
    assert parallel == expected
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_all_missing_files_are_listed_at_once_and_chill_leaves_them_out(
    folders: tuple[Path, Path],
) -> None:
    predictions, references = folders
    (predictions / "a.nii.gz").unlink()
    (predictions / "c.nii.gz").unlink()
    (references / "d.nii.gz").unlink()
    with pytest.raises(ValueError, match="3 files are missing") as caught:
        evaluate_folder(predictions, references, [1])
    for file in (predictions / "a.nii.gz", predictions / "c.nii.gz", references / "d.nii.gz"):
        assert str(file) in str(caught.value)
    (references / "d.nii.gz").write_bytes(b"")
    (predictions / "d.nii.gz").unlink()
    summary = evaluate_folder(predictions, references, [1], chill=True)
    assert [entry["case"] for entry in summary["metric_per_case"]] == ["b"]


def test_only_the_named_cases_are_evaluated(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "a.nii.gz").unlink()
    summary = evaluate_folder(predictions, references, [1], cases=["d", "b"])
    assert [entry["case"] for entry in summary["metric_per_case"]] == ["b", "d"]


def test_every_geometry_mismatch_is_listed_at_once(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    write(predictions / "b.nii.gz", blocks()[:, 1:])
    write(predictions / "d.nii.gz", blocks(), (2.5, 0.8, 1.2))
    with pytest.raises(ValueError, match="2 predictions do not lie on the grid") as caught:
        evaluate_folder(predictions, references, [1])
    assert "b.nii.gz: shape (7, 14, 22) against (7, 15, 22)" in str(caught.value)
    assert "d.nii.gz: spacing (2.5, 0.8, 1.2) against (2.5, 0.8, 1.1)" in str(caught.value)
    write(predictions / "b.nii.gz", blocks())
    summary = evaluate_folder(predictions, references, [1], check_geometry=False)
    assert len(summary["metric_per_case"]) == 4


@pytest.mark.parametrize("ending", [".nii", ".gipl"])
def test_a_cut_file_that_is_not_compressed_is_named_too(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a{ending}"
    write(file, blocks())
    assert np.array_equal(read_label_map(file)[0], blocks())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"a\{ending}: is cut off or damaged \(bytes"):
        read_label_map(file)


def test_a_name_that_is_not_utf8_is_refused_before_it_ends_the_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"M\?ller\.nii\.gz: is not a name in UTF-8"):
        read_label_map(tmp_path / "M\udcfcller.nii.gz")


def test_the_voxels_of_a_scaled_nifti_are_counted_in_the_files_bits(tmp_path: Path) -> None:
    file = tmp_path / "a.nii"
    write(file, blocks())
    content = bytearray(file.read_bytes())
    struct.pack_into("<f", content, 112, 2.0)  # scl_slope
    file.write_bytes(content)
    assert np.array_equal(read_label_map(file)[0], 2 * blocks())


def test_a_cut_file_fails_alone_and_is_named(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    whole = (predictions / "c.nii.gz").read_bytes()
    (predictions / "c.nii.gz").write_bytes(whole[:-12])
    (references / "a.nii.gz").write_bytes(b"")
    summary = evaluate_folder(predictions, references, [1])
    assert [entry["case"] for entry in summary["metric_per_case"]] == ["b", "d"]
    assert {entry["case"] for entry in summary["failed"]} == {"a", "c"}
    assert any("c.nii.gz: is cut off" in entry["error"] for entry in summary["failed"])
    with pytest.raises(ValueError, match="no case could be evaluated"):
        evaluate_folder(predictions, references, [1], cases=["a", "c"])


@pytest.mark.parametrize("ending", [".png", ".tif", ".nrrd", ".mha"])
def test_2d_and_other_formats_are_read(tmp_path: Path, ending: str) -> None:
    reference, prediction = blocks()[3], blocks(1)[3]
    write(tmp_path / "r" / f"x{ending}", reference, (0.5, 0.5))
    write(tmp_path / "p" / f"x{ending}", prediction, (0.5, 0.5))
    summary = evaluate_folder(tmp_path / "p", tmp_path / "r", [1, 2], file_ending=ending)
    spacing = 1.0 if ending in (".png", ".tif") else 0.5
    expected = surface_metrics(reference == 1, prediction == 1, (spacing,) * 2, 2.0)
    assert summary["mean"]["1"]["HD95"] == pytest.approx(expected["HD95"])


def test_a_tiff_takes_its_spacing_from_nnunets_file_beside_it(tmp_path: Path) -> None:
    for folder, shift in (("r", 0), ("p", 1)):
        write(tmp_path / folder / "x.tif", blocks(shift))
        (tmp_path / folder / "x.json").write_text('{"spacing": [3.0, 0.5, 0.25]}')
    summary = evaluate_folder(tmp_path / "p", tmp_path / "r", [1], file_ending=".tif")
    assert summary["mean"]["1"]["HD95"] == pytest.approx(0.25)


def test_colour_images_and_fractions_are_no_label_maps(tmp_path: Path) -> None:
    write(tmp_path / "r" / "x.png", blocks()[3])
    colour = SimpleITK.GetImageFromArray(np.zeros((15, 22, 3), np.uint8), isVector=True)
    (tmp_path / "p").mkdir()
    SimpleITK.WriteImage(colour, str(tmp_path / "p" / "x.png"))
    with pytest.raises(ValueError, match="3 values per voxel"):
        evaluate_folder(tmp_path / "p", tmp_path / "r", [1], file_ending=".png")
    write(tmp_path / "p" / "y.nii.gz", blocks().astype(np.float32) * 0.5)
    write(tmp_path / "r" / "y.nii.gz", blocks().astype(np.float32))
    with pytest.raises(ValueError, match="not whole numbers"):
        evaluate_folder(tmp_path / "p", tmp_path / "r", [1])


def test_labels_of_a_dataset_json_are_nnunets() -> None:
    plain = {"labels": {"background": 0, "liver": 1, "tumor": 2, "ignore": 3}}
    assert labels_of_dataset(plain) == ({"liver": 1, "tumor": 2}, 3)
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": [2], "edge": 3}}
    assert labels_of_dataset(regions) == ({"whole": (1, 2), "core": (2,), "edge": 3}, None)
    with pytest.raises(ValueError, match="no label but the background"):
        labels_of_dataset({"labels": {"background": 0}})
