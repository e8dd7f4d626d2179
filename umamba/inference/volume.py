"""`predict_volume`: the label map of one image held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from umamba.inference.model_folder import Fold
from umamba.inference.predictor import UMambaPredictor


def predict_volume(
    image: np.ndarray,
    spacing: Sequence[float],
    model_folder: str | Path | UMambaPredictor,
    *,
    folds: Sequence[Fold] | Fold | None = None,
    checkpoint_name: str = "checkpoint_final.pth",
    device: torch.device | None = None,
    use_mirroring: bool = True,
    tile_step_size: float = 0.5,
    previous_stage: np.ndarray | None = None,
) -> np.ndarray:
    """The label map (z, y, x) of one image held in memory.

    Args:
        image: (C, z, y, x), channels in the order of dataset.json; a 2-D image has z = 1.
        spacing: (z, y, x) in mm; for a 2-D image the first is not used (nnU-Net writes 999).
        model_folder: path of a trained model folder, or a predictor initialized from one, which is
            quicker for many images and brings its own folds, device and mirroring.
        previous_stage: label map (z, y, x) of the stage before, for the second stage of a cascade.
    """
    if image.ndim != 4:
        raise ValueError(f"image has shape {image.shape}; give (channels, z, y, x)")
    if len(spacing) != 3:
        raise ValueError(f"spacing has {len(spacing)} entries; give (z, y, x) in mm")
    if isinstance(model_folder, UMambaPredictor):
        predictor = model_folder
    else:
        predictor = UMambaPredictor(tile_step_size, use_mirroring=use_mirroring, device=device)
        predictor.initialize_from_trained_model_folder(model_folder, folds, checkpoint_name)
    if image.shape[0] != predictor.n_channels:
        raise ValueError(
            f"image has {image.shape[0]} channels; the network takes {predictor.n_channels}"
        )
    first_stage = predictor.configuration_manager.previous_stage_name
    if (first_stage is None) != (previous_stage is None):
        needs = f"needs the label map of {first_stage}" if first_stage else "takes no label map"
        raise ValueError(f"the network {needs} as previous_stage")
    if previous_stage is not None and previous_stage.shape != image.shape[1:]:
        raise ValueError(
            f"previous_stage has shape {previous_stage.shape}, the image {image.shape[1:]}"
        )
    previous = None if previous_stage is None else previous_stage[None]
    case = predictor.preprocessor().from_array(image, {"spacing": list(spacing)}, previous)
    return predictor.predict_labels(case.data, case.properties)[0]
