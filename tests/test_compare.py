"""`python -m fashionnet.compare --config`: what differs between two runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fashionnet.compare import compare_configs
from fashionnet.errors import UserError

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun


def test_two_runs_of_one_command_are_the_same(small: tuple[FinishedRun, FinishedRun]) -> None:
    first, second = small
    assert compare_configs(first.path, second.path) == {
        "config": [],
        "environment": [],
        "results": [],
    }


def test_what_differs_is_told_by_part(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], failed: FinishedRun, tmp_path: Path
) -> None:
    first, second = small[0], failed
    told = commands.succeed("compare", "--config", first.path, second.path, cwd=tmp_path)
    config, _, results = (
        told[told.index(f"{part}:") :] for part in ("config", "environment", "results")
    )
    assert "  batch_size: 2 -> 32\n" in config
    assert "  optimizer.lr: 0.001 -> 1e+30\n" in config
    assert "environment:" in told
    assert "  status: completed -> failed\n" in results
    assert "  validation: {'loss': " in results

    answer = commands.succeed(
        "compare", "--json", "--config", first.path, second.path, cwd=tmp_path
    )
    found = json.loads(answer)
    assert {"key": "batch_size", "first": 2, "second": 32, "epoch": None} in found["config"]


def test_the_first_epoch_and_quantity_that_part_are_named(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    shutil.copytree(small[0].path, tmp_path / "other")
    other = commands.opened(tmp_path / "other")
    rows = other.history
    rows[1]["val_accuracy"] = 0.5
    (other.path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.edit(threads=7, device="cuda:0", git={"commit": "abc", "dirty": True})
    (other.path / "git.patch").write_text("+1")
    found = compare_configs(small[0].path, other.path)
    (parted,) = found["results"]
    assert (parted.key, parted.epoch, parted.second) == ("val_accuracy", 2, 0.5)
    assert str(parted).startswith("epoch 2, val_accuracy: ")
    environment = {difference.key: difference.second for difference in found["environment"]}
    assert {"threads": 7, "device": "cuda:0", "git.commit": "abc"}.items() <= environment.items()
    assert "git.patch" in environment


def test_what_is_no_run_is_told(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        compare_configs(small[0].path, tmp_path / "nowhere")
    assert "expected 2" in commands.fail("compare", "--config", small[0].path, cwd=tmp_path)
    assert "--config" in commands.fail("compare", cwd=tmp_path)
