"""Fingerprint and preprocessing in one process: equal to stock nnU-Net's, resumable, stamped."""

import functools
import json
import multiprocessing
import os
import pickle
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
    DatasetFingerprintExtractor,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from skimage.io import imsave

from umamba.data.images import read_image
from umamba.planning import cases, fingerprint, preprocess
from umamba.planning.cases import default_workers, list_cases
from umamba.planning.fingerprint import fingerprint_dataset
from umamba.planning.planner import plan_dataset
from umamba.planning.plans import load_plans, plans_file
from umamba.planning.preprocess import (
    folder_is_current,
    preprocess_dataset,
    why_not_current,
)
from umamba.preprocessing.case_store import CaseStore


@pytest.fixture(autouse=True)
def few_samples_in_stock(monkeypatch):
    original = DatasetFingerprintExtractor.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = fingerprint.SAMPLED_VOXELS

    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", init)


@pytest.fixture
def stock_in_threads(monkeypatch):
    """Stock nnU-Net's pools as threads: spawned processes would import torch for seconds each."""
    context = SimpleNamespace(Pool=ThreadPool)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)


@pytest.fixture
def planned(sphere_dataset: str) -> str:
    fingerprint_dataset(sphere_dataset, progress=False)
    plan_dataset(sphere_dataset, memory_gb=2, configurations=["2d", "3d_fullres"])
    return sphere_dataset


def run(dataset: str, *configurations: str) -> dict[str, Path]:
    return preprocess_dataset(
        dataset, "umamba_bot", configurations or ["3d_fullres"], progress=False
    )


def touch_count(monkeypatch, fails: str | None = None) -> list[str]:
    """The cases that are preprocessed from now on; the one named `fails` is not."""
    done: list[str] = []
    original = preprocess.preprocess_and_save

    def preprocess_and_save(images, label, settings, classes, targets, kept, **how):
        name = Path(targets[0]).name
        if name == fails:
            raise RuntimeError("cannot read")
        done.append(name)
        original(images, label, settings, classes, targets, kept, **how)

    monkeypatch.setattr(preprocess, "preprocess_and_save", preprocess_and_save)
    return done


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_fingerprint_equals_that_of_stock_nnunet(sphere_dataset, stock_in_threads):
    ours = fingerprint_dataset(sphere_dataset, progress=False)
    stock = DatasetFingerprintExtractor(sphere_dataset, 1).run(overwrite_existing=True)
    stock = json.loads(json.dumps(stock))
    ours.pop("cases_digest")
    assert ours == stock


def test_the_fingerprint_is_kept_until_a_case_changes(sphere_dataset, nnunet_folders, monkeypatch):
    first = fingerprint_dataset(sphere_dataset, progress=False)
    path = nnunet_folders / "preprocessed" / sphere_dataset / "dataset_fingerprint.json"
    written = path.stat().st_mtime_ns
    assert fingerprint_dataset(sphere_dataset, progress=False) == first
    assert path.stat().st_mtime_ns == written
    raw = nnunet_folders / "raw" / sphere_dataset
    for file in [*raw.glob("imagesTr/case_4*"), *raw.glob("labelsTr/case_4*")]:
        file.unlink()
    assert len(fingerprint_dataset(sphere_dataset, progress=False)["spacings"]) == 4


def test_the_cases_are_those_that_nnunet_lists(sphere_dataset, nnunet_folders):
    raw = nnunet_folders / "raw" / sphere_dataset
    (raw / "imagesTr" / "notes.txt").write_text("no image")
    dataset_json = json.loads((raw / "dataset.json").read_text())
    stock = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    ours = list_cases(raw, dataset_json)
    assert ours == {str(k): v for k, v in stock.items()}
    assert list(ours) == list(stock)


def test_hidden_files_are_no_cases(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    for name in ("a_0000.png", "._a_0000.png"):
        (tmp_path / "imagesTr" / name).touch()
    assert list(list_cases(tmp_path, {"file_ending": ".png"})) == ["a"]


def test_a_dataset_without_images_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(ValueError, match=r"imagesTr holds no image called <case>_0000\.png"):
        list_cases(tmp_path, {"file_ending": ".png"})


def test_a_case_without_its_label_is_an_error_that_names_both(sphere_dataset, nnunet_folders):
    label = nnunet_folders / "raw" / sphere_dataset / "labelsTr" / "case_2.nii.gz"
    label.unlink()
    with pytest.raises(FileNotFoundError, match=r"case_2 .*case_2\.nii\.gz"):
        fingerprint_dataset(sphere_dataset, progress=False)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_preprocessed_cases_equal_those_of_stock_nnunet(
    planned, nnunet_folders, stock_in_threads, configuration
):
    folder = run(planned, configuration)[configuration]
    dataset_class = infer_dataset_class(str(folder))
    ours = dataset_class(str(folder))
    names = sorted(dataset_class.get_identifiers(str(folder)))
    assert names == [f"case_{i}" for i in range(5)]
    kept = {name: ours.load_case(name) for name in names}
    kept = {n: (d[...], s[...], p) for n, (d, s, _, p) in kept.items()}

    DefaultPreprocessor(verbose=False).run(planned, configuration, "umamba_bot", 1)
    stock = dataset_class(str(folder))
    for name in names:
        data, seg, _, properties = stock.load_case(name)
        np.testing.assert_allclose(kept[name][0], data[...], atol=1e-5)
        np.testing.assert_array_equal(kept[name][1], seg[...])
        assert kept[name][2].keys() == properties.keys()
        assert pickle.dumps(kept[name][2]) == pickle.dumps(properties)


def test_references_and_dataset_json_are_copied_as_stock_does(planned, nnunet_folders):
    run(planned)
    home = nnunet_folders / "preprocessed" / planned
    raw = nnunet_folders / "raw" / planned
    for label in (raw / "labelsTr").iterdir():
        assert (home / "gt_segmentations" / label.name).read_bytes() == label.read_bytes()
    assert json.loads((home / "dataset.json").read_text()) == json.loads(
        (raw / "dataset.json").read_text()
    )


def test_an_older_file_in_the_place_of_a_label_is_the_reference_from_then_on(
    planned, nnunet_folders
):
    run(planned)
    restored = nnunet_folders / "raw" / planned / "labelsTr" / "case_1.nii.gz"
    label = SimpleITK.ReadImage(str(restored))
    label[3, 3, 3] = 1
    SimpleITK.WriteImage(label, str(restored))
    os.utime(restored, (1e9, 1e9))
    run(planned)
    reference = nnunet_folders / "preprocessed" / planned / "gt_segmentations" / restored.name
    assert reference.read_bytes() == restored.read_bytes()


def test_a_whole_folder_is_not_made_again_whatever_network_asks(planned, monkeypatch):
    run(planned)
    done = touch_count(monkeypatch)
    plan_dataset(planned, network="umamba_enc", memory_gb=2, configurations=["3d_fullres"])
    preprocess_dataset(planned, "umamba_enc", ["3d_fullres"], progress=False)
    assert done == []


def test_of_a_folder_that_lacks_a_file_or_holds_a_short_one_those_cases_are_made_again(
    planned, monkeypatch
):
    folder = run(planned)["3d_fullres"]
    plans = load_plans(plans_file(planned, "umamba_bot"))
    assert why_not_current(planned, plans, "3d_fullres") is None
    whole = files_of(folder)
    (folder / "case_1_seg.b2nd").write_bytes(whole["case_1_seg.b2nd"][:-1])
    (folder / "case_4.pkl").unlink()
    assert "lacks files of 2 cases" in str(why_not_current(planned, plans, "3d_fullres"))
    done = touch_count(monkeypatch)
    run(planned)
    assert sorted(done) == ["case_1", "case_4"]
    assert files_of(folder) == whole


def test_a_changed_image_is_preprocessed_again_and_a_dropped_case_removed(
    planned, nnunet_folders, monkeypatch
):
    folder = run(planned)["3d_fullres"]
    raw = nnunet_folders / "raw" / planned
    image = raw / "imagesTr" / "case_3_0000.nii.gz"
    image.write_bytes(image.read_bytes() + b"\0")
    (raw / "imagesTr" / "case_0_0000.nii.gz").unlink()
    plans = load_plans(plans_file(planned, "umamba_bot"))
    reason = str(why_not_current(planned, plans, "3d_fullres"))
    assert "made of other files than there are now (case_0, case_3)" in reason
    done = touch_count(monkeypatch)
    run(planned)
    assert done == ["case_3"]
    assert {path.name.split(".")[0] for path in folder.glob("*.pkl")} == {
        f"case_{i}" for i in (1, 2, 3, 4)
    }
    assert folder_is_current(planned, plans, "3d_fullres")


def test_other_plans_make_the_folder_again(planned, monkeypatch):
    run(planned)
    path = plans_file(planned, "umamba_bot")
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.5, 1.1, 1.1]
    path.write_text(json.dumps(plans))
    assert "other plans" in str(why_not_current(planned, plans, "3d_fullres"))
    done = touch_count(monkeypatch)
    run(planned)
    assert len(done) == 5


def test_what_a_failure_left_is_no_folder_to_train_from_and_is_gone_on_with(
    planned, nnunet_folders, monkeypatch
):
    with monkeypatch.context() as patch:
        touch_count(patch, fails="case_3")
        with pytest.raises(ValueError, match=r"case_3.*cannot read"):
            run(planned, "2d", "3d_fullres")
    home = nnunet_folders / "preprocessed" / planned
    assert [p.name for p in home.iterdir() if p.is_dir() and not p.name.startswith(".")] == []
    plans = load_plans(plans_file(planned, "umamba_bot"))
    reason = str(why_not_current(planned, plans, "3d_fullres"))
    assert "is half made" in reason
    assert " of 5 cases)" in reason
    n_whole = int(reason.split("half made (")[1].split()[0])
    (home / ".nnUNetPlans_3d_fullres.partial" / ".case_3.77.b2nd").write_bytes(b"half")
    done = touch_count(monkeypatch)
    folders = run(planned, "2d", "3d_fullres")
    assert len(done) == 5 - n_whole
    assert len(files_of(folders["3d_fullres"])) == 15
    assert folder_is_current(planned, plans, "3d_fullres")


def test_a_kept_case_is_not_read_again_and_gives_the_same(planned, monkeypatch):
    folder = run(planned)["3d_fullres"]
    expected = files_of(folder)
    fingerprint_json = fingerprint_dataset(planned, progress=False)
    _, cases = preprocess.read_dataset(planned)
    store = CaseStore()
    for name, case in cases.items():
        label = read_image(Path(case["label"]))
        store.keep(name, [read_image(Path(image)) for image in case["images"]], label)
    shutil.rmtree(folder)
    (folder.parent / "dataset_fingerprint.json").unlink()
    monkeypatch.setattr(SimpleITK, "ReadImage", None)
    assert fingerprint_dataset(planned, progress=False, store=store) == fingerprint_json
    preprocess_dataset(planned, "umamba_bot", ["3d_fullres"], progress=False, store=store)
    assert files_of(folder) == expected


def test_nnunets_own_code_makes_the_folder_where_asked(planned, monkeypatch):
    ours = run(planned)["3d_fullres"]
    plain = files_of(ours)
    done = touch_count(monkeypatch)
    preprocess_dataset(planned, "umamba_bot", ["3d_fullres"], progress=False, stock=True)
    theirs = files_of(ours)
    assert theirs.keys() == plain.keys()
    assert {name: theirs[name] for name in theirs if name.endswith(".pkl")} == {
        name: plain[name] for name in plain if name.endswith(".pkl")
    }
    assert folder_is_current(planned, load_plans(plans_file(planned, "umamba_bot")), "3d_fullres")
    run(planned)
    assert done == []


def test_the_folder_can_be_trusted_without_the_raw_data(planned, nnunet_folders):
    folder = run(planned)["3d_fullres"]
    plans = load_plans(plans_file(planned, "umamba_bot"))
    shutil.rmtree(nnunet_folders / "raw" / planned)
    assert folder_is_current(planned, plans, "3d_fullres")
    (folder / "case_1.pkl").unlink()
    assert not folder_is_current(planned, plans, "3d_fullres")


def test_a_stock_folder_that_agrees_is_used_and_one_that_does_not_is_refused(
    planned, nnunet_folders, monkeypatch
):
    home = nnunet_folders / "preprocessed" / planned
    folder = run(planned)["3d_fullres"]
    (home / "nnUNetPlans_3d_fullres.stamp.json").unlink()
    with pytest.raises(ValueError, match="was not made by umamba"):
        run(planned)
    plans = json.loads((home / "umamba_bot.json").read_text())
    (home / "nnUNetPlans.json").write_text(json.dumps(plans))
    done = touch_count(monkeypatch)
    assert run(planned)["3d_fullres"] == folder
    assert done == []
    plans["configurations"]["3d_fullres"]["spacing"] = [3.0, 1.0, 1.0]
    (home / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(ValueError, match="does not match these plans"):
        run(planned)


def test_a_stock_folder_that_was_normalized_by_other_intensities_is_refused(
    planned, nnunet_folders
):
    home = nnunet_folders / "preprocessed" / planned
    run(planned)
    (home / "nnUNetPlans_3d_fullres.stamp.json").unlink()
    plans = json.loads((home / "umamba_bot.json").read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    for name in ("umamba_bot", "nnUNetPlans"):
        (home / f"{name}.json").write_text(json.dumps(plans))
        plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 3
    with pytest.raises(ValueError, match="does not match these plans"):
        run(planned)


def test_of_a_dataset_that_has_grown_only_the_new_case_is_preprocessed(
    planned, nnunet_folders, monkeypatch
):
    run(planned)
    raw = nnunet_folders / "raw" / planned
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(raw / folder / f"case_2{ending}", raw / folder / f"case_9{ending}")
    fingerprint_dataset(planned, progress=False)
    plan_dataset(planned, memory_gb=2, configurations=["2d", "3d_fullres"])
    done = touch_count(monkeypatch)
    run(planned)
    assert done == ["case_9"]


@pytest.mark.parametrize("value", [9, -1])
def test_an_unlisted_label_is_an_error_that_names_the_case(planned, nnunet_folders, value):
    file = str(nnunet_folders / "raw" / planned / "labelsTr" / "case_2.nii.gz")
    label = SimpleITK.Cast(SimpleITK.ReadImage(file), SimpleITK.sitkInt16)
    label[3, 3, 3] = value
    SimpleITK.WriteImage(label, file)
    with pytest.raises(ValueError, match=rf"case case_2 .* the label holds {value}, and"):
        run(planned)


def test_a_device_resamples_the_whole_dataset_in_this_process(planned, monkeypatch):
    folder = run(planned)["3d_fullres"]
    by_numpy = infer_dataset_class(str(folder))(str(folder)).load_case("case_1")[0][...]
    shutil.rmtree(folder)
    monkeypatch.setattr(preprocess, "run_cases", functools.partial(check_one, cases.run_cases))
    how = {"n_workers": 4, "progress": False, "device": "cpu"}
    folder = preprocess_dataset(planned, "umamba_bot", ["3d_fullres"], **how)["3d_fullres"]
    by_torch = infer_dataset_class(str(folder))(str(folder)).load_case("case_1")[0][...]
    np.testing.assert_allclose(by_torch, by_numpy, atol=1e-5)


def check_one(run_cases, function, jobs, n_workers, *arguments):
    assert n_workers == 1 and function.keywords["device"] == "cpu"
    return run_cases(function, jobs, n_workers, *arguments)


def test_colour_pictures_with_regions_and_an_ignore_label_go_through(nnunet_folders):
    dataset, raw = "Dataset704_Pictures", nnunet_folders / "raw" / "Dataset704_Pictures"
    generator = np.random.default_rng(3)
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for index in range(4):
        picture = generator.integers(0, 255, (37 + index, 51, 3), dtype=np.uint8)
        label = (picture[..., 0] // 64).astype(np.uint8)  # 0 to 3, 3 is to be ignored
        imsave(raw / "imagesTr" / f"p{index}_0000.png", picture, check_contrast=False)
        imsave(raw / "labelsTr" / f"p{index}.png", label, check_contrast=False)
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2],
        "numTraining": 4,
        "file_ending": ".png",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    fingerprint = fingerprint_dataset(dataset, progress=False)
    assert len(fingerprint["foreground_intensity_properties_per_channel"]) == 3
    plans = plan_dataset(dataset, memory_gb=2)
    assert list(plans["configurations"]) == ["2d"]
    assert plans["configurations"]["2d"]["planning"]["num_classes"] == 2
    folder = run(dataset, "2d")["2d"]
    data, seg, _, properties = infer_dataset_class(str(folder))(str(folder)).load_case("p3")
    assert data.shape == (3, 1, 40, 51)
    assert set(np.unique(seg[...])) == {0, 1, 2, 3}
    assert set(properties["class_locations"]) == {(1, 2), 2, (-1, 0, 1, 2)}


@pytest.mark.slow
def test_worker_processes_give_the_same_as_one_process(planned, monkeypatch):
    folder = run(planned)["3d_fullres"]
    contents = {path.name: path.read_bytes() for path in folder.glob("*.pkl")}
    (folder / "case_0.pkl").unlink()
    preprocess_dataset(planned, "umamba_bot", ["3d_fullres"], n_workers=2, progress=False)
    assert {path.name: path.read_bytes() for path in folder.glob("*.pkl")} == contents


def test_small_data_are_read_in_one_process(sphere_dataset):
    assert default_workers(sphere_dataset) == 1
