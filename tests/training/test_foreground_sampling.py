"""Jittered and balanced loaders: what they draw, how often, and where in the patch."""

import pickle
from collections import Counter

import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.stats import chisquare

from umamba.preprocessing.class_locations import corner_bounds
from umamba.training.recipe import Recipe
from umamba.training.sampling import BalancedLoader, JitteredLoader, loader_class

LABELS = {"background": 0, "organ": 1, "spot": 2}


@pytest.fixture
def make_data(tmp_path):
    """Writes six cases of 18x26x22 with a block of label 1, two of them with three voxels of 2."""

    def make(classes=(1, 2), n_spots=2) -> nnUNetDatasetBlosc2:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for index in range(6):
            seg = np.zeros((1, 18, 26, 22), np.int16)
            seg[0, 4:14, 6:20, 3:12] = 1
            if index < n_spots:
                seg[0, 15, 20:23, 17] = 2
            # The image holds the index of each voxel, so that a patch tells where it was cut.
            image = np.arange(seg.size, dtype=np.float32).reshape(seg.shape)
            located = DefaultPreprocessor._sample_foreground_locations(seg, list(classes))
            target = str(folder / f"case_{index}")
            sizes = {"chunks": (1, 9, 13, 11), "blocks": (1, 9, 13, 11)}
            nnUNetDatasetBlosc2.save_case(image, seg, {"class_locations": located}, target, **sizes)
        return nnUNetDatasetBlosc2(str(folder))

    return make


def draw(make_loader, data, n_batches, patch=(8, 9, 10), initial=None, labels=LABELS, batch=3):
    """The patches (b, channel, *patch) and case names of so many batches, seeded."""
    manager = LabelManager(labels, None)
    loader = make_loader(data, batch, initial or patch, patch, manager, 0.33)
    np.random.seed(1)
    return [next(loader) for _ in range(n_batches)]


def test_without_a_word_about_sampling_the_loader_is_nnunets_own():
    assert loader_class(Recipe()) is nnUNetDataLoader
    assert loader_class(Recipe(sampling="jittered")) is JitteredLoader


def test_patches_that_are_not_forced_are_nnunets(make_data):
    manager, data = LabelManager(LABELS, None), make_data()
    loaders = (
        kind(data, 2, (10, 11, 12), (8, 9, 10), manager, 0.0)
        for kind in (nnUNetDataLoader, JitteredLoader)
    )
    batches = []
    for loader in loaders:
        np.random.seed(3)
        batches.append([next(loader)["data"].numpy() for _ in range(5)])
    assert np.array_equal(*batches)


def test_the_bounds_of_patches_are_those_of_nnunets_random_ones(make_data):
    data, manager = make_data(), LabelManager(LABELS, None)
    for shape in ((18, 26, 22), (6, 26, 9)):
        loader = nnUNetDataLoader(data, 2, (11, 12, 13), (8, 9, 10), manager)
        corners = [loader.get_bbox(np.array(shape), False, None)[0] for _ in range(3000)]
        lowest, highest = corner_bounds(shape, (11, 12, 13), loader.need_to_pad)
        assert np.min(corners, axis=0).tolist() == lowest.tolist()
        assert np.max(corners, axis=0).tolist() == highest.tolist()


def test_the_voxel_of_a_jittered_patch_lies_evenly_between_its_margins():
    located = {1: np.array([[0, 50, 50, 50]])}
    loader = JitteredLoader.__new__(JitteredLoader)
    loader.patch_size, loader.final_patch_size = (30, 24, 1), (24, 16, 1)
    loader.need_to_pad, loader.annotated_classes_key = np.array([6, 8, 0]), (-1, 0, 1)
    np.random.seed(0)
    boxes = [loader.get_bbox(np.array([100, 100, 100]), True, located) for _ in range(3600)]
    positions = 50 - np.array([low for low, _ in boxes])
    assert all(np.subtract(high, low).tolist() == [30, 24, 1] for low, high in boxes)
    for axis, places in ((0, range(6, 24)), (1, range(6, 18))):
        counts = Counter(positions[:, axis].tolist())
        assert set(counts) == set(places)
        assert chisquare([counts[place] for place in places]).pvalue > 0.01
    assert set(positions[:, 2].tolist()) == {0}


@pytest.mark.parametrize("patch", [(8, 9, 10), (24, 28, 10), (9, 10)], ids=str)
def test_every_forced_patch_holds_the_class_that_was_chosen(make_data, patch):
    initial = tuple(n + 3 for n in patch)
    weights = {"class_weights": [1e-9, 1.0]}

    def only_spots(*arguments):
        return BalancedLoader(*arguments, **weights)

    batches = draw(only_spots, make_data(), 25, patch, initial)
    for batch in batches:
        forced = batch["target"][-1, 0].numpy()
        middle = tuple(slice(1, 1 + n) for n in patch)  # what augmentation leaves of it
        assert (forced[middle] == 2).any()
        assert batch["keys"][-1] in ("case_0", "case_1")


def test_the_classes_of_forced_patches_follow_the_weights_and_not_the_cases(make_data):
    recipe = Recipe(sampling="balanced", class_weights=(1.0, 3.0))
    loader = loader_class(recipe)(
        make_data(), 1, (3, 3, 3), (3, 3, 3), LabelManager(LABELS, None), 1.0
    )
    np.random.seed(0)
    seen = Counter(bool((next(loader)["target"] == 2).any()) for _ in range(400))
    assert chisquare([seen[False], seen[True]], [100, 300]).pvalue > 0.01
    names = Counter(str(name) for _ in range(300) for name in loader.get_indices())
    assert names["case_0"] > 3 * names["case_5"]


def test_balanced_patches_are_the_same_for_the_same_seed(make_data):
    data = make_data()
    first, second = (draw(BalancedLoader, data, 4) for _ in range(2))
    assert all(np.array_equal(a["data"], b["data"]) for a, b in zip(first, second, strict=True))


def test_oversampling_by_dice_is_asked_once_for_each_patch(make_data):
    loader = BalancedLoader(
        make_data(), 8, (4, 4, 4), (4, 4, 4), LabelManager(LABELS, None), 0.5,
        probabilistic_oversampling=True, class_weights=(1e-9, 1.0),
    )  # fmt: skip
    np.random.seed(0)
    for _ in range(10):
        batch = next(loader)
        forced = [loader.get_do_oversample(index) for index in range(8)]
        held = [(patch == 2).any().item() for patch in batch["target"]]
        assert all(h for f, h in zip(forced, held, strict=True) if f)
        assert not loader._wanted


def test_regions_and_the_ignore_label_are_chosen_as_nnunet_keys_them(make_data):
    annotated = (-1, 0, 1, 2)
    data = make_data(classes=[1, 2, annotated])
    labels = LABELS | {"ignore": 3}
    loader = BalancedLoader(data, 2, (6, 6, 6), (6, 6, 6), LabelManager(labels, None), 0.33)
    assert [key for key, _ in loader._cases] == [1, 2]
    assert loader.annotated_classes_key == annotated
    assert len(next(loader)["keys"]) == 2
    regions = {"background": 0, "whole": (1, 2), "spot": 2}
    data = make_data(classes=[(1, 2), 2])
    loader = BalancedLoader(data, 2, (6, 6, 6), (6, 6, 6), LabelManager(regions, [1, 2]), 0.33)
    assert [key for key, _ in loader._cases] == [(1, 2), 2]
    assert len(next(loader)["keys"]) == 2


def test_a_class_that_no_case_of_the_fold_has_is_never_wanted(make_data):
    data = make_data(n_spots=0)
    loader = BalancedLoader(
        data, 2, (6, 6, 6), (6, 6, 6), LabelManager(LABELS, None), 1.0, class_weights=(0.1, 0.9)
    )
    assert all((next(loader)["target"] == 1).flatten(1).any(1).all() for _ in range(5))


def test_cases_without_any_foreground_are_cut_anywhere(make_data):
    data = make_data(classes=[7])
    for kind in (JitteredLoader, BalancedLoader):
        assert len(draw(kind, data, 2)) == 2


def test_weights_of_another_number_of_classes_are_refused(make_data):
    with pytest.raises(ValueError, match=r"3 class_weights are given, (?s:.*) have 2 classes"):
        BalancedLoader(
            make_data(), 2, (6, 6, 6), (6, 6, 6), LabelManager(LABELS, None), 0.33,
            class_weights=(1, 1, 1),
        )  # fmt: skip


def test_a_loader_goes_to_another_process_and_draws_the_same_there(make_data):
    recipe = Recipe(sampling="balanced", class_weights=(0.5, 0.5))
    loader = loader_class(recipe)(
        make_data(), 2, (6, 6, 6), (6, 6, 6), LabelManager(LABELS, None), 0.33
    )
    next(loader)
    there = pickle.loads(pickle.dumps(loader))
    batches = []
    for each in (loader, there):
        np.random.seed(5)
        batches.append(next(each)["data"].numpy())
    assert np.array_equal(*batches)


def test_the_recipe_refuses_weights_that_nothing_uses():
    for values in ({"class_weights": [1.0]}, {"sampling": "balanced", "class_weights": [1.0, 0]}):
        with pytest.raises(ValueError, match="class_weights"):
            Recipe.from_dict(values)
    recipe = Recipe.from_dict({"sampling": "balanced", "class_weights": [0.2, 0.8]})
    assert recipe.to_dict() == {"sampling": "balanced", "class_weights": [0.2, 0.8]}
