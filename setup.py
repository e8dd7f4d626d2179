"""Builds the C library of the CPU scan where a C compiler is there, and maps the top-level folders.

Everything else stands in pyproject.toml.  The library has a plain C interface (no Python, no
torch), so one wheel per platform serves every Python: its tag is py3-none-<platform>.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).parent
SOURCES = ROOT / "umamba" / "ops" / "csrc"
LIBRARY = Path("umamba") / "ops" / "libumamba_cpu.so"
# Never -ffast-math: it removes the rounding step of exp and switches denormals off everywhere.
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
INSTRUCTION_SETS = {
    "kernels_v2": ["-march=x86-64-v2"],
    "kernels_v3": ["-march=x86-64-v3"],
    "kernels_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mtune=icelake-server"],
}


def find_compiler() -> str | None:
    """The C compiler of the variable CC, else cc, gcc or clang; None where there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    return None


def build_library(target: Path) -> None:
    """Compiles the kernels once per instruction set and links them into `target`."""
    compiler = find_compiler()
    if compiler is None:
        print(
            "umamba: no C compiler found, so the CPU scan is not built and the slower PyTorch path "
            "serves; install gcc or clang and install umamba again",
            file=sys.stderr,
        )
        return
    digest = runpy.run_path(str(SOURCES.with_name("sources.py")))["digest_sources"](SOURCES)
    x86 = platform.machine() in ("x86_64", "AMD64")
    variants = INSTRUCTION_SETS if x86 else {"kernels_base": []}
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source, name, extra in (
            ("threads.c", "threads", []),
            ("api.c", "api", [f'-DUMAMBA_SOURCES="{digest}"']),
            *(("kernels.c", name, [*f, f"-DKERNELS={name}"]) for name, f in variants.items()),
        ):
            objects.append(str(Path(folder) / f"{name}.o"))
            compile_one = [compiler, *FLAGS, *extra, "-c", str(SOURCES / source)]
            subprocess.run([*compile_one, "-o", objects[-1]], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        link = [compiler, "-shared", *objects, "-o", str(temporary), "-lpthread", "-lm"]
        subprocess.run(link, check=True)
        os.replace(temporary, target)


class BuildWithLibrary(build_py):
    """Puts the library beside the Python files: into the wheel, or into the tree if editable."""

    def run(self) -> None:
        super().run()
        base = ROOT if self.editable_mode else Path(self.build_lib)
        try:
            build_library(base / LIBRARY)
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"umamba: the CPU scan could not be compiled ({error}); the slower PyTorch path "
                "serves",
                file=sys.stderr,
            )


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """Tells that the wheel holds machine code although there is no extension module."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    packages=[
        *find_packages(include=["umamba", "umamba.*"]),
        "umamba.training.nnunet_trainers",
        "umamba.data_conversion",
        "umamba.nnunet_plans",
    ],
    package_dir={
        "umamba": "umamba",
        "umamba.data_conversion": "data_conversion",
        "umamba.nnunet_plans": "nnunet_plans",
    },
    package_data={
        "umamba.ops": ["csrc/*"],
        "umamba.report": ["static/*"],
        "umamba.nnunet_plans": ["*.json"],
    },
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
    distclass=PlatformDistribution,
)
