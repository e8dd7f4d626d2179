"""Ensembles: nnU-Net's label maps, class by class; damaged, missing and stale files."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.pool
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from model_folders import make_dataset_json, make_plans, read_array
from nnunetv2.ensembling import ensemble as theirs
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from umamba.inference.ensemble import average_to_labels, ensemble_folders

SHAPE = (5, 12, 9)
LABELS = {"background": 0, "left": 1, "right": 2}
PROPERTIES = {
    "sitk_stuff": {
        "spacing": (0.8, 1.1, 2.5),
        "origin": (10.0, -20.0, 5.0),
        "direction": (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    },
    "spacing": [2.5, 1.1, 0.8],
    "class_locations": {1: np.arange(6).reshape(2, 3)},
    "shape_before_cropping": tuple(np.array(SHAPE)),
}


def write_probabilities(
    folder: Path, case: str, seed: int, *, n_outputs: int = 3, dtype: str = "float32"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    # few levels, so that many voxels are undecided between two classes
    values = random.integers(0, 5, (n_outputs, *SHAPE)) / 4
    np.savez_compressed(folder / f"{case}.npz", probabilities=values.astype(dtype))
    (folder / f"{case}.pkl").write_bytes(pickle.dumps(PROPERTIES))
    return folder / f"{case}.npz"


def make_members(root: Path, n: int = 2, *, regions: bool = False, dtype: str = "float32"):
    folders = [root / f"member_{i}" for i in range(n)]
    for i, folder in enumerate(folders):
        for j, case in enumerate("abc"):
            write_probabilities(
                folder, case, 10 * i + j, n_outputs=2 if regions else 3, dtype=dtype
            )
        (folder / "plans.json").write_text(json.dumps(make_plans()))
        (folder / "dataset.json").write_text(json.dumps(make_dataset_json(regions=regions)))
    return folders


@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
@pytest.mark.parametrize(("n", "dtype"), [(2, "float32"), (3, "float32"), (2, "float16")])
def test_label_maps_equal_nnunets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regions: bool, n: int, dtype: str
) -> None:
    folders = make_members(tmp_path, n, regions=regions, dtype=dtype)
    assert ensemble_folders(folders, tmp_path / "ours") == ([], 3)

    class Threads:  # nnU-Net's processes take seconds to start
        Pool = multiprocessing.pool.ThreadPool

    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: Threads)
    theirs.ensemble_folders(list(map(str, folders)), str(tmp_path / "theirs"), num_processes=1)
    for case in "abc":
        ours = read_array(tmp_path / "ours" / f"{case}.nii.gz")
        assert len(np.unique(ours)) == 3
        assert np.array_equal(ours, read_array(tmp_path / "theirs" / f"{case}.nii.gz"))


def test_pictures_are_averaged_too(tmp_path: Path) -> None:
    plans, dataset_json = make_plans(reader="NaturalImage2DIO"), make_dataset_json(ending=".png")
    values = np.random.default_rng(0).random((2, 3, 1, 12, 9)).astype(np.float32)
    for member, probabilities in zip("ab", values, strict=True):
        folder = tmp_path / member
        folder.mkdir()
        np.savez_compressed(folder / "x.npz", probabilities=probabilities)
        (folder / "x.pkl").write_bytes(pickle.dumps({"spacing": (999, 1, 1)}))
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(dataset_json))
    assert ensemble_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out") == ([], 1)
    assert np.array_equal(read_array(tmp_path / "out" / "x.png"), values.mean(0)[:, 0].argmax(0))


def test_one_class_at_a_time_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umamba.inference.ensemble._CHUNK", 1 << 14)
    shape, n_outputs = (16, 64, 64), 12
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for file in files:
        np.savez_compressed(file, probabilities=np.zeros((n_outputs, *shape), np.float32))
    labels = LabelManager({"background": 0, **{f"l{i}": i for i in range(1, n_outputs)}}, None)
    tracemalloc.start()
    average_to_labels(files, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 4 * np.prod(shape)  # all classes of one network are 12 of these


@pytest.mark.parametrize("order", ["C", "F"])
def test_both_memory_orders_of_an_archive_are_read(tmp_path: Path, order: str) -> None:
    values = np.random.default_rng(0).random((3, *SHAPE)).astype(np.float32)
    np.savez(tmp_path / "a.npz", probabilities=np.asarray(values, order=order))
    labels = average_to_labels([tmp_path / "a.npz"], LabelManager(LABELS, None))
    assert np.array_equal(labels, values.argmax(0))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def rename_the_array(file: Path) -> None:
    np.savez_compressed(file, softmax=np.zeros(3))


def change_the_shape(file: Path) -> None:
    np.savez_compressed(file, probabilities=np.zeros((3, 5, 12, 8), np.float32))


def change_the_classes(file: Path) -> None:
    np.savez_compressed(file, probabilities=np.zeros((4, *SHAPE), np.float32))


def run_code(file: Path) -> None:
    (file.parents[1] / "member_0" / "b.pkl").write_bytes(pickle.dumps(print))


def lose_the_properties(file: Path) -> None:
    (file.parents[1] / "member_0" / "b.pkl").unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (truncate, "member_1/b.npz: is cut off or damaged"),
        (flip_a_byte, "member_1/b.npz: is cut off or damaged"),
        (rename_the_array, "member_1/b.npz: is cut off or damaged"),
        (change_the_shape, "member_1/b.npz: has shape (3, 5, 12, 8), expected (3, 5, 12, 9)"),
        (change_the_classes, "member_1/b.npz: has shape (4, 5, 12, 9), expected (3, 5, 12, 9)"),
        (Path.unlink, "member_1/b.npz: no such file"),
        (run_code, "member_0/b.pkl: is not nnU-Net's description of a case (it names"),
        (lose_the_properties, "member_0/b.pkl: is missing"),
    ],
)
def test_a_bad_case_is_named_and_the_others_are_written(tmp_path: Path, spoil, sentence) -> None:
    folders = make_members(tmp_path)
    spoil(folders[1] / "b.npz")
    failures, n_cases = ensemble_folders(folders, tmp_path / "out")
    assert n_cases == 3
    assert [failure.identifier for failure in failures] == ["b"]
    assert sentence in failures[0].reason
    written = sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz"))
    assert written == ["a.nii.gz", "c.nii.gz"]


def test_what_is_newer_than_its_files_is_left_alone(tmp_path: Path) -> None:
    folders = make_members(tmp_path)
    ensemble_folders(folders, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.nii.gz")}
    later = max(before.values()) + 10**9
    write_probabilities(folders[0], "b", 99)
    os.utime(folders[0] / "b.npz", ns=(later, later))
    ensemble_folders(folders, tmp_path / "out")
    changed = [file.name for file, time in before.items() if file.stat().st_mtime_ns != time]
    assert changed == ["b.nii.gz"]


def test_a_folder_with_the_ensemble_of_others_is_refused(tmp_path: Path) -> None:
    folders = make_members(tmp_path, 3)
    ensemble_folders(folders[:2], tmp_path / "out")
    with pytest.raises(ValueError, match="holds an ensemble of others"):
        ensemble_folders(folders[1:], tmp_path / "out")


def test_folders_that_cannot_be_averaged_are_named(tmp_path: Path) -> None:
    folders = make_members(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        ensemble_folders([folders[0], tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no probabilities.*--save_probabilities"):
        ensemble_folders([folders[0], tmp_path / "empty"], tmp_path / "out")
    (folders[1] / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 1}}))
    with pytest.raises(ValueError, match="other labels"):
        ensemble_folders(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nnunet_applies_the_postprocessing_that_is_written_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing

    from umamba.evaluation.postprocessing import keep_largest_components
    from umamba.inference.postprocessing import write_nnunet_postprocessing

    labels = np.random.default_rng(0).integers(0, 4, (4, 9, 11)).astype(np.uint8)
    groups = [(1, 2, 3), (2, 3), (1,)]
    write_nnunet_postprocessing(groups, tmp_path / "postprocessing.pkl")
    functions, arguments = pickle.loads((tmp_path / "postprocessing.pkl").read_bytes())
    wanted = keep_largest_components(labels, groups)
    assert np.array_equal(apply_postprocessing(labels, functions, arguments), wanted)
