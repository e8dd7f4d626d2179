"""The arithmetic of one case: transpose, crop, normalize, resample, draw foreground locations.

Equal to nnU-Net's DefaultPreprocessor: data to 1e-5, labels and locations exactly. Imports torch
only for a device. Several configurations of the same plans share what is the same for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umamba.preprocessing.cropping import crop, nonzero_box, outside_of_body
from umamba.preprocessing.geometry import shape_at_spacing
from umamba.preprocessing.label_resampling import is_fused, resample_labels
from umamba.preprocessing.locations import ClassOrRegion, draw_locations
from umamba.preprocessing.normalization import SCHEMES, normalize
from umamba.preprocessing.reading import ReadCase, as_labels
from umamba.preprocessing.resampling import (
    MEMORY_LIMIT,
    SeparableResampling,
    is_separable,
    separable_resampling,
)


@dataclass(frozen=True, eq=False)
class CaseSettings:
    """What the plans say about a case, for one configuration; plain values, cheap to send."""

    reader: str
    transpose_forward: tuple[int, ...]
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    schemes: tuple[str, ...]
    use_mask: tuple[bool, ...]
    intensities: Mapping[str, Any]
    data_function: str
    data_options: dict[str, Any]
    label_function: str
    label_options: dict[str, Any]

    @classmethod
    def from_plans(
        cls, plans: Mapping[str, Any], configuration: Mapping[str, Any]
    ) -> CaseSettings | None:
        """Return the settings; None for what is not done here, so that nnU-Net's code runs."""
        if "foreground_intensity_properties_per_channel" not in plans:
            return None  # plans of an early nnU-Net, whose other words its own code knows
        settings = cls(
            plans["image_reader_writer"],
            tuple(plans["transpose_forward"]),
            tuple(configuration["spacing"]),
            tuple(configuration["patch_size"]),
            tuple(configuration["normalization_schemes"]),
            tuple(configuration["use_mask_for_norm"]),
            plans["foreground_intensity_properties_per_channel"],
            configuration["resampling_fn_data"],
            configuration["resampling_fn_data_kwargs"],
            configuration["resampling_fn_seg"],
            configuration["resampling_fn_seg_kwargs"],
        )
        known = (
            configuration["preprocessor_name"] == "DefaultPreprocessor"
            and all(scheme in SCHEMES for scheme in settings.schemes)
            and is_separable(settings.data_function, settings.data_options)
            and is_fused(settings.label_function, settings.label_options)
        )
        return settings if known else None

    @property
    def normalization(self) -> tuple[Any, ...]:
        """What decides the normalized image."""
        return self.schemes, self.use_mask

    def target(
        self, shape: Sequence[int], spacing: Sequence[float]
    ) -> tuple[tuple[int, ...], list[float]]:
        """Return shape and spacing (z, y, x) of a transposed and cropped image after resampling."""
        # a 2d configuration leaves the distance of the slices as it is
        wanted = [*spacing[: 3 - len(self.spacing)], *self.spacing]
        return shape_at_spacing(shape, spacing, wanted), wanted


@dataclass
class PreprocessedCase:
    """data (C, z, y, x) float32, labels (z, y, x) int16 or None, and nnU-Net's properties."""

    data: np.ndarray
    labels: np.ndarray | None
    properties: dict[str, Any]


def preprocess_case(
    case: ReadCase,
    all_settings: Sequence[CaseSettings],
    classes: Sequence[ClassOrRegion] | None,
    device: str | None = None,
) -> list[PreprocessedCase]:
    """Return the case as each configuration takes it; results may share arrays.

    The image of `case` is used up: it is normalized in place. all_settings: of one plans file.
    classes: of which to draw locations (None: of none). device: where torch resamples the image;
    by default numpy does it.
    """
    first = all_settings[0]
    axes = first.transpose_forward
    image = case.image.transpose([0, *[axis + 1 for axis in axes]])
    spacing = [case.properties["spacing"][axis] for axis in axes]
    properties = case.properties | {"shape_before_cropping": image.shape[1:]}
    box = nonzero_box(image)
    image = crop(image, box)
    properties["bbox_used_for_cropping"] = box
    properties["shape_after_cropping_and_before_resampling"] = image.shape[1:]
    masked = any(any(s.use_mask) for s in all_settings)
    outside = outside_of_body(image) if masked or case.labels is not None else None
    labels = None
    if case.labels is not None:
        labels = as_labels(crop(case.labels.transpose(axes), box))
        if outside is not None:
            labels[(labels == 0) & outside] = -1
    inside = _inside(labels, outside) if masked else None

    normalized: dict[Any, np.ndarray] = {}
    resampled: dict[Any, np.ndarray] = {}
    drawn: dict[Any, tuple[np.ndarray | None, dict[Any, Any] | None]] = {}
    n_normalizations = len({s.normalization for s in all_settings})
    results = []
    for settings in all_settings:
        key = settings.normalization
        if key not in normalized:
            normalized[key] = image.copy() if n_normalizations > 1 else image
            _normalize(normalized[key], settings, inside)
        shape, wanted = settings.target(image.shape[1:], spacing)
        steps = (shape, tuple(wanted), repr(settings.data_options), repr(settings.label_options))
        if (key, steps) not in resampled:
            function, options = settings.data_function, settings.data_options
            geometry = (image.shape[1:], shape, spacing, wanted)
            operator = separable_resampling(function, options, *geometry)
            assert operator is not None
            resampled[key, steps] = _resample(operator, normalized[key], device)
        if steps not in drawn:
            there = labels
            if there is not None:
                there = resample_labels(there, shape, settings.label_options, spacing, wanted)
            locations = None if classes is None or there is None else draw_locations(there, classes)
            drawn[steps] = there, locations
        found, locations = drawn[steps]
        own = {} if locations is None else {"class_locations": locations}
        results.append(PreprocessedCase(resampled[key, steps], found, properties | own))
    return results


def _normalize(image: np.ndarray, settings: CaseSettings, inside: np.ndarray | None) -> None:
    for index, channel in enumerate(image):
        mask = inside if settings.use_mask[index] else None
        normalize(channel, settings.schemes[index], mask, settings.intensities[str(index)])


def _resample(operator: SeparableResampling, data: np.ndarray, device: str | None) -> np.ndarray:
    if device is None or operator.is_identity:
        return operator.whole(data)
    import torch

    tensor = torch.from_numpy(data).to(device)
    # a GPU has no use for blocks that fit a cache
    limit = MEMORY_LIMIT if tensor.device.type == "cpu" else 16 * MEMORY_LIMIT
    result: np.ndarray = operator.whole(tensor, limit).cpu().numpy()
    return result


def _inside(labels: np.ndarray | None, outside: np.ndarray | None) -> np.ndarray | None:
    """Where nnU-Net normalizes under a mask: at labels of 0 and more; None is everywhere."""
    if labels is not None:
        inside = labels >= 0
        return None if inside.all() else inside
    return None if outside is None else ~outside
