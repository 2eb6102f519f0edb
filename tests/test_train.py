"""`python -m fashionnet.train` as people use it: real processes, real data, small runs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from fashionnet.config import compose

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun
    from tests.warm import Forked

HISTORY_KEYS = [
    "epoch",
    "loss",
    "accuracy",
    "val_loss",
    "val_accuracy",
    "lr",
    "epoch_seconds",
]


def sha256_of_weights(path: Path) -> str:
    """The hash as the contract words it, written down once more."""
    weights = torch.load(path, weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).astype("<f4").tobytes())
    return digest.hexdigest()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value) pairs of the one event file in a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (file,) = folder.iterdir()
    found: dict[str, list[tuple[int, float]]] = {}
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder but locks, and when it was last changed."""
    paths = (path for path in folder.rglob("*") if path.name != ".lock")
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in paths}


# ------------------------------------------------------------------------- the run directory


def test_run_directory_holds_what_the_contract_lists(lesson: FinishedRun) -> None:
    names = {path.name for path in lesson.path.iterdir()} - {".lock", "git.patch"}
    assert names == {
        ".hydra",
        "run.json",
        "history.jsonl",
        "checkpoints",
        "tensorboard",
        "train.log",
    }
    hydra = {path.name for path in (lesson.path / ".hydra").iterdir()}
    assert hydra == {"config.yaml", "overrides.yaml", "hydra.yaml"}
    checkpoints = {path.name for path in (lesson.path / "checkpoints").iterdir()}
    assert {"last.pt", "best.pt"} <= checkpoints <= {"last.pt", "best.pt", "previous.pt"}
    curves = {path.name for path in (lesson.path / "tensorboard").iterdir()}
    assert curves == {"train", "validation"}


def test_record_says_what_was_asked_and_on_what(lesson: FinishedRun, commands: Commands) -> None:
    record = lesson.record
    assert record["schema_version"] == 2
    assert record["status"] == "completed"
    assert record["command"] == "python -m fashionnet.train epochs=2 hydra.run.dir=run"
    composed = commands.succeed("train", "--cfg", "job", "epochs=2", cwd=lesson.path)
    assert record["config"] == OmegaConf.to_container(OmegaConf.create(composed))
    assert re.fullmatch("[0-9a-f]{64}", record["config_hash"])
    assert record["seed"] == 0
    assert record["device"].partition(":")[0] in ("cpu", "cuda", "mps")
    assert record["threads"] >= 1
    assert record["deterministic"] is False
    assert record["packages"]["torch"] == torch.__version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert isinstance(record["platform"], str)
    git = record["git"]
    assert git is None or (isinstance(git["commit"], str) and isinstance(git["dirty"], bool))
    assert "error" not in record


def test_record_names_data_and_sizes(lesson: FinishedRun) -> None:
    from fashionnet.data import published

    data = lesson.record["data"]
    assert data["name"] == "fashion_mnist"
    assert (data["train"], data["validation"], data["test"]) == (54_000, 6_000, 10_000)
    assert data["sha256"] == {
        file.name: file.sha256 for file in published.SETS["fashion_mnist"].files
    }
    assert lesson.record["parameters"] == 101_770


def test_record_says_what_came_out(lesson: FinishedRun) -> None:
    record, history = lesson.record, lesson.history
    started, finished = (datetime.fromisoformat(record[k]) for k in ("started", "finished"))
    assert started.utcoffset() == finished.utcoffset() == timedelta(0)
    assert started < finished
    assert 0 < sum(row["epoch_seconds"] for row in history) <= record["fit_seconds"]
    assert record["fit_seconds"] < record["total_seconds"]
    assert record["peak_memory_bytes"] > 60_000 * 28 * 28  # the set sits in memory

    last = history[-1]
    assert record["validation"] == {"loss": last["val_loss"], "accuracy": last["val_accuracy"]}
    assert record["test"].keys() == {"loss", "accuracy", "evaluations"}
    assert record["test"]["evaluations"] == 1
    assert 0.3 < record["test"]["loss"] < 0.6
    assert 0.8 < record["test"]["accuracy"] < 0.9  # two epochs; five give 0.871


def test_weights_sha256_is_that_of_the_last_checkpoint(lesson: FinishedRun) -> None:
    last = sha256_of_weights(lesson.path / "checkpoints/last.pt")
    assert lesson.record["weights_sha256"] == last


def test_best_checkpoint_is_the_epoch_of_lowest_validation_loss(lesson: FinishedRun) -> None:
    losses = [row["val_loss"] for row in lesson.history]
    best = torch.load(lesson.path / "checkpoints/best.pt", weights_only=True)
    assert lesson.record["best_epoch"] == best["epoch"] == 1 + losses.index(min(losses))
    assert best["val_loss"] == min(losses)
    assert best["model"].keys() == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_history_has_keras_keys_in_full_precision(lesson: FinishedRun) -> None:
    assert [list(row) for row in lesson.history] == [HISTORY_KEYS] * 2
    assert [row["epoch"] for row in lesson.history] == [1, 2]
    for row in lesson.history:
        for key, count in (("accuracy", 54_000), ("val_accuracy", 6_000)):
            assert round(row[key] * count) / count == row[key]  # exactly so many right answers
        assert all(round(row[key], 6) != row[key] for key in ("loss", "val_loss"))
        assert row["lr"] == 0.001
        assert row["epoch_seconds"] > 0


def test_hydra_files_hold_config_overrides_and_hydras_own(lesson: FinishedRun) -> None:
    hydra = lesson.path / ".hydra"
    assert OmegaConf.to_container(OmegaConf.load(hydra / "config.yaml")) == lesson.record["config"]
    assert OmegaConf.to_container(OmegaConf.load(hydra / "overrides.yaml")) == ["epochs=2"]
    assert "hydra" in OmegaConf.load(hydra / "hydra.yaml")


def test_tensorboard_draws_training_and_validation_under_the_same_tags(lesson: FinishedRun) -> None:
    train = curves(lesson.path / "tensorboard/train")
    validation = curves(lesson.path / "tensorboard/validation")
    for tag, key in (("epoch_loss", "loss"), ("epoch_accuracy", "accuracy")):
        for drawn, prefix in ((train, ""), (validation, "val_")):
            figures = [(row["epoch"], row[prefix + key]) for row in lesson.history]
            assert [step for step, _ in drawn[tag]] == [epoch for epoch, _ in figures]
            assert [v for _, v in drawn[tag]] == pytest.approx([v for _, v in figures])


def test_log_file_holds_what_the_console_showed(lesson: FinishedRun) -> None:
    text = (lesson.path / "train.log").read_text(encoding="utf-8")
    shown, advice = lesson.stdout.split("run: run\n")
    for line in shown.splitlines():
        assert line in text
    assert advice.startswith("next:\n")


# ------------------------------------------------------------------------------- what it says


def test_prints_a_line_an_epoch_and_what_the_lesson_prints(lesson: FinishedRun) -> None:
    assert "\r" not in lesson.stdout  # no progress bar where nobody watches
    assert "101,770" in lesson.stdout
    lines = lesson.stdout.partition("run: run\n")[0].splitlines()
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 2
    for line, row in zip(epochs, lesson.history, strict=True):
        shown = [f"{key} {row[key]:.4f}" for key in HISTORY_KEYS[1:5]]
        assert line.startswith(f"epoch {row['epoch']}/2  {'  '.join(shown)}  ")
    accuracy, probabilities, guess = lines[-3:]
    assert accuracy.startswith(f"test accuracy: {lesson.record['test']['accuracy']:.2%}")
    numbers = re.findall(r" ([01]\.\d\d)\b", probabilities.removeprefix("class probabilities:"))
    assert len(numbers) == 10
    assert sum(map(float, numbers)) == pytest.approx(1, abs=0.06)  # each is rounded
    assert guess == "best guess: 9, Ankle boot (it is: Ankle boot)"


def on_a_terminal(line: list[str], cwd: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Runs a command whose stdin, stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    variables = {**environment, "TERM": "xterm"}
    process = subprocess.Popen(
        line, cwd=cwd, env=variables, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    except OSError:  # Linux' way to say that the other end is closed
        pass
    os.close(ours)
    return process.wait(), shown.decode()


@pytest.mark.slow
def test_progress_bar_shows_loss_and_accuracy_and_changes_no_bit(
    commands: Commands, lesson: FinishedRun, tmp_path: Path
) -> None:
    line = commands.line("train", "epochs=2", "hydra.run.dir=run")
    status, shown = on_a_terminal(line, tmp_path, commands.environment)
    assert status == 0, shown
    bars = [part for part in shown.split("\r") if "step" in part and "%" in part]
    for epoch in ("epoch 1/2", "epoch 2/2"):
        moving = [bar for bar in bars if bar.startswith(epoch) and "accuracy=0." in bar]
        assert moving and all(re.search(r"loss=\d\.\d", bar) for bar in moving)
    assert commands.opened(tmp_path / "run").bits == lesson.bits


# ------------------------------------------------------------------ help, configuration, completion


def imports(commands: Commands, *arguments: str, cwd: Path, **environment: str) -> tuple[str, str]:
    """Runs the command; returns what it printed and the names of all modules it imported."""
    line = [sys.executable, "-X", "importtime", *commands.line("train", *arguments)[1:]]
    done = commands.call(line, cwd, environment)
    assert done.returncode == 0, done.stderr
    modules = [entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines()]
    assert "hydra" in modules
    return done.stdout, " ".join(modules)


def test_help_tells_groups_keys_and_options_without_torch(
    commands: Commands, tmp_path: Path
) -> None:
    printed, modules = imports(commands, "--help", cwd=tmp_path)
    for word in (
        "model: cnn, mlp, mlp_no_dropout",
        "optimizer: adam, adamw, sgd",
        "data: cifar10, fashion_mnist, function, kmnist, mnist, npz, photos",
    ):
        assert word in printed
    for key in ("seed: 0", "epochs: 5", "validation_split: 0.1", "patience: null", "dropout: 0.2"):
        assert key in printed
    assert "--multirun" in printed
    assert " torch " not in modules
    assert not list(tmp_path.iterdir())


def test_cfg_prints_the_configuration_and_runs_nothing(commands: Commands, tmp_path: Path) -> None:
    printed, modules = imports(
        commands, "--cfg", "job", "model=mlp_no_dropout", "optimizer.lr=0.5", cwd=tmp_path
    )
    config = OmegaConf.create(printed)
    assert (config.model.dropout, config.optimizer.lr, config.epochs) == (0.0, 0.5, 5)
    assert " torch " not in modules
    assert not list(tmp_path.iterdir())


def test_completion_knows_groups_options_and_keys(commands: Commands, tmp_path: Path) -> None:
    def completed(words: str) -> list[str]:
        typed = f"fashionnet-train {words}"
        printed, modules = imports(commands, "-sc", "query=bash", cwd=tmp_path, COMP_LINE=typed)
        assert " torch " not in modules
        return printed.split()

    models = {f"model={path.stem}" for path in (compose.CONF / "model").glob("*.yaml")}
    assert {"model=mlp", "model=mlp_no_dropout"} <= {*completed("model=")} == models
    assert "early_stopping.patience=" in completed("early_stopping.")


# ------------------------------------------------------------------------------ the same bits


def test_same_command_gives_the_same_bits(small: tuple[FinishedRun, FinishedRun]) -> None:
    first, second = small
    assert first.bits == second.bits
    assert first.record["config_hash"] == second.record["config_hash"]


def test_runs_started_at_the_same_instant_get_different_directories(
    small: tuple[FinishedRun, FinishedRun],
) -> None:
    first, second = small
    assert first.path != second.path
    assert first.record["status"] == second.record["status"] == "completed"


STOPPED = [
    "epochs=20",
    "batch_size=8",
    "optimizer.lr=0.02",  # so high that the validation loss soon rises
    "early_stopping.patience=1",
]
VARIANTS = {
    "seed_1": ["seed=1"],
    "often_saved": ["checkpoint.every_seconds=0.0001"],
    "autograd": ["gradients=autograd", "deterministic=true", "epochs=1"],
    "no_validation": ["validation_split=0"],
    "stopped": STOPPED,
    "restored": [*STOPPED, "early_stopping.restore_best_weights=true"],
}

RUN_VARIANTS = """\
import json, sys, traceback
from fashionnet.train import train
overrides, variants = json.loads(sys.argv[1])
for name, more in variants.items():
    try:
        train(*overrides, *more, run_dir=name)
    except Exception:
        traceback.print_exc()
"""


@pytest.fixture(scope="module")
def variants(
    commands: Commands,
    small: tuple[FinishedRun, FinishedRun],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, FinishedRun]:
    """The small run with one thing changed, all in one process, as in a notebook."""
    folder = tmp_path_factory.mktemp("variants")
    argument = json.dumps([commands.small, VARIANTS])
    done = commands.execute(RUN_VARIANTS, argument, cwd=folder)
    assert not done.stderr
    return {name: commands.opened(folder / name) for name in VARIANTS}


@pytest.mark.slow
def test_seed_0_and_seed_1_differ(
    small: tuple[FinishedRun, FinishedRun], variants: dict[str, FinishedRun]
) -> None:
    other = variants["seed_1"]
    assert other.record["seed"] == 1
    assert other.record["weights_sha256"] != small[0].record["weights_sha256"]
    assert other.history[0]["loss"] != small[0].history[0]["loss"]
    assert other.record["config_hash"] != small[0].record["config_hash"]


@pytest.mark.slow
def test_checkpoints_change_no_bit(
    small: tuple[FinishedRun, FinishedRun], variants: dict[str, FinishedRun]
) -> None:
    often = variants["often_saved"]
    before_the_last = often.path / "checkpoints/previous.pt"
    assert torch.load(before_the_last, weights_only=True)["step"] > 0  # there were more
    assert often.bits == small[0].bits
    assert often.record["config_hash"] == small[0].record["config_hash"]


@pytest.mark.slow
def test_autograd_agrees_with_the_gradients_by_hand_and_is_recorded(
    small: tuple[FinishedRun, FinishedRun], variants: dict[str, FinishedRun]
) -> None:
    run = variants["autograd"]
    assert run.record["config"]["gradients"] == "autograd"
    assert run.record["deterministic"] is True
    assert run.history[0]["loss"] == pytest.approx(small[0].history[0]["loss"], rel=1e-3)


@pytest.mark.slow
def test_without_validation_set_there_are_no_validation_figures(
    variants: dict[str, FinishedRun],
) -> None:
    run = variants["no_validation"]
    assert [list(row) for row in run.history] == [
        [key for key in HISTORY_KEYS if not key.startswith("val_")]
    ] * 2
    assert run.record["data"]["validation"] == 0
    assert run.record["validation"] is None
    assert run.record["best_epoch"] == 2  # no honest best: the last one counts
    assert [path.name for path in (run.path / "tensorboard").iterdir()] == ["train"]


@pytest.mark.slow
def test_early_stopping_ends_the_run_with_the_weights_it_has_then(
    commands: Commands, variants: dict[str, FinishedRun]
) -> None:
    run = variants["stopped"]
    losses = [row["val_loss"] for row in run.history]
    best = run.record["best_epoch"]
    assert len(losses) < 20
    assert best == len(losses) - 1  # patience 1: one epoch without improvement, then the end
    assert losses[best - 1] == min(losses) < losses[-1]

    last, best_one = (run.path / "checkpoints" / name for name in ("last.pt", "best.pt"))
    assert run.record["weights_sha256"] == sha256_of_weights(last) != sha256_of_weights(best_one)
    assert run.record["validation"]["loss"] == losses[-1]
    printed = commands.succeed("evaluate", run.path, "--json", cwd=run.path)
    assert json.loads(printed)["loss"] == losses[-1]


@pytest.mark.slow
def test_early_stopping_restores_the_best_weights(
    commands: Commands, variants: dict[str, FinishedRun]
) -> None:
    run = variants["restored"]
    assert run.bits[1] == variants["stopped"].bits[1]  # the same history
    lowest = min(row["val_loss"] for row in run.history)
    last, best = (run.path / "checkpoints" / name for name in ("last.pt", "best.pt"))
    assert run.record["weights_sha256"] == sha256_of_weights(last) == sha256_of_weights(best)
    assert run.record["validation"]["loss"] == lowest
    printed = commands.succeed("evaluate", run.path, "--json", cwd=run.path)
    assert json.loads(printed)["loss"] == lowest


# --------------------------------------------------------------------------------- multirun

RECORDER = """\
import json
from hydra.experimental.callback import Callback

class Recorder(Callback):
    '''Writes down what a job hands back to the sweeper.'''
    def on_job_end(self, config, job_return, **_):
        with open("returned.jsonl", "a") as file:
            overrides, value = job_return.overrides, job_return.return_value
            print(json.dumps([overrides, value]), file=file)
"""


@pytest.fixture(scope="module")
def sweep(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multirun of two jobs in one process, the folder it was started in."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "recorder.py").write_text(RECORDER)
    commands.succeed(
        *("train", "-m", "hydra.sweep.dir=sweep", "model=mlp", "threads=2,1"),
        *(*commands.small, "+hydra.callbacks.recorder._target_=recorder.Recorder"),
        cwd=folder,
        **commands.importing(folder),
    )
    return folder


def job(sweep: Path, **overrides: str) -> Path:
    """The folder of a sweep's job, found by its overrides."""
    (found,) = (
        path
        for path in (sweep / "sweep").iterdir()
        if {f"{key}={value}" for key, value in overrides.items()} <= set(path.name.split(","))
    )
    return found


@pytest.mark.slow
def test_sweep_names_its_folders_by_their_overrides(commands: Commands, sweep: Path) -> None:
    folders = {path.name for path in (sweep / "sweep").iterdir() if path.is_dir()}
    expected = {
        ",".join(sorted([*commands.small, "model=mlp", f"threads={threads}"]))
        for threads in ("2", "1")
    }
    assert folders == expected


@pytest.mark.slow
def test_job_in_a_sweep_has_the_bits_it_has_alone(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], sweep: Path
) -> None:
    run = commands.opened(job(sweep, threads="1"))  # after a job of other threads
    assert run.record["threads"] == small[0].record["threads"]
    assert run.bits == small[0].bits
    assert commands.opened(job(sweep, threads="2")).record["threads"] == 2


@pytest.mark.slow
def test_sweeper_is_handed_the_lowest_validation_loss(commands: Commands, sweep: Path) -> None:
    lines = (sweep / "returned.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for overrides, value in map(json.loads, lines):
        chosen = dict(word.split("=") for word in overrides[:2])
        run = commands.opened(job(sweep, **chosen))
        assert value == min(row["val_loss"] for row in run.history)


@pytest.mark.slow
def test_failing_job_lets_the_others_go_on(commands: Commands, tmp_path: Path) -> None:
    done = commands.run(
        *("train", "-m", "hydra.sweep.dir=sweep", "optimizer=sgd", "optimizer.lr=1e30,0.01"),
        *("epochs=0,1", "data.limit=640"),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    named = [line for line in done.stderr.splitlines() if line.startswith("job failed: ")]
    assert len(named) == 3  # each of them with its overrides and what was wrong
    assert all("epochs=0 must be 1 or more" in line for line in (named[0], named[2]))
    assert "optimizer.lr=1e+30" in named[1] and "epochs=1" in named[1] and "nan" in named[1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr

    records = [json.loads(file.read_text()) for file in tmp_path.glob("sweep/*/run.json")]
    assert {(r["config"]["optimizer"]["lr"], r["status"]) for r in records} == {
        (1e30, "failed"),
        (0.01, "completed"),
    }
    assert len(records) == sum(path.is_dir() for path in (tmp_path / "sweep").iterdir())
    summary = done.stdout[done.stdout.index("sweep sweep: ") :].splitlines()
    assert summary[0] == "sweep sweep: 1 completed, 1 failed"
    assert summary[1].startswith("  failed: ") and "optimizer.lr=1e+30" in summary[1]
    assert "nan" in summary[1]
    assert "hydra.sweep.dir=sweep runs what is missing" in summary[2]


@pytest.mark.slow
def test_a_sweep_given_again_runs_only_what_is_missing(
    commands: Commands,
    small: tuple[FinishedRun, FinishedRun],
    variants: dict[str, FinishedRun],
    tmp_path: Path,
) -> None:
    def sweep(seeds: str, *more: str) -> list[str]:
        arguments = ("-m", f"seed={seeds}", "hydra.sweep.dir=sweep", *commands.small, *more)
        return commands.succeed("train", *arguments, cwd=tmp_path).splitlines()

    done, missing = (
        commands.opened(tmp_path / "sweep" / ",".join(sorted([*commands.small, f"seed={seed}"])))
        for seed in (0, 1)
    )
    shutil.copytree(small[0].path, done.path)
    shutil.copytree(variants["seed_1"].path, missing.path)
    missing.edit(status="interrupted")
    before = done.record
    printed = sweep("0,1,2")
    assert sum(line.startswith("completed before: ") for line in printed) == 1
    assert printed[-1] == "sweep sweep: 3 completed"
    assert done.record == before
    assert missing.record["status"] == "completed"
    assert missing.bits == variants["seed_1"].bits
    printed = sweep("0", "overwrite=true", "epochs=1")
    assert not any(line.startswith("completed before: ") for line in printed)


@pytest.mark.slow
def test_a_sweep_in_parallel_gives_the_bits_of_one_after_another(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    arguments = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,-1,1")
    done = commands.run("train", *arguments, "hydra.sweep.dir=sweep", *commands.small, cwd=tmp_path)
    assert done.returncode == 2
    assert "seed=-1 must be 0 or more" in done.stderr.splitlines()[-1]
    assert "sweep sweep: 2 completed" in done.stdout
    runs = [commands.opened(file.parent) for file in tmp_path.glob("sweep/*/run.json")]
    assert {run.record["seed"] for run in runs} == {0, 1}
    assert small[0].bits in [run.bits for run in runs]


# ------------------------------------------------------ interrupted, continued, taken directories


def wait_for(condition: Any, process: Forked) -> None:
    """Waits until a condition holds; fails if the process ends first."""
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.002)


@dataclass(frozen=True)
class Killed:
    """A run that was stopped in the middle of its second epoch and then killed."""

    path: Path
    refused_beside_it: str  # what a second process for the same directory said meanwhile
    done_seconds: float  # of fitting, as the checkpoint counts them


@pytest.fixture(scope="module")
def killed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """`kill -9` in the middle of the second epoch of what the fixture `lesson` runs."""
    folder = tmp_path_factory.mktemp("killed")
    run = folder / "run"
    arguments = ("epochs=2", "hydra.run.dir=run", "checkpoint.every_seconds=0.0001")
    history, last = run / "history.jsonl", run / "checkpoints/last.pt"

    def stamp() -> int | None:
        return last.stat().st_mtime_ns if last.exists() else None

    process = commands.start("train", *arguments, cwd=folder)
    try:
        wait_for(lambda: history.exists() and history.read_text().count("\n") == 1, process)
        for _ in range(2):  # the first may be the one at the epoch's end
            before = stamp()
            wait_for(lambda before=before: stamp() not in (None, before), process)
        process.send_signal(signal.SIGSTOP)
        refused = commands.fail("train", *arguments, cwd=folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    checkpoint = last if last.exists() else last.with_name("previous.pt")
    state = torch.load(checkpoint, weights_only=True)
    assert (state["epoch"], len(state["history"])) == (2, 1)
    assert state["step"] > 0
    return Killed(run, refused, state["fit_seconds"])


@pytest.mark.slow
def test_second_process_for_the_same_directory_is_refused(killed: Killed) -> None:
    assert str(killed.path) in killed.refused_beside_it
    assert "in use" in killed.refused_beside_it


@pytest.mark.slow
def test_killed_run_is_refused_to_other_configurations_and_continues_to_the_same_bits(
    killed: Killed, lesson: FinishedRun, commands: Commands
) -> None:
    folder, before = killed.path.parent, tree(killed.path)
    run = commands.opened(killed.path)
    assert run.record["status"] == "running"
    where = "hydra.run.dir=run"
    other = commands.fail("train", "epochs=2", "seed=1", where, cwd=folder)
    never = commands.fail("train", "epochs=2", "resume=never", where, cwd=folder)
    assert re.search(r"differs in .*\bseed\b", other)
    assert "resume=auto" in never
    assert tree(killed.path) == before

    started = run.record["started"]
    printed = commands.succeed("train", "epochs=2", where, cwd=folder)
    assert [line[:9] for line in printed.splitlines() if line.startswith("epoch")] == ["epoch 2/2"]
    assert run.bits == lesson.bits
    record = run.record
    assert (record["status"], record["started"]) == ("completed", started)
    assert record["test"] == lesson.record["test"]
    assert record["weights_sha256"] == sha256_of_weights(run.path / "checkpoints/last.pt")
    assert killed.done_seconds < record["fit_seconds"]
    for split in ("train", "validation"):
        drawn = curves(run.path / "tensorboard" / split)
        assert [step for step, _ in drawn["epoch_loss"]] == [1, 2]


# Other signals are those of system/test_signals.py; SIGTERM ends the sweep below.
@pytest.mark.slow
def test_a_signal_is_answered_with_a_checkpoint_and_the_run_goes_on_to_the_same_bits(
    commands: Commands, lesson: FinishedRun, tmp_path: Path
) -> None:
    arguments = ("epochs=2", "hydra.run.dir=run")
    run = commands.opened(tmp_path / "run")
    history = run.path / "history.jsonl"
    process = commands.start("train", *arguments, cwd=tmp_path)
    wait_for(lambda: history.exists() and history.read_text().count("\n") == 1, process)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.wait() == 130
    assert printed == "interrupted by SIGINT\n"
    assert run.record["status"] == "interrupted"
    state = torch.load(run.path / "checkpoints/last.pt", weights_only=True)
    assert state["epoch"] == 2 and 0 < state["step"] < 1688
    assert commands.run("evaluate", str(run.path), "--split", "test", cwd=tmp_path).returncode == 2

    printed = commands.succeed("train", *arguments, cwd=tmp_path)
    assert [line[:9] for line in printed.splitlines() if line.startswith("epoch")] == ["epoch 2/2"]
    assert run.bits == lesson.bits
    assert run.record["weight_hashes"] == lesson.record["weight_hashes"]
    assert run.record["test"] == lesson.record["test"]


@pytest.mark.slow
def test_a_signal_ends_a_sweep_which_goes_on_with_the_same_command(
    commands: Commands, tmp_path: Path
) -> None:
    arguments = ("-m", "seed=0,1", "epochs=2", "hydra.sweep.dir=sweep")
    history = tmp_path / "sweep/epochs=2,seed=0/history.jsonl"
    process = commands.start("train", *arguments, cwd=tmp_path)
    wait_for(lambda: history.exists() and history.read_text().count("\n") == 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert [p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()] == ["epochs=2,seed=0"]
    commands.succeed("train", *arguments, cwd=tmp_path)
    records = [json.loads(file.read_text()) for file in tmp_path.glob("sweep/*/run.json")]
    assert {record["seed"]: record["status"] for record in records} == {
        0: "completed",
        1: "completed",
    }


@pytest.mark.slow
def test_more_epochs_continue_a_completed_run_to_the_bits_of_a_longer_one(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    run = commands.opened(tmp_path / "run")
    commands.succeed("train", *commands.small, "epochs=1", "hydra.run.dir=run", cwd=tmp_path)
    first = run.record
    printed = commands.succeed("train", *commands.small, "hydra.run.dir=run", cwd=tmp_path)
    assert [line[:9] for line in printed.splitlines() if line.startswith("epoch")] == ["epoch 2/2"]
    assert run.bits == small[0].bits
    assert run.record["parents"] == [first]


def test_directory_of_a_completed_run_is_refused_and_untouched(
    commands: Commands, lesson: FinishedRun, tmp_path: Path
) -> None:
    before = tree(lesson.path)
    where = f"hydra.run.dir={lesson.path}"
    printed = commands.fail("train", "epochs=2", "seed=1", where, cwd=tmp_path)
    assert str(lesson.path) in printed
    assert "overwrite=true" in printed
    assert tree(lesson.path) == before


def test_overwrite_replaces_a_completed_run_and_nothing_else(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    run = commands.opened(tmp_path / "run")
    shutil.copytree(small[0].path, run.path)
    (run.path / "notes.txt").write_text("mine")
    arguments = ("epochs=1", "data.limit=320", "validation_split=0", "overwrite=true")
    commands.succeed("train", *arguments, "hydra.run.dir=run", cwd=tmp_path)
    assert run.record["config"]["epochs"] == 1
    assert [row["epoch"] for row in run.history] == [1]
    assert run.record["weights_sha256"] == sha256_of_weights(run.path / "checkpoints/last.pt")
    assert [path.name for path in (run.path / "tensorboard").iterdir()] == ["train"]
    assert "epoch 2/2" not in (run.path / "train.log").read_text()
    assert not (run.path / "checkpoints/previous.pt").exists()
    assert (run.path / "notes.txt").read_text() == "mine"


def test_folder_with_other_peoples_files_is_refused(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("…")
    printed = commands.fail("train", "hydra.run.dir=thesis", "overwrite=true", cwd=tmp_path)
    assert "chapter1.tex" in printed
    assert list(tree(tmp_path)) == ["thesis", "thesis/chapter1.tex"]


# -------------------------------------------------------------------- a loss that is no number


def test_loss_that_is_no_number_names_its_step(failed: FinishedRun) -> None:
    record = failed.record
    assert record["status"] == "failed"
    assert "step 2 " in record["error"] and "optimizer.lr" in record["error"]
    assert "test" not in record  # the test set stays sealed
    assert failed.history == []


BOMB = """\
import torch

class Bomb(torch.optim.SGD):
    '''Takes four steps, and then one to nowhere.'''
    steps = 0
    def step(self):
        super().step()
        self.steps += 1
        if self.steps == 5:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
"""


def test_loss_that_is_no_number_leaves_the_last_good_checkpoint(
    commands: Commands, lesson: FinishedRun, tmp_path: Path
) -> None:
    (tmp_path / "bomb.py").write_text(BOMB)
    printed = commands.fail(
        *("train", "optimizer=sgd", "optimizer._target_=bomb.Bomb", "hydra.run.dir=run"),
        *("epochs=3", "data.limit=96"),  # three steps an epoch
        cwd=tmp_path,
        FASHIONNET_ALLOW="bomb.Bomb",
        **commands.importing(tmp_path),
    )
    assert "at step 6 (epoch 2)" in printed  # the first whose loss the bad weights made
    run = commands.opened(tmp_path / "run")
    assert run.record["status"] == "failed"
    assert run.record["error"] == printed
    assert [row["epoch"] for row in run.history] == [1]
    for name in ("last.pt", "best.pt"):
        state = torch.load(run.path / "checkpoints" / name, weights_only=True)
        assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())


# ------------------------------------------------------------------------------- wrong input

# One of each kind: config/test_schema.py and config/test_refusals.py have the others.
WRONG: dict[str, tuple[str, ...]] = {
    # unknown keys, groups and options
    "epoch=3": ("epoch=3", "type epochs=3"),
    "--multirn": ("--multirn", "type --multirun"),
    "--xyzzy": ("--xyzzy", "--help"),
    "--run --cfg job": ("--cfg",),
    "epochs=1 -m seed=0,1": ("type -m epochs=1 seed=0,1",),
    "model=mlp,mlp_no_dropout": ("type -m model=mlp,mlp_no_dropout",),
    "+model.input_shape=[3,3]": ("model.input_shape",),
    # values
    "epochs=0": ("epochs=0",),
    "validation_split=0.99999999": ("validation_split=0.99999999", "no training image"),
    f"seed={'1' * 250}": ("seed=",),  # longer than the name of a folder may be
    "model.hidden=1000000000000": ("model.hidden=1000000000000", "parameters"),
    "model.hidden=abc": ("model.hidden=abc",),
    "model=null": ("choose cnn, mlp, mlp_no_dropout",),
    "model._target_=os.system": ("model._target_=os.system", "allow-list"),
    "device=cuda": ("device=cuda", "device=auto"),
    "data.limit=10000000": ("data.limit=10000000", "54000"),
    # places that cannot hold a run
    "hydra.run.dir=/dev/null/run": ("/dev/null/run",),
    "data.root=/dev/null": ("data.root=/dev/null",),
}


def wrong_inputs() -> Iterator[Any]:
    for arguments in WRONG:
        has_one = arguments == "device=cuda" and torch.cuda.is_available()
        mark = pytest.mark.skipif(has_one, reason="this machine has a CUDA device")
        yield pytest.param(arguments, marks=mark, id=arguments)


@dataclass(frozen=True)
class Answer:
    """What a command with a wrong input said, and what it left in its empty folder."""

    done: subprocess.CompletedProcess[str]
    left: list[str]


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest,
    commands: Commands,
    pool: ThreadPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Future[Answer]]:
    """Starts every selected wrong input, side by side."""

    def answer(arguments: str, folder: Path) -> Answer:
        done = commands.run("train", *shlex.split(arguments), cwd=folder)
        return Answer(done, sorted(tree(folder)))

    selected = [
        str(item.callspec.params["arguments"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_wrong_input_is_reported"
    ]
    return {
        arguments: pool.submit(answer, arguments, tmp_path_factory.mktemp("wrong"))
        for arguments in selected
    }


@pytest.mark.parametrize("arguments", list(wrong_inputs()))
def test_wrong_input_is_reported(
    arguments: str, answers: dict[str, Future[Answer]], commands: Commands
) -> None:
    answer = answers[arguments].result()
    printed = commands.error(answer.done)
    for word in WRONG[arguments]:
        assert word in printed
    assert answer.done.stdout == ""
    assert answer.left == []


def test_wrong_input_of_a_sweep_is_reported_before_any_job_runs(
    commands: Commands, tmp_path: Path
) -> None:
    printed = commands.fail("train", "-m", "epoch=1,2", cwd=tmp_path)
    assert "type epochs=1,2" in printed
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_no_folder_and_takes_none_of_the_users(
    commands: Commands, tmp_path: Path
) -> None:
    here = tmp_path / "project"
    here.mkdir()
    commands.fail("train", "epochs=0", "hydra.run.dir=a/b/c/d", cwd=here)
    assert list(tree(tmp_path)) == ["project"]


# ----------------------------------------------------------------- files, disks and networks


def test_damaged_data_without_a_network_is_named_and_kept(
    commands: Commands, tmp_path: Path
) -> None:
    from fashionnet.data import fetching

    if (fetching.DEBIAN / "fashion-mnist").is_dir():
        pytest.skip("the data set is installed on this machine and needs no network")
    damaged = tmp_path / "data/train-images-idx3-ubyte.gz"
    damaged.parent.mkdir()
    damaged.write_bytes(b"no gzip")
    (tmp_path / "bin").mkdir()
    with socket.socket() as nobody:  # a port that is taken, and where nobody listens
        nobody.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        printed = commands.fail(
            *("train", f"data.root={damaged.parent}"),
            cwd=tmp_path,
            http_proxy=proxy,
            https_proxy=proxy,
            PATH=str(tmp_path / "bin"),  # hence no apt-get
        )
    assert str(damaged) in printed
    assert "data.root" in printed
    assert damaged.read_bytes() == b"no gzip"
    assert set(tree(tmp_path)) <= {"bin", "data", f"data/{damaged.name}"}


def test_read_only_disk_is_reported(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    unshare = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a disk of one's own")
    mount = 'mount -t tmpfs -o ro,size=1m tmpfs disk && exec "$@"'
    train = commands.line("train", *commands.small, "hydra.run.dir=disk/run")
    printed = commands.error(commands.call([*unshare, "sh", "-c", mount, "sh", *train], tmp_path))
    assert "disk/run" in printed
    assert "Read-only file system" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process")
def test_a_limit_on_the_size_of_files_is_reported(commands: Commands, tmp_path: Path) -> None:
    process = commands.start("train", *commands.small, "hydra.run.dir=run", cwd=tmp_path)
    limit = 100 * 1024  # too little for TensorBoard's file
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _, printed = process.communicate()
    assert process.wait() == 2
    assert "File too large" in printed and "tensorboard" in printed
    run = commands.opened(tmp_path / "run")
    assert run.record["status"] == "failed"
    assert not list(run.path.rglob("*.tmp"))
