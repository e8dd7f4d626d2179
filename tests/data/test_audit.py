"""Each bad input is found, named with its file and cured in one sentence; all come at once."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
from dataset_makers import (
    SHAPE,
    cut,
    make_bare,
    make_image,
    make_label,
    make_nnunet,
    save_float,
    save_nan,
    shear,
    spoil,
    write_dataset_json,
    write_picture,
    write_volume,
)

from umamba.data.audit import audit_dataset, check_images
from umamba.data.dataset import prepare_dataset


def audit(source: Path):
    raw, _ = prepare_dataset(str(source), "W", strict=False)
    return audit_dataset(raw, progress=False)


IMAGE, LABEL = "imagesTr/a1_0000.nii.gz", "labelsTr/a1.nii.gz"

# beside the many of test_bad_input.py: what only a look into the bytes or the header shows
FAULTS = {
    "last bytes lost": (IMAGE, lambda p: cut(p, 0.99), "is cut short"),
    "wrong checksum": (
        IMAGE,
        lambda p: p.write_bytes(p.read_bytes()[:-8] + b"\0\0\0\0" + p.read_bytes()[-4:]),
        "does not decompress",
    ),
    "text": (IMAGE, lambda p: p.write_text("not an image, at all" * 40), "broken NIfTI header"),
    "damaged": (
        IMAGE,
        lambda p: p.write_bytes(p.read_bytes()[:60] + b"\0" * 500),
        "is damaged|is cut",
    ),
    "shorter than its header says": (
        IMAGE,
        lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:-100])),
        "100 bytes of its voxels are missing",
    ),
    "shear": (IMAGE, shear, "not orthonormal"),
    "negative spacing": (
        IMAGE,
        lambda p: write_in_header(p, 80, -0.9),
        r"impossible spacing \(2.5, 0.8, -0.9\) mm",
    ),
    "no place in space": (
        LABEL,
        lambda p: write_in_header(p, 280, np.nan),
        "an origin or direction that is NaN",
    ),
    "a line of voxels": (
        IMAGE,
        lambda p: nibabel.save(nibabel.Nifti1Image(np.ones(9, np.float32), np.eye(4)), p),
        "is a single line of 9 voxels",
    ),
    "NaN in a label": (
        LABEL,
        lambda p: (save_float(p, make_label()), save_nan(p, np.nan)),
        "NaN or infinite",
    ),
    "an image as label": (LABEL, lambda p: write_volume(p, make_image(3)), "no whole numbers"),
}


def write_in_header(path: Path, offset: int, value: float) -> None:
    """Replace a float of a .nii.gz file's header."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", content, offset, value)
    path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_file_is_the_one_fault_and_named_as_the_user_knows_it(tmp_path, name):
    spoiled, make, message = FAULTS[name]
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    make(source / spoiled)
    report = audit(source)
    assert [fault.file for fault in report.faults] == [str(source / spoiled)]
    with pytest.raises(ValueError, match=message):
        report.raise_if_faults()


def test_all_faults_of_a_dataset_are_listed_at_once(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=5, n_channels=2)
    cut(source / "imagesTr" / "a0_0001.nii.gz", 0.5)
    (source / "imagesTr" / "a1_0001.nii.gz").unlink()
    (source / "labelsTr" / "a2.nii.gz").unlink()
    write_volume(source / "labelsTr" / "a3.nii.gz", spoil(make_label(), 9))
    save_nan(source / "imagesTr" / "a4_0000.nii.gz", np.nan)
    write_volume(source / "imagesTr" / "a4_0001.nii.gz", make_image(3), (2.5, 0.8, 2.0))
    report = audit(source)
    with pytest.raises(ValueError, match=r"has \d faults") as caught:
        report.raise_if_faults()
    for part in ("a0_0001", "a1_0001", "a2.nii.gz", "a3.nii.gz", "a4_0000", "a4_0001"):
        assert part in str(caught.value)


@pytest.mark.parametrize("n_channels", [1, 2])
def test_a_clean_dataset_has_neither_faults_nor_warnings(tmp_path, n_channels):
    report = audit(make_nnunet(tmp_path / "Dataset123_Knee", n_channels=n_channels))
    assert (report.n_cases, report.faults, report.warnings) == (3, [], [])
    assert report.summary["shape"]["median"] == list(SHAPE)
    assert report.summary["spacing_mm"]["largest"] == [2.5, 0.8, 0.9]
    assert report.summary["labels"]["1"]["n_cases"] == 3
    share = (make_label() == 1).mean()
    assert report.summary["labels"]["1"]["share"] == pytest.approx(share)


def test_some_empty_labels_are_fine_and_only_empty_ones_are_not(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    write_volume(source / "labelsTr" / "a0.nii.gz", make_label(()))
    assert audit(source).faults == []
    for i in (1, 2):
        write_volume(source / "labelsTr" / f"a{i}.nii.gz", make_label(()))
    report = audit(source)
    assert [f.what for f in report.faults] == ["has no labeled voxel in any of its 3 labels"]


def test_doubtful_findings_are_warnings(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=4)
    write_volume(source / "imagesTr" / "a0_0000.nii.gz", np.zeros(SHAPE, np.float32))
    shutil.copy(source / "imagesTr" / "a1_0000.nii.gz", source / "imagesTr" / "a2_0000.nii.gz")
    write_volume(source / "labelsTr" / "a3.nii.gz", make_label(), origin=(-10.0, 20.1, 3.0))
    for i in range(4):
        write_volume(source / "labelsTr" / f"a{i}.nii.gz", make_label((1,)), origin=(-10, 20.1, 3))
    report = audit(source)
    assert report.faults == []
    found = "\n".join(map(str, report.warnings))
    for part in ("is constant", "same image as a1_0000.nii.gz", "lies up to 0.1 mm", "label 2"):
        assert part in found


def test_regions_and_the_ignore_label_are_allowed_values(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    source = make_nnunet(tmp_path / "Dataset123_Knee", labels=labels, regions_class_order=[1, 2])
    write_volume(source / "labelsTr" / "a0.nii.gz", make_label((1, 2, 3)))
    assert audit(source).faults == []
    write_volume(source / "labelsTr" / "a0.nii.gz", make_label((1, 2, 4)))
    assert len(audit(source).faults) == 1


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".gipl", ".nii"])
def test_a_cut_file_of_every_volume_format_is_found(tmp_path, ending):
    source = make_nnunet(tmp_path / "Dataset123_Knee", ending=ending)
    assert audit(source).faults == []
    cut(source / "imagesTr" / f"a1_0000{ending}", 0.9)
    faults = audit(source).faults
    assert len(faults) == 1
    assert faults[0].file.endswith(f"a1_0000{ending}")


def make_pictures(folder: Path, n_colors: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 255, (9, 11, 3)[: 3 if n_colors == 3 else 2], dtype=np.uint8)
        write_picture(folder / "imagesTr" / f"c{i}_0000.png", pixels)
        write_picture(folder / "labelsTr" / f"c{i}.png", make_label(shape=(9, 11)))
    names = {str(i): color for i, color in enumerate("RGB"[:n_colors])}
    write_dataset_json(folder, 3, channel_names=names, file_ending=".png")
    return folder


def test_color_pictures_hold_three_channels_in_one_file(tmp_path):
    source = make_pictures(tmp_path / "Dataset124_Cells")
    assert audit(source).faults == []
    write_picture(source / "imagesTr" / "c1_0000.png", np.eye(9, 11, dtype=np.uint8))
    cut(source / "imagesTr" / "c2_0000.png", 0.7)
    found = "\n".join(map(str, audit(source).faults))
    assert "has 1 channel(s) where 3 are expected" in found
    assert "c2_0000.png: cannot be read" in found


def test_a_color_picture_as_label_is_a_fault(tmp_path):
    source = make_pictures(tmp_path / "Dataset124_Cells")
    write_picture(source / "labelsTr" / "c1.png", np.zeros((9, 11, 3), np.uint8))
    assert "is a color picture" in str(audit(source).faults)


def test_stacks_in_tiff_need_a_spacing_and_all_their_pages(tmp_path):
    source = tmp_path / "Dataset125_Stacks"
    for name in ("imagesTr", "labelsTr"):
        (source / name).mkdir(parents=True)
    for i in range(2):
        image = source / "imagesTr" / f"s{i}_0000.tif"
        tifffile.imwrite(image, make_image(i), compression="zlib")
        tifffile.imwrite(source / "labelsTr" / f"s{i}.tif", make_label())
        for where in ("imagesTr", "labelsTr"):
            (source / where / f"s{i}.json").write_text('{"spacing": [2.5, 0.8, 0.9]}')
    write_dataset_json(source, 2, file_ending=".tif")
    report = audit(source)
    assert (report.faults, report.warnings) == ([], [])
    assert report.summary["spacing_mm"]["median"] == [2.5, 0.8, 0.9]
    for i in range(2):
        (source / "imagesTr" / f"s{i}.json").unlink()
        (source / "labelsTr" / f"s{i}.json").unlink()
    assert "and 1 more have no spacing" in str(audit(source).warnings)
    cut(source / "imagesTr" / "s1_0000.tif", 0.5)
    assert "is cut short: pages are missing" in str(audit(source).faults)


def test_faults_of_bare_folders_are_named_as_the_user_knows_them(tmp_path):
    source = make_bare(tmp_path / "data", values=(3, 7))
    cut(source / "labels" / "a0.nii.gz", 0.5)
    save_nan(source / "images" / "a1.nii.gz", np.nan)
    (source / "labels" / "a2.nii.gz").unlink()
    report = audit(source)
    assert sorted(f.file for f in report.faults) == sorted(
        str(source / name) for name in ("labels/a0.nii.gz", "images/a1.nii.gz", "images/a2.nii.gz")
    )


def test_images_to_predict_are_checked_without_labels(tmp_path):
    good = write_volume(tmp_path / "g_0000.nii.gz", make_image(0))
    bad = write_volume(tmp_path / "b_0000.nii.gz", make_image(1))
    cut(bad, 0.5)
    second = write_volume(tmp_path / "g_0001.nii.gz", make_image(2), (2.5, 0.8, 2.0))
    found = check_images({"good": [good], "bad": [bad]}, 1)
    assert list(found) == ["bad"]
    assert "is cut short" in found["bad"][0].what
    assert "1 channel(s) where 2 are expected" in str(check_images({"c": [good]}, 2))
    assert "has spacing" in str(check_images({"c": [good, second]}, 2))
    assert "does not exist" in str(check_images({"c": [tmp_path / "no.nii.gz"]}, 1))


def test_a_trailing_axis_of_one_is_read_as_3d(tmp_path):
    path = tmp_path / "t_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(make_image(0).T[..., None], np.eye(4)), path)
    assert SimpleITK.ReadImage(str(path)).GetDimension() == 3
    assert check_images({"c": [path]}, 1) == {}


def test_a_dataset_json_without_channels_or_ending_does_not_hide_other_faults(tmp_path):
    source = make_nnunet(tmp_path / "W" / "raw" / "Dataset123_Knee", channel_names={})
    cut(source / "imagesTr" / "a1_0000.nii.gz", 0.5)
    raw, _ = prepare_dataset("123", tmp_path / "W", strict=False)
    found = "\n".join(map(str, audit_dataset(raw, progress=False).faults))
    assert "has no channel_names" in found
    assert "a1_0000.nii.gz: is cut short" in found
    assert found.count("\n") == 1
    write_dataset_json(source, 3, file_ending=None)
    raw, _ = prepare_dataset("123", tmp_path / "W", strict=False)
    assert "has no file_ending" in str(audit_dataset(raw, progress=False).faults)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"a0": {"image": "x"}}}, "does not name the files of a0"),
        ({"dataset": ["a0"]}, "does not name the files of any case"),
        ({"dataset": {"a0": {"images": [3], "label": "x"}}}, "does not name the files of a0"),
        ({"channel_names": ["MR"]}, "has no channel_names"),
    ],
    ids=["no images", "no table", "a number", "channels as a list"],
)
@pytest.mark.parametrize("where", ["Dataset123_Knee", "W/raw/Dataset123_Knee"])
def test_a_dataset_json_of_another_form_is_a_fault(tmp_path, where, changes, message):
    source = make_nnunet(tmp_path / where, **changes)
    faults = audit(source).faults
    assert len(faults) == 1, faults
    assert f"dataset.json: {message}; " in str(faults[0])


def test_an_image_and_a_label_named_in_other_bytes_of_the_same_letters_are_told(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    one, two = (unicodedata.normalize(form, "M\u00fcller") for form in ("NFC", "NFD"))
    (source / "imagesTr" / "a1_0000.nii.gz").rename(source / "imagesTr" / f"{two}_0000.nii.gz")
    (source / "labelsTr" / "a1.nii.gz").rename(source / "labelsTr" / f"{one}.nii.gz")
    cures = {Path(fault.file).name: fault.cure for fault in audit(source).faults}
    assert cures.keys() == {f"{one}.nii.gz", f"{two}.nii.gz"}
    assert "the same name in other bytes" in cures[f"{one}.nii.gz"]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such a name")
def test_names_that_are_not_utf8_are_faults_and_do_not_end_the_process(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    for name in (b"imagesTr/a1_0000.nii.gz", b"labelsTr/a1.nii.gz"):
        path = os.path.join(os.fsencode(source), name)
        os.rename(path, path.replace(b"a1", b"M\xfcller"))
    code = "import sys; from umamba.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["audit", str(source), "--workspace", "W"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 1, done.stderr
    assert "2 faults in" in done.stdout
    for name in ("imagesTr/M?ller_0000.nii.gz ", "labelsTr/M?ller.nii.gz "):
        assert f"  {name}" in done.stdout


def test_constant_images_are_no_duplicates_of_each_other(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n_channels=2)
    for path in source.glob("imagesTr/*_0001.nii.gz"):
        write_volume(path, np.zeros(SHAPE, np.float32))
    assert {warning.what for warning in audit(source).warnings} == {"is constant: every voxel is 0"}


def test_each_case_without_a_fault_is_handed_on_as_it_was_read(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=3, n_channels=2)
    cut(source / "imagesTr" / "a1_0001.nii.gz", 0.5)
    raw, _ = prepare_dataset(str(source), tmp_path / "W", strict=False)
    seen = {}

    def keep(identifier, images, label):
        seen[identifier] = ([image.values() for image in images], label.values())

    audit_dataset(raw, progress=False, on_case=keep)
    assert sorted(seen) == ["a0", "a2"]
    images, label = seen["a2"]
    assert [np.array_equal(x[0], make_image(20 + c)) for c, x in enumerate(images)] == [True, True]
    assert np.array_equal(label[0], make_label())
