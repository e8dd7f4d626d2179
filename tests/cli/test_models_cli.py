"""`umamba models`: what it prints, and its exit codes."""

from __future__ import annotations

import argparse
import json

import pytest

from umamba.cli import models
from umamba.cli.main import UsageError


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    models.add_parser(parser.add_subparsers())
    args = parser.parse_args(["models", *words])
    return args.run(args)


def test_list_names_the_networks_and_their_controls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    names = json.loads(capsys.readouterr().out)
    assert {"umamba_bot", "umamba_enc_v1", "umamba_enc_noscan"} <= set(names)
    assert run("list", "--dims", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["umamba_bot", "2D,", "3D"] for line in lines)
    assert any("control of umamba_bot" in line for line in lines)


def test_show_tells_origin_arguments_and_quirks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "umamba-enc-noscan") == 0
    text = capsys.readouterr().out
    for word in (
        "umamba.networks.umamba.UMambaEnc",
        "bowang-lab/U-Mamba@28459e3",
        "Apache-2.0",
        "patch_size\n",
        "d_state = 16",
        "mixer='none'",
        "channel tokens",
    ):
        assert word in text


def test_show_tells_the_recipes_of_the_official_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "mamba_clinix_convmix") == 0
    assert "mamba_clinix or mamba_clinix_tversky (--recipe)" in capsys.readouterr().out
    assert run("show", "hymamba") == 0
    assert "--recipe" not in capsys.readouterr().out


def test_an_unknown_network_or_fold_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="umamba_bot"):
        run("show", "umamba_bots")
    files = ["--checkpoint", "c", "--plans", "p", "--dataset-json", "d", "-o", "o"]
    with pytest.raises(UsageError, match="did you mean"):
        run("import", "--network", "umamba", *files)
    with pytest.raises(UsageError, match="fold 'x'"):
        run("import", "--network", "umamba_bot", *files, "-f", "x")


def test_a_missing_checkpoint_is_named() -> None:
    files = ["--checkpoint", "absent.pth", "--plans", "p", "--dataset-json", "d", "-o", "o"]
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        run("import", "--network", "umamba_bot", *files)
