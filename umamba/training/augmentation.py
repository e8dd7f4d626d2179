"""nnU-Net's training transforms, thinned out."""

from __future__ import annotations

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform

INTENSITY = ("Gaussian", "Multiplicative", "Contrast", "SimulateLow", "Gamma")


def thin_out(transforms: BasicTransform, level: str) -> None:
    """Reduces nnU-Net's composed training transforms in place to `level`: "light" or "none".

    "light" keeps rotation and scaling within narrower limits, brightness, one gamma, and mirroring;
    "none" keeps only what training needs (cropping, label handling, deep supervision targets).
    """
    kept, n_gammas = [], 0
    for transform in transforms.transforms:
        inner = transform.transform if isinstance(transform, RandomTransform) else transform
        is_gamma = isinstance(inner, GammaTransform)
        n_gammas += is_gamma
        left_out = type(inner).__name__.startswith(INTENSITY)
        if isinstance(inner, SpatialTransform):
            inner.p_rotation, inner.p_scaling = (0.2, 0.2) if level == "light" else (0.0, 0.0)
            inner.scaling = (0.8, 1.2)
        elif level == "none":
            left_out = left_out or isinstance(inner, MirrorTransform)
        elif isinstance(inner, MultiplicativeBrightnessTransform) or (is_gamma and n_gammas > 1):
            left_out = False
        if not left_out:
            kept.append(transform)
    transforms.transforms = kept
