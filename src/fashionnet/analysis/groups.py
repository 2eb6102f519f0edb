"""Runs gathered for a comparison: in groups that differ in nothing but the seed."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashionnet.config import schema
from fashionnet.errors import UserError, visible
from fashionnet.runs import saved
from fashionnet.runs.record import HISTORY
from fashionnet.system.files import as_typed, read_bounded

CURVES = ("loss", "accuracy", "val_loss", "val_accuracy")
_OVERRIDES = Path(".hydra", "overrides.yaml")
_MAX_OVERRIDES_BYTES = 2**20
_GROUPS = ("model", "optimizer", "schedule", "augmentation", "data", "experiment")
_CHECKSUMS = ("sha256", "split_sha256")


@dataclass(frozen=True)
class Metric:
    """A figure of a run: its label, and the decimals that it is printed with."""

    label: str
    decimals: int = 4


METRICS = {
    "loss": Metric("final training loss"),
    "accuracy": Metric("final training accuracy"),
    "val_loss": Metric("final validation loss"),
    "val_accuracy": Metric("final validation accuracy"),
    "test_loss": Metric("test loss"),
    "test_accuracy": Metric("test accuracy"),
    "gap": Metric("generalization gap"),
    "best_epoch": Metric("best epoch", 1),
    "lowest_val_loss": Metric("lowest validation loss"),
    "fit_seconds": Metric("fit seconds", 1),
}
ON_VALIDATION = ("val_loss", "val_accuracy", "gap", "best_epoch", "lowest_val_loss")


@dataclass(frozen=True)
class Member:
    """A completed run of a group.

    Attributes:
        name: its directory, as one would type it in the current folder.
        figures: a value for each of `METRICS`; None for one that the run does not have.
        rows: the epochs of its history.
    """

    name: str
    path: Path
    seed: int
    record: dict[str, Any]
    figures: dict[str, float | None]
    rows: list[dict[str, Any]]

    @property
    def config(self) -> dict[str, Any]:
        """What determines its numbers except the seed; device and threads as actually used."""
        counted = schema.that_counts(self.record["config"])
        counted.pop("seed", None)
        kind = self.record["device"].partition(":")[0]  # auto is cpu or cuda, cuda:1 is cuda
        return counted | {"device": kind, "threads": self.record["threads"]}

    @property
    def is_rerun(self) -> bool:
        """Whether `reproduce` made it; a rerun that was trained on is a run of its own."""
        parents = self.record.get("parents", [])
        return bool(parents and parents[-1].get("reproduced"))

    @property
    def facts(self) -> dict[str, Any]:
        """The checksums of the data and of the split."""
        return {key: self.record["data"][key] for key in _CHECKSUMS}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, in order of their seeds, one for each."""

    name: str
    members: list[Member]

    @property
    def lengths(self) -> list[int]:
        """The numbers of epochs of its runs, sorted, each once."""
        return sorted({len(member.rows) for member in self.members})


@dataclass(frozen=True)
class LeftOut:
    """A run that is not in the comparison, and why."""

    run: str
    reason: str


@dataclass(frozen=True)
class Gathered:
    """The groups of runs, and the runs left out."""

    groups: list[Group]
    left_out: list[LeftOut]


def gather(folders: Iterable[str | Path]) -> Gathered:
    """Groups the completed runs in and below folders; a run given twice counts once.

    Groups come in the order in which their first runs were given, runs of one folder in order of
    their names.

    Raises:
        UserError: a folder does not exist or holds no run, or no completed run is left.
    """
    given: list[Path] = []
    for folder in folders:
        below = saved.find(Path(folder))
        if not below:
            raise UserError(f"{folder} is not a run directory, and there is none below it")
        given += [path.resolve() for path in below]
    if not given:
        raise UserError("nothing to compare: give run directories, or folders that hold them")
    members, left_out = [], []
    for path in dict.fromkeys(given):
        name = as_typed(path)
        try:
            members.append(_read(path, name))
        except UserError as error:
            left_out.append(LeftOut(name, str(error)))
    kept: dict[Hashable, dict[int, Member]] = {}
    for member in sorted(members, key=lambda member: member.is_rerun):  # originals first
        group = kept.setdefault(_frozen([member.config, member.facts]), {})
        twin = group.setdefault(member.seed, member)
        if twin is not member:  # it would count as one more independent seed
            figures = "the same" if _result(twin) == _result(member) else "different"
            reason = f"it has the configuration and seed of {twin.name}, and {figures} figures"
            left_out.append(LeftOut(member.name, reason))
    if not kept:
        reasons = "; ".join(f"{run.run}: {run.reason}" for run in left_out)
        raise UserError(f"no completed run is left to compare ({reasons})")
    ordered = [[group[seed] for seed in sorted(group)] for group in kept.values()]
    groups = [Group(*pair) for pair in zip(_names(ordered), ordered, strict=True)]
    return Gathered(groups, left_out)


def _read(path: Path, name: str) -> Member:
    """Reads a completed run; the reason to leave it out is a user error."""
    run = saved.read(path)
    values = run.record
    if values["status"] != "completed":
        reason = f" ({values['error']})" if values.get("error") else ""
        raise UserError(f"it is not completed but {values['status']}{reason}")
    if not run.history:
        raise UserError(f"{path / HISTORY} is damaged: it holds no epoch")
    figures = _figures(run.history, values)
    return Member(name, path, values["config"]["seed"], values, figures, run.history)


def _figures(rows: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    final = rows[_final(values, len(rows))]
    figures: dict[str, Any] = {key: final.get(key) for key in CURVES}
    test = values["test"] or {}
    figures |= {f"test_{key}": test.get(key) for key in ("loss", "accuracy")}
    held_out = figures["val_accuracy"]
    figures["gap"] = None if held_out is None else figures["accuracy"] - held_out
    validated = [row for row in rows if "val_loss" in row]
    lowest = min(validated, key=lambda row: float(row["val_loss"]), default={})
    figures |= {"best_epoch": lowest.get("epoch"), "lowest_val_loss": lowest.get("val_loss")}
    return figures | {"fit_seconds": values["fit_seconds"]}


def _final(values: Mapping[str, Any], num_rows: int) -> int:
    """Returns the index of the epoch whose weights a run ended with.

    It is not the last one if the best weights were restored.
    """
    hashes: list[str] = values.get("weight_hashes", [])
    if len(hashes) == num_rows and values["weights_sha256"] in hashes:
        return num_rows - 1 - hashes[::-1].index(values["weights_sha256"])
    return num_rows - 1


def _result(member: Member) -> dict[str, float | None]:
    return {key: value for key, value in member.figures.items() if key != "fit_seconds"}


def _frozen(value: Any) -> Hashable:
    """Returns plain values as something that can be a key; equal values are equal keys."""
    if isinstance(value, Mapping):
        return frozenset((key, _frozen(each)) for key, each in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _names(groups: Sequence[Sequence[Member]]) -> list[str]:
    """Returns a distinct name for each group: what was typed and sets it apart, as overrides.

    Where that leaves groups of one name, the keys in which their configurations differ are taken,
    and then a checksum of their data as well.
    """
    firsts = [members[0] for members in groups]
    settings = [first.config | first.facts for first in firsts]
    differing = {k for other in settings for k in schema.differing_keys(settings[0], other)}
    checksums = sorted(key for key in differing if key.startswith(_CHECKSUMS))
    keys = differing.difference(checksums)
    typed = {"device", "threads"}.union(*map(_overridden, firsts))
    names: list[str] = []
    for candidates in (typed, keys, keys.union(checksums[:1])):
        if len(set(names)) < len(groups):
            columns = {key: [_word(first, key) for first in firsts] for key in sorted(candidates)}
            shown = [
                words
                for key, words in columns.items()
                if key in differing or (None not in words and len(set(words)) > 1)
            ]
            names = [" ".join(str(words[i]) for words in shown) for i in range(len(groups))]
    names = [name or _word(firsts[0], "model") or "all runs" for name in names]
    return [n if names.count(n) == 1 else f"{n} #{names[:i].count(n)}" for i, n in enumerate(names)]


def _word(member: Member, key: str) -> str | None:
    """Returns `key=value`; None for the option of a group that was not recorded."""
    if key in _GROUPS:
        option = (member.record.get("choices") or {}).get(key)
        return option and visible(f"{key}={option}")
    value = schema.at(member.config | member.facts, key)
    text = value if isinstance(value, str) else json.dumps(value)
    return visible(f"{key}={text[:8] if key.startswith(_CHECKSUMS) else text}")


def _overridden(member: Member) -> set[str]:
    """Returns the keys that a run's command line set; none if they were not recorded."""
    try:
        text = read_bounded(member.path / _OVERRIDES, member.path, _MAX_OVERRIDES_BYTES).decode()
    except (FileNotFoundError, UserError, ValueError):  # only a name depends on it
        return set()
    # A YAML list, one override a line; keys have no quotes, so it needs no parser.
    return {line.strip("- '\"+").partition("=")[0] for line in text.splitlines()}
