"""The resampling of logits to the geometry of the image, and the files of a prediction."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from umamba.files import replacing_together
from umamba.inference.probabilities import ProbabilityFile
from umamba.preprocessing.resampling import SeparableResampling, separable_resampling


def write_prediction(
    output: Path,
    labels: np.ndarray,
    probabilities: np.ndarray | ProbabilityFile | None,
    properties: dict[str, Any],
    plans_manager: PlansManager,
    file_ending: str,
) -> None:
    """Writes the label map, and `.npz` + `.pkl` in nnU-Net's form where there are probabilities.

    `output` ends in `file_ending`.  Each file appears whole or not at all, the label map last.
    """
    stem = output.name.removesuffix(file_ending)
    # A folder, not a file: some of nnU-Net's writers put a second file beside the first.
    with replacing_together(output) as folder:
        writer = plans_manager.image_reader_writer_class()
        writer.write_seg(labels, str(folder / output.name), properties)
        if probabilities is not None:
            if isinstance(probabilities, ProbabilityFile):
                probabilities.save(folder / f"{stem}.npz")
            else:
                np.savez_compressed(folder / f"{stem}.npz", probabilities=probabilities)
            (folder / f"{stem}.pkl").write_bytes(pickle.dumps(properties))


def resampling_to_image(
    shape: Sequence[int],
    properties: dict[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
) -> SeparableResampling | None:
    """The operator from logits of this shape to the cropped image, None if it is not separable."""
    configuration = configuration_manager.configuration
    return separable_resampling(
        configuration["resampling_fn_probabilities"],
        configuration["resampling_fn_probabilities_kwargs"],
        shape,
        *_target(properties, plans_manager, configuration_manager),
    )


def resample_whole(
    logits: torch.Tensor,
    properties: dict[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
) -> tuple[SeparableResampling, torch.Tensor]:
    """The operator to the cropped image; what is not separable is applied to the logits here."""
    managers = plans_manager, configuration_manager
    operator = resampling_to_image(logits.shape[1:], properties, *managers)
    if operator is not None:
        return operator, logits
    target = _target(properties, *managers)
    resample = configuration_manager.resampling_fn_probabilities
    return SeparableResampling(target[0]), torch.as_tensor(resample(logits, *target))


def _target(
    properties: dict[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
) -> tuple[tuple[int, ...], list[float], list[float]]:
    """Shape of the cropped image, spacing of the logits, spacing of the image."""
    new_shape = tuple(map(int, properties["shape_after_cropping_and_before_resampling"]))
    image_spacing = [properties["spacing"][i] for i in plans_manager.transpose_forward]
    spacing = configuration_manager.spacing
    if len(spacing) < len(image_spacing):
        # a 2d configuration leaves the distance of the slices as it is
        spacing = [image_spacing[0], *spacing]
    return new_shape, spacing, image_spacing
