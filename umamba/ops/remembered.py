"""The scan backend that was fastest on a device when `umamba doctor --bench` timed them there."""

import contextlib
import datetime
import functools
import json
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import umamba
from umamba.files import write_json
from umamba.ops import cpu

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The name of a backend and the day on which it was found fastest (YYYY-MM-DD)."""

    backend: str
    date: str


def choices_file() -> Path:
    """Return the file that holds the choices of all devices: delete it to forget them."""
    folder = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return Path(folder).expanduser() / "umamba" / "scan.json"


@functools.cache
def recall(device: torch.device) -> Choice | None:
    """Return what is remembered for a device with this torch and this umamba; read once."""
    entry = _read().get(_circumstances(device))
    if entry is None:
        return None
    values = [entry.get(key) for key in ("backend", "date")] if isinstance(entry, dict) else [None]
    if not all(isinstance(value, str) for value in values):
        _log.warning("ignoring %s, of which the entry of this device is unreadable", choices_file())
        return None
    return Choice(*values)


def remember(device: torch.device, backend: str) -> Path:
    """Keep the backend as the choice for a device; return the file, replaced in one step."""
    file = choices_file()
    today = datetime.date.today().isoformat()
    _read.cache_clear()
    content = _read() | {_circumstances(device): {"backend": backend, "date": today}}
    write_json(file, content)
    _read.cache_clear()
    recall.cache_clear()
    return file


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the CPU's model and the C library's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # /proc is Linux's
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        model = next(named, model)
    return f"{model}, {cpu.instruction_set() or 'no C library'}"


def _circumstances(device: torch.device) -> str:
    return f"{device_name(device)}; torch {torch.__version__}; umamba {umamba.__version__}"


@functools.cache
def _read() -> dict[str, Any]:
    """Return the content of the file, nothing where it is absent or no JSON object."""
    try:
        file = choices_file()
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder
        _log.warning("ignoring the remembered scan backends, which cannot be read: %s", error)
        return {}
    if not isinstance(content, dict):
        _log.warning("ignoring %s, which holds no JSON object", file)
        return {}
    return content
