"""What all cases together show: label facts, unusual intensities, and how they are printed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_makers import (
    make_image,
    make_label,
    make_nnunet,
    open_raw,
    write_dataset_json,
    write_picture,
    write_volume,
)

from umamba.data.audit import AuditReport, audit_dataset
from umamba.data.faults import Fault
from umamba.data.table import format_findings, format_summary


def audit(source: Path) -> AuditReport:
    return audit_dataset(open_raw(source), progress=False)


def test_components_of_a_label_are_summed_up_over_the_cases(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=3)
    sizes = {0: [4, 1, 1], 1: [9], 2: []}  # voxels of each component of label 2
    for i, lengths in sizes.items():
        label = np.zeros((5, 8, 7), np.uint8)
        label[0, 0, 0] = 1
        for row, length in enumerate(lengths):
            label[2, 2 * row + 1, : min(length, 7)] = 2
            label[3, 2 * row + 1, : max(0, length - 7)] = 2
        write_volume(source / "labelsTr" / f"a{i}.nii.gz", label)
    summary = audit(source).summary
    found = summary["labels"]["2"]
    assert found["n_cases"] == 2
    assert found["n_voxels"] == 15
    assert found["smallest_case_voxels"] == 6
    assert found["share"] == pytest.approx(15 / (3 * 5 * 8 * 7))
    assert found["components"] == {
        "n": 4,
        "per_case_median": 2.0,
        "smallest_voxels": 1,
        "median_voxels": 1,
        "largest_voxels": 9,
        "median_mm3": pytest.approx(2.5 * 0.8 * 0.9),
    }
    assert "components" not in summary["labels"]["0"]
    text = format_summary(summary)
    row = next(line for line in text.splitlines() if line.split()[:2] == ["2", "two"])
    assert row.split()[2:] == ["2", "1.786", "%", "2", "1", "1", "9", "1.8"]


def write_images(source: Path, scales: list[float], offset: float = 0.0) -> None:
    for i, scale in enumerate(scales):
        image = np.abs(make_image(i)) * scale + offset
        write_volume(source / "imagesTr" / f"a{i}_0000.nii.gz", image.astype(np.float32))


def test_scanners_that_differ_tenfold_are_usual_and_a_hundredfold_is_not(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=8)
    write_images(source, [1, 10, 1, 0.1, 1, 8, 1, 1])
    assert audit(source).warnings == []
    write_images(source, [1, 10, 1, 0.1, 1, 800, 1, 1])
    warnings = audit(source).warnings
    assert [Path(w.file).name for w in warnings] == ["a5_0000.nii.gz"]
    assert "times more" in warnings[0].what
    write_images(source, [1, 1, 0.01, 1, 1, 1, 1, 1])
    assert "times less" in audit(source).warnings[0].what


def test_channels_without_a_span_do_not_hide_what_is_unusual(tmp_path):
    source, rng = tmp_path / "Dataset124_Cells", np.random.default_rng(0)
    for i in range(7):
        pixels = rng.integers(0, 255, (30, 30, 4), dtype=np.uint8)
        if i < 2:
            pixels[..., 3] = 255
        if i == 6:
            pixels[..., 3] = pixels[..., 3] // 100
            pixels[4, 5, 3] = 255
        write_picture(source / "imagesTr" / f"c{i}_0000.png", pixels)
        write_picture(source / "labelsTr" / f"c{i}.png", make_label(shape=(30, 30)))
    names = {str(i): color for i, color in enumerate("RGBA")}
    write_dataset_json(source, 7, channel_names=names, file_ending=".png")
    warnings = audit(source).warnings
    assert {Path(w.file).name for w in warnings} == {"c6_0000.png"}
    assert "far above the others" in warnings[-1].what


def test_few_cases_make_no_habit(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=4)
    write_images(source, [1, 1, 1, 1000])
    assert audit(source).warnings == []


def test_a_ct_without_its_rescale_intercept_is_named(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=6)
    write_dataset_json(source, 6, channel_names={"0": "CT"})
    write_images(source, [6] * 6, offset=-1000)
    assert audit(source).warnings == []
    image = np.abs(make_image(3)) * 6
    write_volume(source / "imagesTr" / "a3_0000.nii.gz", image.astype(np.float32))
    warnings = audit(source).warnings
    assert [Path(w.file).name for w in warnings] == ["a3_0000.nii.gz"]
    assert "Hounsfield" in warnings[0].cure
    write_dataset_json(source, 6)  # an MR may start anywhere
    assert audit(source).warnings == []


def test_findings_with_one_cure_stand_together_and_files_are_named_from_the_folder():
    folder = Path("/data/Dataset1_X")
    faults = [Fault(f"/data/Dataset1_X/imagesTr/a{i}.nii.gz", "is torn", "mend it") for i in (1, 2)]
    faults += [Fault("/elsewhere/b.nii.gz", "is gone", "find it")]
    assert format_findings("fault", faults, folder).splitlines() == [
        "3 faults in /data/Dataset1_X:",
        "  imagesTr/a1.nii.gz  is torn",
        "  imagesTr/a2.nii.gz  is torn",
        "      cure: mend it",
        "  /elsewhere/b.nii.gz  is gone",
        "      cure: find it",
    ]
    assert "... and 1 more" in format_findings("fault", faults, folder, most=1)
    assert format_findings("warning", [], folder) == ""
