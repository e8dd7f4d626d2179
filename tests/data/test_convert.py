"""Copies of damaged sources: a fault that names the source, and no copy that looks whole."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dataset_makers import cut, make_bare, make_image, make_label, write_picture, write_volume

from umamba.data.audit import audit_dataset
from umamba.data.dataset import prepare_dataset


def make_4d_images(folder: Path) -> Path:
    source = make_bare(folder)
    for i in range(3):
        path = source / "images" / f"a{i}.nii.gz"
        channels = np.stack([make_image(i), make_image(10 + i)])
        nibabel.save(nibabel.Nifti1Image(channels.T, nibabel.load(path).affine), path)
    return source


def make_plain_among_compressed(folder: Path) -> Path:
    source = make_bare(folder)
    for i in (0, 2):
        path = source / "images" / f"a{i}.nii.gz"
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return source


def make_nrrd_among_nifti(folder: Path) -> Path:
    source = make_bare(folder)
    (source / "images" / "a1.nii.gz").unlink()
    write_volume(source / "images" / "a1.nrrd", make_image(1))
    return source


def make_gray_among_color(folder: Path) -> Path:
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (9, 11, 3), dtype=np.uint8)
        write_picture(folder / "images" / f"a{i}.png", pixels[..., 0] if i == 1 else pixels)
        write_picture(folder / "labels" / f"a{i}.png", make_label(shape=(9, 11)))
    return folder


def spoil_checksum(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-8] + b"\0\0\0\0" + data[-4:])


DAMAGES = {
    "4D, cut": (make_4d_images, lambda p: cut(p, 0.5), "is cut short"),
    "4D, wrong checksum": (make_4d_images, spoil_checksum, "does not decompress"),
    "nii.gz among nii, cut": (make_plain_among_compressed, lambda p: cut(p, 0.5), "is cut short"),
    "nrrd among nii.gz, cut": (make_nrrd_among_nifti, lambda p: cut(p, 0.8), "cannot be read"),
    "gray among color, cut": (make_gray_among_color, lambda p: cut(p, 0.8), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_source_of_a_copy_is_the_one_fault_until_it_is_whole(tmp_path, name):
    make, damage, said = DAMAGES[name]
    source = make(tmp_path / "data")
    raw, _ = prepare_dataset(str(source), "W")
    assert audit_dataset(raw, progress=False).faults == []
    n_files = len(list((raw.folder / "imagesTr").iterdir()))
    (image,) = (source / "images").glob("a1.*")
    whole = image.read_bytes()
    damage(image)
    for _ in range(2):
        raw, _ = prepare_dataset(str(source), "W", strict=False)
        report = audit_dataset(raw, progress=False)
        assert [fault.file for fault in report.faults] == [str(image)]
        assert said in report.faults[0].what
        assert list((raw.folder / "imagesTr").glob("a1_*")) == []
        with pytest.raises(ValueError, match=said):
            prepare_dataset(str(source), "W")
    image.write_bytes(whole)
    raw, _ = prepare_dataset(str(source), "W")
    assert len(list((raw.folder / "imagesTr").iterdir())) == n_files
    assert audit_dataset(raw, progress=False).faults == []
