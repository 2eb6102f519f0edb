"""Jobs of a sweep that submitit hands to Slurm, or starts as processes of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = ".submitit"  # in the sweep's folder; holds one folder per job, with its log
FAILED = "job failed: "  # begins the line of a job's log that reports its error

_NO_RESULT = re.compile(r"Job (\S+) [^\n]*\s+has not produced any output \(state: ([^)]+)\)")


def explained(error: BaseException) -> str | None:
    """Returns one line for an error of submitit's, or None for any other."""
    if not type(error).__module__.startswith("submitit."):
        no_slurm = isinstance(error, RuntimeError) and "on a slurm cluster" in str(error)
        return (
            "hydra/launcher=slurm: Slurm is not on the PATH (sbatch, srun); "
            "hydra/launcher=submitit_local is the same on one machine"
            if no_slurm
            else None
        )
    lost = _NO_RESULT.search(str(error))
    if lost is not None:
        return (
            f"job {lost[1]} ended without a result (state: {lost[2]}): it ran out of memory or "
            f"time, or was cancelled; its log is in {FOLDER}/{lost[1]}"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "with trace:" in str(error):
        return f"a job failed; its log in {FOLDER} says why: {lines[-1]}"
    refusals = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return f"Slurm refused the jobs: {'; '.join(refusals or lines)}"


def failures(sweep: Path, since: float) -> Iterator[str]:
    """Yields a line for each job of a sweep that failed, from the jobs' logs.

    Args:
        since: time in seconds since 1970; older logs are skipped.
    """
    for log in sorted((sweep / FOLDER).glob("*/*_log.err")):
        if log.stat().st_mtime < since:
            continue
        lines = log.read_text(errors="replace").splitlines()
        reasons = [line.removeprefix(FAILED) for line in lines if line.startswith(FAILED)]
        if reasons:
            yield reasons[-1]
        elif not [*log.parent.glob("*_result.pkl")]:
            last = lines[-1] if lines else "its log is empty"
            yield f"{log.parent.name} left no result: {last}"
