"""Options and fixtures that several test folders share."""

from __future__ import annotations

import os

# As umamba.cli.main sets it, before torch is imported: tests run in parallel processes.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when the kernels are made: then they run on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

PARITY_FOLDER = Path(__file__).parent / "parity"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a further folder of parity cases; every file in it becomes a test",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test all files of the parity folders: those of losses as `loss_file`, the others as
    `parity_file`."""
    names = [name for name in ("parity_file", "loss_file") if name in metafunc.fixturenames]
    if not names:
        return
    files: dict[str, Path] = {}
    for folder in (PARITY_FOLDER, *metafunc.config.getoption("--parity-dir")):
        found = sorted(folder.glob("*.json.gz"))
        if not found:
            raise pytest.UsageError(f"{folder} holds no parity cases (*.json.gz)")
        files.update({file.name.removesuffix(".json.gz"): file for file in found})
    wants_losses = names == ["loss_file"]
    files = {name: file for name, file in files.items() if ("-loss" in name) == wants_losses}
    marks = getattr(metafunc.module, "marks_of_parity_file", lambda file: ())
    metafunc.parametrize(
        names[0], [pytest.param(f, id=name, marks=marks(f)) for name, f in files.items()]
    )


@pytest.fixture(autouse=True, scope="session")
def no_remembered_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps out what `umamba doctor --bench` has found on this machine."""
    from umamba.ops import remembered

    absent = tmp_path_factory.getbasetemp() / "absent.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "choices_file", lambda: absent)
        yield


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and torch.empty_like give with NaN: unwritten elements show."""
    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)

        def filled(*args: object, _original=original, **kwargs: object) -> torch.Tensor:
            tensor = _original(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.fill_(float("nan"))
            return tensor

        monkeypatch.setattr(torch, name, filled)


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Temporary nnU-Net folders (raw, preprocessed, results), set in the environment."""
    folders = {name: tmp_path / name for name in ("raw", "preprocessed", "results")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(folder))
    return folders


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs the test with one torch thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shallow_arguments() -> Callable[[str], dict[str, Any]]:
    """Gives a network's arguments for few features, and one block where there could be several."""
    from umamba.planning.upstream import find_entry

    everywhere = {"features_per_stage": [8], "depths": [1] * 4, "n_mamba_layers": 1}
    own = {
        "resenc_m": {"n_blocks_per_stage": [1]},
        "hymamba": {"n_blocks_per_stage": [0, 1, 1, 1, 1]},
        "lightm_unet": {"n_conv_per_stage": [1] * 4},
    }

    def arguments_of(name: str) -> dict[str, Any]:
        entry = find_entry(name)
        shared = {key: x for key, x in everywhere.items() if key in entry.keywords}
        return shared | own.get(entry.control_of or name, {})

    return arguments_of
