"""What torchrun and Slurm pass to a process through the environment."""

from __future__ import annotations

import os

from fashionnet.errors import UserError

_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def world_size() -> int:
    """Returns how many processes were started for this job; 1 without a launcher.

    Raises:
        UserError: the environment holds no such number.
    """
    return _number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Returns this process' number among them, from 0."""
    return _number("RANK", 0, least=0) if world_size() > 1 else 0


def local_rank() -> int:
    """Returns this process' number among those of its machine, from 0."""
    return _number("LOCAL_RANK", 0, least=0)


def local_world_size() -> int:
    """Returns how many of the processes run on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1)


def job_id() -> str | None:
    """Returns what torchrun calls the job, the same after a restart; None where it has no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # as torchrun's --rdzv-id is by default
    return None if name == "none" else name


def is_restarted() -> bool:
    """Returns whether torchrun or Slurm started this job before, and now starts it again."""
    return any(os.environ.get(key, "0") != "0" for key in _RESTARTS)


def _number(key: str, default: int, least: int) -> int:
    text = os.environ.get(key, str(default))
    if not (text.isdecimal() and int(text) >= least):
        raise UserError(f"{key}={text} in the environment must be a number of {least} or more")
    return int(text)
