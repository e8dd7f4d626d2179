"""Tests of the float32 sliding window."""

from __future__ import annotations

import itertools

import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from umamba.inference.blocks import BlockSums, WindowGrid
from umamba.inference.sliding_window import (
    importance_map,
    predict_mirrored,
    tiles_per_batch,
    window_weight,
)
from umamba.inference.streaming import mean_of_sums, stream_windows

CPU = torch.device("cpu")


def accumulate_windows(
    network, data, windows, *, patch_size, n_outputs, use_gaussian=True, mirror_axes=None,
    max_batch=1, **options,
):  # fmt: skip
    """All logits (K, z, y, x) of one network, gathered from the stream."""
    grid = WindowGrid(windows, data.shape[1:], whole_rows=True)
    weight = window_weight(patch_size, use_gaussian and len(windows) > 1)
    logits = torch.full((n_outputs, *data.shape[1:]), torch.nan)
    for piece in stream_windows(
        lambda tiles: iter([(0, predict_mirrored(network, tiles, mirror_axes, max_batch))]),
        data, windows, weight, lambda: BlockSums(grid, n_outputs + 1), mean_of_sums,
        device=CPU, max_batch=max_batch, **options,
    ):  # fmt: skip
        piece.fill(logits[:, piece.z, piece.y])
    return logits


def windows_3d(shape, patch, step=0.5):
    starts = compute_steps_for_sliding_window(shape, patch, step)
    return [
        (slice(None), *(slice(s, s + p) for s, p in zip(corner, patch, strict=True)))
        for corner in itertools.product(*starts)
    ]


@pytest.fixture
def conv():
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(2, 3, 3, padding=1)
    layer.requires_grad_(False)
    return layer


def test_pointwise_network_gives_the_same_logits_in_windows_as_in_one_piece():
    torch.manual_seed(1)
    layer = torch.nn.Conv3d(1, 4, 1).requires_grad_(False)
    data = 10 * torch.randn(1, 19, 14, 23)
    patch = (7, 9, 11)
    logits = accumulate_windows(
        layer, data, windows_3d(data.shape[1:], patch), patch_size=patch, n_outputs=4
    )
    torch.testing.assert_close(logits, layer(data[None])[0], atol=2e-5, rtol=1e-5)


def test_equals_monai_where_the_windows_are_the_same(conv):
    monai_inferers = pytest.importorskip("monai.inferers")
    patch, shape = (9, 7, 15), (15, 7, 25)
    data = torch.randn(2, *shape)
    windows = windows_3d(shape, patch, step=1 / 3)
    assert sorted({w[3].start for w in windows}) == [0, 5, 10]
    # an overlap of 0.66 makes MONAI step by a third of the patch, too; its Gaussian has a floor
    inferer = monai_inferers.SlidingWindowInferer(patch, overlap=0.66, mode="constant")
    logits = accumulate_windows(
        conv, data, windows, patch_size=patch, n_outputs=3, use_gaussian=False
    )
    torch.testing.assert_close(logits, inferer(data[None], conv)[0], atol=2e-6, rtol=1e-5)


def test_batches_of_windows_change_nothing_but_rounding(conv):
    data = torch.randn(2, 17, 12, 15)
    patch = (8, 8, 8)
    windows = windows_3d(data.shape[1:], patch)
    one, many = (
        accumulate_windows(
            conv, data, windows, patch_size=patch, n_outputs=3,
            mirror_axes=(0, 2), max_batch=n,
        )
        for n in (1, 5)
    )  # fmt: skip
    torch.testing.assert_close(one, many, atol=1e-6, rtol=1e-5)


def test_a_single_window_is_the_output_of_the_network_itself(conv):
    data = torch.randn(2, 5, 6, 7)
    logits = accumulate_windows(
        conv, data, windows_3d((5, 6, 7), (5, 6, 7)), patch_size=(5, 6, 7), n_outputs=3
    )
    torch.testing.assert_close(logits, conv(data[None])[0], atol=1e-6, rtol=1e-5)


def test_two_dimensional_windows_fill_every_plane():
    layer = torch.nn.Conv2d(1, 2, 1).requires_grad_(False)
    data = torch.randn(1, 3, 10, 9)
    windows = [
        (slice(None), z, slice(y, y + 6), slice(x, x + 6))
        for z in range(3) for y in (0, 4) for x in (0, 3)
    ]  # fmt: skip
    logits = accumulate_windows(layer, data, windows, patch_size=(6, 6), n_outputs=2, max_batch=4)
    expected = torch.stack([layer(data[:, z][None])[0] for z in range(3)], 1)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_gaussian", [True, False], ids=["gaussian", "even"])
def test_weights_of_the_windows_sum_to_one(use_gaussian):
    def network(x):
        return torch.full((len(x), 1, *x.shape[2:]), 3.0)

    data = torch.zeros(1, 13, 9, 20)
    logits = accumulate_windows(
        network, data, windows_3d(data.shape[1:], (6, 5, 8)), patch_size=(6, 5, 8), n_outputs=1,
        use_gaussian=use_gaussian,
    )  # fmt: skip
    torch.testing.assert_close(logits, torch.full_like(logits, 3.0), atol=5e-6, rtol=0)


def test_importance_has_peak_one_at_the_center_and_falls_as_nnunets_to_the_corners():
    weight = importance_map((16, 20, 24))
    assert weight.dtype == torch.float32
    assert weight[8, 10, 12] == 1 == weight.max()
    in_sigmas = 8 * torch.tensor([8 / 16, 10 / 20, 12 / 24])
    corner = float(torch.exp(-(in_sigmas**2).sum() / 2))  # 3.8e-11
    assert float(weight[0, 0, 0]) == pytest.approx(corner, rel=1e-4)


def test_what_a_network_says_at_the_edge_of_a_tile_hardly_counts():
    patch, shape = (16, 16, 16), (16, 16, 24)
    edge = torch.zeros(patch)
    edge[..., 0] = edge[..., -1] = 1e3

    logits = accumulate_windows(
        lambda tiles: edge.expand(len(tiles), 1, *patch),
        torch.zeros(1, *shape), windows_3d(shape, patch), patch_size=patch, n_outputs=1,
    )  # fmt: skip
    weight = importance_map(patch).double()
    sums, weights = torch.zeros(shape).double(), torch.zeros(shape).double()
    for start in (0, 8):
        sums[..., start : start + 16] += weight * edge
        weights[..., start : start + 16] += weight
    assert (logits[0] - sums / weights).abs().max() < 1e-3
    assert logits[0, ..., 8].max() < 1  # the first column of the second tile, within the first


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_mirroring_averages_all_combinations_of_the_axes(conv, max_batch):
    tiles = torch.randn(1, 2, 5, 6, 7)
    axes = [c for n in range(4) for c in itertools.combinations((2, 3, 4), n)]
    expected = sum(torch.flip(conv(torch.flip(tiles, c)), c) if c else conv(tiles) for c in axes)
    mirrored = predict_mirrored(conv, tiles, (0, 1, 2), max_batch)
    torch.testing.assert_close(mirrored, expected / 8, atol=1e-6, rtol=1e-5)


def test_mirroring_averages_in_float32_for_a_half_precision_network():
    def network(x):
        return (1000 + x[:, :1]).half()

    tiles = torch.rand(2, 1, 4, 4)
    assert predict_mirrored(network, tiles, (0,)).dtype == torch.float32


def test_output_that_is_not_finite_is_refused():
    def network(x):
        return torch.full((len(x), 1, *x.shape[2:]), float("nan"))

    with pytest.raises(ValueError, match="not finite"):
        accumulate_windows(
            network, torch.zeros(1, 4, 4, 4), windows_3d((4, 4, 4), (4, 4, 4)),
            patch_size=(4, 4, 4), n_outputs=1,
        )  # fmt: skip


@pytest.mark.parametrize("n_windows", [1, 3])
def test_a_lone_tile_goes_through_alone_with_the_same_logits(conv, n_windows):
    batches: list[int] = []

    def network(tiles):
        batches.append(len(tiles))
        return conv(tiles)

    patch = (4, 4, 4)
    data = torch.randn(2, 2 + 2 * n_windows, 4, 4)
    windows = windows_3d(data.shape[1:], patch)
    assert len(windows) == n_windows
    logits = accumulate_windows(network, data, windows, patch_size=patch, n_outputs=3, max_batch=2)
    assert batches == [2] * (n_windows // 2) + [1]
    together = accumulate_windows(conv, data, windows, patch_size=patch, n_outputs=3, max_batch=6)
    torch.testing.assert_close(logits, together, atol=1e-6, rtol=1e-5)
    assert not bool((logits == 0).all())


def test_progress_adds_up_to_one(conv):
    shares: list[float] = []
    data = torch.randn(2, 12, 8, 12)
    accumulate_windows(
        conv, data, windows_3d(data.shape[1:], (5, 8, 5)), patch_size=(5, 8, 5), n_outputs=3,
        max_batch=4, progress=shares.append,
    )  # fmt: skip
    assert len(shares) > 1
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("patch_size", "device", "expected"),
    [
        ((56, 40), "cpu", 8),
        ((40, 56, 40), "cpu", 2),
        ((48, 64, 48), "cpu", 1),
        ((40, 56, 40), "cuda", 9),
    ],
    ids=["small plane on a CPU", "small volume on a CPU", "large volume on a CPU", "GPU"],
)
def test_small_tiles_share_a_pass_on_a_cpu_and_any_on_a_gpu(patch_size, device, expected):
    assert tiles_per_batch(patch_size, 9, torch.device(device)) == expected
