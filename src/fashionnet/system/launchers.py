"""What torchrun and Slurm pass to a process through the environment."""

from __future__ import annotations

import os

from fashionnet.errors import UserError

_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def world_size() -> int:
    """Returns the number of processes of this job; 1 without a launcher.

    Raises:
        UserError: WORLD_SIZE is not a number of 1 or more.
    """
    return _number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Returns the rank of this process, from 0."""
    return _number("RANK", 0, least=0) if world_size() > 1 else 0


def local_rank() -> int:
    """Returns the rank of this process among those of its machine, from 0."""
    return _number("LOCAL_RANK", 0, least=0)


def local_world_size() -> int:
    """Returns the number of the job's processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1)


def job_id() -> str | None:
    """Returns torchrun's name of the job, the same after a restart; None if it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # the default of torchrun's --rdzv-id
    return None if name == "none" else name


def is_restarted() -> bool:
    """Returns whether torchrun or Slurm has restarted this job."""
    return any(os.environ.get(key, "0") != "0" for key in _RESTARTS)


def _number(key: str, default: int, least: int) -> int:
    text = os.environ.get(key, str(default))
    if not (text.isdecimal() and int(text) >= least):
        raise UserError(f"{key}={text} in the environment must be a number of {least} or more")
    return int(text)
