"""Reading: the same voxels, axes and geometry as nnU-Net's own readers."""

from __future__ import annotations

import struct

import nibabel
import numpy as np
import pytest
from dataset_makers import SPACING, make_image, make_label, write_picture, write_volume
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from umamba.data.faults import UnreadableImageError
from umamba.data.images import MOST_VALUES, label_counts, read_image, split_ending


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".gipl"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_volumes_equal_those_of_nnunets_reader(tmp_path, ending, dtype):
    path = write_volume(tmp_path / f"x_0000{ending}", make_image(0).astype(dtype))
    expected, properties = SimpleITKIO().read_images([str(path)])
    found = read_image(path)
    assert np.array_equal(found.values().astype(np.float32), expected)
    assert found.spacing == pytest.approx(properties["spacing"])
    assert found.spacing == pytest.approx(SPACING)
    assert found.affine is not None
    assert found.affine[:3, 3] == pytest.approx((-10, 20, 3))


def test_a_scaled_nifti_equals_that_of_nnunets_reader(tmp_path):
    path = tmp_path / "x_0000.nii.gz"
    image = nibabel.Nifti1Image(make_image(0).T, np.diag([-0.9, 0.8, 2.5, 1]))
    image.set_data_dtype(np.int16)
    nibabel.save(image, path)
    assert nibabel.load(path).dataobj.slope != 1
    expected, _ = SimpleITKIO().read_images([str(path)])
    assert np.allclose(read_image(path).values(), expected, rtol=1e-5)


def test_nii_is_read_with_the_geometry_of_nibabel(tmp_path):
    path = write_volume(tmp_path / "x_0000.nii", make_image(0))
    expected, properties = NibabelIO().read_images([str(path)])
    found = read_image(path)
    assert np.array_equal(found.array, expected)
    assert found.spacing == pytest.approx(properties["spacing"])
    assert np.allclose(found.affine, properties["nibabel_stuff"]["original_affine"])


def test_a_spacing_that_nibabel_passes_on_as_nan_is_refused(tmp_path):
    path = write_volume(tmp_path / "x_0000.nii", make_image(0))
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 80, np.nan)
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"x_0000.nii: has the impossible spacing"):
        read_image(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_2d_volume_file_gets_the_axis_nnunet_gives_it(tmp_path, ending):
    path = write_volume(tmp_path / f"x_0000{ending}", make_image(0, (8, 7)), (0.8, 0.9))
    expected, properties = SimpleITKIO().read_images([str(path)])
    found = read_image(path)
    assert found.array.shape == expected.shape
    assert found.spacing == pytest.approx(properties["spacing"])


PICTURES = [(ending, colors) for ending in (".png", ".bmp", ".tif") for colors in ((), (3,), (4,))]
PICTURES.remove((".bmp", (4,)))  # BMP carries no alpha


@pytest.mark.parametrize(("ending", "colors"), PICTURES)
def test_pictures_equal_those_of_nnunets_reader(tmp_path, ending, colors):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 11, *colors), dtype=np.uint8)
    path = write_picture(tmp_path / f"x_0000{ending}", pixels)
    expected, properties = NaturalImage2DIO().read_images([str(path)])
    found = read_image(path)
    assert np.array_equal(found.array.astype(np.float32), expected)
    assert found.spacing == properties["spacing"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.float64, np.uint16])
def test_label_values_are_counted_exactly(tmp_path, dtype):
    label = make_label((1, 200)).astype(dtype)
    path = tmp_path / "x.nii.gz"
    nibabel.save(nibabel.Nifti1Image(label.T, np.eye(4)), path)
    counts = label_counts(read_image(path, is_label=True))
    assert counts == {float(v): int((label == v).sum()) for v in np.unique(label)}
    shifted = label.astype(np.float32) - 3.5
    write_volume(path, shifted)
    assert sorted(label_counts(read_image(path))) == [-3.5, -2.5, 196.5]


def test_unsigned_labels_of_64_bits_are_counted(tmp_path):
    label = make_label((1, 200)).astype(np.uint64)
    counts = label_counts(read_image(write_volume(tmp_path / "x.nrrd", label)))
    assert counts == {float(v): int((label == v).sum()) for v in (0, 1, 200)}


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_counting_ends_at_more_values_than_a_label_map_has(tmp_path, dtype):
    values = np.arange(40 * MOST_VALUES, dtype=dtype).reshape(-1, 100, 100)
    values = values * (0.1 if dtype == np.float32 else 10**6)
    counts = label_counts(read_image(write_volume(tmp_path / "x.nrrd", values.astype(dtype))))
    assert MOST_VALUES < len(counts) <= 2 * MOST_VALUES


def test_endings_are_told_in_any_case_and_the_longest_wins():
    assert split_ending("a.b_0000.NII.GZ") == ("a.b_0000", ".NII.GZ")
    assert split_ending("a.tiff") == ("a", ".tiff")
    assert split_ending("a.jpg") is None
    assert split_ending(".nii") is None
