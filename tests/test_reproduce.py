"""`python -m fashionnet.reproduce`: a recorded run, rerun and compared to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fashionnet.errors import UserError
from fashionnet.reproduce import DIFFERENT, IDENTICAL, WITHIN_TOLERANCE, Reproduction, reproduce

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def run(tmp_path: Path, small: tuple[FinishedRun, FinishedRun], commands: Commands) -> FinishedRun:
    """A copy of a small run, to be altered."""
    shutil.copytree(small[0].path, tmp_path / "run")
    return commands.opened(tmp_path / "run")


def keys(outcome: Reproduction) -> list[tuple[str, int | None]]:
    return [(difference.key, difference.epoch) for difference in outcome.differences]


def around(outcome: Reproduction) -> list[str]:
    """What differs in the environment but in the checkout, where somebody may be working."""
    found = [difference.key for difference in outcome.environment]
    return [key for key in found if not key.startswith("git.")]


@pytest.mark.slow
def test_a_run_is_identical_to_itself_and_left_alone(
    commands: Commands, run: FinishedRun, tmp_path: Path
) -> None:
    before = contents(run.path)
    done = commands.run("reproduce", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "\nidentical: data, split, initial weights, " in done.stdout
    assert contents(run.path) == before
    again = commands.opened(tmp_path / "run-reproduced")
    assert again.bits == run.bits
    (parent,) = again.record["parents"]
    assert parent["path"] == str(run.path)
    assert parent["weights_sha256"] == run.record["weights_sha256"]

    done = commands.run("reproduce", "run", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (answer["verdict"], answer["differences"]) == ("identical", [])
    assert Path(answer["run_dir"]).name == "run-reproduced-2"


def alter_history(run: FinishedRun, *epochs: int, **figures: float) -> None:
    rows = run.history
    for epoch in epochs:
        rows[epoch - 1] |= figures
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.path / "history.jsonl").write_text(text)


def alter(run: FinishedRun, part: str, **values: Any) -> None:
    run.edit(**{part: {**run.record[part], **values}})


ALTERED: dict[str, tuple[Callable[[FinishedRun], None], str, list[tuple[str, int | None]]]] = {
    "a figure, by rounding": (
        lambda run: alter_history(run, 2, val_loss=run.history[1]["val_loss"] * 1.001),
        WITHIN_TOLERANCE,
        [("val_loss", 2)],
    ),
    "a figure, by more": (
        lambda run: alter_history(run, 1, accuracy=0.9),
        DIFFERENT,
        [("accuracy", 1)],
    ),
    "first a little, then by more": (
        lambda run: alter_history(run, 1, 2, loss=run.history[0]["loss"] * 1.001),
        DIFFERENT,
        [("loss", 1), ("loss", 2)],
    ),
    "the weights of an epoch": (
        lambda run: run.edit(weight_hashes=[run.record["weight_hashes"][0], "0" * 64]),
        WITHIN_TOLERANCE,
        [("weights", 2)],
    ),
    "the initial weights": (
        lambda run: run.edit(initial_weights_sha256="0" * 64),
        DIFFERENT,
        [("initial_weights_sha256", None)],
    ),
    "the test figures": (
        lambda run: alter(run, "test", accuracy=0.99),
        DIFFERENT,
        [("test.accuracy", None)],
    ),
    "the final weights": (
        lambda run: run.edit(weights_sha256="0" * 64),
        DIFFERENT,
        [("weights_sha256", None)],
    ),
    "how often the test set was used": (
        lambda run: alter(run, "test", evaluations=7),
        IDENTICAL,
        [],
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_differs_is_named(what: str, run: FinishedRun) -> None:
    change, verdict, found = ALTERED[what]
    change(run)
    outcome = reproduce(run.path)
    assert outcome.verdict == verdict
    assert keys(outcome)[: len(found)] == found
    assert bool(found) == bool(outcome.differences)
    assert around(outcome) == []


@pytest.mark.parametrize(
    "change", [{"sha256": {"train-images-idx3-ubyte": "0" * 64}}, {"split_sha256": "0" * 64}]
)
def test_other_data_are_refused_before_anything_is_trained(
    run: FinishedRun, change: dict[str, Any]
) -> None:
    alter(run, "data", **change)
    with pytest.raises(UserError, match=r"was trained on other data: .*; --data-root DIR names"):
        reproduce(run.path)
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]


def test_the_exit_status_and_the_environment_are_told(
    commands: Commands, run: FinishedRun, tmp_path: Path
) -> None:
    alter_history(run, 2, loss=9.0)
    run.edit(python="2.7.18", packages={**run.record["packages"], "torch": "1.0"})
    done = commands.run("reproduce", "run", cwd=tmp_path)
    assert done.returncode == 4
    assert "different: 2 epochs compared" in done.stdout
    assert "epoch 2, loss: 9.0 -> " in done.stdout
    assert "  python: 2.7.18 -> " in done.stdout and "  packages.torch: 1.0 -> " in done.stdout
    alter_history(
        run, 2, loss=commands.opened(tmp_path / "run-reproduced").history[1]["loss"] * 1.001
    )
    assert commands.run("reproduce", "run", cwd=tmp_path).returncode == 3


def test_recorded_threads_count_whatever_the_configuration_leaves_open(run: FinishedRun) -> None:
    alter(run, "config", threads=None)
    outcome = reproduce(run.path)
    assert outcome.verdict == IDENTICAL
    record = json.loads((outcome.run_dir / "run.json").read_text())
    assert record["threads"] == run.record["threads"]


def test_of_an_interrupted_run_the_epochs_it_did_are_compared(run: FinishedRun) -> None:
    alter(run, "config", epochs=9)
    run.edit(status="interrupted", weights_sha256=None)
    outcome = reproduce(run.path, run.path.parent / "mine")
    assert (outcome.verdict, outcome.epochs) == (IDENTICAL, 2)
    assert outcome.run_dir == run.path.parent / "mine"


def test_a_run_without_an_epoch_has_nothing_to_compare(run: FinishedRun) -> None:
    (run.path / "history.jsonl").unlink()
    run.edit(status="failed")
    with pytest.raises(UserError, match=r"did no whole epoch \(failed\)"):
        reproduce(run.path)


@pytest.mark.parametrize("text", ["{", "[]\n", '{"epoch": 2}\n', "[" * 50_000, "\udcff"])
def test_a_damaged_history_is_told(run: FinishedRun, text: str) -> None:
    (run.path / "history.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"history\.jsonl is damaged"):
        reproduce(run.path)


def test_a_device_that_is_not_here_is_told_before_anything_is_trained(run: FinishedRun) -> None:
    run.edit(device="cuda:99")
    with pytest.raises(UserError, match="device=cuda:99"):
        reproduce(run.path)
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]


def test_nothing_of_a_strangers_directory_is_executed(
    commands: Commands, run: FinishedRun, tmp_path: Path
) -> None:
    bomb = (
        f"hydra:\n  callbacks:\n    bomb:\n      _target_: os.mkdir\n      path: {tmp_path}/boom\n"
    )
    for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
        (run.path / ".hydra" / name).write_text(bomb)
    (run.path / "checkpoints/last.pt").write_bytes(b"no checkpoint, and never opened")
    assert commands.run("reproduce", "run", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "boom").exists()

    model = {"_target_": "os.mkdir", "path": f"{tmp_path}/boom"}
    alter(run, "config", model=model)
    shutil.rmtree(tmp_path / "run-reproduced")
    assert "allow-list" in commands.fail("reproduce", "run", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("nowhere",), "is not a folder"), ((".",), "holds no run.json"), ((), "RUN_DIR")],
)
def test_what_is_no_run_is_told(
    commands: Commands, tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    assert word in commands.fail("reproduce", *arguments, cwd=tmp_path)
