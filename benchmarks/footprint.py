"""The memory of a training step as the planner counts it beside its measured peak.

    python benchmarks/footprint.py [--rows NAME ...] [--device cpu] [--json FILE]

Each row is a process of its own that runs the step of `umamba plan --check`: the network with
deep supervision, nnU-Net's loss, the recipe's optimizer, labels of three classes.  Measured is the
growth of the resident memory (on a GPU of the allocated) over what was in use before the network
was built.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
from pathlib import Path
from typing import Any

ROWS: dict[str, tuple[str, tuple[int, ...], int, str]] = {
    "plainconv_unet 2D": ("plainconv_unet", (256, 256), 6, "sgd"),
    "plainconv_unet 3D": ("plainconv_unet", (48, 64, 64), 2, "sgd"),
    "plainconv_unet 3D, AdamW": ("plainconv_unet", (48, 64, 64), 2, "adamw"),
    "resenc_m 3D": ("resenc_m", (48, 64, 64), 2, "sgd"),
    "umamba_bot 2D": ("umamba_bot", (256, 256), 6, "sgd"),
    "umamba_bot 3D": ("umamba_bot", (48, 64, 64), 2, "sgd"),
    "umamba_enc 3D": ("umamba_enc", (48, 64, 64), 2, "sgd"),
    "segmamba 3D": ("segmamba", (64, 64, 64), 1, "sgd"),
    "swin_umamba 2D": ("swin_umamba", (224, 224), 2, "sgd"),
    "swin_umamba 2D, AdamW": ("swin_umamba", (224, 224), 2, "adamw"),
    "vm_unet 2D": ("vm_unet", (224, 224), 4, "adamw"),
}
LABELS = {"background": 0, "organ": 1, "lesion": 2}


def plans_of(network: str, patch_size: tuple[int, ...], batch_size: int, optimizer: str) -> dict:
    """Plans of one configuration with nnU-Net's stages for the patch, and its widths."""
    from umamba.networks.registry import NetworkEntry
    from umamba.planning.overview import STANDARD_FEATURES
    from umamba.planning.topology import network_arguments, stages_for_patch
    from umamba.planning.upstream import UPSTREAM, find_entry

    entry, dims = find_entry(network), len(patch_size)
    strides, kernels, _ = stages_for_patch([1.0] * dims, patch_size)
    features = list(STANDARD_FEATURES[dims][: len(strides)])
    architecture = UPSTREAM["plainconv_unet"].architecture(strides, features)
    if isinstance(entry, NetworkEntry):
        stock = architecture["arch_kwargs"] | {"kernel_sizes": [list(k) for k in kernels]}
        arguments = network_arguments(entry, {}, stock, dims)
        if "patch_size" in entry.keywords:
            arguments["patch_size"] = list(patch_size)
        architecture = {
            "network_class_name": entry.class_path,
            "arch_kwargs": json.loads(json.dumps(arguments)),
            "_kw_requires_import": [],
        }
    else:
        architecture = entry.architecture(strides, features)
    configuration = {
        "data_identifier": "none",
        "batch_size": batch_size,
        "patch_size": list(patch_size),
        "spacing": [1.0] * dims,
        "batch_dice": False,
        "architecture": architecture,
        "recipe": {"optimizer": optimizer},
        "planning": {"input_channels": 1, "num_classes": len(LABELS)},
    }
    return {
        "dataset_name": "Dataset999_None",
        "plans_name": network,
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "configurations": {"it": configuration},
    }


def measure(row: str, device: str) -> dict[str, Any]:
    """Counts and measures one row."""
    import torch

    from umamba.planning.plans import check_plan
    from umamba.training.dry_run import DryRun

    torch.set_num_threads(1)
    plans = plans_of(*ROWS[row])
    dataset_json = {"labels": LABELS, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
    make_step = functools.partial(DryRun, plans, "it", dataset_json, device)
    make_step()  # what torch and the libraries load once, is not of this network
    step = check_plan(plans, "it", device, make_step)
    return {
        "row": row,
        "patch_size": list(ROWS[row][1]),
        "batch_size": ROWS[row][2],
        "parameters": step.parameters,
        "counted_gib": round(step.counted_bytes / 2**30, 3),
        "measured_gib": round(step.peak_bytes / 2**30, 3),
        "ratio": round(step.counted_bytes / step.peak_bytes, 3),
        "cpu_seconds": round(step.cpu_seconds, 2),
        "device": step.device,
    }


def main() -> None:
    """Prints a line per row; writes all to --json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print("| training step | patch, batch | counted GiB | measured GiB | counted / measured |")
    print("|---|---|---|---|---|")
    for name in args.rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (name, args.device))
        rows.append(row)
        patch = " x ".join(map(str, row["patch_size"]))
        print(
            f"| {name} | {patch}, {row['batch_size']} | {row['counted_gib']:.2f} | "
            f"{row['measured_gib']:.2f} | {row['ratio']:.2f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
