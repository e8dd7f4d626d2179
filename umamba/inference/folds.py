"""The weights of several folds, which take turns in one network without being copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from umamba.inference.sliding_window import predict_mirrored, tiles_per_batch
from umamba.inference.streaming import Predict


class FoldWeights:
    """Keeps each fold's weights beside the network, in its layout and on its device."""

    def __init__(self, network: nn.Module, parameters: Sequence[dict[str, torch.Tensor]]) -> None:
        plain = getattr(network, "_orig_mod", network)
        self._own: dict[str, torch.Tensor] = plain.state_dict(keep_vars=True)
        with torch.inference_mode(False), torch.no_grad():
            self._folds = [self._placed(weights) for weights in parameters]

    @contextmanager
    def in_turn(self) -> Iterator[Callable[[int], None]]:
        """Yields what puts the weights of fold number i in place; its own return at the end."""
        before = {name: tensor.data for name, tensor in self._own.items()}
        try:
            yield lambda i: self._put(self._folds[i])
        finally:
            self._put(before)

    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._own.items():
            tensor.data = weights[name]

    def _placed(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # some of nnU-Net's networks have several names for one tensor
        made: dict[tuple[int, torch.Size], torch.Tensor] = {}
        for name, own in self._own.items():
            source = weights[name]
            key = (source.data_ptr(), source.shape)
            if key not in made:
                made[key] = torch.empty_like(own.data).copy_(source)
        return {name: made[weights[name].data_ptr(), weights[name].shape] for name in self._own}


def to_channels_last(network: nn.Module, n_spatial: int) -> None:
    """Lays the weights of convolutions out channel by channel, last to first in memory."""
    layout = torch.channels_last if n_spatial == 2 else torch.channels_last_3d
    for parameter in network.parameters():
        if parameter.ndim == n_spatial + 2:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def exact_tiles(predictor: nnUNetPredictor, use: Callable[[int], object], n_folds: int) -> Predict:
    """Each fold's logits as nnU-Net's own code predicts them, one after another."""
    n_outputs, kind = predictor.label_manager.num_segmentation_heads, predictor.device.type

    def predict(tiles: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        for fold in range(n_folds):
            use(fold)
            with torch.autocast(kind, enabled=kind == "cuda"):
                found = predictor._internal_maybe_mirror_and_predict(tiles)
            yield fold * n_outputs, found

    return predict


def mean_tiles(
    predictor: nnUNetPredictor,
    use: Callable[[int], object],
    n_folds: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Predict:
    """The float32 mean of the folds and of mirrored passes; `autocast` makes the region of each."""
    manager = predictor.configuration_manager
    axes = predictor.allowed_mirroring_axes if predictor.use_mirroring else None
    max_batch = tiles_per_batch(manager.patch_size, manager.batch_size, predictor.device)

    def predict(tiles: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        total: torch.Tensor | None = None
        for fold in range(n_folds):
            use(fold)
            # one region for each: older versions of torch keep the cast weights of the first
            with autocast():
                found = predict_mirrored(predictor.network, tiles, axes, max_batch)
            total = found if total is None else total.add_(found)
            del found
        assert total is not None
        yield 0, total if n_folds == 1 else total.div_(n_folds)

    return predict
