"""Every test of this folder runs in a folder of its own, without nnU-Net's variables."""

from __future__ import annotations

import pytest

from umamba.data.workspace import VARIABLES


@pytest.fixture(autouse=True)
def no_variables(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(tmp_path)
