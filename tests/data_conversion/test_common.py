"""The converters' common parts make a raw dataset, and refuse what nnU-Net would refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from data_conversion import common


def write(path: Path, spacing: tuple[float, float, float], shape=(4, 6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(np.zeros(shape, np.uint8))
    image.SetSpacing(spacing)
    SimpleITK.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_a_fake_source_tree_becomes_a_raw_dataset(tmp_path, link):
    out = tmp_path / "Dataset701_Fake"
    sources = {}
    for i in range(3):
        scan = write(tmp_path / "src" / f"scan{i}.nii.gz", (0.8, 0.8, 2.5))
        sources[f"p{i}"] = scan
        common.place_file(scan, out / "imagesTr" / f"p{i}_0000.nii.gz", link)
        common.place_file(scan, out / "labelsTr" / f"p{i}.nii.gz", link)
    common.write_dataset_json(out, ["CT"], {"background": 0, "organ": 1}, licence="CC0")
    common.write_source(out, "fake", sources)
    content = json.loads((out / "dataset.json").read_text())
    assert content["numTraining"] == 3
    assert content["licence"] == "CC0"
    assert (out / "imagesTr" / "p0_0000.nii.gz").is_symlink() is link
    assert len(set(json.loads((out / "source.json").read_text())["sha256"].values())) == 1


def test_regions_need_their_order(tmp_path):
    with pytest.raises(ValueError, match="regions_class_order"):
        common.write_dataset_json(tmp_path, ["CT"], {"background": 0, "whole": [1, 2]})


def test_a_case_on_both_sides_of_a_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="b in train and val"):
        common.write_splits(tmp_path, [(["a", "b"], ["b"])])
    common.write_splits(tmp_path, [(["b", "a"], ["c"])])
    written = json.loads((tmp_path / "splits_official.json").read_text())
    assert written == [{"train": ["a", "b"], "val": ["c"]}]


def test_geometry_is_compared_and_other_sizes_are_refused(tmp_path):
    image = write(tmp_path / "i.nii.gz", (0.8, 0.8, 2.5))
    assert common.same_geometry(image, write(tmp_path / "a.nii.gz", (0.8, 0.8, 2.5)))
    assert not common.same_geometry(image, write(tmp_path / "b.nii.gz", (0.8, 0.8, 2.0)))
    with pytest.raises(ValueError, match="cannot belong together"):
        common.same_geometry(image, write(tmp_path / "c.nii.gz", (0.8, 0.8, 2.5), (4, 6, 6)))


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scan\.nii\.gz does not exist"):
        common.place_file(tmp_path / "scan.nii.gz", tmp_path / "out" / "x.nii.gz")
