"""Many runs: the spread over seeds beside Keras', launchers in turn, and growth with size."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runs
from benchmarks.lesson import KERAS_SCRIPT, peer_run, write_keras_home

# Base, and what grows with its values; one epoch of the lesson on a part of the data.
_BASE = {"epochs": 1, "data.limit": 12_000, "device": "cpu", "experiment": "lesson"}
AXES: dict[str, tuple[int, ...]] = {
    "data.limit": (6_000, 12_000, 24_000, 48_000),
    "epochs": (1, 2, 4, 8),
    "batch_size": (16, 32, 64, 128),
    "model.hidden": (64, 128, 256, 512),
}
SEEDS = (2, 4, 8, 16)
# What is compared over seeds, by its name in a history or a record.
FIGURES = {
    "test accuracy": "test_accuracy",
    "test loss": "test_loss",
    "final training accuracy": "accuracy",
    "final validation accuracy": "val_accuracy",
}


def seeds(first: int, num: int, num_keras: int) -> dict[str, Any]:
    """Runs the lesson with seeds from `first` on, and Keras on JAX with as many as asked for."""
    here: list[dict[str, float]] = []
    keras: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs.swept("vectorized", folder, "experiment=lesson", f"seed=range({first},{first + num})")
        for path in sorted(folder.glob("sweep/*/run.json")):
            record = json.loads(path.read_text())
            final = json.loads((path.parent / "history.jsonl").read_text().splitlines()[-1])
            final |= {f"test_{key}": record["test"][key] for key in ("accuracy", "loss")}
            here.append({"seed": record["seed"], **{key: final[key] for key in FIGURES.values()}})
        if num_keras:
            write_keras_home(folder / "keras")
        for seed in range(first, first + num_keras):
            found = peer_run(folder / "keras", KERAS_SCRIPT, str(seed), KERAS_BACKEND="jax")
            keras.append({"seed": seed, **{key: found[key] for key in FIGURES.values()}})
            print(f"Keras, seed {seed}: {found['test_accuracy']:.4f}", flush=True)
    here.sort(key=lambda run: run["seed"])
    return {"here": here, "keras": keras}


def sweep(launchers: Sequence[str], num: int, rounds: int) -> dict[str, Any]:
    """Times a sweep of the lesson through several launchers in turn, and compares the bits."""
    seconds: dict[str, list[float]] = {launcher: [] for launcher in launchers}
    weights: dict[str, list[str]] = {}
    for number in range(rounds):
        for launcher, found in seconds.items():
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                overrides = ("experiment=lesson", f"seed=range({num})")
                found.append(runs.swept(launcher, folder, *overrides))
                records = [json.loads(p.read_text()) for p in folder.glob("sweep/*/run.json")]
            weights[launcher] = sorted(record["weights_sha256"] for record in records)
        last = ", ".join(f"{launcher} {found[-1]:.1f} s" for launcher, found in seconds.items())
        print(f"round {number + 1}: {last}", flush=True)
    same = len({tuple(found) for found in weights.values()}) == 1
    return {"runs": num, "seconds": seconds, "same_bits": same}


def growth(rounds: int) -> dict[str, Any]:
    """Times fits, and takes their peak memory, along each axis; and sweeps with more seeds."""
    found: dict[str, list[dict[str, float]]] = {}
    for key, values in AXES.items():
        found[key] = []
        for _ in range(rounds):
            for value in values:
                overrides = [f"{k}={v}" for k, v in (_BASE | {key: value}).items()]
                cost = runs.trained(*overrides)
                found[key].append({"x": value, "fit": cost["fit"], "memory": cost["memory"]})
        print(f"{key}: fit grows with exponent {exponent(found[key], 'fit'):.2f}", flush=True)
    found["seeds together"] = []
    for _ in range(rounds):
        for num in SEEDS:
            with tempfile.TemporaryDirectory() as scratch:
                overrides = [f"{k}={v}" for k, v in _BASE.items()]
                runs.swept("vectorized", Path(scratch), *overrides, f"seed=range({num})")
                path = next(Path(scratch).glob("sweep/*/run.json"))
                record = json.loads(path.read_text())
            found["seeds together"].append(
                {
                    "x": num,
                    "fit": record["group"]["fit_seconds"],
                    "memory": record["peak_memory_bytes"] / 2**20,
                }
            )
    return {"base": _BASE, "axes": found}


def exponent(samples: Sequence[dict[str, float]], key: str) -> float:
    """Returns p of the line log(figure) = p · log(x) + c that fits best by least squares."""
    x = [math.log(sample["x"]) for sample in samples]
    y = [math.log(sample[key]) for sample in samples]
    return float(np.polyfit(x, y, 1)[0])


def ratio_of_sd(here: Sequence[float], there: Sequence[float]) -> tuple[float, float, float]:
    """Returns the ratio of two standard deviations and the ends of its 95 % interval.

    The interval is the bootstrap's: 10,000 times as many values of each are drawn from them, with
    replacement.
    """
    rng = np.random.default_rng(0)
    drawn = [rng.choice(values, (10_000, len(values))).std(1, ddof=1) for values in (here, there)]
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975))
    return float(np.std(here, ddof=1) / np.std(there, ddof=1)), float(low), float(high)
