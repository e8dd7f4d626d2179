"""A case read here, from its files or from what the audit read, is what nnU-Net's reader gives."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage.io import imsave

from umamba.data.images import read_image
from umamba.preprocessing import case_store
from umamba.preprocessing.case_store import CaseStore
from umamba.preprocessing.reading import Kept, read_case, refuse_unknown_labels

SHAPE = (7, 6, 5)  # x, y, z
AFFINE = np.array([[-0.7, 0, 0, 3], [0, 0.9, 0, -4], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])


def write(path: Path, dtype: str, scaling: tuple[float, float] | None, shape=SHAPE) -> str:
    values = np.random.default_rng(4).integers(0, 200, shape).astype(dtype)
    if values.dtype.kind == "f":
        values += np.random.default_rng(5).random(shape).astype(dtype)
    image = nibabel.Nifti1Image(values, AFFINE)
    image.header.set_data_dtype(dtype)
    image.to_filename(path)
    if scaling is not None:
        content = bytearray(path.read_bytes())
        content[112:120] = np.array(scaling, "<f4").tobytes()
        path.write_bytes(content)
    return str(path)


def assert_read_alike(ours, files, label, reader) -> None:
    image, properties = reader().read_images(files)
    np.testing.assert_array_equal(ours.image, image)
    assert ours.image.dtype == image.dtype == np.float32
    assert repr(ours.properties) == repr(properties)
    if label is not None:
        np.testing.assert_array_equal(ours.labels, reader().read_seg(label)[0][0])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [
        ("uint8", None),
        ("int16", None),
        ("int16", (1.7, -1024.3)),
        ("uint8", (0.1, 0.0)),
        ("float32", None),
        ("float32", (0.3, 2.7)),
        ("float64", None),
        (">i2", (2.0, 1.0)),
    ],
)
def test_nifti_is_read_as_simpleitk_reads_it(tmp_path, dtype, scaling, kept):
    files = [write(tmp_path / f"a_000{i}.nii", dtype, scaling) for i in range(2)]
    label = write(tmp_path / "a.nii", "uint8", None)
    known = None
    if kept:
        known = Kept([read_image(Path(file)) for file in files], read_image(Path(label)))
    ours = read_case(files, label, "SimpleITKIO", known)
    assert_read_alike(ours, files, label, SimpleITKIO)


def test_a_flat_nifti_is_read_as_simpleitk_reads_it(tmp_path):
    files = [write(tmp_path / "a.nii", "int16", None, (7, 6))]
    assert_read_alike(read_case(files, files[0], "SimpleITKIO"), files, files[0], SimpleITKIO)


def test_other_readers_are_nnunets_own(tmp_path):
    nifti = [write(tmp_path / "a.nii", "int16", (2.0, 1.0))]
    ours = read_case(nifti, nifti[0], "NibabelIO")
    assert_read_alike(ours, nifti, nifti[0], NibabelIO)
    picture = str(tmp_path / "a.png")
    pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 3), dtype=np.uint8)
    imsave(picture, pixels, check_contrast=False)
    ours = read_case([picture], None, "NaturalImage2DIO")
    assert_read_alike(ours, [picture], None, NaturalImage2DIO)


def test_a_label_of_another_shape_is_an_error(tmp_path):
    image = write(tmp_path / "a.nii", "int16", None)
    label = write(tmp_path / "b.nii", "uint8", None, (7, 6, 4))
    with pytest.raises(ValueError, match="label is 4 x 6 x 7 voxels, the image 5 x 6 x 7"):
        read_case([image], label, "SimpleITKIO")


@pytest.mark.parametrize("n_bytes", [1, 8, 60])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_a_gzip_without_its_end_is_an_error(tmp_path, n_bytes, reader):
    file = Path(write(tmp_path / "a.nii.gz", "int16", None))
    file.write_bytes(file.read_bytes()[:-n_bytes])
    with pytest.raises(ValueError, match=r"a\.nii\.gz is cut short, its gzip stream has no end"):
        read_case([str(file)], None, reader)


def test_a_gzip_that_ends_before_the_last_voxel_is_an_error(tmp_path):
    content = Path(write(tmp_path / "a.nii", "int16", None)).read_bytes()
    file = tmp_path / "a.nii.gz"
    file.write_bytes(gzip.compress(content[:-9]))
    with pytest.raises(ValueError, match="cut short, 9 bytes are missing"):
        read_case([str(file)], None, "SimpleITKIO")


def test_a_damaged_gzip_is_an_error(tmp_path):
    file = Path(write(tmp_path / "a.nii.gz", "int16", None))
    file.write_bytes(b"\x1f\x8b" + bytes(300))
    with pytest.raises(ValueError, match=r"a\.nii\.gz is damaged"):
        read_case([str(file)], None, "SimpleITKIO")


def test_a_gzip_of_several_members_or_with_more_than_the_voxels_is_read(tmp_path):
    content = Path(write(tmp_path / "a.nii", "int16", None)).read_bytes()
    whole = gzip.compress(content)
    parts = gzip.compress(content[:400]) + gzip.compress(content[400:])
    for index, odd in enumerate((parts, gzip.compress(content + b"more"), whole + bytes(9))):
        file = tmp_path / f"{index}.nii.gz"
        file.write_bytes(odd)
        ours = read_case([str(file)], None, "SimpleITKIO")
        assert_read_alike(ours, [str(file)], None, SimpleITKIO)


@pytest.mark.parametrize("value", [3, -1, 255, 0.5])
def test_a_label_that_is_not_listed_is_an_error(value):
    labels = np.ones((3, 4, 5), np.float32 if value == 0.5 else np.int16)
    refuse_unknown_labels(labels, {0, 1, 7})
    labels[2, 1, 3] = value
    with pytest.raises(ValueError, match=rf"the label holds {value}\b"):
        refuse_unknown_labels(labels, {0, 1, 7})


def test_channels_that_do_not_fit_are_left_to_nnunet_to_refuse(tmp_path):
    files = [write(tmp_path / "a.nii", "int16", None), write(tmp_path / "b.nii", "int16", None)]
    other = SimpleITK.ReadImage(files[1])
    other.SetSpacing((9.0, 9.0, 9.0))
    SimpleITK.WriteImage(other, files[1])
    with pytest.raises(RuntimeError):
        read_case(files, None, "SimpleITKIO")


def test_a_store_keeps_no_more_than_an_eighth_of_the_memory_that_is_free(tmp_path, monkeypatch):
    content = read_image(Path(write(tmp_path / "a.nii", "int16", None)))
    monkeypatch.setattr(case_store, "available_memory", lambda: 24 * content.array.nbytes)
    store = CaseStore()
    for name in ("a", "b"):
        store.keep(name, [content], content)
    assert store.get("a") and not store.get("b")


def test_a_store_keeps_what_fits(tmp_path):
    content = read_image(Path(write(tmp_path / "a.nii", "int16", None)))
    n_bytes = content.array.nbytes
    store = CaseStore(most_bytes=5 * n_bytes)
    for name in ("a", "b", "c"):
        store.keep(name, [content], content)
    store.keep("d", [content], None)
    assert [name for name in "abcd" if store.get(name)] == ["a", "b", "d"]
