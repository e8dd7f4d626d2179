"""`umamba doctor`: what it finds, what it prints, and when it fails."""

from __future__ import annotations

import argparse
import builtins
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from umamba.cli import doctor
from umamba.ops import cpu, dispatch, remembered, self_check


def forget() -> None:
    for cached in (
        *(dispatch._choose, dispatch._announce, dispatch._from_environment),
        *(remembered.recall, remembered._read),
    ):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No variables, a fresh choice, nothing remembered, a folder of its own, and no timing."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "UMAMBA_SCAN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(remembered, "choices_file", lambda: tmp_path / "cache" / "scan.json")
    forget()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(self_check, "tokens_per_second", lambda *a, **k: (3e6, 1e6))
    monkeypatch.setattr(
        doctor, "_torchvision", lambda: {"state": "loads", "works": "All commands work."}
    )
    yield
    forget()


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *words])
    return args.run(args)


def test_a_sound_machine_passes_and_every_part_is_shown(capsys: pytest.CaptureFixture[str]):
    assert call() == 0
    text = capsys.readouterr().out
    for part in ("torch ", "nnunetv2", "CPU cores", "Scan on cpu", "mamba_ssm  no: ", "chunked"):
        assert part in text
    assert "3,000,000 / 1,000,000" in text
    assert "nnUNet_raw = (not set)" in text
    assert "export nnUNet_extTrainer=" in text


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]):
    assert call("--json") == 0
    found = json.loads(capsys.readouterr().out)
    reasons = found["scan"]["cpu"]["backends"]
    assert set(reasons) == {"cpu", "triton", "mamba_ssm", "chunked", "reference"}
    checked = {check["backend"] for check in found["self_check"] if check["device"] == "cpu"}
    assert checked == {name for name, reason in reasons.items() if reason is None}
    assert all(0 < check["error"] < 5e-6 for check in found["self_check"])
    leaf = found["folders"]["stock_commands"].partition("=")[2]
    assert (Path(leaf) / "umamba_trainers.py").is_file()


def test_a_wrong_scan_fails_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from umamba.ops import chunked

    forward = chunked.forward

    def wrong(*arguments):  # type: ignore[no-untyped-def]
        out, last_state, states = forward(*arguments)
        return out * (1 + 1e-4), last_state, states

    monkeypatch.setattr(chunked, "forward", wrong)
    assert call() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "WRONG" in line and "chunked" in line]


def test_without_the_c_library_the_cure_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "not built: install a C compiler")
    assert call() == 0
    text = capsys.readouterr().out
    assert "Scan on cpu: chunked" in text
    assert "cpu        no: not built: install a C compiler" in text


def test_a_backend_that_the_variable_asks_for_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("UMAMBA_SCAN", "reference")
    assert call() == 0
    assert "Scan on cpu: reference (UMAMBA_SCAN asks for it)" in capsys.readouterr().out


def test_half_set_variables_are_a_problem_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert call() == 0
    assert "problem: nnUNet_raw is set but" in capsys.readouterr().out


def test_a_workspace_that_is_no_folder_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    assert call("--workspace", str(tmp_path / "file" / "below")) == 0
    assert "cannot be written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "does not load (operator"),
        (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), "not installed"),
        (ImportError("libcudart.so"), "does not load (libcudart.so)"),
    ],
    ids=["other_torch", "absent", "no_cuda"],
)
def test_a_torchvision_that_does_not_load_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
):
    monkeypatch.undo()
    original = builtins.__import__

    def fail(name: str, *arguments, **options):  # type: ignore[no-untyped-def]
        if name == "torchvision":
            raise error
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    found = doctor._torchvision()
    assert state in found["state"]
    assert "nnUNetTrainer" in found["fails"]
    assert "build that belongs to this torch" in found["cure"]
