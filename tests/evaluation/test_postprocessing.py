"""Post-processing: nnU-Net's decisions and label maps, files, and what is wrong with them."""

import json
import multiprocessing
import multiprocessing.pool
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from umamba.evaluation import postprocessing
from umamba.evaluation.overlap import Label
from umamba.evaluation.postprocessing import (
    determine_postprocessing,
    keep_largest_components,
    measure_cases,
    postprocess_files,
    read_postprocessing,
)

LABELS = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}
KINDS = {
    "labels": LABELS,
    "one label": {"labels": {"background": 0, "a": 1}},
    "a label in no case": {"labels": {**LABELS["labels"], "d": 4}},
    "ignore label": {"labels": {**LABELS["labels"], "ignore": 4}},
    "regions": {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 1, "dot": [3]},
        "regions_class_order": [1, 2, 1, 3],
    },
}


def write(file: Path, labels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(labels)
    image.SetSpacing((0.8, 1.1, 2.5)[: labels.ndim])
    image.SetOrigin((10.0, -20.0, 3.0)[: labels.ndim])
    SimpleITK.WriteImage(image, str(file))


def read(file: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def blobs(random: np.random.Generator, shape: tuple[int, ...], n_labels: int) -> np.ndarray:
    """Structures of every label in one or several pieces, some of which touch."""
    smooth = [ndimage.gaussian_filter(random.normal(size=shape), 1.6) for _ in range(n_labels)]
    labels = np.argmax([np.full(shape, 0.09), *smooth], axis=0)
    return labels.astype(np.uint8)


def make_folders(
    folder: Path, seed: int, n_labels: int = 3, ignore: int | None = None, ending: str = ".nii.gz"
) -> tuple[Path, Path]:
    """Predictions and references of four cases; what one lacks of the other depends on the seed."""
    random = np.random.default_rng(seed)
    faulty = random.random(n_labels + 1) < 0.6  # labels whose small pieces are the network's fault
    for case in "abcd":
        shape = (14, 17) if ending == ".png" else (6, 13, 14)
        prediction = blobs(random, shape, n_labels)
        reference = prediction.copy()
        if seed % 2:  # what lies apart is a fault of the network
            reference = keep_largest_components(prediction, [tuple(range(1, n_labels + 1))])
        faulty_groups = [(int(label),) for label in np.flatnonzero(faulty[1:]) + 1]
        reference = keep_largest_components(reference, faulty_groups)
        reference[random.random(shape) < 0.03] = 0
        if ignore is not None:
            reference[..., :4] = ignore
        write(folder / "predictions" / f"{case}{ending}", prediction)
        write(folder / "references" / f"{case}{ending}", reference)
    return folder / "predictions", folder / "references"


@pytest.fixture
def pools_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nnU-Net work in threads: its processes take seconds to start."""

    class Threads:
        Pool = multiprocessing.pool.ThreadPool

    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: Threads)


def of_dataset(dataset_json: dict) -> tuple[list[Label], int | None]:
    from umamba.evaluation import labels_of_dataset

    labels, ignore = labels_of_dataset(dataset_json)
    return list(labels.values()), ignore


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.usefixtures("pools_of_threads")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_decisions_and_label_maps_equal_nnunets(tmp_path: Path, kind: str, seed: int) -> None:
    from nnunetv2.postprocessing import remove_connected_components as theirs

    dataset_json = KINDS[kind] | {"file_ending": ".nii.gz"}
    labels, ignore = of_dataset(dataset_json)
    predictions, references = make_folders(
        tmp_path, seed, n_labels=1 if kind == "one label" else 3, ignore=ignore
    )
    plans = {"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager"}
    _, wanted = theirs.determine_postprocessing(
        str(predictions), str(references), plans, dataset_json, num_processes=1
    )
    files = {f.name: (f, references / f.name) for f in sorted(predictions.glob("*.nii.gz"))}
    groups, content = determine_postprocessing(measure_cases(files, labels, ignore, 1), labels)

    wanted_groups = [np.atleast_1d(w["labels_or_regions"]).tolist() for w in wanted]
    assert list(map(list, groups)) == wanted_groups
    assert read_postprocessing(predictions / "postprocessing.json") == groups
    stock = json.loads((predictions / "postprocessing.json").read_text())
    for part in ("input_folder", "postprocessed"):
        for label, means in stock[part]["mean"].items():
            ours = content[part]["mean"][label]["Dice"]
            assert np.isnan(means["Dice"]) if ours is None else ours == pytest.approx(means["Dice"])
    out = tmp_path / "out"
    assert not postprocess_files({f: out / f.name for f, _ in files.values()}, groups, 2)
    for name in files:
        assert np.array_equal(read(out / name), read(predictions / "postprocessed" / name))


def test_every_kind_of_decision_occurs_in_the_comparison(tmp_path: Path) -> None:
    n_groups, foreground_first = set(), set()
    for seed in range(4):
        predictions, references = make_folders(tmp_path / str(seed), seed)
        files = {f.name: (f, references / f.name) for f in sorted(predictions.glob("*.nii.gz"))}
        groups, _ = determine_postprocessing(measure_cases(files, [1, 2, 3], None, 2), [1, 2, 3])
        n_groups.add(len(groups))
        foreground_first.add((1, 2, 3) in groups)
    assert len(n_groups) > 1
    assert len(foreground_first) == 2


@pytest.mark.parametrize("shape", [(9, 14, 11), (1, 23, 17)])
def test_the_largest_component_is_the_one_nnunet_keeps(shape: tuple[int, ...]) -> None:
    from nnunetv2.postprocessing.remove_connected_components import (
        remove_all_but_largest_component_from_segmentation as theirs,
    )

    random = np.random.default_rng(3)
    for labels in [blobs(random, shape, 3), random.integers(0, 4, shape).astype(np.uint16)]:
        before = labels.copy()
        wanted = theirs(theirs(theirs(labels, [1, 2, 3]), (1, 3)), 2)
        assert np.array_equal(keep_largest_components(labels, [(1, 2, 3), (1, 3), (2,)]), wanted)
        assert np.array_equal(labels, before)


def test_equal_largest_components_are_all_kept() -> None:
    labels = np.zeros((3, 8, 9), dtype=np.uint8)
    labels[1, 1:3, 1:3] = labels[1, 5:7, 5:7] = labels[0, 7, 0] = 2
    kept = keep_largest_components(labels, [(2,)])
    assert kept[0, 7, 0] == 0
    assert np.count_nonzero(kept) == 8


def test_pictures_are_post_processed_too(tmp_path: Path) -> None:
    predictions, references = make_folders(tmp_path, 1, ending=".png")
    files = {f.name: (f, references / f.name) for f in sorted(predictions.glob("*.png"))}
    groups, content = determine_postprocessing(measure_cases(files, [1, 2, 3], None, 1), [1, 2, 3])
    assert groups
    before, after = (content[part]["foreground_mean"]["Dice"]
                     for part in ("input_folder", "postprocessed"))  # fmt: skip
    assert after > before
    file = predictions / "a.png"
    assert not postprocess_files({file: tmp_path / "out.png"}, groups, 1)
    assert np.array_equal(read(tmp_path / "out.png"), keep_largest_components(read(file), groups))


def test_each_prediction_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, references = make_folders(tmp_path, 0)
    original: Callable = postprocessing.read_label_map
    read_files = []
    monkeypatch.setattr(
        postprocessing, "read_label_map", lambda file: (read_files.append(file), original(file))[1]
    )
    files = {f.name: (f, references / f.name) for f in sorted(predictions.glob("*.nii.gz"))}
    determine_postprocessing(measure_cases(files, [1, 2, 3], None, 1), [1, 2, 3])
    assert sorted(read_files) == sorted(file for pair in files.values() for file in pair)


def test_a_bad_file_is_named_and_the_others_are_written_in_their_geometry(tmp_path: Path) -> None:
    predictions, _ = make_folders(tmp_path, 0)
    (predictions / "b.nii.gz").write_bytes((predictions / "b.nii.gz").read_bytes()[:90])
    files = {predictions / f"{case}.nii.gz": tmp_path / f"out/{case}.nii.gz" for case in "abcd"}
    failures = postprocess_files(files, [(1,)], 2)
    assert [str(predictions / "b.nii.gz") in failure for failure in failures] == [True]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "a.nii.gz", "c.nii.gz", "d.nii.gz",
    ]  # fmt: skip
    source, target = (SimpleITK.ReadImage(str(f)) for f in next(iter(files.items())))
    assert source.GetSpacing() == target.GetSpacing() and source.GetOrigin() == target.GetOrigin()
    assert source.GetPixelID() == target.GetPixelID()


def test_a_picture_in_color_is_named_and_the_others_are_written(tmp_path: Path) -> None:
    write(tmp_path / "in" / "b.png", np.ones((5, 6), np.uint8))
    color = SimpleITK.GetImageFromArray(np.ones((5, 6, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(color, str(tmp_path / "in" / "a.png"))
    files = {tmp_path / "in" / name: tmp_path / "out" / name for name in ("a.png", "b.png")}
    (failure,) = postprocess_files(files, [(1,)], 1)
    assert "a.png: has 3 values per voxel" in failure
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["b.png"]


def test_a_label_map_that_cannot_be_written_is_not_blamed_on_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.nii.gz", np.ones((3, 4, 5), np.uint8))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the writer's own words")

    monkeypatch.setattr(SimpleITK, "WriteImage", fail)
    with pytest.raises(RuntimeError, match="the writer's own words"):
        postprocess_files({tmp_path / "a.nii.gz": tmp_path / "out.nii.gz"}, [(1,)], 1)


def test_a_prediction_of_another_shape_is_named(tmp_path: Path) -> None:
    write(tmp_path / "prediction.nii.gz", np.ones((3, 4, 5), np.uint8))
    write(tmp_path / "reference.nii.gz", np.ones((3, 4, 6), np.uint8))
    pair = tmp_path / "prediction.nii.gz", tmp_path / "reference.nii.gz"
    with pytest.raises(ValueError, match=r"prediction\.nii\.gz: has shape \(3, 4, 5\)"):
        measure_cases({"a": pair}, [1], None, 1)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("postprocessing.pkl", "", "may run code"),
        ("a.json", "{", "is not a postprocessing.json"),
        ("a.json", "{}", "is not a postprocessing.json"),
        (
            "a.json",
            '{"postprocessing_fns": ["other"], "postprocessing_kwargs": [{}]}',
            "functions.*other",
        ),
    ],
    ids=["pickle", "no JSON", "no functions", "another function"],
)
def test_a_file_that_is_no_postprocessing_is_refused(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_postprocessing(tmp_path / name)
