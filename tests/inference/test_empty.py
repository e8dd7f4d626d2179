"""Tests of empty windows: found where they surely are, and background without the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_folders import make_dataset_json, make_model_folder, make_plans

from umamba.inference.empty import background_logits, find_empty_windows
from umamba.inference.predictor import UMambaPredictor

CPU = torch.device("cpu")


class SeesTissue(torch.nn.Module):
    """Class 2 where the first channel is bright, 1 where it is in between, 0 in the air."""

    n_tiles = 0

    def forward(self, x):
        self.n_tiles += len(x)
        x = x[:, :1]
        return torch.cat([-x, 1.5 - (x - 2).abs(), x - 3], 1)


def body(shape, center=0.5):
    """Noisy air at -1, and in it a body of 1 to 4."""
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, n) for n in shape[1:]], indexing="ij"))
    inside = (((grid - center) / 0.15) ** 2).sum(0) < 1
    tissue = 1.5 + 2 * (grid[0] > center)
    volume = np.where(inside, tissue, -1.0) + random.normal(0, 0.02, shape)
    return torch.from_numpy(volume[None].astype(np.float32))


def predict(tmp_path, data, patch, skip, regions=False):
    model = tmp_path / f"model_{skip}"
    spacing = (1.0,) * len(patch)
    dataset_json = make_dataset_json(regions=regions)
    make_model_folder(
        model, make_plans(patch_size=patch, spacing=spacing), dataset_json, mirror_axes=None
    )
    predictor = UMambaPredictor(device=CPU, skip_empty=skip)
    predictor.initialize_from_trained_model_folder(model)
    network = SeesTissue()
    if regions:
        network.forward = lambda x: SeesTissue.forward(network, x)[:, 1:]
    predictor.network, predictor.list_of_parameters = network, None
    said, shares = [], []
    predictor.on_plan, predictor.on_windows_done = said.append, shares.append
    shape = tuple(data.shape[1:])
    properties = {
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_after_cropping_and_before_resampling": shape,
        "spacing": [1.0, 1.0, 1.0],
    }
    labels, _ = predictor.predict_labels(data, properties)
    assert sum(shares) == pytest.approx(1)
    return labels, network.n_tiles, said


@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
@pytest.mark.parametrize(
    ("shape", "patch"),
    [((12, 96, 80), (8, 16, 16)), ((3, 96, 80), (16, 16)), ((5, 96, 80), (8, 16, 16))],
    ids=["3d", "2d", "thinner than a patch"],
)
def test_labels_equal_those_of_all_tiles(tmp_path, shape, patch, regions):
    data = body(shape)
    full, n_full, _ = predict(tmp_path, data, patch, False, regions)
    found, n_found, said = predict(tmp_path, data, patch, True, regions)
    assert np.array_equal(found, full)
    assert set(np.unique(full)) == {0, 1, 2}
    assert n_found < 0.7 * n_full
    assert said[0] == f"skips {n_full - n_found} of {n_full} tiles: they are empty"


@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
def test_a_volume_of_one_value_is_background_without_the_network(tmp_path, regions):
    data = torch.full((1, 20, 40, 30), 2.0)
    full, _, _ = predict(tmp_path, data, (8, 16, 16), False, regions)
    found, n_found, _ = predict(tmp_path, data, (8, 16, 16), True, regions)
    assert full.any()
    assert not found.any()
    assert n_found == 0


def windows(shape, side=16):
    starts = [sorted({*range(0, n - side, side // 2), n - side}) for n in shape]
    return [
        (slice(None), slice(z, z + side), slice(y, y + side), slice(x, x + side))
        for z in starts[0] for y in starts[1] for x in starts[2]
    ]  # fmt: skip


def unclear(name):
    random = np.random.default_rng(1)
    shape = (32, 64, 64)
    volume = body(shape)[0].numpy()
    if name == "cropped":
        volume = random.normal(0, 1, shape)
    elif name == "bright surroundings":
        volume = -volume
    elif name == "touches the edges":
        volume = body(shape, center=0.0)[0].numpy()
        volume[:, :40, :40] = 2 + volume[:, :40, :40] / 10
    elif name == "fills the volume":
        volume[1:-1, 1:-1, 1:-1] = 2 + volume[1:-1, 1:-1, 1:-1] / 10
    elif name == "no contrast":
        volume = random.uniform(0, 1, shape)
    return torch.from_numpy(volume[None].astype(np.float32))


def empty(data, n_channels=1):
    inside = [slice(0, n) for n in data.shape[1:]]
    return find_empty_windows(data, windows(data.shape[1:]), inside, n_channels)


@pytest.mark.parametrize(
    "name",
    ["cropped", "bright surroundings", "touches the edges", "fills the volume", "no contrast"],
)
def test_no_tile_is_skipped_where_the_body_is_not_clear(name):
    assert empty(unclear("clear"))
    assert not empty(unclear(name))


def test_foreground_of_the_stage_before_is_not_skipped():
    data = torch.cat([body((16, 80, 80)), torch.zeros(1, 16, 80, 80)])
    before = empty(data, 1)
    data[1, 5, 3, 4] = 1
    corner = next(i for i, w in enumerate(windows(data.shape[1:])) if w[2].start == w[3].start == 0)
    assert corner in before
    assert corner not in empty(data, 1)
    assert empty(data, 1) < before


def test_cavities_of_the_body_are_part_of_it():
    data = torch.full((1, 40, 120, 120), -1.0) + 0.01 * torch.rand(1, 40, 120, 120)
    data[:, :, 20:100, 20:100] = 2
    data[:, :, 24:96, 24:96] = -0.9
    hollow = empty(data)
    assert hollow
    inner = [i for i, w in enumerate(windows(data.shape[1:])) if w[2].start == w[3].start == 48]
    assert inner
    assert not hollow & set(inner)


def test_exact_mode_and_skipping_exclude_each_other():
    with pytest.raises(ValueError, match="--nnunet-exact computes every tile"):
        UMambaPredictor(device=CPU, nnunet_exact=True, skip_empty=True)


def test_background_decides_in_labels_and_regions():
    class Manager:
        num_segmentation_heads = 3
        has_regions = False

    assert background_logits(Manager) == [10, -10, -10]
    Manager.has_regions = True
    assert background_logits(Manager) == [-10, -10, -10]
