"""Tests of the arithmetic of volumes, with torch in double precision as the oracle."""

from __future__ import annotations

import pytest
import torch

from umamba.ops import volumes
from umamba.ops.volumes import LinearAxis, add_tile, has_linear_argmax, linear_argmax


def linear_matrix(n_in, n_out):
    """Linear interpolation between voxel centers, clamped at the ends."""
    position = ((torch.arange(n_out) + 0.5) * n_in / n_out - 0.5).clamp(0, n_in - 1)
    low = position.floor().long().clamp(max=max(0, n_in - 2))
    matrix = torch.zeros(n_out, n_in)
    rows = torch.arange(n_out)
    matrix[rows, low] += 1 - (position - low)
    matrix[rows, (low + 1).clamp(max=n_in - 1)] += position - low
    return matrix


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("n_held", [0, 3, 7], ids=["put", "both", "added"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 3, 0)], ids=["planes", "channels last"])
def test_tiles_are_weighted_and_summed(monkeypatch, compiled, n_held, order):
    if not compiled:
        monkeypatch.setattr(volumes, "_usable", lambda *tensors: False)
    total = torch.randn(5, 4, 6, 7)
    tile = torch.randn(5, 4, 6, 9).permute(order).contiguous()
    tile = tile.permute([order.index(i) for i in range(4)])[..., 1:8]
    weight = torch.rand(4, 6, 9)[..., 2:]
    expected = tile * weight
    expected[..., :n_held] += total[..., :n_held]
    total[..., n_held:] = torch.nan  # memory as it comes
    add_tile(total, tile, weight, n_held)
    torch.testing.assert_close(total, expected)
    weights = torch.randn(1, 4, 6, 7)
    expected = weight + torch.where(torch.arange(7) < n_held, weights, 0)
    weights[..., n_held:] = torch.nan
    add_tile(weights, None, weight, n_held)
    torch.testing.assert_close(weights, expected)


def test_half_sums_are_rounded_as_nnunets():
    total, tile = torch.randn(2, 3, 4, 50).half(), torch.randn(2, 3, 4, 50).half()
    weight = torch.rand(3, 4, 50).half()
    expected = total.clone()
    expected += tile.clone().mul_(weight)
    add_tile(total, tile, weight, 50)
    assert torch.equal(total, expected)


SHAPES = {
    "larger": ((3, 5, 7), (8, 71, 19)),
    "smaller": ((9, 11, 13), (4, 5, 6)),
    "mixed": ((4, 6, 5), (9, 3, 5)),
    "one voxel": ((1, 1, 1), (2, 3, 4)),
}


@pytest.mark.skipif(not has_linear_argmax(), reason="the C library is not built")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=["8 bit", "16 bit"])
@pytest.mark.parametrize("name", SHAPES)
def test_argmax_of_resampled_values_is_that_of_torch(name, dtype):
    shape, new_shape = SHAPES[name]
    data = torch.randn(6, *shape)
    matrices = [
        None if m == n else linear_matrix(m, n) for m, n in zip(shape, new_shape, strict=True)
    ]
    resampled = data.double()
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            resampled = torch.tensordot(resampled, matrix.double(), ([axis + 1], [1]))
            resampled = resampled.movedim(-1, axis + 1)
    z, y, x = (LinearAxis.from_matrix(m, n) for m, n in zip(matrices, shape, strict=True))
    whole = torch.full([n + 2 for n in new_shape], 9, dtype=dtype)
    labels = whole[1:-1, 1:-1, 1:-1]
    linear_argmax(data, (z, y, None if matrices[2] is None else x), labels)
    margin = resampled.topk(2, dim=0).values.diff(dim=0)[0].abs()
    assert (labels.long() == resampled.argmax(0))[margin > 1e-5].all()
    assert int((whole == 9).sum()) >= whole.numel() - labels.numel()


@pytest.mark.skipif(not has_linear_argmax(), reason="the C library is not built")
@pytest.mark.parametrize(("half", "label"), [(False, 1), (True, 0)])
def test_the_first_of_equal_values_wins_also_after_rounding_to_half(half, label):
    data = torch.tensor([1.0, 1.0001, 1.0001, 0.5])[:, None, None, None].expand(4, 1, 1, 1)
    axis = LinearAxis.from_matrix(None, 1)
    labels = torch.full((1, 1, 1), 7, dtype=torch.uint8)
    linear_argmax(data.contiguous(), (axis, axis, None), labels, round_half=half)
    assert int(labels) == label


def test_a_cubic_matrix_is_no_linear_axis():
    assert LinearAxis.from_matrix(torch.full((4, 3), 1 / 3), 3) is None
