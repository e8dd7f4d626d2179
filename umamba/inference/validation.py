"""Predicts preprocessed training cases in one process: the final validation of a fold."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from tqdm import tqdm

from umamba.files import replacing_together
from umamba.inference.export import write_prediction
from umamba.inference.pipeline import run_pipeline
from umamba.inference.predictor import Predicted, UMambaPredictor
from umamba.inference.preprocessing import PreparedCase, with_previous_stage

logger = logging.getLogger(__name__)


def predict_preprocessed_cases(
    network: nn.Module,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
    preprocessed_folder: Path,
    cases: Sequence[str],
    output_folder: Path,
    *,
    device: torch.device,
    use_mirroring: bool,
    mirror_axes: Sequence[int] | None,
    progress: bool = True,
    save_probabilities: bool = False,
    previous_stage_folder: Path | None = None,
    next_stages: dict[str, tuple[Path, Path]] | None = None,
) -> list[Path]:
    """Writes the label map of each case in the geometry of its image; returns the files.

    The network is used as it is, wrapped or not; deep supervision and train mode are restored.

    Args:
        preprocessed_folder: nnU-Net's, of this configuration.
        cases: identifiers in it.
        mirror_axes: spatial axes that may be mirrored, as the training allows; None for none.
        previous_stage_folder: preprocessed label maps of the previous stage, in a cascade.
        next_stages: for a first stage, by name of the following configuration: its preprocessed
            folder, and the folder that receives this stage's label maps at its shape.

    Raises RuntimeError naming the cases that failed, after all others are written.
    """
    predictor = UMambaPredictor(use_mirroring=use_mirroring, device=device)
    axes = None if mirror_axes is None else tuple(mirror_axes)
    predictor.manual_initialization(
        network, plans_manager, configuration_manager, None, dataset_json, "", axes
    )
    folder = str(preprocessed_folder)
    previous_stage = None if previous_stage_folder is None else str(previous_stage_folder)
    dataset = infer_dataset_class(folder)(folder, list(cases), previous_stage)
    ending = dataset_json["file_ending"]
    output_folder.mkdir(parents=True, exist_ok=True)
    probability_folder = output_folder if save_probabilities else None
    outputs = {case: output_folder / f"{case}{ending}" for case in cases}

    def prepare(case: str) -> PreparedCase:
        data, _, previous, properties = dataset.load_case(case)
        array = np.array(data[:], dtype=np.float32)
        if previous_stage is not None:
            array = with_previous_stage(array, np.asarray(previous[:]), predictor.label_manager)
        return PreparedCase(torch.from_numpy(array), properties)

    def predict(case: str, prepared: PreparedCase) -> Predicted | torch.Tensor:
        if next_stages:
            # a following stage is resampled from the logits to another shape
            return predictor.predict_logits_from_preprocessed_data(prepared.data)
        return predictor.predict_labels(
            prepared.data,
            prepared.properties,
            probability_folder=probability_folder,
            spill_folder=output_folder,
        )

    def export(case: str, prepared: PreparedCase, found: Predicted | torch.Tensor) -> None:
        properties = prepared.properties
        if isinstance(found, torch.Tensor):
            result: Predicted = predictor.to_labels(found, properties, probability_folder)
            for name, (stage, target) in (next_stages or {}).items():
                _write_for_next_stage(predictor, case, name, stage, target, found, properties)
        else:
            result = found
        write_prediction(outputs[case], *result, properties, plans_manager, ending)

    with (
        _prepared_for_inference(network),
        tqdm(total=len(cases), desc="validation", unit="case", disable=not progress) as bar,
    ):
        failures = run_pipeline(
            cases,
            lambda case: case,
            prepare,
            predict,
            export,
            lambda _: bar.update(),
        )
    if failures:
        listing = "; ".join(f"{f.identifier}: {f.reason}" for f in failures)
        raise RuntimeError(f"{len(failures)} of {len(cases)} cases failed: {listing}")
    return list(outputs.values())


@contextmanager
def _prepared_for_inference(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without deep supervision, both as they were afterwards."""
    plain = getattr(network, "module", network)
    plain = getattr(plain, "_orig_mod", plain)
    decoder: Any = getattr(plain, "decoder", None)
    deep_supervision = getattr(decoder, "deep_supervision", None)
    training = network.training
    network.eval()
    if deep_supervision is not None:
        decoder.deep_supervision = False
    try:
        yield
    finally:
        network.train(training)
        if deep_supervision is not None:
            decoder.deep_supervision = deep_supervision


def _write_for_next_stage(
    predictor: UMambaPredictor,
    case: str,
    name: str,
    preprocessed_folder: Path,
    target: Path,
    logits: torch.Tensor,
    properties: dict[str, Any],
) -> None:
    """The label map at the shape of the next stage's preprocessed case, in nnU-Net's format."""
    folder = str(preprocessed_folder)
    dataset_class = infer_dataset_class(folder)
    try:
        following = dataset_class(folder, [case]).load_case(case)[0]
    except FileNotFoundError:
        logger.warning("%s is not preprocessed for %s: no input for that stage", case, name)
        return
    with replacing_together(target / case) as temporary:
        resample_and_save(
            logits,
            list(following.shape[1:]),
            str(temporary / case),
            predictor.plans_manager,
            predictor.configuration_manager,
            properties,
            predictor.dataset_json,
            torch.get_num_threads(),
            dataset_class,
        )
