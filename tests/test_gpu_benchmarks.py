"""The GPU benchmark on a CPU, at tiny sizes: that its parts run, and that they compare equals."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import checks, common, layers, official, run, scan, shapes, steps, tables, train
from umamba.ops.causal_conv import causal_conv1d_silu
from umamba.ops.dispatch import find_backend
from umamba.ops.selective_scan import selective_scan

ROOT = Path(__file__).parents[1]
H200 = common.NOMINAL
# Milliseconds of forward and backward on an H200 in bfloat16, worked out by hand.
FLOORS = {
    "U-Mamba Enc 128^3, stage 0": (1.284, 1.829),
    "U-Mamba Enc 128^3, stage 3": (0.020, 0.029),
    "U-Mamba Enc CT 40x224x192, stage 1": (0.527, 0.750),
    "SegMamba 128^3, stage 0": (0.722, 1.029),
    "SegMamba 128^3, stage 3": (0.011, 0.016),
    "VM-UNet 256^2, stage 0": (0.481, 0.686),
}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a part's main with tiny sizes on the CPU; its exit code and what it wrote."""

    def call(part: Any, *words: str) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "part.json"
        always = ["part", "--device", "cpu", "--tiny", "--seconds", "1e9", "--json", str(file)]
        monkeypatch.setattr(sys, "argv", [*always, *words])
        code = part.main()
        return code, json.loads(file.read_text())

    return call


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_those_worked_out_by_hand(name: str):
    shape = next(shape for shape in shapes.SHAPES if shape.name == name)
    assert shapes.floors(shape, 2, H200) == pytest.approx(FLOORS[name], abs=6e-4)


def test_bytes_bound_a_scan_where_copies_are_slow():
    shape = shapes.SHAPES[0]
    slow = H200 | {"copy_bytes_per_second": 1e12}
    forward, backward = shapes.floors(shape, 2, slow)
    elements = 2 * 64 * 128**3
    assert forward == pytest.approx(elements * 9.5 / 1e9)
    assert backward == pytest.approx(elements * 17.25 / 1e9)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_both_scans_of_a_comparison_give_the_same(
    parsed, backend: str, capsys: pytest.CaptureFixture[str]
):
    reason = find_backend(backend).why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    code, found = parsed(scan, "--backend", backend)
    assert code == 0
    assert_scans_agree(found)
    assert "share of floor" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.triton
def test_both_scans_of_a_comparison_give_the_same_in_tritons_interpreter(tmp_path: Path):
    pytest.importorskip("triton")
    file = tmp_path / "scan.json"
    words = ["--device", "cpu", "--tiny", "--backend", "triton", "--json", str(file)]
    command = [sys.executable, "-m", "benchmarks.gpu.scan", *words]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert_scans_agree(json.loads(file.read_text()))


def assert_scans_agree(found: dict[str, Any]) -> None:
    assert len(found["rows"]) == 2 * len(shapes.TINY_SHAPES)
    for row in found["rows"]:
        assert row["difference"] < (2e-6 if row["type"] == "float32" else 2e-2), row
        assert min(row["ours"][key] for key in scan.PASSES) > 0


def test_layers_with_copies_are_the_same_functions(parsed):
    code, found = parsed(layers)
    assert code == 0
    for row in found["rows"]:
        assert row["difference"] < 2e-5, row
        assert row["block"]["both"] > 0


def test_checks_pass_on_a_right_backend_and_fail_on_a_wrong_one(
    parsed, monkeypatch: pytest.MonkeyPatch
):
    code, found = parsed(checks)
    assert code == 0, found
    monkeypatch.setattr(checks, "scan_errors", lambda *_, **__: {"output": 1e-3})
    assert parsed(checks)[0] == 1


def test_steps_measure_networks_and_their_controls(parsed, monkeypatch: pytest.MonkeyPatch):
    names = (
        *("umamba_bot", "umamba_bot_noscan", "umamba_bot channels-last"),
        *("vm_unet", "nnU-Net ResEnc M", "umamba_bot_convmix"),
    )
    monkeypatch.setattr(steps, "ORDER", names)
    code, found = parsed(steps)
    assert code == 0
    assert [row["network"] for row in found["rows"]] == list(names)
    assert all(row["finite"] and row["milliseconds"] > 0 for row in found["rows"]), found
    assert "Channels-last, a step of umamba_bot takes" in found["notes"][0]
    assert "umamba_bot_noscan and" in found["notes"][1]


@pytest.mark.parametrize("plans", [steps.PLANS, steps.TINY_PLANS], ids=["full", "tiny"])
def test_every_network_of_the_steps_can_be_built(plans: dict[str, steps.Plan]):
    with torch.device("meta"):
        for name in plans:
            network = steps.build(name, plans[name])
            assert sum(p.numel() for p in network.parameters()) > 0
    assert set(map(steps.base_name, steps.ORDER)) - set(plans) == set(steps.RESENC_PLANS)


def test_a_failing_row_says_why_and_the_rest_goes_on(parsed, monkeypatch: pytest.MonkeyPatch):
    measure = steps.measure

    def fail_once(name: str, *others: Any) -> dict[str, Any]:
        if name == "umamba_enc":
            raise RuntimeError("out of\nmemory")
        return measure(name, *others)

    monkeypatch.setattr(steps, "measure", fail_once)
    monkeypatch.setattr(steps, "ORDER", ("umamba_enc", "umamba_bot_noscan"))
    code, found = parsed(steps)
    assert code == 0
    assert found["rows"][0]["error"] == "RuntimeError: out of memory"
    assert found["rows"][1]["milliseconds"] > 0


def test_no_row_begins_when_the_time_is_over(parsed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common, "STARTED", -1e18)
    code, found = parsed(layers)
    assert code == 1
    assert all(row["error"] == "no time was left" for row in found["rows"])


def test_training_commands_are_ones_that_umamba_takes(tmp_path: Path):
    from umamba.cli.main import build_parser

    command = train.run_command("umamba_bot", tmp_path / "data", tmp_path, 1.5, "cuda")
    args = build_parser().parse_args(command[3:])
    assert (args.network, args.minutes, args.device) == ("umamba_bot", 1.5, "cuda")


def test_training_is_left_out_where_time_or_packages_are_missing(
    parsed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    code, found = parsed(train, "--data", str(tmp_path), "--seconds", "5")
    assert code == 0 and not found["rows"] and "Nothing is trained" in found["notes"][0]
    monkeypatch.setattr(train, "NEEDED", ("a_package_that_nobody_has",))
    code, found = parsed(train)
    assert code == 0 and "a_package_that_nobody_has" in found["notes"][0]


def test_the_official_scan_gets_its_arguments_in_its_order():
    tensors = scan_tensors()
    fake = official.bound(official.Scan, SimpleNamespace(fwd=fake_forward, bwd=fake_backward))
    for gate in (True, False):
        given = [x if gate or i != 6 else None for i, x in enumerate(tensors)]
        assert_same_gradients(fake, lambda *x: selective_scan(*x, delta_softplus=True), given)


def test_the_official_convolution_gets_its_arguments_in_its_order():
    def forward(x, weight, bias, index, first, out, last, silu):  # type: ignore[no-untyped-def]
        assert (index, first, last, silu) == (None, None, None, True)
        out.copy_(causal_conv1d_silu(x, weight, bias))

    def backward(*arguments: Any) -> None:
        x, weight, bias, dout, index, first, dlast, dx, dweight, dbias, dfirst, silu = arguments
        assert (index, first, dlast, dfirst, silu) == (None, None, None, None, True)
        for target, gradient in zip(
            (dx, dweight, dbias),
            gradients(causal_conv1d_silu, (x, weight, bias), dout),
            strict=True,
        ):
            target.copy_(gradient)

    extension = SimpleNamespace(causal_conv1d_fwd=forward, causal_conv1d_bwd=backward)
    tensors = [torch.randn(2, 4, 9), torch.randn(4, 4), torch.randn(4)]
    fake = official.bound(official.Convolution, extension)
    assert_same_gradients(fake, causal_conv1d_silu, tensors)
    assert_same_gradients(official.torch_conv, causal_conv1d_silu, tensors)


def test_archives_are_unpacked_and_their_absence_is_told(tmp_path: Path):
    source = tmp_path / "made" / "mamba_ssm-2.3.2" / "csrc" / "selective_scan"
    source.mkdir(parents=True)
    (source / "selective_scan.cpp").write_text("// empty")
    archives = tmp_path / "archives"
    archives.mkdir()
    with tarfile.open(archives / "mamba_ssm-2.3.2.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "made" / "mamba_ssm-2.3.2", "mamba_ssm-2.3.2")
    start, inside = official.EXTENSIONS["selective_scan_cuda"]
    tree = official.unpack(archives, start, tmp_path / "sources")
    assert (tree / inside / "selective_scan.cpp").is_file()
    with pytest.raises(FileNotFoundError, match="causal_conv1d"):
        official.unpack(archives, "causal_conv1d", tmp_path / "sources")


def test_without_its_archives_mamba_ssm_is_left_out_in_a_sentence(tmp_path: Path):
    assert official.start_builds(None, tmp_path)[1].startswith("mamba-ssm is not built")
    found, sentence = official.load(tmp_path)
    assert found is None and "neither installed nor built" in sentence


def test_a_failed_build_leaves_its_reason(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        official.build("selective_scan_cuda", tmp_path, tmp_path)
    _, sentence = official.load(tmp_path)
    assert "mamba_ssm-*.tar.gz is not in the folder" in sentence


def test_steps_go_first_while_mamba_ssm_is_being_built(monkeypatch: pytest.MonkeyPatch):
    states = itertools.chain([None, None], itertools.repeat(0))
    build: Any = SimpleNamespace(poll=lambda: next(states))
    waited: list[float] = []
    monkeypatch.setattr(official, "wait", lambda builds, seconds: waited.append(seconds))
    order = [part for part, _ in run.in_order(list(run.SHARES), [build])]
    assert order == ["checks", "steps", "scan", "layers", "train"]
    assert not waited


def test_time_that_a_part_leaves_goes_to_the_others():
    first, *later = run.SHARES
    seconds = run.share(first, later, 500)
    assert seconds < 250
    assert run.share(later[0], later[1:], 500) > run.share(later[0], later[1:], 500 - seconds)
    assert run.share(first, [], 500) == 500 - run.GRACE


def test_without_a_gpu_the_command_says_so_and_exits_with_2():
    result = subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu" / "run.sh"), "--parts", "scan"],
        capture_output=True, text=True, check=False,
        env={"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "there is no CUDA device here (torch.cuda.is_available() is False)\n"


@pytest.mark.slow
def test_the_whole_command_writes_its_tables(tmp_path: Path):
    words = ["--device", "cpu", "--tiny", "--seconds", "400", "--output", str(tmp_path)]
    words += ["--parts", "checks", "scan", "layers"]
    command = [sys.executable, "-m", "benchmarks.gpu.run", *words]
    subprocess.run(command, cwd=ROOT, check=True)
    (page,), (figures,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    found = json.loads(figures.read_text())
    assert {part: result["code"] for part, result in found["parts"].items()} == dict.fromkeys(
        ("checks", "scan", "layers"), 0
    )
    assert page.read_text() == tables.markdown(found)
    assert "| tri-orientated | 1x3x4x24 |" in page.read_text()


def test_reports_without_triton_or_without_tests_fail(tmp_path: Path):
    def report(*cases: str, needs_triton: bool = True) -> dict[str, Any]:
        file = tmp_path / "report.xml"
        file.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
        return checks.read_report(file, needs_triton=needs_triton)

    good = '<testcase classname="a" name="b"/>'
    assert report(good)["passed"]
    assert not report()["passed"]
    assert not report(good, '<testcase name="c"><failure/></testcase>')["passed"]
    skipped = '<testcase name="c"><skipped message="{}"/></testcase>'
    assert report(good, skipped.format("too little memory"))["passed"]
    assert not report(good, skipped.format("Triton is missing"))["passed"]
    assert not report(skipped.format("too little memory"))["passed"]
    assert report(skipped.format("Triton is missing"), needs_triton=False)["passed"]


def scan_tensors() -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias of a small scan on sequences."""
    torch.manual_seed(0)
    tokens = [torch.randn(2, 6, 11) for _ in range(3)]
    matrices = [torch.randn(2, 2, 3, 11) for _ in range(2)]
    u, delta, z = tokens
    return [u, delta, -torch.rand(6, 3), *matrices, torch.randn(6), z, torch.randn(6)]


def fake_forward(*arguments: Any) -> list[Tensor]:
    """As the extension: what the scan gives before the gate, its states, what it gives behind."""
    *tensors, softplus = arguments
    assert softplus is True
    bare = [*tensors[:6], None, tensors[7]]
    ungated = selective_scan(*bare, delta_softplus=True)
    found = [ungated, torch.zeros(3)]
    return found if tensors[6] is None else [*found, selective_scan(*tensors, delta_softplus=True)]


def fake_backward(*arguments: Any) -> list[Tensor]:
    *tensors, dout, states, ungated, dz, softplus, recompute = arguments
    assert states.shape == (3,) and dz is None and (softplus, recompute) == (True, False)
    assert (ungated is None) == (tensors[6] is None)
    present = [x for x in tensors if x is not None]

    def call(*given: Tensor) -> Tensor:
        values = iter(given)
        full = [None if x is None else next(values) for x in tensors]
        return selective_scan(*full, delta_softplus=True)

    found = list(gradients(call, present, dout))
    if tensors[6] is None:
        return found
    *leading, dz_found, dbias = found
    return [*leading, dbias, dz_found]


def gradients(call: Any, tensors: Any, upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    with torch.enable_grad():
        return torch.autograd.grad(call(*leaves), leaves, upstream)


def assert_same_gradients(one: Any, two: Any, tensors: list[Tensor | None]) -> None:
    """Two functions give the same and have the same gradients."""
    results = []
    for function in (one, two):
        leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        present = [x for x in leaves if x is not None]
        upstream = torch.cos(torch.arange(out.numel())).reshape(out.shape)
        results.append([out, *torch.autograd.grad(out, present, upstream)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
