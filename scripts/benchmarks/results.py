"""What a benchmark leaves: docs/results/SUITE.json, with machine, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from fashionnet.system import devices, files

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "results"
_PACKAGES = (
    "torch",
    "numpy",
    "keras",
    "jax",
    "tensorflow",
    "scikit-learn",
    "hydra-joblib-launcher",
)


def keep(suite: str, figures: dict[str, Any], folder: Path) -> Path:
    """Writes the figures of a suite with all that they depend on; returns the file."""
    script = f"scripts/{Path(sys.argv[0]).name}"
    values = {
        "suite": suite,
        "command": shlex.join(["python", script, *map(_named, sys.argv[1:])]),
        "date": date.today().isoformat(),
        "commit": COMMIT,
        "machine": machine(),
        "versions": versions(),
        "figures": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    files.write_output(path, (json.dumps(values, indent=1) + "\n").encode())
    return path


def machine() -> dict[str, Any]:
    """Returns what identifies this machine to a reader."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "processor": devices.processor_name(),
        "cores": devices.num_cores(),
        "memory_gb": round(memory),
        "gpu": _gpu(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that are compared."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _named(argument: str) -> str:
    """Returns an argument as typed, and of a path of this machine the name alone."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str:
    """Returns the commit of the code that ran; "-dirty" marks changes to it, but for results."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":!docs/results")
    return f"{commit}{'-dirty' if changes else ''}" if commit else "unknown"


COMMIT = _commit()  # at the start: a checkout may move while a suite runs
