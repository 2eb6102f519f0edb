"""scripts/soak.py: kills that change no bit, and that it would see one that did."""

from __future__ import annotations

import importlib
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("soak")


def counts(told: str) -> dict[str, list[int]]:
    """The rows of numbers in the printed tables, by their first cell."""
    rows = [line.strip("|").split("|") for line in told.splitlines() if line.startswith("|")]
    return {
        row[0].strip(): [int(cell) for cell in row[1:]]
        for row in rows
        if all(cell.strip().isdigit() for cell in row[1:])
    }


# -------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_killed_runs_come_to_the_same_bits(
    soak: ModuleType, commands: Commands, tmp_path: Path
) -> None:
    line = [sys.executable, str(SCRIPT), "--kills", "3", "--keep", "kept"]
    done = commands.call([*line, "--only", "stopped"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    found = counts(done.stdout)
    assert sum(sum(found[phase]) for phase in soak.PHASES) == 3
    restarts, completed, differing, _seconds = found["3"]
    done_when_killed = sum(found[soak.DONE])
    assert (restarts, differing) == (3 - done_when_killed, 0)
    runs = [path for path in (tmp_path / "kept").iterdir() if re.search(r"-\d{3}$", path.name)]
    assert len(runs) == completed
    for run in runs:
        record = commands.opened(run).record
        assert record["status"] == "completed"
        assert record["weight_hashes"]


# ------------------------------------------------------------------------------- what it notices


def change_history(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    rows[1]["val_loss"] += 2**-40
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def drop_an_epoch(run: Path) -> None:
    first, *_ = (run / "history.jsonl").read_text().splitlines()
    (run / "history.jsonl").write_text(first + "\n")


def change_record(**values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | values))

    return change


def change_a_weight(run: Path) -> None:
    path = run / "checkpoints/last.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["1.bias"][3] += 1e-6
    torch.save(state, path)


def draw_the_curve_twice(run: Path) -> None:
    (file,) = (run / "tensorboard/train").iterdir()
    shutil.copy(file, f"{file}.again")


def leave_a_temporary_file(run: Path) -> None:
    (run / "checkpoints/.last.pt.1.tmp").touch()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_history, "history.jsonl 2 val_loss"),
        (drop_an_epoch, "history.jsonl, length"),
        (change_record(weights_sha256="0" * 64), "run.json weights_sha256"),
        (change_record(weight_hashes=["0" * 64] * 2), "run.json weight_hashes 1"),
        (change_record(best_epoch=7), "run.json best_epoch"),
        (change_record(test={"accuracy": 0.5, "loss": 1.0}), "run.json test loss"),
        (change_record(status="interrupted"), "run.json status"),
        (change_a_weight, "checkpoints last.pt model 1.bias"),
        (draw_the_curve_twice, "tensorboard train epoch_loss, length"),
        (leave_a_temporary_file, "temporary files, length"),
    ],
)
def test_change_of_a_finished_run_is_reported(
    change: Callable[[Path], None],
    named: str,
    soak: ModuleType,
    small: tuple[FinishedRun, FinishedRun],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(small[0].path, run)
    expected = soak.facts(small[1].path)  # the same run once more
    assert soak.differences(expected, soak.facts(run)) == []
    change(run)
    found = soak.differences(expected, soak.facts(run))
    assert any(line.startswith(f"{named}: ") for line in found), found


# --------------------------------------------------------- processes that end as they must not


def trainer(soak: ModuleType, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Puts a program in the place of `python -m fashionnet.train`."""
    monkeypatch.setattr(soak, "TRAIN", [sys.executable, "-S", "-c", program])


def test_refused_restart_is_told_with_its_command_and_words(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer(soak, monkeypatch, "print('no, thanks'); raise SystemExit(2)")
    kill = soak.Kill(soak.SIGKILL, "start", 60.0)
    with pytest.raises(soak.Fault, match=r"status 2[\s\S]*hydra\.run\.dir=run\nno, thanks"):
        soak.start("mlp", tmp_path / "run", kill)


STUBBORN = """\
import json, pathlib, signal, time
run = pathlib.Path("run")
run.mkdir()
signal.signal(signal.SIGTERM, {handler})
(run / "run.json").write_text(json.dumps({{"status": "running"}}))
time.sleep(60)
"""


@pytest.mark.parametrize(
    "handler",
    ["signal.SIG_IGN", "signal.SIG_DFL", "lambda *_: exit(143)"],
    ids=["ignores it", "does not catch it", "notes no interruption"],
)
def test_run_that_takes_sigterm_in_another_way_is_a_fault(
    handler: str,
    soak: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    trainer(soak, monkeypatch, STUBBORN.format(handler=handler))
    monkeypatch.setattr(soak, "_MOST_SECONDS", 0.5)
    with pytest.raises(soak.Fault, match="fitting; sent: Kill"):
        soak.start("mlp", tmp_path / "run", soak.Kill(soak.SIGTERM, "record", 0.05), num_epochs=3)


def test_same_seed_draws_the_same_kills(soak: ModuleType) -> None:
    reference = soak.Reference({}, 3, 4.0, 1.0)

    def drawn(seed: int) -> list[Any]:
        chance = random.Random(seed)
        return [soak.draw(chance, reference) for _ in range(50)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {kill.aim for kill in drawn(0)} == {"start", "record", "write"}
    assert {kill.signal for kill in drawn(0)} == {soak.SIGKILL, soak.SIGTERM}
    assert all(kill.delay <= (4.0 if kill.aim == "start" else 1.0) for kill in drawn(0))
