"""Every form a dataset may have becomes one raw dataset, and nothing of the user's is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dataset_makers import (
    make_bare,
    make_image,
    make_label,
    make_nnunet,
    read_array,
    write_picture,
    write_volume,
)
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from umamba.data.dataset import prepare_dataset
from umamba.data.workspace import VARIABLES


def files(folder: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_an_nnunet_folder_is_linked_file_by_file_under_its_own_name(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    before = files(source)
    raw, place = prepare_dataset(str(source), tmp_path / "W")
    assert raw.name == "Dataset123_Knee"
    assert raw.folder == place.raw / "Dataset123_Knee"
    assert not raw.folder.is_symlink()
    image = raw.folder / "imagesTr" / "a0_0000.nii.gz"
    assert image.is_symlink()
    assert image.resolve() == source / "imagesTr" / "a0_0000.nii.gz"
    assert files(source) == before
    assert os.environ[VARIABLES[0]] == str(place.raw)


def test_an_id_a_name_and_a_path_give_the_same_dataset(tmp_path):
    make_nnunet(tmp_path / "W" / "raw" / "Dataset123_Knee")
    for spec in ("123", "Dataset123_Knee", str(tmp_path / "W" / "raw" / "Dataset123_Knee")):
        raw, _ = prepare_dataset(spec, tmp_path / "W")
        assert raw.name == "Dataset123_Knee"
        assert raw.source == raw.folder
        assert not list(raw.folder.glob("umamba*"))


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    make_nnunet(tmp_path / "W" / "raw" / "Dataset123_Knee")
    with pytest.raises(ValueError, match="there is Dataset123_Knee"):
        prepare_dataset("Dataset123_Knees", tmp_path / "W")
    with pytest.raises(ValueError, match="no dataset 7"):
        prepare_dataset("7", tmp_path / "W")
    with pytest.raises(FileNotFoundError, match="no folder"):
        prepare_dataset(str(tmp_path / "nowhere"), tmp_path / "W")


def test_the_whole_of_dataset_json_is_kept(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    source = make_nnunet(
        tmp_path / "Dataset123_Knee",
        labels=labels,
        regions_class_order=[1, 2],
        overwrite_image_reader_writer="NibabelIO",
        numTraining=99,
    )
    raw, _ = prepare_dataset(str(source), tmp_path / "W")
    written = json.loads((raw.folder / "dataset.json").read_text())
    assert written["labels"] == labels
    assert written["regions_class_order"] == [1, 2]
    assert written["overwrite_image_reader_writer"] == "NibabelIO"
    assert written["numTraining"] == 3


def test_explicit_paths_in_dataset_json_become_the_usual_layout(tmp_path):
    image = write_volume(tmp_path / "far" / "scan.nii.gz", make_image(0))
    source = tmp_path / "Dataset123_Knee"
    label = write_volume(source / "masks" / "m.nii.gz", make_label())
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "one": 1, "two": 2},
        "file_ending": ".nii.gz",
        "dataset": {"k1": {"images": [str(image)], "label": "masks/m.nii.gz"}},
    }
    (source / "dataset.json").write_text(json.dumps(content))
    raw, _ = prepare_dataset(str(source), tmp_path / "W")
    assert (raw.folder / "labelsTr" / "k1.nii.gz").resolve() == label
    assert (raw.folder / "imagesTr" / "k1_0000.nii.gz").resolve() == image


def test_an_id_that_another_dataset_has_is_refused(tmp_path):
    make_nnunet(tmp_path / "W" / "raw" / "Dataset123_Other")
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    with pytest.raises(ValueError, match=r"id 123, which Dataset123_Other.*--workspace"):
        prepare_dataset(str(source), tmp_path / "W")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"labels": ', r"dataset\.json is not valid JSON"),
        ("[1]", "no JSON object"),
        ("{}", "no labels"),
    ],
    ids=["broken", "no object", "empty"],
)
def test_a_broken_dataset_json_is_named(tmp_path, content, message):
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    (source / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare_dataset(str(source), tmp_path / "W")


def test_a_folder_of_no_known_form_is_told_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither dataset\.json nor the folders"):
        prepare_dataset(str(tmp_path / "empty"), tmp_path / "W")
    make_nnunet(tmp_path / "Dataset123_Knee")
    shutil.rmtree(tmp_path / "Dataset123_Knee" / "labelsTr")
    (tmp_path / "Dataset123_Knee" / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset\.json does not exist"):
        prepare_dataset(str(tmp_path / "Dataset123_Knee"), tmp_path / "W")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"one": 1, "two": 2}, "declares no background"),
        ({"background": 0, "one": 1, "three": 3}, r"skips the label value\(s\) 2"),
        ({"background": 0, "one": 1, "ignore": 5}, "must follow the last label: 2"),
        ({"background": 0, "whole": [1, 2], "core": 2}, "no regions_class_order"),
        ({"0": "background", "1": "one"}, "no whole number"),
        ({"background": 0, "one": 1.5}, "no whole number"),
    ],
    ids=["no background", "gap", "ignore", "regions", "turned round", "fraction"],
)
def test_labels_that_nnunet_cannot_use_are_refused_with_the_cure(tmp_path, labels, message):
    source = make_nnunet(tmp_path / "Dataset123_Knee", labels=labels)
    with pytest.raises(ValueError, match=message):
        prepare_dataset(str(source), tmp_path / "W")


def test_all_faults_of_names_come_at_once(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=4, n_channels=2)
    (source / "imagesTr" / "a0_0001.nii.gz").unlink()
    (source / "labelsTr" / "a1.nii.gz").unlink()
    (source / "labelsTr" / "zz.nii.gz").touch()
    (source / "imagesTr" / "a9.nii.gz").touch()
    with pytest.raises(ValueError, match="4 faults") as caught:
        prepare_dataset(str(source), tmp_path / "W")
    message = str(caught.value)
    for part in ("a0_0001.nii.gz: is missing", "a1.nii.gz: is missing", "zz.nii.gz: is a label"):
        assert part in message
    assert "rename it to a9_0000.nii.gz" in message
    raw, _ = prepare_dataset(str(source), tmp_path / "W", strict=False)
    assert len(raw.faults) == 4


def test_a_wrong_file_ending_is_answered_with_the_one_that_is_there(tmp_path):
    source = make_nnunet(tmp_path / "Dataset123_Knee", file_ending=".nrrd")
    with pytest.raises(ValueError, match=r'set "file_ending": "\.nii\.gz"'):
        prepare_dataset(str(source), tmp_path / "W")


def make_decathlon(folder: Path, n_channels: int = 2) -> Path:
    for i in range(2):
        array = np.stack([make_image(10 * i + c) for c in range(n_channels)])
        affine = np.diag([-0.9, 0.8, 2.5, 1])
        (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(np.squeeze(array.T), affine)
        nibabel.save(image, folder / "imagesTr" / f"p_{i}.nii.gz")
        (folder / "labelsTr").mkdir(exist_ok=True)
        label = nibabel.Nifti1Image(make_label().T, affine)
        nibabel.save(label, folder / "labelsTr" / f"p_{i}.nii.gz")
    (folder / "imagesTr" / "._p_0.nii.gz").touch()
    names = {"0": "T2", "1": "ADC"} if n_channels == 2 else {"0": "T2"}
    content = {
        "modality": names,
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "numTraining": 2,
        "training": [
            {"image": f"./imagesTr/p_{i}.nii.gz", "label": f"./labelsTr/p_{i}.nii.gz"}
            for i in range(2)
        ],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_a_decathlon_folder_is_split_into_channels_with_the_same_voxels_and_geometry(tmp_path):
    source = make_decathlon(tmp_path / "Task05_Prostate")
    raw, _ = prepare_dataset(str(source), tmp_path / "W")
    assert raw.name == "Dataset005_Prostate"
    assert raw.dataset_json["channel_names"] == {"0": "T2", "1": "ADC"}
    assert raw.dataset_json["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    for c in range(2):
        path = raw.folder / "imagesTr" / f"p_1_{c:04d}.nii.gz"
        assert np.array_equal(read_array(path), make_image(10 + c))
        assert np.allclose(nibabel.load(path).affine, np.diag([-0.9, 0.8, 2.5, 1]))
    assert (raw.folder / "labelsTr" / "p_1.nii.gz").is_symlink()
    assert len(list((raw.folder / "imagesTr").iterdir())) == 4


def test_a_decathlon_folder_with_3d_images_is_linked(tmp_path):
    source = make_decathlon(tmp_path / "Task04_Hippocampus", n_channels=1)
    raw, _ = prepare_dataset(str(source), tmp_path / "W")
    assert (raw.folder / "imagesTr" / "p_0_0000.nii.gz").is_symlink()


def test_a_decathlon_folder_that_lacks_files_lists_them_all(tmp_path):
    source = make_decathlon(tmp_path / "Task05_Prostate")
    (source / "imagesTr" / "p_0.nii.gz").unlink()
    (source / "labelsTr" / "p_1.nii.gz").unlink()
    with pytest.raises(ValueError, match="2 faults"):
        prepare_dataset(str(source), tmp_path / "W")


def test_bare_folders_are_paired_by_stem_and_their_labels_are_read(tmp_path):
    source = make_bare(tmp_path / "My data")
    raw, place = prepare_dataset(str(source))
    assert raw.name == "Dataset500_My_data"
    assert place.root == source / "umamba-work"
    assert raw.dataset_json["labels"] == {"background": 0, "label_1": 1, "label_2": 2}
    assert raw.dataset_json["channel_names"] == {"0": "channel_0"}
    assert (raw.folder / "labelsTr" / "a0.nii.gz").is_symlink()
    assert any("channel_0" in note for note in raw.notes)


def test_a_channel_suffix_makes_channels_unless_the_labels_carry_it_too(tmp_path):
    for i in range(2):
        for c in range(2):
            write_volume(tmp_path / "A" / "images" / f"x{i}_{c:04d}.nii.gz", make_image(c))
        write_volume(tmp_path / "A" / "labels" / f"x{i}.nii.gz", make_label())
        write_volume(tmp_path / "B" / "images" / f"x_{i:04d}.nii.gz", make_image(i))
        write_volume(tmp_path / "B" / "labels" / f"x_{i:04d}.nii.gz", make_label())
    first, _ = prepare_dataset(str(tmp_path / "A"))
    assert len(first.dataset_json["channel_names"]) == 2
    second, _ = prepare_dataset(str(tmp_path / "B"))
    assert len(second.dataset_json["channel_names"]) == 1
    assert (second.folder / "imagesTr" / "x_0001_0000.nii.gz").exists()


def test_test_images_lose_the_channel_number_that_training_images_lose(tmp_path):
    for name in ("imagesTr/x_0000", "imagesTs/y_0000", "labelsTr/x"):
        write_volume(tmp_path / "A" / f"{name}.nii.gz", make_label())
    raw, _ = prepare_dataset(str(tmp_path / "A"))
    assert [p.name for p in (raw.folder / "imagesTs").iterdir()] == ["y_0000.nii.gz"]


def test_label_values_with_gaps_are_renumbered_in_copies_and_said(tmp_path):
    source = make_bare(tmp_path / "data", values=(3, 7))
    (source / "labels.json").write_text('{"3": "liver", "7": "spleen"}')
    raw, _ = prepare_dataset(str(source))
    assert raw.dataset_json["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert raw.dataset_json["label_values_in_source"] == {"0": 0, "3": 1, "7": 2}
    copy = raw.folder / "labelsTr" / "a0.nii.gz"
    assert np.array_equal(read_array(copy), make_label((1, 2)))
    header = [nibabel.load(p).affine for p in (copy, source / "labels" / "a0.nii.gz")]
    assert np.allclose(*header)
    assert np.array_equal(read_array(source / "labels" / "a0.nii.gz"), make_label((3, 7)))
    assert any("3 -> 1, 7 -> 2" in note for note in raw.notes)


def test_a_value_that_labels_json_does_not_name_is_a_fault(tmp_path):
    source = make_bare(tmp_path / "data", values=(1, 2))
    (source / "labels.json").write_text('{"liver": 1}')
    with pytest.raises(ValueError, match=r"holds the value\(s\) 2 that labels.json does not name"):
        prepare_dataset(str(source))


def test_black_and_white_masks_of_pictures_become_zero_and_one(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 255, (9, 11), dtype=np.uint8)
        write_picture(tmp_path / "d" / "images" / f"c{i}.png", pixels)
        write_picture(tmp_path / "d" / "labels" / f"c{i}.png", make_label((255,), (9, 11)))
    raw, _ = prepare_dataset(str(tmp_path / "d"))
    assert raw.dataset_json["labels"] == {"background": 0, "foreground": 1}
    assert raw.dataset_json["file_ending"] == ".png"
    found = read_array(raw.folder / "labelsTr" / "c1.png")
    assert np.array_equal(found, make_label((1,), (9, 11)))
    assert (raw.folder / "imagesTr" / "c0_0000.png").is_symlink()


def test_pictures_of_mixed_colors_and_endings_are_made_alike_in_copies(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in {"g.png": (9, 11), "c.PNG": (9, 11, 3), "t.bmp": (9, 11, 3)}.items():
        write_picture(tmp_path / "d" / "images" / name, rng.integers(0, 255, shape, dtype=np.uint8))
        stem = name.split(".")[0]
        mask = np.repeat(make_label((1,), (9, 11))[..., None], 3, axis=-1)
        write_picture(tmp_path / "d" / "masks" / f"{stem}.png", mask)
    raw, _ = prepare_dataset(str(tmp_path / "d"))
    assert len(raw.dataset_json["channel_names"]) == 3
    for stem in "gct":
        image = read_array(raw.folder / "imagesTr" / f"{stem}_0000.png")
        assert image.shape == (9, 11, 3)
        label = read_array(raw.folder / "labelsTr" / f"{stem}.png")
        assert np.array_equal(label, make_label((1,), (9, 11)))


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".gipl", ".nii"])
def test_other_volume_formats_pass_and_labels_follow_the_images(tmp_path, ending):
    write_volume(tmp_path / "d" / "images" / f"a{ending}", make_image(0))
    write_volume(tmp_path / "d" / "labels" / "a.nii.gz", make_label())
    raw, _ = prepare_dataset(str(tmp_path / "d"))
    assert raw.dataset_json["file_ending"] == ending
    assert np.array_equal(read_array(raw.folder / "labelsTr" / f"a{ending}"), make_label())


def test_missing_pairs_of_bare_folders_are_all_listed(tmp_path):
    source = make_bare(tmp_path / "data", n=4)
    (source / "labels" / "a0.nii.gz").unlink()
    (source / "images" / "a1.nii.gz").unlink()
    with pytest.raises(ValueError, match="2 faults") as caught:
        prepare_dataset(str(source))
    assert "a0.nii.gz: has no label" in str(caught.value)
    assert "a1.nii.gz: is a label without an image" in str(caught.value)


def test_masks_of_instances_are_refused(tmp_path):
    source = tmp_path / "d"
    write_volume(source / "images" / "a.nii.gz", make_image(0, (4, 8, 8)))
    write_volume(source / "labels" / "a.nii.gz", np.arange(256, dtype=np.int16).reshape(4, 8, 8))
    with pytest.raises(ValueError, match="look like instances"):
        prepare_dataset(str(source))


def test_a_second_call_changes_nothing_and_keeps_the_id(tmp_path):
    first = make_bare(tmp_path / "one", values=(3, 7))
    second = make_bare(tmp_path / "two")
    names = [prepare_dataset(str(p), tmp_path / "W")[0].name for p in (first, second)]
    assert names == ["Dataset500_one", "Dataset501_two"]
    before = files(tmp_path / "W")
    again = [prepare_dataset(str(p), tmp_path / "W")[0].name for p in (second, first)]
    assert again == names[::-1]
    by_id, _ = prepare_dataset("500", tmp_path / "W")
    assert by_id.source == first
    assert files(tmp_path / "W") == before


def test_changed_added_and_removed_files_are_renewed(tmp_path):
    source = make_bare(tmp_path / "data", values=(3, 7))
    raw, _ = prepare_dataset(str(source))
    write_volume(source / "labels" / "a0.nii.gz", make_label((7, 3)))
    write_volume(source / "images" / "b.nii.gz", make_image(9))
    write_volume(source / "labels" / "b.nii.gz", make_label((3, 7)))
    for kind in ("images", "labels"):
        (source / kind / "a2.nii.gz").unlink()
    raw, _ = prepare_dataset("500", raw.folder.parents[1])
    assert np.array_equal(read_array(raw.folder / "labelsTr" / "a0.nii.gz"), make_label((2, 1)))
    assert sorted(p.name for p in (raw.folder / "labelsTr").iterdir()) == [
        "a0.nii.gz",
        "a1.nii.gz",
        "b.nii.gz",
    ]


def test_files_are_copied_where_links_are_impossible(monkeypatch, tmp_path):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    source = make_nnunet(tmp_path / "Dataset123_Knee")
    raw, _ = prepare_dataset(str(source), tmp_path / "W")
    copy = raw.folder / "imagesTr" / "a0_0000.nii.gz"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (source / "imagesTr" / "a0_0000.nii.gz").read_bytes()


def test_nnunet_accepts_what_was_linked(tmp_path):
    for source in (
        make_bare(tmp_path / "data", values=(3, 7)),
        make_decathlon(tmp_path / "Task05_P"),
    ):
        raw, _ = prepare_dataset(str(source), tmp_path / "W")
        cases = get_filenames_of_train_images_and_targets(str(raw.folder))
        assert len(cases) == raw.dataset_json["numTraining"]
        reader = determine_reader_writer_from_dataset_json(raw.dataset_json, verbose=False)
        manager = LabelManager(raw.dataset_json["labels"], None)
        allowed = [int(v) for v in manager.all_labels]
        n = len(raw.dataset_json["channel_names"])
        for case in cases.values():
            assert check_cases(case["images"], case["label"], n, reader)
            assert verify_labels(case["label"], reader, allowed)


def test_the_ignore_label_comes_last_and_background_is_zero(tmp_path):
    source = make_bare(tmp_path / "data", values=(1, 2))
    (source / "labels.json").write_text('{"ignore": 1, "bone": 2}')
    raw, _ = prepare_dataset(str(source))
    assert raw.dataset_json["labels"] == {"background": 0, "bone": 1, "ignore": 2}
    assert np.array_equal(read_array(raw.folder / "labelsTr" / "a0.nii.gz"), make_label((2, 1)))
    (source / "labels.json").write_text('{"background": 1, "bone": 2}')
    with pytest.raises(ValueError, match="must call the value 0"):
        prepare_dataset(str(source))


def test_channel_names_may_be_given_and_must_fit(tmp_path):
    source = make_bare(tmp_path / "data")
    (source / "channels.json").write_text('{"0": "CT"}')
    assert prepare_dataset(str(source))[0].dataset_json["channel_names"] == {"0": "CT"}
    (source / "channels.json").write_text('{"0": "CT", "1": "PET"}')
    with pytest.raises(ValueError, match=r"channels\.json must name the channels 0 to 0"):
        prepare_dataset(str(source))


def test_a_dataset_without_its_raw_images_is_still_known_by_name(tmp_path):
    make_nnunet(tmp_path / "W" / "preprocessed" / "Dataset123_Knee")
    raw, place = prepare_dataset("123", tmp_path / "W")
    assert (raw.name, raw.folder) == ("Dataset123_Knee", place.raw / "Dataset123_Knee")
    assert "no raw images" in raw.notes[0]
