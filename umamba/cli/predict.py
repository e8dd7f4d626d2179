"""`umamba predict`: label maps for a folder of images, or for one image, from a model folder.

A case that cannot be read or predicted is named at the end, all others are done (exit code 3).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from umamba.cli import common
from umamba.cli.common import UsageError
from umamba.lock import holding

if TYPE_CHECKING:
    from umamba.inference.cases import PredictionCase
    from umamba.inference.pipeline import CaseFailure
    from umamba.inference.predictor import UMambaPredictor

SOME_CASES_FAILED = 3


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    add = common.add_command(subparsers, "predict", run, __doc__, "-device -t").add_argument
    add("-m", "--model", required=True, metavar="FOLDER", help="model folder, with plans.json")
    add(
        "-i", "--input", required=True, nargs="+", metavar="PATH",
        help="folder of images named case_0000.ending, or the file(s) of one case, by channel",
    )  # fmt: skip
    add("-o", "--output", required=True, metavar="PATH", help="folder, or the file for one case")
    add("-f", "--folds", nargs="+", help="folds to average (all that are trained)")
    add("-chk", "--checkpoint", default="checkpoint_final.pth", help="name of the checkpoint")
    add("-step_size", "--step-size", type=float, default=0.5, help="tile step, in patches (0.5)")
    add("--disable_tta", "--disable-tta", action="store_true", help="no mirroring: 8 times faster")
    add(
        "--save_probabilities", "--save-probabilities", "--npz", action="store_true",
        help="write nnU-Net's .npz and .pkl beside each label map",
    )  # fmt: skip
    add(
        "--continue_prediction", "--continue", action="store_true",
        help="leave out cases whose outputs are there and whole",
    )  # fmt: skip
    add(
        "-prev_stage_predictions", "--prev-stage-predictions", metavar="FOLDER",
        help="label maps of the first stage, for a cascade",
    )  # fmt: skip
    add("-num_parts", "--num-parts", type=int, default=1, help="share the cases among N runs")
    add("-part_id", "--part-id", type=int, default=0, help="which of these runs this is, from 0")
    add(
        "--nnunet-exact", "--nnunet_exact", action="store_true",
        help="nnU-Net's half precision arithmetic: its labels, voxel for voxel",
    )  # fmt: skip
    add(
        "--precision", choices=("float32", "bfloat16"),
        help="of the network (CPU: float32, GPU: as it was trained)",
    )  # fmt: skip
    add("--not_on_device", "--not-on-device", action="store_true", help="sum up on the CPU")
    add(
        "--no_input_check", "--no-input-check", action="store_true",
        help="do not look for truncated or broken images, which nnU-Net's readers take for whole",
    )  # fmt: skip
    add(
        "--max-ram", metavar="SIZE",
        help="memory that this process may take, such as 4G (what is available)",
    )  # fmt: skip
    add(
        "--max-vram", metavar="SIZE",
        help="memory of the GPU that this process may take (what is free)",
    )  # fmt: skip
    add(
        "--skip-empty", action="store_true",
        help="take tiles without any part of the body for background, without the network",
    )  # fmt: skip
    add("--disable_progress_bar", "--disable-progress-bar", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Predicts; returns 0, or 3 where some cases failed, or 1 where all did."""
    predictor = _load_predictor(args)

    from umamba.data.images import read_image
    from umamba.inference.cases import find_images, is_whole, output_folder, plan_cases

    output = Path(args.output)
    if output.is_file() and output_folder(output, predictor.dataset_json["file_ending"]) == output:
        raise UsageError(f"-o {output} is a file; give a folder")
    ending = predictor.dataset_json["file_ending"]
    # A color picture is one file of all channels.  nnU-Net's reader of 3-D TIFF finds the spacing
    # by the length of the name with its channel.
    reader_name = _reader_name(predictor)
    bare_names = reader_name == "NaturalImage2DIO" or (
        predictor.n_channels == 1 and reader_name != "Tiff3DIO"
    )
    found = plan_cases(
        find_images(args.input, ending, bare_names=bare_names),
        output,
        ending,
        previous_stage_folder=_previous_stage(args, predictor),
        num_parts=args.num_parts,
        part_id=args.part_id,
    )
    cases = found
    # Several runs may write single files into one folder.
    to_folder = output_folder(output, ending) == output
    with holding(output, "prediction", args.part_id) if to_folder else nullcontext():
        if args.continue_prediction:
            read = partial(read_image, is_label=True)
            cases = [c for c in found if not is_whole(c, read, args.save_probabilities)]
        if to_folder:
            _write_settings(args, predictor, output)
        if cases and args.precision is None and not args.nnunet_exact:
            _hint_at_bfloat16(predictor)
        failures = _predict(cases, args, predictor)

    n_written, n_there = len(cases) - len(failures), len(found) - len(cases)
    skipped = f", {n_there} were there already" if n_there else ""
    print(f"{n_written} of {len(found)} cases predicted{skipped} -> {output}")
    if not failures:
        return 0
    print(f"error: {len(failures)} cases could not be predicted:", file=sys.stderr)
    for failure in failures:
        print(f"  {failure.identifier}: {failure.reason}", file=sys.stderr)
    return SOME_CASES_FAILED if n_written or n_there else 1


def _load_predictor(args: argparse.Namespace) -> UMambaPredictor:
    if not 0 < args.step_size <= 1:
        raise UsageError(f"-step_size {args.step_size} is not above 0 and at most 1")
    if not 0 <= args.part_id < args.num_parts:
        raise UsageError(f"-part_id must be 0 to {args.num_parts - 1}; it is {args.part_id}")
    wrong = [fold for fold in args.folds or () if fold != "all" and not fold.isdigit()]
    if wrong:
        raise UsageError(f"-f takes fold numbers or all, not {', '.join(wrong)}")
    folds = [common.parse_fold(fold) for fold in args.folds] if args.folds else None

    import torch
    from tqdm import tqdm

    from umamba.inference.model_folder import UnknownFoldError
    from umamba.inference.predictor import UMambaPredictor
    from umamba.memory import parse_size

    common.set_threads(args.threads)
    with common.usage_errors(ValueError):
        max_ram, max_vram = (parse_size(s) if s else None for s in (args.max_ram, args.max_vram))
        predictor = UMambaPredictor(
            tile_step_size=args.step_size,
            use_mirroring=not args.disable_tta,
            perform_everything_on_device=not args.not_on_device,
            device=torch.device(common.choose_device(args.device)) if args.device else None,
            nnunet_exact=args.nnunet_exact,
            skip_empty=args.skip_empty,
            precision=args.precision,
        )
        predictor.limit_memory(max_ram, max_vram)
    said: set[str] = set()

    def say(sentence: str) -> None:
        # sums in memory as expected are worth no line
        asked = max_ram or max_vram or not sentence.startswith("streams")
        if sentence not in said and (asked or "temporary" in sentence or "on the CPU" in sentence):
            said.add(sentence)
            tqdm.write(sentence)  # above the bar

    predictor.on_plan = say
    with common.usage_errors(UnknownFoldError):
        predictor.initialize_from_trained_model_folder(args.model, folds, args.checkpoint)
    return predictor


def _previous_stage(args: argparse.Namespace, predictor: UMambaPredictor) -> Path | None:
    previous = predictor.configuration_manager.previous_stage_name
    if previous is None:
        return None
    if args.prev_stage_predictions is None:
        raise ValueError(
            f"{args.model} is the second stage of a cascade: predict the images with {previous} "
            "first, and give that folder as -prev_stage_predictions"
        )
    folder = Path(args.prev_stage_predictions)
    if not folder.is_dir():
        raise FileNotFoundError(f"-prev_stage_predictions {folder} is not a folder; check it")
    return folder


def _refuse_faults(case: PredictionCase, predictor: UMambaPredictor) -> None:
    """ValueError for images that nnU-Net's readers would misread without a word, or not read."""
    from umamba.data.audit import check_images

    before, manager = case.previous_stage, predictor.label_manager
    if before is not None and not before.is_file():
        raise ValueError(f"{before} of the first stage is missing")
    faults = check_images(
        {case.identifier: list(case.images)},
        predictor.n_channels,
        reader_writer=_reader_name(predictor),
        label_maps={} if before is None else {case.identifier: before},
        labels=(*manager.all_labels, *(manager.regions_class_order or ())),
    )
    if faults:
        raise ValueError(" and ".join(map(str, faults[case.identifier])))


def _reader_name(predictor: UMambaPredictor) -> str:
    return str(predictor.plans_manager.plans.get("image_reader_writer", ""))


def _hint_at_bfloat16(predictor: UMambaPredictor) -> None:
    from umamba.networks.precision import computes_bfloat16

    if predictor.device.type == "cpu" and computes_bfloat16(predictor.device):
        print(
            "This processor computes bfloat16: with --precision bfloat16 convolutions take about "
            "half the time, and a few labels in 10,000 change."
        )


def _write_settings(args: argparse.Namespace, predictor: UMambaPredictor, output: Path) -> None:
    """The three files that nnU-Net leaves beside predictions, for its post-processing tools."""
    from umamba.files import write_json

    settings = {key: value for key, value in vars(args).items() if key != "run"}
    write_json(
        output / "predict_from_raw_data_args.json", settings | {"folds": list(predictor.folds)}
    )
    write_json(output / "dataset.json", predictor.dataset_json)
    write_json(output / "plans.json", predictor.plans_manager.plans)


def _predict(
    cases: list[PredictionCase], args: argparse.Namespace, predictor: UMambaPredictor
) -> list[CaseFailure]:
    if not cases:
        return []
    from tqdm import tqdm

    # Percent of windows, not of cases: one large volume may take the whole time.
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} < {remaining}"
    with tqdm(total=len(cases), bar_format=layout, disable=args.disable_progress_bar) as bar:
        done: list[PredictionCase] = []

        def count(case: PredictionCase) -> None:
            done.append(case)
            bar.set_description_str(f"predicted {len(done)}/{len(cases)}", refresh=False)

        bar.set_description_str(f"predicted 0/{len(cases)}")
        # the shares of many windows may add up to a little more than 1
        predictor.on_windows_done = lambda share: bar.update(min(share, bar.total - bar.n))
        return predictor.predict_cases(
            cases,
            save_probabilities=args.save_probabilities,
            on_done=count,
            check=None if args.no_input_check else partial(_refuse_faults, predictor=predictor),
        )
