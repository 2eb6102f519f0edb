"""Running commands of the package and of its peers, and what each cost."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What a process printed, its seconds from start to end, and its peak memory in MB."""

    said: str
    seconds: float
    memory: float


def timed(command: Sequence[str], folder: Path, **environment: str) -> Cost:
    """Runs a command to its end.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    with open(folder / "stdout", "w+b") as out, open(folder / "stderr", "w+b") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=os.environ | environment, cwd=folder
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        said, complaint = out.read().decode(), err.read().decode()
    if process.returncode:
        last = complaint.strip().splitlines()[-1:] or ["no message"]
        raise SystemExit(f"error: {' '.join(command)[:200]} failed: {last[0]}")
    return Cost(said, seconds, usage.ru_maxrss / 1024)


TRAIN = ("-m", "fashionnet.train")


def ran(
    folder: Path, *overrides: str, program: Sequence[str] = TRAIN
) -> tuple[Cost, dict[str, Any]]:
    """Trains `folder`/run by the command; returns what that cost, and the run's record."""
    line = [sys.executable, *program, *overrides, "hydra.run.dir=run"]
    cost = timed(line, folder)
    return cost, json.loads((folder / "run/run.json").read_text())


def wrong_in_test(folder: Path) -> set[int]:
    """Returns which test pictures `folder`/run gets wrong."""
    line = [sys.executable, "-m", "fashionnet.mistakes", "run", "--split", "test"]
    timed([*line, "--num", "10000", "--out", "mistakes"], folder)
    rows = (folder / "mistakes/mistakes.csv").read_text().splitlines()[1:]
    return {int(row.split(",", 1)[0]) for row in rows}


def trained(*overrides: str, program: Sequence[str] = TRAIN) -> dict[str, Any]:
    """Trains a run by the command; returns the figures that benchmarks keep."""
    with tempfile.TemporaryDirectory() as scratch:
        cost, record = ran(Path(scratch), *overrides, program=program)
        return {
            "fit": record["fit_seconds"],
            "process": cost.seconds,
            "memory": cost.memory,
            "test_accuracy": (record["test"] or {}).get("accuracy"),
            "weights": record["weights_sha256"],
        }


def swept(launcher: str, folder: Path, *overrides: str) -> float:
    """Runs a sweep below `folder`/sweep; returns the seconds of the process."""
    line = [sys.executable, *TRAIN, "-m", *overrides]
    line += [f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"]
    return timed(line, folder).seconds


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Returns `median (least–most)`."""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"
