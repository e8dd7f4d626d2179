"""`umamba doctor --bench`: who takes part, who wins, what is printed and remembered."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from umamba.cli import bench, doctor
from umamba.cli.common import UsageError
from umamba.ops import chunked, cpu, dispatch, remembered, self_check, timing
from umamba.ops.timing import Call, Layout
from umamba.planning import scan_calls

CPU = torch.device("cpu")
SECONDS = {"cpu": 0.002, "chunked": 0.001, "reference": 0.003}


def forget() -> None:
    for cached in (
        *(dispatch._choose, dispatch._announce, dispatch._from_environment),
        *(remembered.recall, remembered._read),
    ):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the test remembers; two calls to time, which take SECONDS; one error per backend."""
    path = tmp_path / "cache" / "scan.json"
    for name in ("UMAMBA_SCAN", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remembered, "choices_file", lambda: path)
    monkeypatch.setattr(cpu, "why_unavailable", lambda: None)
    monkeypatch.setattr(doctor, "_torchvision", lambda: {"state": "loads"})
    monkeypatch.setattr(self_check, "scan_errors", lambda name, device: {"output": 1e-7})
    monkeypatch.setattr(self_check, "tokens_per_second", lambda *a, **k: (3e6, 1e6))
    monkeypatch.setattr(scan_calls, "typical_calls", lambda on_gpu: calls())
    monkeypatch.setattr(timing, "shortest_run", lambda call, name, device: SECONDS[name])
    forget()
    yield path
    forget()


def calls() -> Counter[Call]:
    def convolution(length: int) -> Call:
        shapes = ((1, 2, length), (2, 4))
        layouts = [Layout(shape, (1,) * len(shape), torch.float32) for shape in shapes]
        return Call(torch.ops.umamba.causal_conv1d_silu.default, (*layouts, None, False))

    return Counter({convolution(10): 3, convolution(20): 1})


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *words])
    return args.run(args)


def test_the_fastest_in_total_is_printed_remembered_and_taken(
    file: Path, capsys: pytest.CaptureFixture[str]
):
    assert call("--bench") == 0
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert ["1", "x", "convolution", "1x2x20", "2.00", "1.00", "3.00"] in rows
    assert ["one", "step", "8.0", "4.0", "12.0"] in rows
    assert f"chunked is fastest and remembered in {file}" in printed.out
    assert "Scan on cpu: chunked (remembered from `umamba doctor --bench` on 2" in printed.out
    assert f"to forget it delete {file}" in printed.out
    assert printed.err.splitlines()[0] == "timing 1 of 2: convolution 1x2x20"
    forget()
    assert dispatch.choose(CPU, torch.float32, 16) is chunked
    assert call() == 0
    assert "Scan on cpu: chunked (remembered from" in capsys.readouterr().out


def test_json_holds_the_times(file: Path, capsys: pytest.CaptureFixture[str]):
    assert call("--bench", "--json") == 0
    found = json.loads(capsys.readouterr().out)["bench"]
    assert found["fastest"] == "chunked"
    assert found["total_ms"] == pytest.approx({"cpu": 8, "chunked": 4, "reference": 12})
    assert found["rows"][0] == {
        "call": "convolution 1x2x20",
        "count": 1,
        "ms": pytest.approx({"cpu": 2, "chunked": 1, "reference": 3}),
    }


def test_without_bench_nothing_is_timed_or_remembered(
    file: Path, capsys: pytest.CaptureFixture[str]
):
    assert call() == 0
    assert "Forward and backward" not in capsys.readouterr().out
    assert not file.exists()


def test_a_wrong_backend_never_wins(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        self_check, "scan_errors", lambda name, device: {"output": float(name == "chunked")}
    )
    assert call("--bench") == 1
    assert "cpu is fastest and remembered" in capsys.readouterr().out
    assert dispatch.choose(CPU, torch.float32, 16) is cpu


def test_a_hopeless_backend_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    speeds = {"cpu": 1e6, "chunked": 2e5, "reference": 1e4}
    monkeypatch.setattr(
        self_check, "tokens_per_second", lambda name, *a, **k: (speeds[name], speeds[name])
    )
    timed = []

    def shortest_run(what: Call, name: str, device: torch.device) -> float:
        timed.append(name)
        return 1.0 if name == "cpu" else 20.0

    monkeypatch.setattr(timing, "shortest_run", shortest_run)
    assert call("--bench") == 0
    text = capsys.readouterr().out
    assert timed == ["cpu", "chunked", "cpu"]
    assert "reference: 100 times slower than cpu: not timed further" in text
    assert "chunked: 20 times slower than cpu: not timed further" in text
    assert "cpu is fastest and remembered" in text


def test_a_backend_that_fails_at_a_call_cannot_win(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def shortest_run(what: Call, name: str, device: torch.device) -> float:
        if name == "chunked" and what.size() < 40:
            raise RuntimeError("out of\nmemory")
        return SECONDS[name]

    monkeypatch.setattr(timing, "shortest_run", shortest_run)
    assert call("--bench") == 0
    text = capsys.readouterr().out
    assert "chunked: fails at convolution 1x2x10: out of memory" in text
    assert "cpu is fastest and remembered" in text


def test_where_every_backend_fails_the_choice_stays(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(timing, "shortest_run", lambda *a: 1 / 0)
    assert call("--bench") == 0
    assert "no backend could be timed: the choice stays as it was" in capsys.readouterr().out
    assert not file.exists()


def test_a_cache_folder_that_cannot_be_written_is_said_after_the_table(
    file: Path, capsys: pytest.CaptureFixture[str]
):
    file.parent.write_text("a file")
    assert call("--bench") == 0
    text = capsys.readouterr().out
    assert "chunked is fastest; the choice cannot be remembered: " in text


def test_what_the_variable_asks_for_stays_the_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("UMAMBA_SCAN", "reference")
    assert call("--bench") == 0
    text = capsys.readouterr().out
    assert "Scan on cpu: reference (UMAMBA_SCAN asks for it)" in text
    assert "chunked is fastest and remembered" in text


def test_a_remembered_backend_that_cannot_be_used_now_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    remembered.remember(CPU, "cpu")
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "not built")
    assert call() == 0
    text = capsys.readouterr().out
    assert "Scan on cpu: chunked (cpu, remembered from `umamba doctor --bench` on" in text


def test_the_plans_named_are_those_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[object] = []

    def plans_calls(path: Path, configuration: str | None) -> Counter[Call]:
        asked.extend((path, configuration))
        return calls()

    monkeypatch.setattr(scan_calls, "plans_calls", plans_calls)
    assert call("--bench", "--plans", "a.json", "-c", "2d") == 0
    assert asked == [Path("a.json"), "2d"]
    assert bench.find_calls(None, None) == calls()


def test_plans_without_bench_are_a_usage_error_and_missing_plans_a_sentence(tmp_path: Path):
    with pytest.raises(UsageError, match="--plans with --bench"):
        call("--plans", "a.json")
    with pytest.raises(UsageError, match="--configuration with --plans"):
        call("--bench", "-c", "2d")
    with pytest.raises(FileNotFoundError, match="no plans file"):
        call("--bench", "--plans", str(tmp_path / "none.json"))
