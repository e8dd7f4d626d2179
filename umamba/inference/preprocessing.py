"""Prepares a case for prediction as nnU-Net does, without its needless steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import (
    LabelManager,
    convert_labelmap_to_one_hot,
)
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from umamba.preprocessing.case import CaseSettings, preprocess_case
from umamba.preprocessing.reading import ReadCase, read_case


@dataclass
class PreparedCase:
    """A case as the network takes it: data (C, z, y, x) float32, and nnU-Net's record of it."""

    data: torch.Tensor
    properties: dict[str, Any]


class CasePreprocessor:
    """Turns images of a case, from files or memory, into a `PreparedCase`."""

    def __init__(
        self, plans_manager: PlansManager, configuration: dict, dataset_json: dict, exact: bool
    ) -> None:
        """exact: nnU-Net's own code does it, as it does what is not known here."""
        manager = _PredictionConfiguration(configuration)
        if manager.preprocessor_class is None:
            raise ValueError(
                f"plans.json names the preprocessor {manager.preprocessor_name}, which nnunetv2 "
                "does not have; install the nnunetv2 that made these plans"
            )
        self.preprocessor = manager.preprocessor_class(verbose=False)
        self.label_manager = plans_manager.get_label_manager(dataset_json)
        self.settings = (
            None if exact else CaseSettings.from_plans(plans_manager.plans, configuration)
        )
        self._plans = (plans_manager, manager, dataset_json)

    def from_files(self, images: Sequence[Path], previous_stage: Path | None) -> PreparedCase:
        """Reads and prepares; in a cascade, `previous_stage` is the label map before."""
        previous = None if previous_stage is None else str(previous_stage)
        files = [str(image) for image in images]
        if self.settings is not None:
            return self._prepare(read_case(files, previous, self.settings.reader), self.settings)
        data, seg, found = self.preprocessor.run_case(files, previous, *self._plans)
        return self._prepared(data, None if previous is None else seg[0], found)

    def from_array(
        self, image: np.ndarray, properties: dict[str, Any], previous_stage: np.ndarray | None
    ) -> PreparedCase:
        """Prepares (C, z, y, x); needs "spacing" in properties; previous_stage (1, z, y, x)."""
        if self.settings is not None:
            previous = None if previous_stage is None else previous_stage[0]
            case = ReadCase(np.array(image, np.float32), previous, dict(properties))
            return self._prepare(case, self.settings)
        arguments = (image, previous_stage, dict(properties))
        data, seg, found = self.preprocessor.run_case_npy(*arguments, *self._plans)
        return self._prepared(data, None if previous_stage is None else seg[0], found)

    def _prepare(self, case: ReadCase, settings: CaseSettings) -> PreparedCase:
        (done,) = preprocess_case(case, [settings], None)
        return self._prepared(done.data, done.labels, done.properties)

    def _prepared(
        self, data: np.ndarray, previous: np.ndarray | None, properties: dict[str, Any]
    ) -> PreparedCase:
        if previous is not None:
            data = with_previous_stage(data, previous, self.label_manager)
        return PreparedCase(torch.from_numpy(data).float().contiguous(), properties)


def with_previous_stage(
    data: np.ndarray, labels: np.ndarray, label_manager: LabelManager
) -> np.ndarray:
    """The data (C, z, y, x) with one channel more for each foreground label of the stage before."""
    one_hot = convert_labelmap_to_one_hot(labels, label_manager.foreground_labels, data.dtype)
    return np.vstack((data, one_hot))


class _PredictionConfiguration(ConfigurationManager):
    """The plans' configuration, for nnU-Net's own preprocessor."""

    @property
    def resampling_fn_seg(self) -> Callable[..., Any]:
        if self.previous_stage_name is not None:
            return super().resampling_fn_seg
        # Without a previous stage the map only marks what is outside, and is thrown away.
        return lambda seg, *_: seg
