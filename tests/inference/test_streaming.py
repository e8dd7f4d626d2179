"""Tests of the stream from windows to labels: equal to the path that holds all logits."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from model_folders import (
    make_dataset_json,
    make_image,
    make_model_folder,
    make_plans,
    read_array,
    write_cases,
    write_nifti,
)
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch.utils._python_dispatch import TorchDispatchMode

from umamba.inference import labels as labels_file
from umamba.inference import memory, streaming
from umamba.inference import predictor as predictor_file
from umamba.inference.blocks import BlockSums, WindowGrid
from umamba.inference.cases import find_images
from umamba.inference.model_folder import build_network
from umamba.inference.predictor import UMambaPredictor
from umamba.inference.sliding_window import predict_mirrored, window_weight
from umamba.preprocessing.resampling import SeparableResampling, axis_matrix

CPU = torch.device("cpu")

CASES = {
    "isotropic": {"plans": {"spacing": (1.3, 1.1, 1.0)}},
    "separate z": {"plans": {"spacing": (6.0, 1.0, 1.0)}},
    "downsampled": {"plans": {"spacing": (1.5, 0.5, 0.7)}},
    "not resampled": {"plans": {"spacing": (3.0, 0.8, 1.3)}},
    "regions": {"dataset": {"regions": True}},
    "two folds": {"folds": (0, 3)},
    "2d": {"plans": {"patch_size": (16, 12), "spacing": (1.0, 1.0)}, "mirror_axes": (0, 1)},
    "one plane": {"shape": (1, 30, 41)},
    "one column": {"shape": (9, 30, 1)},
    "smaller than a patch": {"shape": (4, 9, 8)},
    "crop and transpose": {"plans": {"transpose": (2, 0, 1)}},
    "small steps": {"step": 0.4, "shape": (8, 20, 17)},
}


def prepare(tmp_path, name, **options):
    """A predictor and a preprocessed case of this name."""
    settings = CASES[name]
    model = make_model_folder(
        tmp_path / "model",
        make_plans(**settings.get("plans", {})),
        make_dataset_json(**settings.get("dataset", {})),
        folds=settings.get("folds", (0,)),
        mirror_axes=settings.get("mirror_axes", (2,)),
    )
    images = write_cases(
        tmp_path / "images", {"a": settings.get("shape", (14, 37, 29))}, (3.0, 0.8, 1.3)
    )
    predictor = UMambaPredictor(settings.get("step", 0.5), device=CPU, **options)
    predictor.initialize_from_trained_model_folder(model)
    files = find_images([images], ".nii.gz", bare_names=False)["a"]
    case = predictor.preprocessor().from_files(files, None)
    return predictor, case


def whole(predictor, case, probabilities=False):
    """Labels, and probabilities, by way of the logits of the whole volume, summed in one array."""
    manager = predictor.configuration_manager
    data, inside = pad_nd_image(case.data, manager.patch_size, "constant", {"value": 0}, True, None)
    logits = sum(whole_mean(predictor, data, fold) for fold in predictor.list_of_parameters)
    logits = logits[(slice(None), *inside[1:])] / len(predictor.list_of_parameters)
    managers = predictor.plans_manager, manager, predictor.label_manager
    resampled, found = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.numpy(), *managers, case.properties, True, 1
    )
    return resampled, found


def whole_mean(predictor, data, parameters, skipped=()):
    """The weighted mean over the windows that are not skipped; nan where there are none."""
    predictor.network.load_state_dict(parameters)
    sums = torch.zeros(predictor.label_manager.num_segmentation_heads + 1, *data.shape[1:])
    windows = predictor._internal_get_sliding_window_slicers(data.shape[1:])
    weight = window_weight(predictor.configuration_manager.patch_size, len(windows) > 1)
    for i, window in enumerate(windows):
        if i not in skipped:
            with torch.inference_mode():
                tile = predict_mirrored(
                    predictor.network, data[window][None], predictor.allowed_mirroring_axes
                )[0]
            tile = tile if tile.ndim == 4 else tile[:, None]
            volume = sums[(slice(None), *(s if isinstance(s, slice) else slice(s, s + 1)
                                          for s in window[1:]))]  # fmt: skip
            volume[:-1] += tile * weight
            volume[-1] += weight
    return sums[:-1] / sums[-1]


def divided(monkeypatch, n_bytes=400_000):
    """Makes the plan divide rows and leave most sums on disk; returns the stores made."""
    made = []

    def small(grids, *_, **__):
        return memory.MemoryPlan(grids[1], n_bytes, 0, "small")

    class Watched(BlockSums):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(memory, "plan_memory", small)
    monkeypatch.setattr(predictor_file, "BlockSums", Watched)
    return made


@pytest.mark.parametrize("way", ["compiled", "torch", "spilled"])
@pytest.mark.parametrize("name", CASES)
def test_streamed_labels_equal_those_of_whole_logits(tmp_path, monkeypatch, name, way):
    predictor, case = prepare(tmp_path, name)
    expected, _ = whole(predictor, case)
    if way == "torch":
        monkeypatch.setattr(labels_file, "has_linear_argmax", lambda: False)
    stores = divided(monkeypatch, 1) if way == "spilled" else []
    found, probabilities = predictor.predict_labels(
        case.data, case.properties, spill_folder=tmp_path
    )
    assert probabilities is None
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    # rounding of the sums of the resampling may turn what is undecided
    assert np.count_nonzero(found != expected) <= 2
    assert len(np.unique(found)) > 1
    assert all(store.n_spilled for store in stores if len(store.grid.boxes) > 1)
    assert {p.name for p in tmp_path.iterdir()} == {"images", "model"}


@pytest.mark.parametrize("piece_bytes", [1, 20_000])
def test_the_size_of_pieces_changes_nothing(tmp_path, monkeypatch, piece_bytes):
    predictor, case = prepare(tmp_path, "isotropic")
    expected, _ = predictor.predict_labels(case.data, case.properties)
    monkeypatch.setattr(streaming, "PIECE_BYTES", piece_bytes)
    found, _ = predictor.predict_labels(case.data, case.properties)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_exact_logits_are_those_of_stock_nnunet_bit_for_bit(tmp_path, monkeypatch, name):
    predictor, case = prepare(tmp_path, name, nnunet_exact=True)
    predictor.preprocessor()
    stock = nnUNetPredictor.predict_logits_from_preprocessed_data(predictor, case.data)
    divided(monkeypatch)
    found = torch.full(stock.shape, torch.nan)
    with torch.inference_mode():
        for piece in predictor._stream(case.data, 0, tmp_path):
            piece.fill(found[:, piece.z, piece.y])
    assert stock.dtype == torch.half
    assert torch.equal(found, stock.float())


@pytest.mark.parametrize("name", ["isotropic", "regions", "crop and transpose", "2d"])
@pytest.mark.parametrize("way", ["in memory", "spilled"])
def test_streamed_probabilities_equal_those_of_whole_logits(tmp_path, monkeypatch, name, way):
    predictor, case = prepare(tmp_path, name)
    labels, expected = whole(predictor, case, probabilities=True)
    if way == "spilled":
        divided(monkeypatch, 1)
    found, probabilities = predictor.predict_labels(
        case.data, case.properties, probability_folder=tmp_path / "new"
    )
    probabilities.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as saved:
        assert list(saved) == ["probabilities"]
        assert saved["probabilities"].dtype == np.float32
        np.testing.assert_allclose(saved["probabilities"], expected, atol=1e-5)
    assert np.count_nonzero(found != labels) <= 2
    assert not list((tmp_path / "new").iterdir())


def test_weights_handed_over_with_a_network_are_those_that_predict(tmp_path):
    predictor, case = prepare(tmp_path, "isotropic")
    (parameters,) = predictor.list_of_parameters
    expected, _ = predictor.predict_labels(case.data, case.properties)
    managers = predictor.plans_manager, predictor.configuration_manager
    network = build_network(*managers, predictor.dataset_json)
    predictor.manual_initialization(
        network,
        *managers,
        [parameters],
        predictor.dataset_json,
        "",
        predictor.allowed_mirroring_axes,
    )
    found, _ = predictor.predict_labels(case.data, case.properties)
    assert np.array_equal(found, expected)


def test_weights_of_the_folds_are_in_their_places_afterwards(tmp_path):
    predictor, case = prepare(tmp_path, "two folds")
    before = {k: v.clone() for k, v in predictor.network.state_dict().items()}
    expected = [{k: v.clone() for k, v in fold.items()} for fold in predictor.list_of_parameters]
    predictor.predict_labels(case.data, case.properties)
    assert all(torch.equal(v, before[k]) for k, v in predictor.network.state_dict().items())
    for fold, weights in zip(predictor.list_of_parameters, expected, strict=True):
        assert all(torch.equal(v, weights[k]) for k, v in fold.items())


def test_a_cubic_resampling_of_logits_holds_them_and_says_so(tmp_path):
    predictor, case = prepare(tmp_path, "isotropic")
    configuration = predictor.configuration_manager.configuration
    configuration["resampling_fn_probabilities_kwargs"]["order"] = 3
    said = []
    predictor.on_plan = said.append
    expected, _ = whole(predictor, case)
    found, _ = predictor.predict_labels(case.data, case.properties)
    assert np.array_equal(found, expected)
    assert "holds the logits" in said[0]


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor made while it is active."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.n_bytes = max(self.n_bytes, result.untyped_storage().nbytes())
        return result


def test_all_classes_of_the_volume_are_never_held(tmp_path, monkeypatch):
    dataset_json = make_dataset_json()
    dataset_json["labels"] = {"background": 0} | {f"organ_{i}": i for i in range(1, 30)}
    plans = make_plans(spacing=(1.0, 1.0, 1.0), patch_size=(8, 8, 8))
    model = make_model_folder(tmp_path / "model", plans, dataset_json, mirror_axes=None)
    predictor = UMambaPredictor(device=CPU)
    predictor.initialize_from_trained_model_folder(model)
    shape = (40, 40, 40)
    image = make_image(shape)[None]
    case = predictor.preprocessor().from_array(image, {"spacing": [1.2, 1.2, 1.2]}, None)
    whole_volume = 30 * 4 * case.data[0].numel()
    stores = divided(monkeypatch, 2**20)
    monkeypatch.setattr(streaming, "PIECE_BYTES", 2**18)
    tracemalloc.start()
    with LargestTensor() as largest:
        predictor.predict_labels(case.data, case.properties, spill_folder=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole_volume > 10 * 2**20
    assert largest.n_bytes < 2**20
    assert peak < 3 * 2**20
    assert stores[0].n_spilled > 2**20


def test_a_limit_below_the_need_is_refused_with_what_is_needed(tmp_path):
    predictor, case = prepare(tmp_path, "isotropic")
    predictor.max_ram = 2**20
    with pytest.raises(ValueError, match=r"needs at least .* GiB .* raise --max-ram"):
        predictor.predict_labels(case.data, case.properties)


@pytest.mark.parametrize("skipped", [(), (0, 3, 17)], ids=["all windows", "some skipped"])
@pytest.mark.parametrize("whole_rows", [True, False], ids=["whole rows", "divided rows"])
def test_sums_in_blocks_are_those_of_the_volume(tmp_path, monkeypatch, whole_rows, skipped):
    """Whatever the memory held before, and though most of them wait on disk."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    patch, shape = (4, 6, 5), (11, 15, 13)
    starts = [range(0, n - p + 1, 1 + p // 2) for n, p in zip(shape, patch, strict=True)]
    starts = [sorted({*s, n - p}) for s, n, p in zip(starts, shape, patch, strict=True)]
    windows = [
        (slice(None), *(slice(s, s + p) for s, p in zip(corner, patch, strict=True)))
        for corner in itertools.product(*starts)
    ]
    grid = WindowGrid(windows, shape, whole_rows=whole_rows, skipped=skipped)
    sums = BlockSums(
        grid, 3, background=(5.0, 6.0), budget=grid.peak()[1] * 12, spill_folder=tmp_path
    )
    expected = torch.zeros(3, *shape)
    weight = torch.rand(patch)
    strips = list(grid.strips)
    for i, window in enumerate(windows):
        tile = torch.randn(2, *patch)
        if i not in skipped:
            sums.add(i, 0, tile[:1], weight)
            sums.add(i, 1, tile[1:], weight)
            expected[:2][window] += tile * weight
            expected[2][window[1:]] += weight
        while strips and strips[0].window == i:
            strip = strips.pop(0)
            for block in grid.blocks((strip.z, strip.y, slice(0, shape[2]))):
                of_block = expected[(slice(None), *grid.extent(block))]
                of_block[:, of_block[2] == 0] = torch.tensor([[5.0], [6.0], [1.0]])
                torch.testing.assert_close(sums.take(block, i), of_block)
    assert not strips
    assert bool((expected[0] == 5).any()) == bool(skipped)
    assert sums.n_spilled
    sums.close()
    assert not list(tmp_path.iterdir())


def test_planes_that_wait_for_the_next_count_as_memory(tmp_path):
    predictor, _ = prepare(tmp_path, "isotropic")
    shape, doubled = (14, 37, 29), (28, 37, 29)
    for to, matrix, n_planes in (
        (shape, None, 0),
        (doubled, axis_matrix(14, 28, 1, False), 1),
    ):
        properties = {
            "shape_before_cropping": to,
            "bbox_used_for_cropping": [(0, n) for n in to],
        }
        operator = SeparableResampling(to, (matrix, None, None))
        maker = labels_file.LabelMaker(operator, shape, properties, predictor.label_manager)
        blocks = 0 if labels_file.has_linear_argmax() else labels_file.MEMORY_LIMIT
        expected = n_planes * 4 * 3 * 37 * 29
        assert maker.n_bytes - maker.labels.nbytes - blocks == expected
        maker.add(slice(0, 7), slice(0, 37), lambda logits: logits.zero_())
        assert (0 if maker._planes is None else maker._planes.nbytes) == expected


def test_a_case_on_file_takes_the_limit_and_gives_the_same_labels(tmp_path):
    from umamba.inference.cases import plan_cases

    model = make_model_folder(tmp_path / "model")
    write_nifti(tmp_path / "i" / "a_0000.nii.gz", make_image((14, 37, 29)), (3.0, 0.8, 1.3))
    found, said = [], []
    for name, limit in (("free", None), ("limited", 2**40)):
        predictor = UMambaPredictor(device=CPU)
        predictor.initialize_from_trained_model_folder(model)
        predictor.max_ram, predictor.on_plan = limit, said.append
        images = find_images([tmp_path / "i"], ".nii.gz", bare_names=False)
        (case,) = plan_cases(images, tmp_path / name, ".nii.gz")
        assert predictor.predict_cases([case]) == []
        found.append(read_array(case.output))
    assert np.array_equal(*found)
    assert "of 1024.00 GiB" in said[-1]


@pytest.mark.parametrize("limit", [0, 2**40], ids=["on the CPU", "on the device"])
@pytest.mark.parametrize("name", ["isotropic", "two folds", "2d"])
def test_where_the_sums_are_changes_nothing(tmp_path, monkeypatch, name, limit):
    predictor, case = prepare(tmp_path, name)
    expected, _ = predictor.predict_labels(case.data, case.properties)
    predictor.perform_everything_on_device = True  # nnU-Net turns it off for CPUs
    pretended = memory.DeviceMemory(limit, 0)
    monkeypatch.setattr(memory, "device_memory", lambda device, max_vram: pretended)
    said = []
    predictor.on_plan = said.append
    found, _ = predictor.predict_labels(case.data, case.properties)
    assert np.array_equal(found, expected)
    assert ("of sums on the GPU" in said[0]) == bool(limit)


@pytest.mark.parametrize("way", ["in memory", "spilled"])
def test_skipped_windows_leave_the_mean_over_the_others(tmp_path, monkeypatch, way):
    predictor, case = prepare(tmp_path, "isotropic", skip_empty=True)
    if way == "spilled":
        divided(monkeypatch, 1)
    n = len(predictor._internal_get_sliding_window_slicers(case.data.shape[1:]))
    skipped = frozenset(range(n // 3)) | {n - 2, n - 1}
    monkeypatch.setattr(predictor_file, "find_empty_windows", lambda *_: skipped)
    found = torch.full((3, *case.data.shape[1:]), torch.nan)
    with torch.inference_mode():
        for piece in predictor._stream(case.data, 0, tmp_path):
            piece.fill(found[:, piece.z, piece.y])
    (parameters,) = predictor.list_of_parameters
    expected = whole_mean(predictor, case.data, parameters, skipped)
    uncovered = expected.isnan().any(0)
    assert uncovered.any()
    expected[:, uncovered] = torch.tensor([10.0, -10.0, -10.0])[:, None]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
