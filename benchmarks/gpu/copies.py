"""Our layers computed as the official code does: scans of sequences, copied for every direction.

state-spaces/mamba, mamba_simple.py (one direction); ge-xing/SegMamba, the same file with two more;
MzeroMiko/VMamba, vmamba.py (four, stacked). The steps are theirs, the parameters our layer's.

B batch, C channels, E d_inner, L tokens, N states, R dt_rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.official import Official


def copied_mixer_layer(layer: Any, official: Official, features: Tensor) -> Tensor:
    """What a MixerLayer with voxel tokens gives for features (B, C, *spatial)."""
    mixer = layer.mixer
    tokens = layer.norm(features.flatten(2).transpose(1, 2))  # (B, L, C)
    both = mixer.in_proj.weight @ tokens.transpose(1, 2)  # (B, 2E, L): values, gate
    total: Tensor | None = None
    for order, direction in zip(mixer.orders, mixer.directions, strict=True):
        sequence = to_order(both, order)
        scanned = from_order(scan_sequence(direction, official, sequence), order)
        total = scanned if total is None else total + scanned
    assert total is not None
    out = mixer.out_proj(total.transpose(1, 2))  # (B, L, C)
    mixed = out.transpose(1, 2).reshape(features.shape)
    return features + mixed if layer.residual else mixed


def to_order(sequence: Tensor, order: str) -> Tensor:
    """(B, E, L) in raster order as a copy in the order named."""
    if order == "raster":
        return sequence
    if order == "raster_reversed":
        return sequence.flip(-1)
    slices = sequence.chunk(n_slices(order), dim=-1)
    return torch.stack(slices, dim=-1).flatten(-2)


def from_order(sequence: Tensor, order: str) -> Tensor:
    """The inverse of to_order."""
    if order == "raster":
        return sequence
    if order == "raster_reversed":
        return sequence.flip(-1)
    slices = sequence.unflatten(-1, (-1, n_slices(order)))
    return slices.transpose(-1, -2).flatten(-2)


def n_slices(order: str) -> int:
    return int(order.removeprefix("inter_slice_"))


def scan_sequence(direction: Any, official: Official, both: Tensor) -> Tensor:
    """Convolution, projections and scan of a sequence (B, 2E, L) -> (B, E, L)."""
    x, gate = both.chunk(2, dim=1)
    x = official.conv(x, direction.conv_weight.squeeze(1), direction.conv_bias)
    batch, channels, length = x.shape
    rows = x.transpose(1, 2).reshape(batch * length, channels)
    rank, n_states = direction.dt_proj_weight.shape[1], direction.A_log.shape[1]
    dt, B, C = functional.linear(rows, direction.x_proj_weight).split([rank, n_states, n_states], 1)
    delta = (direction.dt_proj_weight @ dt.t()).unflatten(1, (batch, length)).transpose(0, 1)
    matrices = [
        matrix.unflatten(0, (batch, length)).transpose(1, 2).unsqueeze(1).contiguous()
        for matrix in (B, C)
    ]
    decay = -torch.exp(direction.A_log)
    return official.scan(x, delta, decay, *matrices, direction.D, gate, direction.dt_proj_bias)


def copied_ss2d(mixer: Any, official: Official, features: Tensor) -> Tensor:
    """What SS2D with its default options gives for features (B, H, W, C)."""
    height, width = features.shape[1:3]
    x, gate = mixer.in_proj(features).chunk(2, dim=-1)
    x = functional.silu(mixer.conv(x.permute(0, 3, 1, 2).contiguous()))  # (B, E, H, W)
    ahead = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    walked = torch.cat([ahead, ahead.flip(-1)], 1)  # (B, 4, E, L)
    rank, n_states = mixer.dt_proj_weight.shape[2], mixer.A_log.shape[2]
    projected = torch.einsum("bkel,kce->bkcl", walked, mixer.x_proj_weight)
    dt, B, C = projected.split([rank, n_states, n_states], dim=2)
    delta = torch.einsum("bkrl,ker->bkel", dt, mixer.dt_proj_weight)
    out = official.scan(
        walked.flatten(1, 2),
        delta.flatten(1, 2).contiguous(),
        -torch.exp(mixer.A_log.flatten(0, 1)),
        B.contiguous(),
        C.contiguous(),
        mixer.D.flatten(),
        None,
        mixer.dt_proj_bias.flatten(),
    ).unflatten(1, (4, -1))
    pairs = out[:, :2] + out[:, 2:].flip(-1)
    columns = pairs[:, 1].unflatten(-1, (width, height)).transpose(2, 3)
    merged = pairs[:, 0].unflatten(-1, (height, width)) + columns
    normalized = mixer.out_norm(merged.permute(0, 2, 3, 1))
    return mixer.out_proj(normalized * functional.silu(gate))  # type: ignore[no-any-return]
