"""Hit rates of patches: against every possible patch, against drawn batches, and guessed."""

from itertools import product

import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from umamba.planning import hit_rates
from umamba.planning.hit_rates import (
    draw_patches,
    guess_hit_rates,
    measure_hit_rates,
    n_forced,
)
from umamba.training.recipe import Recipe
from umamba.training.sampling import loader_class

PATCH = (8, 9, 7)


def make_segmentation(index: int) -> np.ndarray:
    """A block in every case, two far-off voxels in every third."""
    seg = np.zeros((15, 20 + index, 18), np.int16)
    seg[2:8, 3:12, 3 + index : 9 + index] = 1
    if index % 3 == 0:
        seg[13, 17, 2] = seg[4, 16, 15] = 2
    return seg


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        seg = make_segmentation(index)[None]
        located = DefaultPreprocessor._sample_foreground_locations(seg, [1, 2, 3])
        nnUNetDatasetBlosc2.save_case(
            seg.astype(np.float32), seg, {"class_locations": located},
            str(tmp_path / f"case_{index}"), chunks=(1, 8, 8, 8), blocks=(1, 8, 8, 8),
        )  # fmt: skip
    return tmp_path


def every_patch(seg: np.ndarray, patch) -> np.ndarray:
    """The share of all positions of the patch that hold each class."""
    places = product(*(range(n - p + 1) for n, p in zip(seg.shape, patch, strict=True)))
    cuts = [
        seg[tuple(slice(at, at + extent) for at, extent in zip(place, patch, strict=True))]
        for place in places
    ]
    return np.array([np.mean([(cut == value).any() for cut in cuts]) for value in (1, 2)])


def test_random_patches_hit_as_often_as_all_patches_do(folder):
    rates = measure_hit_rates(folder, PATCH, [1, 2])
    exact = np.mean([every_patch(make_segmentation(index), PATCH) for index in range(6)], axis=0)
    assert rates.n_cases.tolist() == [6, 2]
    assert rates.per_patch(None, 2) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("sampling", ["stock", "jittered", "balanced"])
def test_the_expected_rates_are_those_of_drawn_batches(folder, sampling):
    weights = [0.2, 0.7, 0.1] if sampling == "balanced" else None
    expected = measure_hit_rates(folder, PATCH, [1, 2, 3]).per_patch(sampling, 3, weights)
    labels = LabelManager({"background": 0, "block": 1, "voxels": 2}, None)
    loader = loader_class(Recipe(sampling=sampling, class_weights=weights))(
        nnUNetDatasetBlosc2(str(folder)), 3, PATCH, PATCH, labels, 0.33
    )
    np.random.seed(0)
    patches = np.concatenate([next(loader)["target"].numpy() for _ in range(250)])
    drawn = [(patches == value).any(axis=(1, 2, 3, 4)).mean() for value in (1, 2)]
    assert [*drawn, 0] == pytest.approx(expected, abs=0.05)


def test_a_slice_of_a_2d_configuration_is_a_patch_of_one_voxel_of_depth(folder):
    rates = measure_hit_rates(folder, (9, 7), [1, 2])
    exact = [every_patch(make_segmentation(index), (1, 9, 7)) for index in range(6)]
    assert rates.per_patch(None, 2) == pytest.approx(np.mean(exact, axis=0), abs=0.03)


def test_a_class_in_no_case_is_hit_by_no_patch_and_takes_no_share(folder):
    rates = measure_hit_rates(folder, PATCH, [1, 2, 3])
    for sampling in (None, "stock", "jittered", "balanced"):
        assert rates.per_patch(sampling, 2)[2] == 0
    seen = rates.per_patch("balanced", 2, [0.5, 0.0, 0.5])
    assert seen == pytest.approx(rates.per_patch("balanced", 2, [1.0, 0.0, 0.0]))


def write_case(folder, name: str, located: dict) -> None:
    seg = np.zeros((1, 12, 12, 12), np.int16)
    nnUNetDatasetBlosc2.save_case(
        seg.astype(np.float32), seg, {"class_locations": located}, str(folder / name),
        chunks=(1, 8, 8, 8), blocks=(1, 8, 8, 8),
    )  # fmt: skip


def test_a_case_of_ignored_voxels_alone_is_a_case_without_classes(tmp_path):
    voxel = np.array([[0, 6, 6, 6]])
    write_case(tmp_path, "a", {1: voxel, (-1, 0, 1): voxel})
    write_case(tmp_path, "b", {1: [], (-1, 0, 1): []})
    rates = measure_hit_rates(tmp_path, PATCH, [1])
    assert rates.per_patch(None, 2).tolist() == [0.5]


def test_a_class_that_the_folder_was_made_without_is_in_no_case(tmp_path):
    write_case(tmp_path, "a", {1: np.array([[0, 6, 6, 6]])})
    assert measure_hit_rates(tmp_path, PATCH, [1, 2]).n_cases.tolist() == [1, 0]


def test_of_many_cases_enough_are_read_for_each_class(tmp_path, monkeypatch):
    for index in range(60):
        rare = [[0, 6, 6, 6]] if index % 4 == 1 else []
        write_case(tmp_path, f"case_{index:02d}", {1: np.array([[0, 3, 3, 3]]), 2: np.array(rare)})
    read = []
    load_case = nnUNetDatasetBlosc2.load_case
    monkeypatch.setattr(
        nnUNetDatasetBlosc2,
        "load_case",
        lambda self, name: read.append(name) or load_case(self, name),
    )
    monkeypatch.setattr(hit_rates, "READ_CASES", 20)
    measure_hit_rates(tmp_path, PATCH, [1, 2])
    assert len(read) == len(set(read)) < 35
    assert sum(int(name[-2:]) % 4 == 1 for name in read) == hit_rates.READ_PER_CLASS


def test_with_an_ignore_label_patches_lie_around_annotated_voxels():
    voxels = [np.array([[2, 2, 2]]), np.zeros((0, 3), int)]
    annotated = np.array([[2, 3, 2], [3, 2, 2]])
    patch, generator = np.array([5, 5, 5]), np.random.default_rng(0)
    assert draw_patches(voxels, (40, 40, 40), patch, generator)[0][0] < 0.2
    assert draw_patches(voxels, (40, 40, 40), patch, generator, annotated)[0][0] == 1


@pytest.mark.parametrize(("batch", "forced"), [(1, 0), (2, 1), (3, 1), (9, 3), (12, 4)])
def test_nnunet_forces_so_many_patches_of_a_batch(batch, forced):
    assert n_forced(batch) == forced


def test_the_guess_from_the_audit_is_near_for_scattered_cubes():
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(150):
        seg = np.zeros((16, 24, 20), np.int16)
        for _ in range(2):
            z, y, x = (generator.integers(0, n - 2) for n in seg.shape)
            seg[z : z + 3, y : y + 3, x : x + 3] = 1
        hits.append(every_patch(seg, (6, 9, 20))[0])
    fact = {"n_cases": 15, "components": {"per_case_median": 2.0, "median_voxels": 54}}
    rates = guess_hit_rates([fact], (16, 24, 20), (6, 9, 20), 0.5, 60)
    assert rates.random[0] == pytest.approx(np.mean(hits), abs=0.04)
    assert rates.per_patch("stock", 2)[0] < rates.per_patch("balanced", 2)[0]
