"""The test set is sealed: shown by a test set that nobody can open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fashionnet.analysis import comparison
from fashionnet.compare import compare, compare_configs
from fashionnet.data import examples, published, sources
from fashionnet.evaluate import evaluate
from fashionnet.list import list_runs
from fashionnet.mistakes import mistakes
from fashionnet.runs import saved
from fashionnet.train import train


class UnsealedError(Exception):
    """The test set was opened."""


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = published._read_examples

    def guarded(
        root: Path, data: sources.Published, part: tuple[sources.Source, ...], *rest: Any
    ) -> examples.Examples:
        if part == data.test:
            raise UnsealedError
        return read(root, data, part, *rest)

    monkeypatch.setattr(published, "_read_examples", guarded)


def record_of(run_dir: Path) -> dict[str, object]:
    return dict(json.loads((run_dir / "run.json").read_text()))


@pytest.mark.usefixtures("sealed")
def test_only_the_final_evaluation_opens_it(tmp_path: Path) -> None:
    overrides = (
        *("epochs=3", "data.limit=320", "checkpoint.every_seconds=0.0001"),
        *("early_stopping.patience=1", "early_stopping.restore_best_weights=true"),
    )
    with pytest.raises(UnsealedError):
        train(*overrides, run_dir=tmp_path / "run")
    # Training, selection, early stopping and curves were done by then, on validation alone.
    assert (tmp_path / "run/history.jsonl").read_text().count("\n") >= 1
    for name in ("last.pt", "best.pt"):
        assert (tmp_path / "run/checkpoints" / name).is_file()
    assert list((tmp_path / "run/tensorboard/validation").iterdir())
    record = record_of(tmp_path / "run")
    assert record["status"] == "failed"
    assert record["test"] == {"evaluations": 1}  # counted before it is read


def test_what_looks_at_a_finished_run_does_not_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    run = train("epochs=1", "data.limit=320", run_dir=tmp_path / "run")
    request.getfixturevalue("sealed")
    assert run.best_val_loss == run.history[0]["val_loss"]  # what a sweeper is given
    evaluate(run.run_dir)
    mistakes(run.run_dir, num=1)
    list_runs(tmp_path)
    compare_configs(run.run_dir, run.run_dir)
    _ = saved.read(run.run_dir).model
    assert record_of(run.run_dir)["test"] == run.record["test"]
    for uses, look in enumerate((evaluate, mistakes), start=2):
        with pytest.raises(UnsealedError):
            look(run.run_dir, "test")
        counted = record_of(run.run_dir)["test"]
        assert isinstance(counted, dict) and counted["evaluations"] == uses


def test_a_run_may_leave_it_sealed_and_evaluate_opens_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    whole = train("epochs=1", "data.limit=320", run_dir=tmp_path / "whole")
    request.getfixturevalue("sealed")
    run = train("epochs=1", "data.limit=320", "evaluate_test=false", run_dir=tmp_path / "run")
    assert run.record["test"] is None
    assert "test accuracy" not in (run.run_dir / "train.log").read_text()
    assert compare_configs(run.run_dir, whole.run_dir)["results"]
    assert [row["test_accuracy"] for row in list_runs(run.run_dir)] == [None]
    found = compare(run.run_dir)
    assert found.runs["test_accuracy"].isna().all()
    assert "test accuracy" in comparison.text(found)
    monkeypatch.undo()
    assert run.record["weights_sha256"] == whole.record["weights_sha256"]
    assert run.record["config_hash"] == whole.record["config_hash"]
    metrics = evaluate(run.run_dir, "test")
    assert (metrics.loss, metrics.accuracy) == (
        whole.record["test"]["loss"],
        whole.record["test"]["accuracy"],
    )
    assert record_of(run.run_dir)["test"] == whole.record["test"]
    evaluate(run.run_dir, "test")
    assert record_of(run.run_dir)["test"] == {**whole.record["test"], "evaluations": 2}
