"""`python -m fashionnet.evaluate`: the figures of a finished run, and runs that are not sound."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fashionnet.errors import UserError
from fashionnet.evaluate import evaluate
from fashionnet.mistakes import mistakes

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun


@pytest.fixture
def copied(commands: Commands, lesson: FinishedRun, tmp_path: Path) -> FinishedRun:
    """A copy of the lesson's run that a test may change."""
    shutil.copytree(lesson.path, tmp_path / "run")
    return commands.opened(tmp_path / "run")


def test_validation_figures_are_those_of_the_record(
    commands: Commands, lesson: FinishedRun, tmp_path: Path
) -> None:
    found = json.loads(commands.succeed("evaluate", lesson.path, "--json", cwd=tmp_path))
    assert found == {"split": "validation", **lesson.record["validation"]}
    assert lesson.record["test"]["evaluations"] == 1  # nobody looked at the test set


def test_test_figures_are_those_of_the_record_and_every_look_is_counted(
    commands: Commands, copied: FinishedRun
) -> None:
    arguments = ("evaluate", copied.path, "--split", "test")
    before = copied.record
    found = json.loads(commands.succeed(*arguments, "--json", cwd=copied.path))
    assert found == {
        "split": "test",
        "loss": before["test"]["loss"],
        "accuracy": before["test"]["accuracy"],
    }
    assert copied.record == before | {"test": before["test"] | {"evaluations": 2}}

    words = commands.succeed(*arguments, cwd=copied.path)
    assert words == f"test  loss {found['loss']:.4f}  accuracy {found['accuracy']:.4f}\n"
    assert copied.record["test"]["evaluations"] == 3


def test_run_of_another_machine_is_evaluated_on_this_ones_data(
    commands: Commands, copied: FinishedRun, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    config = copied.record["config"]
    copied.edit(config=config | {"data": config["data"] | {"root": str(elsewhere)}})
    found = json.loads(commands.succeed("evaluate", copied.path, "--json", cwd=tmp_path))
    assert found["loss"] == copied.record["validation"]["loss"]
    assert not elsewhere.exists()


# ------------------------------------------------------------------------- what is not sound


def truncated(run: FinishedRun) -> None:
    record = run.path / "run.json"
    record.write_bytes(record.read_bytes()[:500])


def without(*keys: str) -> Callable[[FinishedRun], object]:
    def change(run: FinishedRun) -> None:
        record = part = run.record
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        (run.path / "run.json").write_text(json.dumps(record))

    return change


def last(content: Callable[[Path], object]) -> Callable[[FinishedRun], object]:
    return lambda run: content(run.path / "checkpoints/last.pt")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200_000] ^= 1  # amid the weights
    path.write_bytes(content)


class Touch:
    """What a hostile checkpoint would do if it were unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("hostile"),)  # type: ignore[return-value]


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.parent / "new", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (path.parent / "new").replace(path)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def program(run: FinishedRun) -> None:
    node = {"_target_": "os.system", "command": f"touch {run.path.parent / 'hostile'}"}
    run.edit(config=run.record["config"] | {"model": node})


# What is done to the run, and words that the one line must hold.
DAMAGED: dict[str, tuple[Callable[[FinishedRun], object], tuple[str, ...]]] = {
    "no run.json": (lambda run: (run.path / "run.json").unlink(), ("not a run directory",)),
    "truncated record": (truncated, ("run/run.json", "damaged")),
    "record is a list": (lambda run: (run.path / "run.json").write_text("[]"), ("damaged",)),
    "record without model": (without("config", "model"), ("run/run.json", "model")),
    "record without data": (without("data"), ("run/run.json", "damaged", "data")),
    "record without count": (without("test", "evaluations"), ("run/run.json", "damaged")),
    "no checkpoint": (last(lambda path: shutil.rmtree(path.parent)), ("last.pt", "missing")),
    "truncated checkpoint": (
        last(lambda path: path.write_bytes(path.read_bytes()[:9999])),
        ("last.pt", "damaged"),
    ),
    "flipped bit": (last(flipped), ("last.pt", "damaged")),
    "foreign checkpoint": (last(lambda path: torch.save({"epoch": 1}, path)), ("last.pt",)),
    "another network": (
        last(lambda path: torch.save({"model": {"weight": torch.zeros(2)}}, path)),
        ("last.pt", "does not fit"),
    ),
    "hostile checkpoint": (last(lambda path: torch.save({"model": Touch()}, path)), ("last.pt",)),
    "compressed checkpoint": (last(compressed), ("last.pt", "compressed")),
    "pipe": (last(piped), ("last.pt", "neither a file nor a folder")),
    "program": (program, ("os.system", "allow-list")),
    "unfinished": (lambda run: run.edit(status="running", test=None), ("running", "sealed")),
}
# What is found out only where the test set is asked for.
FOR_TEST = {"record without count", "unfinished"}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_run_is_refused(
    damage: str, copied: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = DAMAGED[damage]
    change(copied)
    monkeypatch.chdir(copied.path.parent)
    with pytest.raises(UserError) as refusal:
        evaluate("run", "test" if damage in FOR_TEST else "validation")
    for word in words:
        assert word in str(refusal.value)
    assert [path.name for path in Path.cwd().iterdir()] == ["run"]


def test_damaged_run_is_refused_in_one_line(
    commands: Commands, copied: FinishedRun, pool: ThreadPoolExecutor
) -> None:
    damages = ("truncated record", "flipped bit", "hostile checkpoint", "program", "pipe")
    answers = []
    for name in damages:
        folder = copied.path.parent / name
        shutil.copytree(copied.path, folder / "run")
        DAMAGED[name][0](commands.opened(folder / "run"))
        answers.append(pool.submit(commands.fail, "evaluate", "run", cwd=folder))
    for name, answer in zip(damages, answers, strict=True):
        for word in DAMAGED[name][1]:
            assert word in answer.result()
        assert [path.name for path in (copied.path.parent / name).iterdir()] == ["run"]


@pytest.mark.parametrize("command", [evaluate, mistakes])
def test_a_damaged_checkpoint_costs_no_use_of_the_test_set(
    command: Callable[[Path, str], object], copied: FinishedRun
) -> None:
    DAMAGED["flipped bit"][0](copied)
    before = (copied.path / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"last\.pt"):
        command(copied.path, "test")
    assert (copied.path / "run.json").read_bytes() == before


def test_unfinished_run_shows_its_validation_figures(copied: FinishedRun) -> None:
    copied.edit(status="interrupted", test=None)
    loss = copied.record["validation"]["loss"]
    assert evaluate(copied.path).loss == pytest.approx(loss, rel=1e-6)


def test_failed_run_without_checkpoint_is_refused(
    commands: Commands, failed: FinishedRun, tmp_path: Path
) -> None:
    assert "last.pt is missing" in commands.fail("evaluate", failed.path, cwd=tmp_path)


def test_wrong_arguments_are_refused(commands: Commands, tmp_path: Path) -> None:
    for arguments, words in (
        ((), ("RUN_DIR", "--help")),
        (("nowhere", "--split", "train"), ("--split", "train", "validation")),
        (("nowhere",), ("nowhere", "fashionnet.list")),
    ):
        message = commands.fail("evaluate", *arguments, cwd=tmp_path)
        assert all(word in message for word in words)
    assert not list(tmp_path.iterdir())


def test_what_is_refused_uses_no_test_set(copied: FinishedRun) -> None:
    with pytest.raises(UserError, match="device=tpu is not known"):
        evaluate(copied.path, "test", device="tpu")
    with pytest.raises(UserError, match="split=train is not known"):
        evaluate(copied.path, "train")
    assert copied.record["test"]["evaluations"] == 1


def test_run_without_validation_set_is_refused(copied: FinishedRun) -> None:
    copied.edit(config=copied.record["config"] | {"validation_split": 0.0})
    with pytest.raises(UserError, match="validation_split=0"):
        evaluate(copied.path)
