"""`run.json`, the record of a run: what was asked, where it ran, what came out."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from fashionnet.config import schema
from fashionnet.config.schema import Config, Range
from fashionnet.errors import UserError, shortened
from fashionnet.runs.forms import (
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
from fashionnet.system.files import read_json, write_json

NAME, HISTORY = "run.json", "history.jsonl"
PATCH = "git.patch"  # what the code had changed since its commit
MAX_PATCH_BYTES = 2**20
SCHEMA_VERSION = 2
_MAX_BYTES = 4 * 2**20  # a thousand times what a run writes
STATUSES = ("running", "completed", "interrupted", "failed")


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
_NODE = group({"_target_": text(1024)}, rest=schema.refuse_unreasonable)
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
    "test": optional(group({"evaluations": integer(0, 10**9)}, _METRICS)),
    "fit_seconds": _SECONDS,
    "weights_sha256": _HASH,
}
_OTHERS: dict[str, Form] = {
    **_AT_END,
    "weights_sha256": optional(_HASH),
    "command": text(2**20),
    "choices": optional(group({}, rest=text(1024))),
    "input": group({"mean": _CHANNELS, "std": _CHANNELS}, {"library": text(100)}),
    "processes": integer(1, 2**20),
    "deterministic": flag,
    "precision": one_of("float32", "bfloat16"),
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
    "budget": group({"steps": integer(1, 2**53), "measured": _COUNT}, {"end": _COUNT}),
    "group": group({"jobs": _COUNT, "fit_seconds": _SECONDS}),
    "weight_hashes": list_of(_HASH, 0, 2**20),
}
_PARENT = group({}, {**_AT_START, **_OTHERS, "path": text(4096), "reproduced": flag})
_FORM = group(
    _AT_START,
    {**_OTHERS, "parents": list_of(_PARENT, 0, 1000), "continued": list_of(_PARENT, 0, 10_000)},
)
_COMPLETED_FORM = group(_AT_END)


class Record:
    """The record of one run; every change reaches the disk whole.

    Attributes:
        writes: whether this process writes the run; other ranks of its job only change `values`.
    """

    def __init__(self, run_dir: Path, values: dict[str, Any]) -> None:
        self.path = run_dir / NAME
        self.values = values
        self.writes = True

    def update(self, **values: Any) -> None:
        """Sets `values` and rewrites the file atomically."""
        self.values |= values
        if self.writes:
            write_json(self.path, self.values)


def read(run_dir: Path) -> dict[str, Any]:
    """Returns the record of a run directory.

    Raises:
        UserError: the folder does not exist, holds no run, or its record is damaged.
    """
    path = run_dir / NAME
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir} is not a folder; give a run directory, see python -m fashionnet.list"
        )
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it holds no {NAME}")
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
