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
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from tqdm import tqdm

from umamba.inference.export import logits_to_labels, write_prediction
from umamba.inference.pipeline import run_pipeline
from umamba.inference.predictor import UMambaPredictor
from umamba.inference.preprocessing import PreparedCase

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
    axes = tuple(mirror_axes) if mirror_axes is not None else None
    predictor.manual_initialization(
        network, plans_manager, configuration_manager, None, dataset_json, "", axes
    )
    label_manager = plans_manager.get_label_manager(dataset_json)
    folder = str(preprocessed_folder)
    dataset = infer_dataset_class(folder)(
        folder,
        list(cases),
        None if previous_stage_folder is None else str(previous_stage_folder),
    )
    ending = dataset_json["file_ending"]
    outputs = {case: output_folder / f"{case}{ending}" for case in cases}

    def prepare(case: str) -> PreparedCase:
        data, _, previous, properties = dataset.load_case(case)
        array = np.array(data[:], dtype=np.float32)
        if previous_stage_folder is not None:
            labels = label_manager.foreground_labels
            one_hot = convert_labelmap_to_one_hot(np.asarray(previous[:]), labels, array.dtype)
            array = np.vstack((array, one_hot))
        return PreparedCase(torch.from_numpy(array), properties)

    def export(case: str, prepared: PreparedCase, logits: torch.Tensor) -> None:
        properties = prepared.properties
        labels, probabilities = logits_to_labels(
            logits,
            properties,
            plans_manager,
            configuration_manager,
            label_manager,
            return_probabilities=save_probabilities,
        )
        write_prediction(outputs[case], labels, probabilities, properties, plans_manager, ending)
        for name, (stage_folder, target) in (next_stages or {}).items():
            _write_for_next_stage(
                case, name, stage_folder, target, logits, properties,
                plans_manager, configuration_manager, dataset_json,
            )  # fmt: skip

    with (
        _prepared_for_inference(network),
        tqdm(total=len(cases), desc="validation", unit="case", disable=not progress) as bar,
    ):
        failures = run_pipeline(
            list(cases),
            lambda case: case,
            prepare,
            lambda _, prepared: predictor.predict_logits_from_preprocessed_data(prepared.data),
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
    decoder = getattr(plain, "decoder", None)
    deep_supervision = getattr(decoder, "deep_supervision", None)
    training = network.training
    network.eval()
    if decoder is not None and deep_supervision is not None:
        decoder.deep_supervision = False
    try:
        yield
    finally:
        network.train(training)
        if decoder is not None and deep_supervision is not None:
            decoder.deep_supervision = deep_supervision


def _write_for_next_stage(
    case: str,
    name: str,
    preprocessed_folder: Path,
    target: Path,
    logits: torch.Tensor,
    properties: dict[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
) -> None:
    """The label map at the shape of the next stage's preprocessed case, in nnU-Net's format."""
    dataset_class = infer_dataset_class(str(preprocessed_folder))
    try:
        following = dataset_class(str(preprocessed_folder), [case]).load_case(case)[0]
    except FileNotFoundError:
        logger.warning("%s is not preprocessed for %s: no input for that stage", case, name)
        return
    target.mkdir(parents=True, exist_ok=True)
    resample_and_save(
        logits,
        list(following.shape[1:]),
        str(target / case),
        plans_manager,
        configuration_manager,
        properties,
        dataset_json,
        torch.get_num_threads(),
        dataset_class,
    )
