"""Surface metrics: truths by hand, surface-distance and MONAI as oracles, empty masks."""

import numpy as np
import pytest
from scipy import ndimage

from umamba.evaluation.surface import nsd_voxel_count, surface_distances, surface_metrics

SPACING = (3.0, 1.0, 0.5)


def moved_cube() -> tuple[np.ndarray, np.ndarray]:
    """A cube of 60 mm and the same moved by 6 mm along the thick axis."""
    reference = np.zeros((40, 110, 220), dtype=bool)
    reference[8:28, 20:80, 40:160] = True
    return reference, np.roll(reference, 2, axis=0)


def random_shapes(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two similar blobs of random form that may touch the border of the image."""
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.standard_normal(shape), 2)
    other = field + 0.3 * field.std() * ndimage.gaussian_filter(generator.standard_normal(shape), 1)
    return field > 0.8 * field.std(), other > 0.8 * field.std()


def test_two_voxels_two_mm_apart_are_two_mm_apart() -> None:
    reference = np.zeros((3, 5, 7), dtype=bool)
    prediction = reference.copy()
    reference[1, 2, 2], prediction[1, 2, 4] = True, True
    metrics = surface_metrics(reference, prediction, (2.5, 1.5, 1.0), tolerance_mm=1.0)
    assert metrics["HD95"] == pytest.approx(2.0)
    assert metrics["NSD"] == pytest.approx(0.5)  # each voxel's nearer side is 1 mm away
    assert metrics["ASSD"] == pytest.approx(1.5)


def test_a_moved_cube_has_the_distances_computed_by_hand() -> None:
    reference, prediction = moved_cube()
    metrics = surface_metrics(reference, prediction, SPACING, tolerance_mm=3.0)
    assert metrics["HD95"] == pytest.approx(6.0)
    # four sides of 60 x 60 mm, of which 54 + 3 mm lie within 3 mm, out of six: 0.63 .. 0.70
    assert metrics["NSD"] == pytest.approx(0.665, abs=0.025)
    assert metrics["NSD"] == pytest.approx(0.686, abs=0.001)
    assert metrics["ASSD"] == pytest.approx(2.01, abs=0.005)


def test_counting_voxels_gives_thick_slices_the_wrong_weight() -> None:
    assert nsd_voxel_count(*moved_cube(), SPACING, 3.0) == pytest.approx(0.389, abs=0.001)


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_agree_with_surface_distance(seed: int) -> None:
    oracle = pytest.importorskip("surface_distance")
    shape = (11, 18, 25) if seed % 2 else (23, 30)
    spacing = np.random.default_rng(seed).uniform(0.4, 3.1, len(shape)).tolist()
    reference, prediction = random_shapes(seed, shape)
    assert reference.any()
    assert prediction.any()
    theirs = oracle.compute_surface_distances(reference, prediction, spacing)
    ours = surface_distances(reference, prediction, spacing)
    for tolerance in (0.71, 1.37, 2.93):
        assert ours.nsd(tolerance) == pytest.approx(
            oracle.compute_surface_dice_at_tolerance(theirs, tolerance), abs=1e-9
        )
    for percent in (50, 95, 100):
        assert ours.hausdorff(percent) == pytest.approx(
            oracle.compute_robust_hausdorff(theirs, percent), abs=1e-9
        )
    to_prediction, to_reference = oracle.compute_average_surface_distance(theirs)
    areas = ours.reference_sizes.sum(), ours.prediction_sizes.sum()
    expected = (to_prediction * areas[0] + to_reference * areas[1]) / sum(areas)
    assert ours.average() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_voxel_count_nsd_agrees_with_monai(seed: int) -> None:
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    spacing = (2.7, 0.9, 1.3)
    reference, prediction = random_shapes(seed, (11, 18, 25))
    as_monai = [
        torch.from_numpy(np.stack([~m, m])[None].astype(float)) for m in (prediction, reference)
    ]
    theirs = metrics.compute_surface_dice(*as_monai, class_thresholds=[2.3], spacing=spacing)
    ours = nsd_voxel_count(reference, prediction, spacing, 2.3)
    assert ours == pytest.approx(float(theirs[0, 0]), abs=1e-6)


@pytest.mark.parametrize("sparse", [True, False], ids=["tree", "transform"])
def test_tree_and_distance_transform_give_the_same_distances(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of `_distances` are run on one pair by moving the image border."""
    reference, prediction = random_shapes(5, (9, 14, 17))
    expected = surface_distances(reference, prediction, SPACING)
    used = []
    for name in ("cKDTree", "ndimage"):
        original = getattr(__import__("umamba.evaluation.surface", fromlist=[name]), name)
        monkeypatch.setattr(f"umamba.evaluation.surface.{name}", Recorder(original, used, name))
    far = [np.pad(mask, ((0, 30), (0, 30), (0, 30))) for mask in (reference, prediction)]
    if sparse:
        for mask in far:
            mask[-1, -1, -1] = True  # the box is the whole image, the surfaces are a small part
    result = surface_distances(far[0], far[1], SPACING)
    assert set(used) == {"cKDTree" if sparse else "ndimage"}
    n_before = len(expected.reference_sizes)
    np.testing.assert_allclose(
        np.sort(result.reference_to_prediction[:n_before]),
        np.sort(expected.reference_to_prediction),
        atol=1e-9,
    )


class Recorder:
    """Stands before a function or module and notes its use."""

    def __init__(self, original: object, used: list[str], name: str) -> None:
        self._original, self._used, self._name = original, used, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        self._used.append(self._name)
        return self._original(*args, **kwargs)  # type: ignore[operator]

    def __getattr__(self, attribute: str) -> object:
        self._used.append(self._name)
        return getattr(self._original, attribute)


def test_empty_masks_follow_the_stated_rule() -> None:
    empty = np.zeros((4, 5, 6), dtype=bool)
    full = empty.copy()
    full[1:3, 2:4, 2:5] = True
    assert all(np.isnan(v) for v in surface_metrics(empty, empty, SPACING, 1.0).values())
    for pair in ((empty, full), (full, empty)):
        metrics = surface_metrics(*pair, SPACING, 1.0)
        assert metrics == {"NSD": 0.0, "HD95": np.inf, "ASSD": np.inf}
        assert nsd_voxel_count(*pair, SPACING, 1.0) == 0
    assert np.isnan(nsd_voxel_count(empty, empty, SPACING, 1.0))


def test_identical_masks_that_fill_the_image_are_perfect() -> None:
    full = np.ones((3, 4, 5), dtype=bool)
    assert surface_metrics(full, full, SPACING, 0.0) == {"NSD": 1.0, "HD95": 0.0, "ASSD": 0.0}


def test_a_distance_equal_to_the_tolerance_is_within_it() -> None:
    reference = np.zeros((1, 12, 12), dtype=bool)
    reference[0, 3:6, 3:9] = True
    prediction = np.roll(reference, 3, axis=1)  # 3 x 0.7 is 2.0999999999999996
    assert surface_metrics(reference, prediction, (1.0, 0.7, 0.7), 2.1)["NSD"] == 1.0


def test_one_slice_is_measured_as_a_plane() -> None:
    reference, prediction = random_shapes(8, (21, 34))
    plane = surface_metrics(reference, prediction, (1.2, 0.7), 1.0)
    assert surface_metrics(reference[None], prediction[None], (9.0, 1.2, 0.7), 1.0) == plane
    assert surface_metrics(reference[:, None], prediction[:, None], (1.2, 9.0, 0.7), 1.0) == plane


def test_spacing_of_the_wrong_length_is_refused() -> None:
    mask = np.ones((2, 3, 4), dtype=bool)
    with pytest.raises(ValueError, match="one spacing per axis"):
        surface_distances(mask, mask, (1.0, 1.0))
