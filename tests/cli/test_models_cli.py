"""`umamba models`: what it prints, and its exit codes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from umamba.cli import models
from umamba.cli.main import UsageError

ROOT = Path(__file__).parents[2]
FILES = ("--checkpoint", "c", "--plans", "p", "--dataset-json", "d", "-o", "o")


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    models.add_parser(parser.add_subparsers())
    args = parser.parse_args(["models", *words])
    return args.run(args)


def test_list_tells_dimensions_parameters_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"umamba_bot", "umamba_enc_v1", "segmamba"} <= set(rows)
    assert rows["umamba_bot"]["dims"] == [2, 3]
    assert rows["vm_unet"]["parameters"] == {"2D": 27427586}
    assert "swin_unet" not in rows
    assert run("list", "--dims", "3", "--controls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["segmamba", "3D", "67.4", "M"] for line in lines)
    assert any(line.startswith("segmamba_noscan ") for line in lines)
    assert not any(line.startswith("vm_unet") for line in lines)
    assert run("list") == 0
    assert "swin_unet, " in capsys.readouterr().out


def test_show_draws_the_network_and_tells_origin_arguments_and_quirks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("show", "umamba-enc-noscan") == 0
    text = capsys.readouterr().out
    for word in (
        "umamba.networks.umamba.UMambaEnc",
        "bowang-lab/U-Mamba@28459e3",
        "Apache-2.0",
        "image - stem - stage 0",
        "patch_size\n",
        "d_state = 16",
        "mixer='none'",
        "channel tokens",
    ):
        assert word in text


def test_the_readme_shows_the_registry() -> None:
    command = [sys.executable, "scripts/network_table.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_show_knows_modules(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "vmamba-tiny-0230s") == 0
    text = capsys.readouterr().out
    for word in ("umamba.networks.vmamba.VMambaEncoder", "MzeroMiko/VMamba@2ed52ea", "d_state = 1"):
        assert word in text


def test_show_tells_the_recipes_of_the_official_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "mamba_clinix_convmix") == 0
    assert "mamba_clinix or mamba_clinix_tversky (--recipe)" in capsys.readouterr().out
    assert run("show", "hymamba") == 0
    assert "--recipe" not in capsys.readouterr().out


def test_networks_of_nnunets_own_are_listed_and_shown_and_need_no_import(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("list", "--dims", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("plainconv_unet "))
    assert "3D 31.2 M" in line
    assert "nnU-Net itself" in line
    assert run("show", "resenc-l") == 0
    text = capsys.readouterr().out
    for word in ("ResidualEncoderUNet", "nnUNetPlannerResEncL", "24 GB", "n_blocks_per_stage"):
        assert word in text
    with pytest.raises(UsageError, match="nothing to import"):
        run("import", "--network", "resenc_l", *FILES)


def test_an_unknown_network_or_fold_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="umamba_bot"):
        run("show", "umamba_bots")
    with pytest.raises(UsageError, match="swin_unet is a module without plans"):
        run("import", "--network", "swin_unet", *FILES)
    with pytest.raises(UsageError, match="did you mean"):
        run("import", "--network", "umamba", *FILES)
    with pytest.raises(UsageError, match="fold 'x'"):
        run("import", "--network", "umamba_bot", *FILES, "-f", "x")


def test_a_missing_checkpoint_is_named() -> None:
    files = ["--checkpoint", "absent.pth", "--plans", "p", "--dataset-json", "d", "-o", "o"]
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        run("import", "--network", "umamba_bot", *files)
