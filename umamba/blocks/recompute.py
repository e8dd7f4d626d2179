"""Layers that forget what their mixer computed and compute it again in backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import umamba.ops.selective_scan  # noqa: F401  registers the operator


class RecomputableLayer(nn.Module):
    """A layer whose `recomputable` method is computed again in backward where `recomputes` is set.

    Until then it keeps its input and the results of its scans, so that no scan is run twice.
    """

    recomputes = False


def recompute_mixers(network: nn.Module, on: bool = True) -> None:
    """Makes every RecomputableLayer of the network compute its mixer again in backward, or not."""
    for module in network.modules():
        if isinstance(module, RecomputableLayer):
            module.recomputes = on


def recomputable(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Makes a RecomputableLayer's method compute again in backward what is not a scan's result."""

    @functools.wraps(method)
    def run(layer: RecomputableLayer, features: Tensor) -> Tensor:
        if not (layer.recomputes and torch.is_grad_enabled()):
            return method(layer, features)
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_scans)
        result: Tensor = checkpoint(
            method, layer, features, use_reentrant=False, context_fn=contexts
        )
        return result

    return run


def _keep_scans(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    if operator is torch.ops.umamba.selective_scan_fwd.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
