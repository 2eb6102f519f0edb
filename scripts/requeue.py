"""Queues a Slurm job again and again at random moments, and checks that its run ends the same.

    python scripts/requeue.py --times 10 [--seed 0]

Needs a Slurm on the PATH; `python -m tests.slurm python scripts/requeue.py` brings its own. The
job is scripts/slurm.sbatch without a GPU; half of the times it is told that its time is up, and
queues itself again, half of the times the operator does it. Weights and history must be those of a
run without Slurm that was never stopped; the exit status is 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN = (
    "epochs=400",
    "data.limit=2000",
    "batch_size=8",
    "device=cpu",
    "checkpoint.every_seconds=0.2",
)


def told(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def of_job(job: str, key: str) -> str:
    words = told("scontrol", "-o", "show", "job", job).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))


def outcome(run_dir: Path) -> tuple[str, list[dict[str, Any]]]:
    """Returns what must be the same: weights, and history but its seconds."""
    rows = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    for row in rows:
        del row["epoch_seconds"]
    return json.loads((run_dir / "run.json").read_text())["weights_sha256"], rows


def status(run_dir: Path) -> str | None:
    record = run_dir / "run.json"
    return json.loads(record.read_text())["status"] if record.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    os.environ["PYTHON"] = sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.monotonic()
        train = [sys.executable, "-m", "fashionnet.train", *RUN]
        subprocess.run([*train, f"hydra.run.dir={folder}/alone"], check=True, capture_output=True)
        seconds = time.monotonic() - began
        script, run_dir = ROOT / "scripts/slurm.sbatch", folder / "run"
        os.environ["RUN_DIR"] = str(run_dir)
        log = f"--output={folder}/job.log"
        os.chdir(ROOT)
        job = told("sbatch", "--parsable", "--gpus=0", log, str(script), *RUN)
        for number in range(1, given.times + 1):
            while status(run_dir) != "running" or of_job(job, "JobState") != "RUNNING":
                time.sleep(0.05)
                if of_job(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED"):
                    break
            time.sleep(draw.uniform(0, seconds / given.times / 2))
            if of_job(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED"):
                print(f"the job ended before it was queued again for the {number}. time")
                break
            is_operator = draw.random() < 0.5
            if is_operator:
                told("scontrol", "requeue", job)
            else:
                told("scancel", "--batch", "--signal=USR1", job)
            while of_job(job, "Restarts") != str(number):
                time.sleep(0.05)
            done = len((run_dir / "history.jsonl").read_text().splitlines())
            who = "the operator" if is_operator else "the end of its time"
            print(f"{number}: queued again by {who} after {done} epochs", flush=True)
        while of_job(job, "JobState") not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            time.sleep(0.2)
        restarts, ended = of_job(job, "Restarts"), of_job(job, "JobState")
        same = ended == "COMPLETED" and outcome(run_dir) == outcome(folder / "alone")
        print(f"{ended} after {restarts} restarts; weights and history the same: {same}")
    raise SystemExit(0 if same and restarts == str(given.times) else 1)


if __name__ == "__main__":
    main()
