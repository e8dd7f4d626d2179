"""Tests of finding the cases to predict, their outputs and what is done already."""

from __future__ import annotations

import numpy as np
import pytest
from model_folders import write_nifti

from umamba.data.images import read_image
from umamba.inference.cases import PredictionCase, find_images, is_whole, output_folder, plan_cases

ENDING = ".nii.gz"


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"x")
    return [folder / name for name in names]


def test_channels_of_a_case_are_grouped_in_order(tmp_path):
    touch(tmp_path, "b_0001.nii.gz", "b_0000.nii.gz", "a_2_0000.nii.gz", "notes.txt", "a.json")
    found = find_images([tmp_path], ENDING, bare_names=False)
    names = {case: [f.name for f in files] for case, files in found.items()}
    assert names == {"a_2": ["a_2_0000.nii.gz"], "b": ["b_0000.nii.gz", "b_0001.nii.gz"]}


def test_a_channel_that_lacks_between_others_is_named_not_passed_over(tmp_path):
    touch(
        tmp_path, "a_0000.png", "a_0002.png", "b_0001.png", "b_0002.png", "c_0000.png", "c_0001.png"
    )
    found = find_images([tmp_path], ".png", bare_names=False)
    assert {case: {f.name for f in files if not f.exists()} for case, files in found.items()} == {
        "a": {"a_0001.png"}, "b": {"b_0000.png"}, "c": set(),
    }  # fmt: skip


def test_files_without_channel_number_are_cases_of_one_channel(tmp_path):
    touch(tmp_path, "case_001.nii.gz", "case_002_0000.nii.gz")
    assert set(find_images([tmp_path], ENDING, bare_names=True)) == {"case_001", "case_002"}
    assert set(find_images([tmp_path], ENDING, bare_names=False)) == {"case_002"}


def test_names_without_channel_number_tell_the_right_name(tmp_path):
    touch(tmp_path, "case_001.nii.gz")
    with pytest.raises(ValueError, match=r"case_001_0000\.nii\.gz"):
        find_images([tmp_path], ENDING, bare_names=False)


def test_folder_of_other_files_tells_their_ending(tmp_path):
    touch(tmp_path, "case_0000.nrrd")
    with pytest.raises(ValueError, match=r"\.nii\.gz.*\.nrrd"):
        find_images([tmp_path], ENDING, bare_names=True)


def test_empty_folder_and_missing_input_are_named(tmp_path):
    with pytest.raises(ValueError, match="it is empty"):
        find_images([tmp_path], ENDING, bare_names=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images([tmp_path / "nowhere"], ENDING, bare_names=True)


def test_files_of_one_case_come_as_words_or_with_commas(tmp_path):
    files = touch(tmp_path, "p_0000.nii.gz", "p_0001.nii.gz")
    expected = {"p": files}
    assert find_images(files, ENDING, bare_names=False) == expected
    assert find_images([",".join(map(str, files))], ENDING, bare_names=False) == expected


def test_single_file_may_have_another_ending_and_name(tmp_path):
    (file,) = touch(tmp_path, "scan.v2.nrrd")
    images = find_images([file], ENDING, bare_names=True)
    (case,) = plan_cases(images, tmp_path / "out.nii", ENDING)
    assert (case.identifier, case.output.name, case.file_ending) == ("scan.v2", "out.nii", ".nii")


def test_outputs_of_a_folder_take_the_ending_of_the_dataset(tmp_path):
    images = {"b": touch(tmp_path, "b_0000.png"), "a": touch(tmp_path, "a_0000.png")}
    cases = plan_cases(images, tmp_path / "out", ".png", previous_stage_folder=tmp_path / "low")
    assert [c.output for c in cases] == [tmp_path / "out" / n for n in ("a.png", "b.png")]
    assert cases[0].previous_stage == tmp_path / "low" / "a.png"


def test_output_file_for_several_cases_is_refused(tmp_path):
    images = {n: touch(tmp_path, f"{n}_0000.nii.gz") for n in "ab"}
    with pytest.raises(ValueError, match="give a folder"):
        plan_cases(images, tmp_path / "out.nii.gz", ENDING)


def test_parts_share_all_cases_between_them(tmp_path):
    images = {f"c{i}": touch(tmp_path, f"c{i}_0000.nii.gz") for i in range(7)}
    parts = [
        {c.identifier for c in plan_cases(images, tmp_path, ENDING, num_parts=3, part_id=i)}
        for i in range(3)
    ]
    assert set().union(*parts) == set(images)
    assert sum(map(len, parts)) == 7
    with pytest.raises(ValueError, match=r"0\.\.2"):
        plan_cases(images, tmp_path, ENDING, num_parts=3, part_id=3)


def test_output_folder_of_a_file_is_where_it_lies(tmp_path):
    assert output_folder(tmp_path / "a.nii.gz", ENDING) == tmp_path
    assert output_folder(tmp_path / "a", ENDING) == tmp_path / "a"


@pytest.fixture
def whole_case(tmp_path):
    random = np.random.default_rng(0).integers(0, 3, (9, 20, 17)).astype(np.uint8)
    output = write_nifti(tmp_path / "a.nii.gz", random, (3.0, 0.8, 1.3))
    return PredictionCase("a", (), output, ENDING)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_truncated_output_is_not_done(tmp_path, ending, share):
    random = np.random.default_rng(0).integers(0, 3, (9, 20, 17)).astype(np.uint8)
    output = write_nifti(tmp_path / f"a{ending}", random, (3.0, 0.8, 1.3))
    whole_case = PredictionCase("a", (), output, ending)
    assert is_whole(whole_case, read_image, with_probabilities=False)
    content = whole_case.output.read_bytes()
    whole_case.output.write_bytes(content[: int(share * len(content))])
    assert not is_whole(whole_case, read_image, with_probabilities=False)


def test_missing_output_is_not_done(whole_case):
    whole_case.output.unlink()
    assert not is_whole(whole_case, read_image, with_probabilities=False)


def test_probabilities_that_are_missing_or_truncated_are_not_done(whole_case):
    file = whole_case.output.with_name("a.npz")
    whole_case.output.with_name("a.pkl").write_bytes(b"x")
    assert not is_whole(whole_case, read_image, with_probabilities=True)
    np.savez_compressed(file, probabilities=np.random.default_rng(0).random((2, 9, 9)))
    assert is_whole(whole_case, read_image, with_probabilities=True)
    file.write_bytes(file.read_bytes()[:-40])
    assert not is_whole(whole_case, read_image, with_probabilities=True)
