"""A short run of the soak: killed commands end with what uninterrupted ones end with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are counted in /proc")
@pytest.mark.parametrize("part", ["preprocess", "predict"])
def test_a_killed_command_ends_with_the_result_of_an_uninterrupted_one(tmp_path, part):
    file = tmp_path / "soak.json"
    words = ["benchmarks/soak.py", "--kills", "2", "--cases", "5", "--parts", part]
    words += ["--json", str(file)]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(file.read_text())[part]["kills"] == 2
