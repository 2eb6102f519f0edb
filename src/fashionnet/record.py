"""`run.json`, the record of a run: what was asked, where it ran, what came out."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import nn

from fashionnet import config as configs, datasets, ranks, runtime
from fashionnet.checkpoint import weights_sha256
from fashionnet.config import Config, Range
from fashionnet.data import Dataset
from fashionnet.errors import UserError, shortened
from fashionnet.files import atomic_write, read_json, write_json
from fashionnet.models import num_parameters
from fashionnet.schema import (
    Form,
    figure,
    flag,
    group,
    in_range,
    integer,
    list_of,
    number,
    one_of,
    optional,
    text,
)
from fashionnet.transfer import Transfer

NAME = "run.json"
SCHEMA_VERSION = 1
_MAX_BYTES = 4 * 2**20  # a thousand times what a run writes
PATCH = "git.patch"
MAX_PATCH_BYTES = 2**20
_MAX_UNTRACKED = 100
STATUSES = ("running", "completed", "interrupted", "failed")

_PACKAGES = (
    "fashionnet",
    "torch",
    "torchvision",
    "numpy",
    "hydra-core",
    "omegaconf",
    "tensorboard",
)


def _form_of_config(node: type = Config) -> Form:
    """Returns the form of a recorded configuration, from the dataclasses of the schema."""
    forms: dict[str, Form] = {}
    for item in fields(node):
        kind, _, null = str(item.type).partition(" | ")
        range_ = item.metadata.get("range", Range(-1e38, 1e38))
        form = {
            "int": in_range(range_, whole=True),
            "float": in_range(range_),
            "bool": flag,
            "str": text(4096),
            "list[str]": list_of(text(1024), 0, _MOST_CLASSES),
            "Any": _NODE,
        }.get(kind) or _form_of_config(item.default_factory)  # type: ignore[arg-type]
        forms[item.name] = optional(form) if null else form
    needed = {item.name for item in fields(node) if item.default == MISSING}
    needed |= {"seed", "epochs", "data"} & forms.keys() if node is Config else set()
    return group({name: forms[name] for name in needed}, forms)


_MOST_CLASSES = 2**16  # or folders of photos, or files of a data set
_NODE = group({"_target_": text(1024)}, rest=configs.refuse_unreasonable)
_COUNT, _SECONDS, _TIME, _HASH = integer(0, 2**53), number(0, 1e12), text(64), text(128)
_CHANNELS = list_of(number(-1e6, 1e6), 3, 3)
_METRICS = {"loss": figure, "accuracy": figure}
_DATA = {
    "name": text(100),
    "sha256": group({}, rest=_HASH),
    "train": _COUNT,
    "validation": _COUNT,
    "test": _COUNT,
    "split_sha256": _HASH,
    "image_shape": list_of(integer(1, 1024), 2, 3),
    "class_names": list_of(text(1024), 1, _MOST_CLASSES, distinct=True),
}
_AT_START: dict[str, Form] = {
    "schema_version": integer(SCHEMA_VERSION, SCHEMA_VERSION),
    "status": one_of(*STATUSES),
    "config": _form_of_config(),
    "config_hash": _HASH,
    "seed": integer(0, 2**63 - 1),
    "device": text(100),
    "threads": integer(1, 2**20),
    "data": group(_DATA, {"counts": group({}, rest=_COUNT)}),
    "started": _TIME,
}
_AT_END: dict[str, Form] = {
    "validation": optional(group(_METRICS)),
    "test": group({**_METRICS, "evaluations": integer(0, 10**9)}),
    "fit_seconds": _SECONDS,
    "weights_sha256": _HASH,
}
_OTHERS: dict[str, Form] = {
    **_AT_END,
    "weights_sha256": optional(_HASH),
    "test": optional(group({"evaluations": integer(0, 10**9)}, _METRICS)),
    "command": text(2**20),
    "choices": optional(group({}, rest=text(1024))),
    "input": group({"mean": _CHANNELS, "std": _CHANNELS}, {"library": text(100)}),
    "processes": integer(1, 2**20),
    "deterministic": flag,
    "parameters": _COUNT,
    "initial_weights_sha256": _HASH,
    "packages": group({}, rest=optional(text(100))),
    "error": text(2**20),
    "finished": _TIME,
    "frozen_sha256": _HASH,
    "head": group({"epochs": _COUNT}, _METRICS),
    "kept": text(100),
    "total_seconds": _SECONDS,
    "peak_memory_bytes": _COUNT,
    "peak_gpu_memory_bytes": optional(_COUNT),
    "best_epoch": optional(_COUNT),
    "epochs_done": _COUNT,
    "weight_hashes": list_of(_HASH, 0, 2**20),
}
_PARENT = group({}, {**_AT_START, **_OTHERS, "path": text(4096), "reproduced": flag})
_FORM = group(
    _AT_START,
    {**_OTHERS, "parents": list_of(_PARENT, 0, 1000), "continued": list_of(_PARENT, 0, 10_000)},
)
_COMPLETED_FORM = group(_AT_END)


class Record:
    """The record of one run; every change reaches the disk whole."""

    def __init__(self, run_dir: Path, values: dict[str, Any]) -> None:
        self.path = run_dir / NAME
        self.values = values

    def update(self, **values: Any) -> None:
        """Sets `values` and rewrites the file atomically."""
        self.values |= values
        write_json(self.path, self.values)


def read(run_dir: Path) -> dict[str, Any]:
    """Returns the record of a run directory.

    Raises:
        UserError: there is no such folder, it holds no run, or its record is damaged.
    """
    path = run_dir / NAME
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir} is not a folder; give a run directory, see python -m fashionnet.list"
        )
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it holds no {NAME}")
    values = read_json(path, run_dir, _MAX_BYTES)
    version = values.get("schema_version", SCHEMA_VERSION) if isinstance(values, dict) else None
    if type(version) is int and version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has the schema_version {shortened(version)}, and this version of fashionnet "
            f"reads {SCHEMA_VERSION}: use the one that wrote it"
        )
    try:
        _FORM(values, "")
        if values["status"] == "completed":
            _COMPLETED_FORM(values, "")
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return dict(values)


def at_start(
    config: Config,
    choices: Mapping[str, str],
    dataset: Dataset,
    model: nn.Module,
) -> dict[str, Any]:
    """Returns what is known of a run before its first step, and what it runs on.

    Args:
        model: with its initial weights.
    """
    plain = configs.as_dict(config)
    if config.data.root:  # the run may be looked at from another folder
        plain["data"]["root"] = str(Path(config.data.root).expanduser().absolute())
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command_line(),
        "choices": dict(choices),
        "config": plain,
        "config_hash": configs.config_hash(plain),
        "seed": config.seed,
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "processes": ranks.count(),
        "deterministic": config.deterministic,
        "data": datasets.describe(dataset, config.validation_split, config.data.limit),
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
        "processor": runtime.processor_name(),
        "gpu": runtime.gpu_facts(device),
        "python": platform.python_version(),
        "platform": runtime.platform_name(),
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
