"""The launcher `vectorized`: Hydra's own suite, and sweeps with the bits of each run alone."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase
from packaging.version import Version

from tests.conftest import Commands, FinishedRun

VECTORIZED = "hydra/launcher=vectorized"
SMALL = ("device=cpu", "epochs=3", "data.limit=1203")

pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------- Hydra's own suite


def test_hydra_finds_it() -> None:
    names = [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]
    assert "VectorizedLauncher" in names


@pytest.fixture
def _hydras_own_version(hydra_restore_singletons: Any) -> None:
    """Makes Hydra behave as without `version_base`, which its suite expects."""
    VersionBase.instance().setbase(Version("1.1"))


@pytest.mark.usefixtures("_hydras_own_version")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("vectorized", [])])
class TestLauncher(LauncherTestSuite):
    pass


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=vectorized"])]
)
class TestIntegration(IntegrationTestSuite):
    pass


# ------------------------------------------------------------------------------- sweeps of ours


def swept(commands: Commands, folder: Path, *overrides: str) -> dict[str, FinishedRun]:
    """Runs a sweep and returns its runs by the names of their folders."""
    commands.succeed("train", "-m", f"hydra.sweep.dir={folder}", *overrides, cwd=folder.parent)
    return {path.parent.name: FinishedRun(path.parent) for path in folder.glob("*/run.json")}


def facts(run: FinishedRun) -> dict[str, Any]:
    """Returns what two runs of the same bits have in common."""
    names = ("config_hash", "initial_weights_sha256", "weight_hashes", "weights_sha256")
    figures = [{k: v for k, v in row.items() if k != "epoch_seconds"} for row in run.history]
    return {name: run.record[name] for name in (*names, "validation", "test")} | {"rows": figures}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def alone(commands: Commands, folder: Path) -> dict[str, FinishedRun]:
    return swept(commands, folder / "alone", *SMALL, "seed=0,1,2,3,4")


@pytest.fixture(scope="module")
def together(commands: Commands, folder: Path) -> dict[str, FinishedRun]:
    return swept(commands, folder / "together", *SMALL, "seed=0,1,2,3,4", VECTORIZED)


def test_each_job_has_the_bits_of_a_run_alone(
    alone: dict[str, FinishedRun], together: dict[str, FinishedRun]
) -> None:
    assert alone.keys() == together.keys() and len(alone) == 5
    for name, run in alone.items():
        assert facts(run) == facts(together[name])


def test_each_job_has_a_whole_run_directory(
    alone: dict[str, FinishedRun], together: dict[str, FinishedRun]
) -> None:
    def files(run: FinishedRun) -> list[str]:
        found = (path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file())
        # Where a run alone writes a checkpoint at each epoch's end, a group may write only one.
        names = sorted(str(path) for path in found if path.name != "previous.pt")
        return [name.partition("tfevents")[0] for name in names]

    for name, run in alone.items():
        assert files(run) == files(together[name])
        log = (together[name].path / "train.log").read_text()
        assert log.count("epoch 3/3") == log.count("test accuracy") == 1  # nothing of the others


def test_seconds_are_a_part_of_the_groups(together: dict[str, FinishedRun]) -> None:
    for run in together.values():
        group = run.record["group"]
        assert group["jobs"] == 5
        assert 0 < run.record["fit_seconds"] < run.record["total_seconds"]
        assert 0 < group["fit_seconds"] < run.record["total_seconds"]


def test_the_other_commands_see_no_difference(
    commands: Commands, folder: Path, alone: dict[str, FinishedRun], together: object
) -> None:
    tables = [
        commands.succeed("compare", f"{folder}/{name}", "--json", cwd=folder)
        for name in ("alone", "together")
    ]
    assert json.loads(tables[0]).keys() == json.loads(tables[1]).keys()
    name = next(iter(alone))
    said = commands.succeed("reproduce", f"together/{name}", cwd=folder)
    assert "identical: data, split, initial weights, and figures and weights of 3 epochs" in said


def test_jobs_that_stop_early_leave_the_others(commands: Commands, folder: Path) -> None:
    stopping = ("early_stopping.patience=1", "epochs=12", "optimizer.lr=0.02")
    overrides = ("device=cpu", "data.limit=1203", *stopping, "seed=0,1,2,3")
    first = swept(commands, folder / "stopped alone", *overrides)
    second = swept(commands, folder / "stopped", *overrides, VECTORIZED)
    epochs = {run.record["epochs_done"] for run in first.values()}
    assert len(epochs) > 1 and min(epochs) < 12
    assert {n: facts(run) for n, run in first.items()} == {n: facts(r) for n, r in second.items()}


def test_rates_may_differ(commands: Commands, folder: Path) -> None:
    """Learning rates share a group; networks without gradients by hand are trained alone."""
    overrides = (
        *("device=cpu", "epochs=1", "data.limit=640", "seed=0,1", "optimizer.lr=0.001,0.003"),
        "gradients=auto,autograd",
    )
    first = swept(commands, folder / "grid alone", *overrides)
    second = swept(commands, folder / "grid", *overrides, VECTORIZED)
    assert len(first) == 8
    assert {n: facts(run) for n, run in first.items()} == {n: facts(r) for n, r in second.items()}
    jobs = [run.record.get("group", {}).get("jobs") for run in second.values()]
    assert sorted(jobs, key=str) == [4] * 4 + [None] * 4
    logs = [(run.path / "train.log").read_text() for run in second.values()]
    reason = "trained alone: the gradients of MLP are not computed by hand"
    assert sum(reason in text for text in logs) == 4


def test_networks_of_other_shapes_are_trained_alone_and_the_log_says_so(
    commands: Commands, folder: Path
) -> None:
    overrides = ("device=cpu", "epochs=1", "data.limit=640", "model.hidden=4,5", VECTORIZED)
    line = ("train", "-m", f"hydra.sweep.dir={folder}/shapes", "hydra/hydra_logging=default")
    said = commands.succeed(*line, *overrides, cwd=folder)
    why = "no other job differs from it in seed or learning rate alone"
    assert f"2 jobs were trained one after another: {why}" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("way", ["auto", "autograd"])
def test_on_a_gpu_a_group_agrees_with_runs_alone(
    commands: Commands, folder: Path, way: str
) -> None:
    overrides = ("device=cuda", "epochs=1", "data.limit=640", "seed=0,1,2", f"gradients={way}")
    first = swept(commands, folder / f"gpu {way} alone", *overrides)
    second = swept(commands, folder / f"gpu {way}", *overrides, VECTORIZED)
    for name, run in second.items():
        assert run.record["group"]["jobs"] == 3
        assert run.history[0]["loss"] == pytest.approx(first[name].history[0]["loss"], rel=1e-4)


def test_one_that_fails_leaves_the_others(commands: Commands, folder: Path) -> None:
    """A rate so large that the loss becomes nan ends one job; it is recorded as failed."""
    overrides = (*SMALL, "seed=0,1", "optimizer.lr=0.001,1e30", f"hydra.sweep.dir={folder}/failing")
    done = commands.run("train", "-m", *overrides, VECTORIZED, cwd=folder)
    assert done.returncode == 2 and "became nan or infinite" in done.stderr
    found = {p.parent.name: FinishedRun(p.parent) for p in folder.glob("failing/*/run.json")}
    ended = {name: run.record["status"] for name, run in found.items()}
    assert sorted(ended.values()) == ["completed", "completed", "failed", "failed"]
    assert all(("1e+30" in name) == (status == "failed") for name, status in ended.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_and_given_again_it_comes_to_the_same_bits(
    commands: Commands, folder: Path, number: signal.Signals
) -> None:
    overrides = ("device=cpu", "epochs=4", "data.limit=4803", "seed=0,1,2", "batch_size=16")
    whole = swept(commands, folder / f"whole {number.name}", *overrides)
    again = folder / f"ended {number.name}"
    often = ("checkpoint.every_seconds=0.01", f"hydra.sweep.dir={again}", VECTORIZED)
    command = commands.start("train", "-m", *overrides, *often, cwd=folder)
    until = time.monotonic() + 60
    while len(list(again.glob("*/checkpoints/last.pt"))) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    command.send_signal(number)
    assert command.wait() != 0
    ended = [FinishedRun(path.parent) for path in again.glob("*/run.json")]
    status = "interrupted" if number == signal.SIGINT else "running"
    assert [run.record["status"] for run in ended] == [status] * 3
    assert all(run.record.get("epochs_done", 0) < 4 for run in ended)
    found = swept(commands, again, *overrides, VECTORIZED, "checkpoint.every_seconds=0.01")
    assert {n: facts(run)["rows"] for n, run in whole.items()} == {
        n.replace("checkpoint.every_seconds=0.01,", ""): facts(run)["rows"]
        for n, run in found.items()
    }


def test_without_a_sweep_it_is_a_plain_run(commands: Commands, folder: Path) -> None:
    commands.succeed("train", *SMALL, "epochs=1", VECTORIZED, "hydra.run.dir=plain", cwd=folder)
    assert "group" not in FinishedRun(folder / "plain").record


def test_a_terminal_shows_one_bar_for_all(commands: Commands, folder: Path) -> None:
    from tests.test_train import on_a_terminal

    overrides = ("device=cpu", "epochs=1", "data.limit=6400", "seed=0,1", VECTORIZED)
    line = commands.line("train", "-m", *overrides, "hydra.sweep.dir=shown")
    status, shown = on_a_terminal(line, folder, commands.environment)
    assert status == 0, shown
    bars = [part for part in shown.split("\r") if part.startswith("epoch 1/1, 2 runs:")]
    assert len(bars) > 1 and "0/400 " in bars[0]
