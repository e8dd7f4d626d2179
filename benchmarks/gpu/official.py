"""mamba-ssm and causal-conv1d: built from source archives, and called by their compiled parts.

    python -m benchmarks.gpu.official SOURCES --into FOLDER      (builds; run.py does so itself)

SOURCES holds the source distributions mamba_ssm-*.tar.gz and causal_conv1d-*.tar.gz (1.5 or newer),
or their unpacked folders. Only the CUDA extensions are built, for the compute capability of the GPU
that is there; nothing is installed. Where both packages are installed, those are used.

B batch, E channels, L tokens, N states, G groups.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.common import ROOT, one_line

# Extension -> the start of its archive's name, and where in it the sources lie.
EXTENSIONS = {
    "selective_scan_cuda": ("mamba_ssm", "csrc/selective_scan"),
    "causal_conv1d_cuda": ("causal_conv1d", "csrc"),
}
# As both packages are built, but for one kind of GPU.
FLAGS = [
    "-O3",
    *(f"-U__CUDA_NO_{kind}__" for kind in ("HALF_OPERATORS", "HALF_CONVERSIONS")),
    *(f"-U__CUDA_NO_BFLOAT16_{kind}__" for kind in ("OPERATORS", "CONVERSIONS")),
    *(f"-U__CUDA_NO_BFLOAT162_{kind}__" for kind in ("OPERATORS", "CONVERSIONS")),
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
]


class Official(NamedTuple):
    """A scan and a causal convolution on channel-first tensors in walk order, with gradients.

    scan(u (B, E, L), delta, A (E, N), B (B, G, N, L), C, D (E,), z or None, delta_bias (E,)) with
    softplus; conv(x (B, E, L), weight (E, taps), bias (E,)) with SiLU.
    """

    scan: Callable[..., Tensor]
    conv: Callable[[Tensor, Tensor, Tensor], Tensor]


def stand_in() -> tuple[Official, str]:
    """Our own operators in place of the official ones: to try the comparison out on a CPU."""
    from umamba.ops.causal_conv import causal_conv1d_silu
    from umamba.ops.selective_scan import selective_scan

    def scan(*tensors: Any) -> Tensor:
        return selective_scan(*tensors, delta_softplus=True)  # type: ignore[call-overload,no-any-return]

    return Official(scan, causal_conv1d_silu), "Compared with our own operators on sequences."


def load(folder: Path | None) -> tuple[Official | None, str]:
    """The official operators, or None where there are none, and a sentence about it.

    folder: where `build` put the extensions; installed ones go first.
    """
    if folder is not None:
        sys.path += [str(folder / name) for name in EXTENSIONS]
    scan, reason = import_extension("selective_scan_cuda", folder)
    if scan is None:
        return None, f"mamba-ssm is not compared: {reason}."
    conv, reason = import_extension("causal_conv1d_cuda", folder)
    if conv is None:
        sentence = f"Compared with mamba-ssm and torch's depthwise convolution: {reason}."
        return Official(bound(Scan, scan), torch_conv), sentence
    both = Official(bound(Scan, scan), bound(Convolution, conv))
    return both, "Compared with mamba-ssm and causal-conv1d."


def import_extension(name: str, folder: Path | None) -> tuple[Any, str]:
    """(extension, "") or (None, reason)."""
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError, RuntimeError) as error:
        log = None if folder is None else folder / f"{name}.failed"
        if log is not None and log.is_file():
            return None, log.read_text().strip()
        absent = isinstance(error, ModuleNotFoundError)
        return None, f"{name} is neither installed nor built" if absent else one_line(error)


def bound(function: type[torch.autograd.Function], extension: Any) -> Callable[..., Tensor]:
    """The function with its extension given."""
    return lambda *tensors: function.apply(extension, *tensors)  # type: ignore[no-any-return]


class Scan(torch.autograd.Function):
    """mamba-ssm's selective scan. Its backward takes the result before the gate from forward."""

    @staticmethod
    def forward(ctx: Any, extension: Any, *tensors: Tensor | None) -> Tensor:
        ungated, states, *gated = extension.fwd(*tensors, True)
        ctx.extension = extension
        ctx.save_for_backward(*tensors, states, ungated if gated else None)
        return gated[0] if gated else ungated

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, states, ungated = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        found = ctx.extension.bwd(*tensors, dout, states, ungated, None, True, False)
        du, ddelta, dA, dB, dC, dD, dbias, *dz = found
        return None, du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, dbias


class Convolution(torch.autograd.Function):
    """causal-conv1d with SiLU; its C++ functions take the results' memory since 1.5."""

    @staticmethod
    def forward(ctx: Any, extension: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x if x.stride(2) == 1 or x.stride(1) == 1 else x.contiguous()
        out = torch.empty_like(x)
        extension.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True)
        ctx.extension = extension
        ctx.save_for_backward(x, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        dout = dout if dout.stride(2) == 1 or dout.stride(1) == 1 else dout.contiguous()
        dx = torch.empty_like(x)
        dweight, dbias = (torch.zeros_like(w, dtype=torch.float32) for w in (weight, bias))
        ctx.extension.causal_conv1d_bwd(
            x, weight, bias, dout, None, None, None, dx, dweight, dbias, None, True
        )
        return None, dx, dweight, dbias


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The causal convolution with SiLU as a Conv1d padded at both ends and cut."""
    channels, taps = weight.shape
    padded = functional.conv1d(x, weight.unsqueeze(1), bias, padding=taps - 1, groups=channels)
    return functional.silu(padded[..., : x.shape[-1]])


def start_builds(sources: Path | None, folder: Path) -> tuple[list[subprocess.Popen[bytes]], str]:
    """Starts building both extensions in the background; the processes, and why there are none."""
    from torch.utils.cpp_extension import CUDA_HOME

    if sources is None:
        return [], "mamba-ssm is not built: no folder with its source archives was given"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").is_file():
        return [], "mamba-ssm is not built: there is no CUDA compiler (nvcc) here"
    words = [str(sources.resolve()), "--into", str(folder.resolve())]
    command = [sys.executable, "-m", "benchmarks.gpu.official", *words]
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for name in EXTENSIONS:
        with open(folder / f"{name}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [*command, "--only", name], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )  # fmt: skip
    return processes, ""


def build(name: str, sources: Path, folder: Path) -> None:
    """Builds one extension into folder/name; one line in folder/name.failed where that fails."""
    try:
        from torch.utils.cpp_extension import load as compile_extension

        start, inside = EXTENSIONS[name]
        tree = unpack(sources, start, folder / "sources") / inside
        major, minor = torch.cuda.get_device_capability()
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
        os.environ.setdefault("MAX_JOBS", str(max(1, (os.cpu_count() or 2) - 2)))
        # ninja may lie beside the interpreter only
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        units = sorted(str(file) for kind in ("*.cpp", "*.cu") for file in tree.glob(kind))
        made = folder / f"{name}.making"
        made.mkdir(parents=True, exist_ok=True)
        compile_extension(
            name, units, extra_cflags=["-O3"], extra_cuda_cflags=FLAGS,
            extra_include_paths=[str(tree)], build_directory=str(made), verbose=True,
        )  # fmt: skip
        target = folder / name
        target.mkdir(exist_ok=True)
        shutil.copy(made / f"{name}.so", target / f"{name}.part")
        os.replace(target / f"{name}.part", target / f"{name}.so")
    except Exception as error:  # whatever fails, the benchmark goes on without the comparison
        lines = [line for line in str(error).splitlines() if "error:" in line.lower()]
        reason = lines[0].strip()[:200] if lines else one_line(error)
        (folder / f"{name}.failed").write_text(f"the build failed, {reason}\n")
        raise


def unpack(sources: Path, start: str, target: Path) -> Path:
    """The folder of a source distribution, unpacked from its archive where there is only that."""
    folders = sorted(path for path in sources.glob(f"{start}-*") if path.is_dir())
    if folders:
        return folders[-1]
    archives = sorted(sources.glob(f"{start}-*.tar.gz"))
    if not archives:
        raise FileNotFoundError(f"{start}-*.tar.gz is not in the folder of source archives")
    with tarfile.open(archives[-1]) as archive:
        archive.extractall(target, filter="data")
    return target / archives[-1].name.removesuffix(".tar.gz")


def wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Waits for the builds, at most so long."""
    ends = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            return


def main() -> None:
    """Builds what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--only", choices=EXTENSIONS, action="append")
    args = parser.parse_args()
    for name in args.only or EXTENSIONS:
        build(name, args.sources.resolve(), args.into.resolve())


if __name__ == "__main__":
    main()
