"""scripts/gpu_check.py: it runs without a GPU, too, and fails where runs differ."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Commands

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("gpu_check")


def test_runs_with_other_weights_fail(gpu_check: ModuleType) -> None:
    record = {"weights_sha256": "ab", "device": "cpu", "fit_seconds": 1.0}
    record |= {"test": {"loss": 0.5, "accuracy": 0.8}}
    assert gpu_check.same("two", [record, record]).is_good
    assert not gpu_check.same("two", [record, {**record, "weights_sha256": "cd"}]).is_good


@pytest.mark.slow
def test_a_check_that_fails_is_reported_and_keeps_the_runs(
    commands: Commands, tmp_path: Path
) -> None:
    line = [sys.executable, str(SCRIPT), "--device", "cpu", "--keep", str(tmp_path)]
    done = commands.call([*line, "--only", "syncs,processes", "batch_size=0"], tmp_path)
    assert done.returncode == 1
    assert "ok      syncs: needs CUDA" in done.stdout
    assert "FAILED  processes: status 2: error: batch_size=0 must be 1 or more" in done.stdout
    assert f"the runs are in {tmp_path}" in done.stdout
