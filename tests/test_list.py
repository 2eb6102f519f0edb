"""`python -m fashionnet.list`: the runs below a folder, sound or not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fashionnet.errors import UserError
from fashionnet.list import list_runs

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun

DAMAGED = {
    "truncated": '{"status": "comp',
    "a figure for a group": '{"status": "completed", "config": {"model": 5}, "validation": 5}',
}


@pytest.fixture(scope="module")
def folder(
    lesson: FinishedRun, failed: FinishedRun, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a completed run, a failed one and damaged ones, at different depths."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(failed.path, folder / "a/sweep/failed")
    shutil.copytree(lesson.path, folder / "completed")
    for name, text in DAMAGED.items():
        (folder / "damaged" / name).mkdir(parents=True)
        (folder / "damaged" / name / "run.json").write_text(text)
    (folder / "no run").mkdir()
    return folder


def test_json_has_the_figures_of_the_records_oldest_first(
    commands: Commands, folder: Path, lesson: FinishedRun, failed: FinishedRun
) -> None:
    rows = json.loads(commands.succeed("list", ".", "--json", cwd=folder))
    *damaged, first, second = rows
    in_order = sorted((lesson, failed), key=lambda run: str(run.record["started"]))
    for run, row in zip(in_order, (first, second), strict=True):
        record = run.record
        validation, test = record.get("validation") or {}, record.get("test") or {}
        assert row == {
            "run": {"completed": "completed", "failed": "a/sweep/failed"}[record["status"]],
            "status": record["status"],
            "model": "mlp",
            "seed": 0,
            "epochs": record["config"]["epochs"],
            "val_loss": validation.get("loss"),
            "val_accuracy": validation.get("accuracy"),
            "test_accuracy": test.get("accuracy"),
            "started": record["started"],
            "error": record.get("error"),
        }
    assert {row["run"] for row in damaged} == {f"damaged/{name}" for name in DAMAGED}
    for row in damaged:
        assert row["status"] == "damaged"
        assert "run.json" in row["error"]
        assert row["val_loss"] is None


def test_table_shows_a_line_a_run(commands: Commands, folder: Path, lesson: FinishedRun) -> None:
    head, *lines = commands.succeed("list", folder, cwd=folder.parent).splitlines()
    assert head.split() == [
        *("run", "status", "model", "seed", "epochs"),
        *("val_loss", "val_accuracy", "test_accuracy"),
    ]
    assert len(lines) == 2 + len(DAMAGED)
    (completed,) = (line.split() for line in lines if " completed " in line)
    record = lesson.record
    assert completed == [
        *(os.path.join(folder.name, "completed"), "completed", "mlp", "0", "2"),
        f"{record['validation']['loss']:.4f}",
        f"{record['validation']['accuracy']:.4f}",
        f"{record['test']['accuracy']:.4f}",
    ]
    assert sum(" damaged " in line for line in lines) == len(DAMAGED)
    assert len({len(line) for line in lines}) == 1  # aligned


def test_outputs_is_where_one_looks(
    lesson: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lesson.path, tmp_path / "outputs/mlp/run")
    assert [row["run"] for row in list_runs()] == ["outputs/mlp/run"]


def test_folder_without_runs_is_no_error(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    assert commands.succeed("list", cwd=tmp_path) == "no runs below outputs\n"
    assert list_runs(tmp_path) == []


def test_missing_folder_is_told(commands: Commands, tmp_path: Path) -> None:
    assert "outputs is not a folder" in commands.fail("list", cwd=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        list_runs(tmp_path / "file")
