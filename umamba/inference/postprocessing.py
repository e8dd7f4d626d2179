"""Writes post-processing in the form that nnUNetv2_apply_postprocessing takes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.postprocessing.remove_connected_components import (
    remove_all_but_largest_component_from_segmentation,
)

from umamba.files import replacing


def write_nnunet_postprocessing(groups: Sequence[Sequence[int]], file: Path) -> None:
    """Writes postprocessing.pkl: nnU-Net's function by its name, and the groups to apply it to."""
    functions = [remove_all_but_largest_component_from_segmentation] * len(groups)
    arguments = [{"labels_or_regions": list(group)} for group in groups]
    with replacing(file) as temporary:
        temporary.write_bytes(pickle.dumps((functions, arguments)))
