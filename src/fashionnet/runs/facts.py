"""What is known of a run at its start: machine, packages, code, data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fashionnet.config import schema
from fashionnet.config.schema import Config
from fashionnet.models.transfer import Transfer
from fashionnet.models.weights import num_parameters, weights_sha256
from fashionnet.runs.record import MAX_PATCH_BYTES, PATCH, SCHEMA_VERSION
from fashionnet.system import devices, processes
from fashionnet.system.files import atomic_write

_MAX_UNTRACKED = 100
_PACKAGES = (
    "fashionnet",
    "torch",
    "torchvision",
    "numpy",
    "hydra-core",
    "omegaconf",
    "tensorboard",
)


def at_start(
    config: Config,
    choices: Mapping[str, str],
    data: Mapping[str, Any],
    model: nn.Module,
) -> dict[str, Any]:
    """Returns what is known of a run before its first step, and what it runs on.

    Args:
        data: what `data.describe` returns of the data set.
        model: with its initial weights.
    """
    plain = schema.as_dict(config)
    if config.data.root:  # the run may be looked at from another folder
        plain["data"]["root"] = str(Path(config.data.root).expanduser().absolute())
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command_line(),
        "choices": dict(choices),
        "config": plain,
        "config_hash": schema.config_hash(plain),
        "seed": config.seed,
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size(),
        "deterministic": config.deterministic,
        "precision": devices.precision(),
        "data": dict(data),
        **_input(model),
        "parameters": num_parameters(model),
        "initial_weights_sha256": weights_sha256(model.state_dict()),
        **environment(next(model.parameters()).device),
    }


def _input(model: nn.Module) -> dict[str, Any]:
    """Returns what pictures are normalized with, of a network that a library describes."""
    if not isinstance(model, Transfer):
        return {}
    mean, std = (values.flatten().tolist() for values in (model.mean, model.std))
    library = f"{model.library} {_version(model.library)}"
    return {"input": {"mean": mean, "std": std, "library": library}}


def environment(device: torch.device) -> dict[str, Any]:
    """Returns packages, interpreter, system, processor, GPU and the commit of the code.

    Args:
        device: what the run works on; of another one nothing is asked.
    """
    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "torch_build": torch.version.git_version,
        "processor": devices.processor_name(),
        "gpu": devices.gpu_facts(device),
        "python": platform.python_version(),
        "platform": devices.platform_name(),
        "git": git_state(),
    }


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # names the build, too: 2.11.0+cu130
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Returns commit, dirtiness and untracked files of this code's checkout.

    None for an installed package. Of many untracked files the first hundred are named.
    """
    status = _git("status", "--porcelain=v2", "--branch", "--untracked-files=all")
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    if status is None or tracked is None:  # or inside somebody else's checkout
        return None
    lines = status.decode(errors="replace").splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), None)
    untracked = [line[2:] for line in lines if line.startswith("? ")]
    return {
        "commit": commit,
        "dirty": any(not line.startswith("#") for line in lines),
        "untracked": untracked[:_MAX_UNTRACKED],
    }


def write_patch(run_dir: Path, part: int = 1) -> None:
    """Writes what this code's checkout has changed since its commit as `git.patch`, up to 1 MiB.

    Nothing is written of an unchanged checkout, nor of a larger change.

    Args:
        part: which part of the run begins. A later one writes `git.PART.patch`, if it differs.
    """
    patch = _git("diff", "HEAD", "--binary")
    if not patch or len(patch) > MAX_PATCH_BYTES:
        return
    first = run_dir / PATCH
    if part == 1 or not first.is_file() or first.read_bytes() != patch:
        with atomic_write(first if part == 1 else run_dir / f"git.{part}.patch") as file:
            file.write(patch)


def _git(*arguments: str) -> bytes | None:
    """Returns what git says of the folder of this file, or None if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # looking changes nothing
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def command_line() -> str:
    """Returns the command that started this process, as one would type it."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join(sys.argv)


def utc_now() -> str:
    """Returns the time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
