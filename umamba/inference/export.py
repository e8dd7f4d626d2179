"""From logits to a label map in the geometry of the image, block by block, under a memory limit."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from umamba.files import replacing_together
from umamba.inference.labels import decide, label_dtype
from umamba.inference.probabilities import ProbabilityFile
from umamba.preprocessing.resampling import (
    MEMORY_LIMIT,
    SeparableResampling,
    output_blocks,
    separable_resampling,
)

# Legend: K classes or regions; z, y, x extents of the logits, Z, Y, X extents of the cropped image.


def logits_to_labels(
    logits: torch.Tensor,
    properties: dict[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    label_manager: LabelManager,
    *,
    return_probabilities: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Label map of the whole image, and probabilities (K, ...) if asked for, in its own axis order.

    Equal to nnU-Net's export but for rounding (1e-5 of the logits), without ever holding all
    classes at full size: logits are resampled, and decided, in blocks of about `memory_limit`
    bytes.

    Args:
        logits: (K, z, y, x) float32 on the CPU, as predicted at the configuration's spacing.
        properties: what nnU-Net's preprocessor recorded about the case.
    """
    operator, logits = _resampling(logits, properties, plans_manager, configuration_manager)
    full_shape = tuple(properties["shape_before_cropping"])
    crop = tuple(slice(int(a), int(b)) for a, b in properties["bbox_used_for_cropping"])
    labels = np.zeros(full_shape, dtype=label_dtype(label_manager))
    cropped_labels = labels[crop]
    probabilities = None
    if return_probabilities:
        probabilities = np.zeros((len(logits), *full_shape), dtype=np.float32)
        if not label_manager.has_regions:
            probabilities[0] = 1
        cropped_probabilities = probabilities[(slice(None), *crop)]

    bounds = operator.clip_bounds(logits)
    for rows, columns in output_blocks(operator.new_shape, len(logits), memory_limit):
        block = operator.block(logits, rows, columns, bounds)
        cropped_labels[rows, columns] = decide(block, label_manager, labels.dtype.type)
        if return_probabilities:
            cropped_probabilities[:, rows, columns] = label_manager.apply_inference_nonlin(block)

    backward = plans_manager.transpose_backward
    if probabilities is not None:
        probabilities = probabilities.transpose([0, *[i + 1 for i in backward]])
    return labels.transpose(backward), probabilities


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


def _resampling(
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
