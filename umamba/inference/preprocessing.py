"""Prepares a case for prediction with nnU-Net's preprocessor, without its needless steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from umamba.inference.resampling import separable_resampling


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
        self.plans_manager = plans_manager
        self.dataset_json = dataset_json
        self.configuration_manager = _PredictionConfiguration(configuration, exact)
        preprocessor_class = self.configuration_manager.preprocessor_class
        if preprocessor_class is None:
            raise ValueError(
                "plans.json names the preprocessor "
                f"{self.configuration_manager.preprocessor_name}, which nnunetv2 "
                "does not have; install the nnunetv2 that made these plans"
            )
        self.preprocessor = preprocessor_class(verbose=False)
        self.label_manager = plans_manager.get_label_manager(dataset_json)

    def from_files(self, images: Sequence[Path], previous_stage: Path | None) -> PreparedCase:
        """Reads and prepares; in a cascade, `previous_stage` is the label map before."""
        data, seg, properties = self.preprocessor.run_case(
            [str(i) for i in images],
            str(previous_stage) if previous_stage is not None else None,
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
        )
        return self._prepared(data, seg, properties, previous_stage is not None)

    def from_array(
        self, image: np.ndarray, properties: dict[str, Any], previous_stage: np.ndarray | None
    ) -> PreparedCase:
        """Prepares (C, z, y, x); needs "spacing" in properties; previous_stage (1, z, y, x)."""
        data, seg, properties = self.preprocessor.run_case_npy(
            image,
            previous_stage,
            dict(properties),
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
        )
        return self._prepared(data, seg, properties, previous_stage is not None)

    def _prepared(
        self, data: np.ndarray, seg: np.ndarray, properties: dict[str, Any], cascaded: bool
    ) -> PreparedCase:
        if cascaded:
            labels = self.label_manager.foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))
        tensor = torch.from_numpy(data)
        return PreparedCase(tensor.to(torch.float32).contiguous(), properties)


class _PredictionConfiguration(ConfigurationManager):
    """The plans' configuration, with resampling fit for prediction."""

    def __init__(self, configuration: dict, exact: bool) -> None:
        super().__init__(configuration)
        self._exact = exact

    @property
    def resampling_fn_data(self) -> Callable[..., Any]:
        stock = super().resampling_fn_data
        if self._exact:
            return stock

        def resample(data: np.ndarray, new_shape: Any, spacing: Any, new_spacing: Any) -> Any:
            operator = separable_resampling(
                self.configuration["resampling_fn_data"],
                self.configuration["resampling_fn_data_kwargs"],
                data.shape[1:],
                new_shape,
                spacing,
                new_spacing,
            )
            if operator is None or data.dtype != np.float32:
                return stock(data, new_shape, spacing, new_spacing)
            return operator.whole(torch.from_numpy(np.ascontiguousarray(data))).numpy()

        return resample

    @property
    def resampling_fn_seg(self) -> Callable[..., Any]:
        if self.previous_stage_name is not None:
            return super().resampling_fn_seg
        # Without a previous stage the map only marks what is outside, and is thrown away.
        return lambda seg, *_: seg
