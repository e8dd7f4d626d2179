"""A repaired copy: what is safe is mended, the rest linked, the source untouched."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from dataset_makers import (
    cut,
    make_bare,
    make_image,
    make_label,
    make_nnunet,
    open_raw,
    read_array,
    save_float,
    write_dataset_json,
    write_volume,
)

from umamba.cli.main import main
from umamba.data.audit import audit_dataset
from umamba.data.dataset import prepare_dataset
from umamba.data.fix import write_repaired
from umamba.data.images import read_image

OFF = (-10.0, 20.1, 3.0)  # an origin an eighth of a voxel off


def audit(source: Path):
    raw = open_raw(source)
    return raw, audit_dataset(raw, progress=False)


def fix(source: Path, folder: Path):
    raw, report = audit(source)
    return write_repaired(raw, report.repairs, folder)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_float_labels_and_small_offsets_are_mended_in_every_format(tmp_path, ending):
    source = make_nnunet(tmp_path / "Dataset123_Knee", ending=ending, n_channels=2)
    save_float(source / "labelsTr" / f"a0{ending}", make_label())
    write_volume(source / "labelsTr" / f"a1{ending}", make_label().astype(np.float32), origin=OFF)
    write_volume(source / "imagesTr" / f"a2_0001{ending}", make_image(21), origin=OFF)
    before = digests(source)
    folder = tmp_path / "sub" / "Dataset124_Fixed"
    fixed = fix(source, folder)
    assert digests(source) == before
    _, after = audit(folder)
    assert (after.faults, after.warnings, after.n_cases) == ([], [], 3)
    assert fixed.folder == folder
    for name in (f"labelsTr/a0{ending}", f"labelsTr/a1{ending}"):
        assert not (folder / name).is_symlink()
        assert read_array(folder / name).dtype == np.uint8
        assert np.array_equal(read_array(folder / name), make_label())
    second = read_image(folder / "imagesTr" / f"a2_0001{ending}")
    assert np.array_equal(second.array[0], make_image(21))
    first = read_image(folder / "imagesTr" / f"a2_0000{ending}")
    assert np.allclose(second.affine, first.affine, atol=1e-6)
    untouched = folder / "imagesTr" / f"a0_0000{ending}"
    assert untouched.resolve() == source / "imagesTr" / untouched.name
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_voxels_of_a_nifti_whose_header_alone_is_mended_keep_their_bytes(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n_channels=2)
    path = source / "imagesTr" / "a1_0001.nii.gz"
    reference = nibabel.load(source / "imagesTr" / "a1_0000.nii.gz")
    affine = reference.affine.copy()
    affine[0, 3] += 0.1
    scaled = nibabel.Nifti1Image(make_image(11).T, affine)
    scaled.set_data_dtype(np.int16)  # nibabel then writes slope and intercept
    scaled.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"kept"))
    nibabel.save(scaled, path)
    fix(source, tmp_path / "fixed")
    copy = nibabel.load(tmp_path / "fixed" / "imagesTr" / "a1_0001.nii.gz")
    assert np.array_equal(copy.affine, reference.affine)
    assert np.array_equal(copy.dataobj.get_unscaled(), nibabel.load(path).dataobj.get_unscaled())
    assert copy.dataobj.slope == nibabel.load(path).dataobj.slope != 1
    assert b"kept" in copy.header.extensions[0].get_content()
    assert audit(tmp_path / "fixed")[1].warnings == []


def test_labels_that_scaling_made_a_hair_off_are_rounded(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    path = source / "labelsTr" / "a1.nii.gz"
    label = nibabel.Nifti1Image(make_label().T.astype(np.float32), nibabel.load(path).affine)
    label.set_data_dtype(np.uint8)  # stored as 0 to 255 with a slope of 2 / 255
    nibabel.save(label, path)
    _, before = audit(source)
    assert "a hair off whole numbers" in before.faults[0].what
    fix(source, tmp_path / "fixed")
    assert audit(tmp_path / "fixed")[1].faults == []
    fixed = nibabel.load(tmp_path / "fixed" / "labelsTr" / "a1.nii.gz")
    assert fixed.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(fixed.dataobj).T, make_label())


def test_what_cannot_be_mended_stays_as_it_is_and_stays_listed(tmp_path, capsys):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    save_float(source / "labelsTr" / "a0.nii.gz", make_label())
    cut(source / "imagesTr" / "a1_0000.nii.gz", 0.5)
    (source / "labelsTr" / "a2.nii.gz").unlink()
    words = ["audit", str(source), "--workspace", "W", "--fix", "fixed"]
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "1 file repaired" in printed
    after = printed.split("repaired")[1]
    assert "is cut short" in after
    assert "an image but no label" in after
    assert main(words) == 1
    assert "fixed holds something already" in capsys.readouterr().err


def test_a_header_comes_from_the_first_channel_that_can_be_read(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n_channels=2)
    cut(source / "imagesTr" / "a1_0000.nii.gz", 0.5)
    write_volume(source / "labelsTr" / "a1.nii.gz", make_label(), origin=OFF)
    fix(source, tmp_path / "fixed")
    label = read_image(tmp_path / "fixed" / "labelsTr" / "a1.nii.gz")
    assert np.array_equal(label.affine, read_image(source / "imagesTr" / "a1_0001.nii.gz").affine)


def test_nothing_is_written_where_nothing_can_be_mended(tmp_path, capsys):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    assert main(["audit", str(source), "--workspace", "W", "--fix", "fixed"]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert not (tmp_path / "fixed").exists()


def test_the_copy_of_bare_folders_needs_neither_them_nor_the_workspace(tmp_path):
    source = make_bare(tmp_path / "data", values=(3, 7))  # renumbered in copies
    image = SimpleITK.ReadImage(str(source / "labels" / "a1.nii.gz"))
    image.SetOrigin(OFF)
    SimpleITK.WriteImage(image, str(source / "labels" / "a1.nii.gz"))
    raw, _ = prepare_dataset(str(source), tmp_path / "W", strict=False)
    report = audit_dataset(raw, progress=False)
    folder = tmp_path / "fixed"
    write_repaired(raw, report.repairs, folder)
    assert all(not path.is_symlink() for path in (folder / "labelsTr").iterdir())
    for path in (folder / "imagesTr").iterdir():
        assert path.resolve().parent == source / "images"
    _, after = audit(folder)
    assert (after.faults, after.warnings) == ([], [])


def test_explicit_paths_become_the_usual_names(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    entries = {
        f"case{i}": {"images": [f"imagesTr/a{i}_0000.nii.gz"], "label": f"labelsTr/a{i}.nii.gz"}
        for i in range(3)
    }
    write_dataset_json(source, 3, dataset=entries)
    save_float(source / "labelsTr" / "a1.nii.gz", make_label())
    fixed = fix(source, tmp_path / "fixed")
    assert "dataset" not in fixed.dataset_json
    assert (tmp_path / "fixed" / "imagesTr" / "case2_0000.nii.gz").is_file()
    assert audit(tmp_path / "fixed")[1].n_cases == 3


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    save_float(source / "labelsTr" / "a1.nii.gz", make_label())
    raw, report = audit(source)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("umamba.data.fix._write_nifti", fail)
    with pytest.raises(OSError, match="no space"):
        write_repaired(raw, report.repairs, tmp_path / "fixed")
    assert [path.name for path in tmp_path.iterdir()] == ["Dataset123_Knee"]
