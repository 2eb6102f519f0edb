"""What is reported of the jobs of a sweep, from submitit's errors and from the jobs' logs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from submitit.core.utils import FailedJobError, UncompletedJobError

from fashionnet.system import submitted


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            FailedJobError("sbatch: error: invalid partition specified: x\nsbatch: error: no\n"),
            "Slurm refused the jobs: invalid partition specified: x; no",
        ),
        (FailedJobError("out of order"), "Slurm refused the jobs: out of order"),
        (
            FailedJobError(
                "Job (task=0) failed during processing with trace:\n"
                '----------------------\n  File "x.py", line 1\nOSError: error: no space left\n'
            ),
            "^a job failed.*: OSError: error: no space left$",
        ),
        (
            UncompletedJobError(
                "Job 17_3 (task: 0) with path /a/17_3_0_result.pkl\n"
                "has not produced any output (state: OUT_OF_MEMORY)\nError stream: error: x"
            ),
            r"job 17_3 ended without a result \(state: OUT_OF_MEMORY\).*log is in .submitit/17_3",
        ),
        (
            RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?'),
            "Slurm is not on the PATH",
        ),
    ],
)
def test_what_submitit_raises_becomes_a_line(error: Exception, words: str) -> None:
    line = submitted.explained(error)
    assert line is not None and "\n" not in line
    assert re.search(words, line)


@pytest.mark.parametrize("error", [RuntimeError("a fault"), ValueError("x"), KeyError("error: ")])
def test_what_is_not_submitits_is_left_alone(error: Exception) -> None:
    assert submitted.explained(error) is None


def test_failed_jobs_are_named_from_their_logs(tmp_path: Path) -> None:
    logs = {
        "8_0": ("job failed: seed=0: old\nx\njob failed: seed=0: new\n", True),
        "8_1": ("a warning\n", True),
        "8_2": ("starting\nslurmstepd: error: oom\n", False),
        "8_3": ("", False),
        "7_0": ("job failed: seed=9: of an earlier sweep\n", True),
    }
    for name, (text, has_result) in logs.items():
        folder = tmp_path / ".submitit" / name
        folder.mkdir(parents=True)
        log = folder / f"{name}_0_log.err"
        log.write_text(text)
        os.utime(log, (1000, 1000) if name == "7_0" else (2000, 2000))
        if has_result:
            (folder / f"{name}_0_result.pkl").touch()
    assert [*submitted.failures(tmp_path, since=1500)] == [
        "seed=0: new",
        "8_2 left no result: slurmstepd: error: oom",
        "8_3 left no result: its log is empty",
    ]
    assert not [*submitted.failures(tmp_path / "elsewhere", since=0)]
