"""Test accuracy against seconds: trainings within a budget, the lesson, and others' models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import near_duplicates

from benchmarks import runs
from benchmarks.lesson import PEERS, peer_run, write_keras_home

# The experiment that a budget takes, by its seconds.
BUDGETS = {
    5: "lesson",
    10: "ten_seconds",
    30: "two_minutes",
    60: "two_minutes",
    120: "two_minutes",
}
LESSON = "the lesson's MLP"
KERAS_CNN = "Keras' tutorial CNN, 15 epochs"
SCIKIT = {
    "logistic regression": "LogisticRegression",
    "random forest": "RandomForestClassifier",
    "gradient boosting": "HistGradientBoostingClassifier",
}


def budget_name(seconds: int) -> str:
    """Returns the name of the trainings with a budget."""
    return f"{seconds} s"


def command(name: str) -> str | None:
    """Returns what one types for the trainings of that name; None for others' models."""
    if name == LESSON:
        return "experiment=lesson"
    seconds = name.removesuffix(" s")
    if not seconds.isdigit():
        return None
    return f"experiment={BUDGETS[int(seconds)]} budget_seconds={seconds}"


def frontier(num: int, num_peers: int) -> dict[str, Any]:
    """Runs each contestant with several seeds, in turn, a process of its own each time.

    Args:
        num: seeds of this package's runs.
        num_peers: seeds of the others'.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "keras"
        write_keras_home(home)
        for seed in range(max(num, num_peers)):
            for name, run in _contestants(home, seed, seed < num, seed < num_peers).items():
                try:
                    last = run()
                except SystemExit as error:  # half an hour of other runs is not lost with it
                    failed.append(f"seed {seed}  {name}: {error}")
                    print(failed[-1], flush=True)
                    continue
                found.setdefault(name, []).append(last)
                print(
                    f"seed {seed}  {name}: {last['process']:.1f} s, {last['test_accuracy']:.4f}",
                    flush=True,
                )
    return {"budgets": list(BUDGETS), "runs": found, "failed": failed}


def _contestants(
    home: Path, seed: int, is_ours: bool, is_peers: bool
) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for seconds, experiment in BUDGETS.items() if is_ours else ():
        found[budget_name(seconds)] = lambda seconds=seconds, experiment=experiment: ours(  # type: ignore[misc]
            f"experiment={experiment}", f"seed={seed}", f"budget_seconds={seconds}"
        )
    if is_ours:
        found[LESSON] = lambda: ours("experiment=lesson", f"seed={seed}")
    if is_peers:
        for name, model in SCIKIT.items():
            found[name] = lambda model=model: peer_run(  # type: ignore[misc]
                home, PEERS / "sklearn_lesson.py", model, str(seed)
            )
        found[KERAS_CNN] = lambda: peer_run(
            home, PEERS / "keras_cnn.py", str(seed), KERAS_BACKEND="jax"
        )
    return found


def ours(*overrides: str) -> dict[str, Any]:
    """Trains a run; returns its figures.

    The accuracy without near-duplicates takes a second look at the test set, of the same weights.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cost, record = runs.ran(Path(scratch), "device=cpu", *overrides)
        wrong = runs.wrong_in_test(Path(scratch))
    duplicates = set(near_duplicates.indices())
    num = record["data"]["test"] - len(duplicates)
    return {
        "seed": record["seed"],
        "process": cost.seconds,
        "fit": record["fit_seconds"],
        "memory": cost.memory,
        "test_accuracy": record["test"]["accuracy"],
        "budget": record.get("budget"),
        "without_near_duplicates": 1 - len(wrong - duplicates) / num,
    }
