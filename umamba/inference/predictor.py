"""`UMambaPredictor`: nnU-Net's predictor with float32 sums, in one process, without a trainer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from umamba.inference import memory
from umamba.inference.blocks import BlockSums, WindowGrid
from umamba.inference.cases import PredictionCase
from umamba.inference.empty import background_logits, find_empty_windows
from umamba.inference.export import resample_whole, resampling_to_image, write_prediction
from umamba.inference.folds import FoldWeights, exact_tiles, mean_tiles, to_channels_last
from umamba.inference.labels import LabelMaker
from umamba.inference.model_folder import (
    Fold,
    build_network,
    check_weights,
    find_model_folder,
    read_checkpoint,
    read_json,
    select_folds,
)
from umamba.inference.pipeline import CaseFailure, run_pipeline
from umamba.inference.preprocessing import CasePreprocessor, PreparedCase
from umamba.inference.probabilities import ProbabilityFile
from umamba.inference.sliding_window import nnunet_weight, tiles_per_batch, window_weight
from umamba.inference.streaming import (
    PIECE_BYTES,
    Piece,
    mean_of_half_sums,
    mean_of_sums,
    plane_bytes,
    stream_windows,
)
from umamba.memory import available_memory
from umamba.networks.precision import Precision, autocast, check_precision
from umamba.preprocessing.resampling import SeparableResampling

Predicted = tuple[np.ndarray, np.ndarray | ProbabilityFile | None]


class UMambaPredictor(nnUNetPredictor):
    """Predicts with the network of a model folder, or with one handed to `manual_initialization`.

    Windows, mirroring, preprocessing and file formats are nnU-Net's.  Sums over windows, mirrored
    passes and folds are float32, where nnU-Net's are half precision; with `nnunet_exact` every step
    is nnU-Net's own arithmetic, and the labels equal its own voxel for voxel.  On a GPU the network
    runs in the precision of the recipe in the plans, without a recipe in "auto", else in float32;
    `precision` overrides it.  With `skip_empty` tiles that cannot hold foreground are background.
    """

    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device | None = None,
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = False,
        *,
        nnunet_exact: bool = False,
        skip_empty: bool = False,
        precision: Precision | None = None,
    ) -> None:
        if nnunet_exact and skip_empty:
            raise ValueError("--nnunet-exact computes every tile; leave out --skip-empty")
        # nnU-Net prints a line for every device but CUDA
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                tile_step_size, use_gaussian, use_mirroring, perform_everything_on_device,
                device or default_device(), verbose, verbose_preprocessing, allow_tqdm,
            )  # fmt: skip
        self.nnunet_exact = nnunet_exact
        check_precision(precision, self.device, nnunet_exact)
        self.skip_empty, self.precision = skip_empty, precision
        self.folds: tuple[Fold, ...] = ()
        self.on_windows_done: Callable[[float], object] = lambda share: None
        self.max_ram: int | None = None
        self.max_vram: int | None = None
        self.on_plan: Callable[[str], object] = lambda sentence: None
        self._fold_weights: FoldWeights | None = None

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str | Path,
        use_folds: Sequence[Fold] | Fold | None = None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """Builds the network from the folder's plans alone and reads the weights of the folds.

        `use_folds`: None takes every numbered fold that has the checkpoint, else "all".
        Raises ValueError (`UnknownFoldError` for folds) or FileNotFoundError with the cure.
        """
        folder = find_model_folder(model_training_output_dir)
        if isinstance(use_folds, str | int):
            use_folds = (use_folds,)
        self.folds = select_folds(folder, use_folds, checkpoint_name)
        plans_manager = PlansManager(read_json(folder / "plans.json"))
        dataset_json = read_json(folder / "dataset.json")
        files = [folder / f"fold_{fold}" / checkpoint_name for fold in self.folds]
        checkpoint = read_checkpoint(files[0])
        name = checkpoint["init_args"]["configuration"]
        known = plans_manager.available_configurations
        if name not in known:
            raise ValueError(
                f"{files[0]} was trained with the configuration {name}, which its plans.json "
                f"does not have (it has {', '.join(known)})"
            )
        configuration_manager = plans_manager.get_configuration(name)
        network = build_network(plans_manager, configuration_manager, dataset_json)
        parameters = [checkpoint["network_weights"]]
        parameters += [read_checkpoint(file)["network_weights"] for file in files[1:]]
        for file, weights in zip(files, parameters, strict=True):
            check_weights(network, weights, file)
        n_spatial = len(configuration_manager.patch_size)
        if self.device.type == "cpu" and n_spatial == 2 and not self.nnunet_exact:
            # spares oneDNN reordering between convolutions; a plain 3-D U-Net loses by it
            to_channels_last(network, n_spatial)
        self.manual_initialization(
            network,
            plans_manager,
            configuration_manager,
            parameters,
            dataset_json,
            checkpoint.get("trainer_name", ""),
            checkpoint.get("inference_allowed_mirroring_axes"),
        )

    def manual_initialization(
        self,
        network: torch.nn.Module,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        parameters: list[dict[str, torch.Tensor]] | None,
        *others: Any,
        **named: Any,
    ) -> None:
        """Takes a network, and the weights of its folds, or None to leave it as it is."""
        if parameters:
            network.load_state_dict(parameters[0])
        self._fold_weights = None
        super().manual_initialization(
            network, plans_manager, configuration_manager, parameters, *others, **named
        )

    def limit_memory(self, max_ram: int | None = None, max_vram: int | None = None) -> None:
        """Bytes that this process may take; ValueError for a limit of a GPU that is not used."""
        if max_vram is not None:
            memory.limit_device(self.device, max_vram)
        self.max_ram, self.max_vram = max_ram, max_vram

    @torch.inference_mode()
    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Logits (K, z, y, x) on the CPU for preprocessed data (C, z, y, x), the folds' mean."""
        if self.nnunet_exact:
            return super().predict_logits_from_preprocessed_data(data)
        n_outputs = self.label_manager.num_segmentation_heads
        logits = torch.empty(n_outputs, *data.shape[1:])
        for piece in self._stream(data, logits.nbytes, None):
            piece.fill(logits[:, piece.z, piece.y])
        return logits

    @torch.inference_mode()
    def predict_labels(
        self,
        data: torch.Tensor,
        properties: dict[str, Any],
        *,
        probability_folder: Path | None = None,
        spill_folder: Path | None = None,
    ) -> Predicted:
        """Label map of preprocessed data (C, z, y, x), in the geometry of the image.

        Logits are resampled and decided as soon as they are final, so all classes are never held
        for the whole volume; only where their resampling is not linear (order above 1, or no
        spline) are they. Raises ValueError where `max_ram` bytes are too few.

        Args:
            probability_folder: where probabilities, if asked for, wait in a file without a name.
            spill_folder: where pending sums wait if memory is short (the system's default).
        """
        managers = self.plans_manager, self.configuration_manager
        operator = resampling_to_image(data.shape[1:], properties, *managers)
        if operator is None or operator.clip:
            self.on_plan("holds the logits of the whole volume: their resampling is not linear")
            logits = self.predict_logits_from_preprocessed_data(data)
            return self.to_labels(logits, properties, probability_folder)
        maker, sink = self._label_maker(operator, data.shape[1:], properties, probability_folder)
        try:
            for piece in self._stream(data, maker.n_bytes, spill_folder):
                maker.add(piece.z, piece.y, piece.fill)
                del piece  # and with it sums, before the network runs again
        except BaseException:
            if sink is not None:
                sink.close()
            raise
        return maker.labels.transpose(self.plans_manager.transpose_backward), sink

    def to_labels(
        self, logits: torch.Tensor, properties: dict[str, Any], probability_folder: Path | None
    ) -> Predicted:
        """What `predict_labels` returns, of logits (K, z, y, x) that are all there."""
        managers = self.plans_manager, self.configuration_manager
        if self.nnunet_exact:
            with_probabilities = probability_folder is not None
            result = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.numpy(), *managers, self.label_manager, properties, with_probabilities,
                torch.get_num_threads(),
            )  # fmt: skip
            return result if with_probabilities else (result, None)
        operator, logits = resample_whole(logits, properties, *managers)
        maker, sink = self._label_maker(operator, logits.shape[1:], properties, probability_folder)
        maker.add_whole(logits)
        return maker.labels.transpose(self.plans_manager.transpose_backward), sink

    def _label_maker(
        self,
        operator: SeparableResampling,
        shape: Sequence[int],
        properties: dict[str, Any],
        probability_folder: Path | None,
    ) -> tuple[LabelMaker, ProbabilityFile | None]:
        sink = None
        if probability_folder is not None:
            sink = ProbabilityFile.of_case(
                probability_folder, properties, self.plans_manager, self.label_manager
            )
        half = self.nnunet_exact
        maker = LabelMaker(
            operator, shape, properties, self.label_manager, half=half, probabilities=sink
        )
        return maker, sink

    def _stream(
        self, data: torch.Tensor, n_bytes: int, spill_folder: Path | None
    ) -> Iterator[Piece]:
        """Pieces of the logits, in the arithmetic asked for, within the memory allowed.

        n_bytes: what those take who receive the pieces.
        """
        patch_size, exact = self.configuration_manager.patch_size, self.nnunet_exact
        network: Any = self.network
        network.to(self.device).eval()
        n_folds = max(1, len(self.list_of_parameters or ()))
        data, inside = pad_nd_image(data, patch_size, "constant", {"value": 0}, True, None)
        windows = self._internal_get_sliding_window_slicers(data.shape[1:])
        skipped: frozenset[int] = frozenset()
        if self.skip_empty:
            skipped = find_empty_windows(data, windows, inside[1:], self.n_channels)
            self.on_plan(f"skips {len(skipped)} of {len(windows)} tiles: they are empty")
        on_device = self.perform_everything_on_device
        weight = window_weight(patch_size, self.use_gaussian and len(windows) > 1)
        if exact:
            weight = nnunet_weight(patch_size, self.use_gaussian, self.device)
        n_channels = self.label_manager.num_segmentation_heads * (n_folds if exact else 1) + 1
        dtype = torch.half if exact else torch.float32
        if self.max_ram is not None:
            memory.return_freed_memory()
        whole_rows = WindowGrid(windows, data.shape[1:], whole_rows=True, skipped=skipped)
        # a piece, the one before, and what is computed on the way
        n_bytes += max(4 * PIECE_BYTES, 2 * plane_bytes(whole_rows, n_channels))
        fixed = memory.resident_bytes() + n_bytes
        limit = self.max_ram or memory.resident_bytes() + available_memory()
        memory.reset_peak(self.device)
        before = memory.resident_bytes()

        def make_sums() -> BlockSums:
            of_network = max(0, memory.peak_bytes() - before)
            plan = memory.plan_memory(
                (whole_rows, WindowGrid(windows, data.shape[1:], skipped=skipped)),
                n_channels * dtype.itemsize, limit=limit, fixed=fixed, network=of_network,
                device=memory.device_memory(self.device, self.max_vram) if on_device else None,
            )  # fmt: skip
            self.on_plan(plan.sentence)
            return BlockSums(
                plan.grid, n_channels, dtype=dtype,
                device=self.device if plan.on_device else torch.device("cpu"),
                budget=plan.budget, spill_folder=spill_folder,
                background=background_logits(self.label_manager),
            )  # fmt: skip

        with contextlib.ExitStack() as stack:
            use: Callable[[int], object] = lambda fold: None  # noqa: E731
            if n_folds > 1:
                if self._fold_weights is None:
                    self._fold_weights = FoldWeights(self.network, self.list_of_parameters)
                use = stack.enter_context(self._fold_weights.in_turn())
            yield from stream_windows(
                exact_tiles(self, use, n_folds)
                if exact
                else mean_tiles(self, use, n_folds, self.autocast),
                data.cpu(),
                windows,
                weight,
                make_sums,
                mean_of_half_sums if exact else mean_of_sums,
                device=self.device,
                inside=inside[1:],
                max_batch=1 if exact else self._max_batch(),
                skipped=skipped,
                progress=self.on_windows_done,
            )

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The region in which the network runs."""
        recipe = self.configuration_manager.configuration.get("recipe") or {}
        return autocast(self.device, recipe.get("precision", "auto"), self.precision)

    def _max_batch(self) -> int:
        configuration = self.configuration_manager
        return tiles_per_batch(configuration.patch_size, configuration.batch_size, self.device)

    @property
    def n_channels(self) -> int:
        """Channels of an image, the previous stage of a cascade not counted."""
        return len(self.dataset_json.get("channel_names") or self.dataset_json.get("modality", {}))

    def preprocessor(self) -> CasePreprocessor:
        configuration = self.configuration_manager.configuration
        return CasePreprocessor(
            self.plans_manager, configuration, self.dataset_json, self.nnunet_exact
        )

    def predict_cases(
        self,
        cases: Sequence[PredictionCase],
        *,
        save_probabilities: bool = False,
        on_done: Callable[[PredictionCase], object] | None = None,
        check: Callable[[PredictionCase], object] | None = None,
    ) -> list[CaseFailure]:
        """Predicts the cases and writes their outputs; returns those that failed.

        `check` is called with each case right before its images are read, in another thread; a case
        for which it raises ValueError is not predicted.
        """
        first_stage = self.configuration_manager.previous_stage_name
        if first_stage is not None and any(case.previous_stage is None for case in cases):
            raise ValueError(
                "this network is the second stage of a cascade; give the folder of the label "
                f"maps of {first_stage} (-prev_stage_predictions)"
            )
        preprocessor = self.preprocessor()

        def prepare(case: PredictionCase) -> PreparedCase:
            if check is not None:
                check(case)
            return preprocessor.from_files(case.images, case.previous_stage)

        def predict(case: PredictionCase, prepared: PreparedCase) -> Predicted:
            folder = case.output.parent
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return self.predict_labels(
                    prepared.data, prepared.properties,
                    probability_folder=folder if save_probabilities else None, spill_folder=folder,
                )  # fmt: skip
            except OSError as error:
                if error.filename is not None:
                    raise
                # of a temporary file, which has no name
                raise OSError(error.errno, error.strerror, str(folder)) from error

        def export(case: PredictionCase, prepared: PreparedCase, result: Predicted) -> None:
            write_prediction(
                case.output, *result, prepared.properties, self.plans_manager, case.file_ending
            )

        return run_pipeline(
            cases,
            lambda case: case.identifier,
            prepare,
            predict,
            export,
            on_done,
            size=lambda prepared: prepared.data.nbytes,
            # under a limit of memory, one case at a time
            most_ahead=available_memory() // 4 if self.max_ram is None else -1,
        )


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
