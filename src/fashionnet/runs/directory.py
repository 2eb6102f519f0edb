"""Run directories: claiming one, what lies in it, and reading a run back."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fashionnet import data as datasets
from fashionnet.config import schema
from fashionnet.errors import UserError, one_line
from fashionnet.models import weights
from fashionnet.runs import checkpoint, network, record, resume
from fashionnet.runs.facts import utc_now, write_patch
from fashionnet.runs.record import HISTORY, Record
from fashionnet.system import devices, locks, processes
from fashionnet.system.files import (
    TEMPORARY,
    as_typed,
    atomic_write,
    missing_folders,
    refuse_strange_below,
    remove,
    remove_empty,
    remove_temporary,
)
from fashionnet.training import schedule as schedules
from fashionnet.training.metrics import Metrics
from fashionnet.training.schedule import depends_on_length
from fashionnet.training.state import TrainState

log = logging.getLogger(__name__)

LOG = "train.log"
TRACE = "trace.json"
MISTAKES, EXPORT = "mistakes", "export"
# What a run owns in its directory and `overwrite=true` may remove.
# The record goes last: what is left of a removal cut short is still known as a run.
_OWNED = (
    *(".hydra", HISTORY, "checkpoints", "tensorboard", LOG, TRACE, MISTAKES, EXPORT),
    *(record.PATCH, record.NAME),
)
# Facts of the weights that a fit started from.
_OF_WEIGHTS = ("initial_weights_sha256", "frozen_sha256", "head")


@dataclass
class Run:
    """A claimed run directory.

    Attributes:
        path: the directory, absolute.
        config: the checked configuration, as plain values.
        resumed: the checkpoint to go on from, or None for a fresh start.
        parent: the record of the completed run that more epochs continue, if they do.
    """

    path: Path
    config: dict[str, Any]
    resumed: checkpoint.State | None
    record: Record
    parent: dict[str, Any] | None = None
    begun: bool = False

    @property
    def name(self) -> str:
        """The directory as one would type it from here."""
        return as_typed(self.path)

    @property
    def before(self) -> Mapping[str, Any]:
        """The record that this run goes on from; empty for a new run."""
        return self.record.values if self.parent is None else self.parent

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def restore(self, fit: TrainState, data: Mapping[str, Any]) -> None:
        """Puts a fresh fit where the run's checkpoint left it; a fresh run's stays as it is.

        Args:
            data: what the fit is to go on with, as `datasets.describe` returns it.

        Raises:
            OtherData: these are not the data of the run; the message says why.
            UserError: the checkpoint does not fit.
        """
        if self.resumed is None:
            return
        if changed := datasets.difference(self.before.get("data") or {}, data):
            raise datasets.OtherData(
                f"{self.name} was trained on other data: {changed}; put these back as they were, "
                "or train anew with overwrite=true or another hydra.run.dir"
            )
        resume.restore(fit, self.resumed)
        network.restore_frozen(fit.model, self.checkpoints)

    def begins(self, fit: TrainState) -> str:
        """Returns in words which run this is, and from where it continues."""
        if self.resumed is None:
            return f"run {self.name}"
        return f"continues {self.name} from epoch {fit.epoch}, step {fit.step}"

    def begin(self, hydra_files: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Writes the first files of the run; before this nothing in the directory is touched.

        Of several processes the first writes; this holds for all that follows.

        Args:
            hydra_files: text of each file of `.hydra/`.
            facts: what is known of the run at its start, for the record.
        """
        if not self.record.writes:
            self.record.update(**self._facts(facts))
            return
        if self.resumed is None:
            patches = self.path.glob("git.*.patch")  # of later parts
            remove(*patches, *(self.path / name for name in _OWNED))
        for folder in (self.path, self.checkpoints):
            remove_temporary(folder)
        if self.parent is not None:
            self._keep_weights_of(self.parent)
            remove(self.path / MISTAKES, self.path / EXPORT)  # of the weights until now
        for key in ("error", "finished"):  # how the part before this one ended
            self.record.values.pop(key, None)
        # First of all, so that a killed run is known as one.
        self.record.update(**self._facts(facts), status="running")
        self.begun = True
        self.checkpoints.mkdir(exist_ok=True)
        (self.path / ".hydra").mkdir(exist_ok=True)
        for name, text in hydra_files.items():
            with atomic_write(self.path / ".hydra" / name) as file:
                file.write(text.encode())
        if self.config["git_patch"] and (facts.get("git") or {}).get("dirty"):
            write_patch(self.path, 1 + len(self.record.values.get("continued", [])))

    def _facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the record is to hold from now on of how the run began.

        Facts of a start are written once. A part that continues a run is noted in `continued`, with
        what differs from the start. More epochs of a completed run are a run of their own, but one
        that started from the same weights.
        """
        facts = {**facts, "started": utc_now()}
        if self.resumed is None:
            return facts
        if self.parent is not None:
            return {**facts, **{k: self.parent[k] for k in _OF_WEIGHTS if k in self.parent}}
        before = self.record.values
        kept = {key: before.get(key, value) for key, value in facts.items()}
        other = {k: v for k, v in facts.items() if v != kept[k] and k not in _OF_WEIGHTS}
        # The data may have moved: from now on they are looked for where they are.
        data_config = {**kept["config"]["data"], "root": facts["config"]["data"]["root"]}
        kept["config"] = {**kept["config"], "data": data_config}
        return {**kept, "continued": [*before.get("continued", []), other]}

    def _keep_weights_of(self, parent: Mapping[str, Any]) -> None:
        """Keeps a completed run's last checkpoint as `epoch-N.pt`: more epochs write over it.

        So with what its code had changed, as `git.epoch-N.patch`.
        """
        patch = self.path / record.PATCH
        if patch.is_file():
            patch.replace(self.path / f"git.epoch-{parent['config']['epochs']}.patch")
        kept = self.checkpoints / f"epoch-{parent['config']['epochs']}.pt"
        if not kept.exists():  # it may, where this was begun before and killed
            with atomic_write(kept) as file:
                file.write(checkpoint.newest(self.checkpoints).read_bytes())

    def keep_frozen(self, model: nn.Module) -> None:
        """Keeps what a fit does not change of a model, once, for checkpoints do not hold it."""
        if self.resumed is not None or not self.record.writes:
            return
        if frozen := network.save_frozen(model, self.checkpoints):
            self.record.update(frozen_sha256=weights.weights_sha256(frozen))

    def note_head(self, head: Mapping[str, Any] | None) -> None:
        """Notes the figures of a head that was fitted before the rest, if one was."""
        if head is not None:
            self.record.update(head=dict(head))

    def count_test_use(self) -> None:
        """Notes a use of the test set, before it is read."""
        uses = (self.record.values.get("test") or {}).get("evaluations", 0)
        self.record.update(test={"evaluations": uses + 1})

    def complete(
        self,
        fit: TrainState,
        fit_seconds: float,
        validation: Metrics | None,
        test: Metrics | None,
        total_seconds: float,
    ) -> None:
        """Writes what came out of the run, and that it is complete."""
        head, stopping = self.record.values.get("head"), fit.early_stopping
        if head and stopping.restore_best_weights and stopping.monitor.startswith("val_"):
            is_head = stopping.best == head.get(stopping.monitor.removeprefix("val_"))
            self.record.values["kept"] = "head" if is_head else "fine_tuned"
        self.record.update(
            fit_seconds=fit_seconds,
            total_seconds=total_seconds,
            peak_memory_bytes=devices.peak_memory_bytes(),
            peak_gpu_memory_bytes=devices.peak_gpu_memory_bytes(fit.device),
            **({"group": fit.group} if fit.group else {}),
            best_epoch=fit.best_epoch,
            epochs_done=len(fit.history),
            validation=asdict(validation) if validation else None,
            test={**asdict(test), **self.record.values["test"]}
            if test
            else self.record.values.get("test"),
            weights_sha256=weights.weights_sha256(fit.model.state_dict()),
            status="completed",
            finished=utc_now(),
        )


@contextlib.contextmanager
def claimed(path: Path, config: schema.Config) -> Iterator[Run]:
    """Claims a run directory for the body; of several processes the first does it for all.

    Raises:
        UserError: the directory is taken, in use, or no place for a run.
    """
    with contextlib.ExitStack() as stack:
        run = processes.from_main_process(
            lambda: stack.enter_context(_claimed(path.resolve(), config))
        )
        run.record.writes = processes.is_main_process()
        yield run


@contextlib.contextmanager
def _claimed(path: Path, config: schema.Config) -> Iterator[Run]:
    """Claims a run directory for the body; the record gets the status the body ends with.

    A directory of a completed run is refused unless `overwrite` is on; an unfinished run of the
    same configuration is continued; one of another configuration is refused. A process that died
    holds no claim.
    """
    _refuse_a_file(path)
    made = missing_folders(path)
    run = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locks.exclusive(path):
            try:
                run = _open(path, config)
                yield run
            except BaseException as error:
                if run is not None and run.begun:
                    interrupted = isinstance(error, KeyboardInterrupt)
                    _note_end(run, "interrupted" if interrupted else "failed", error)
                raise
            finally:
                if run is None or not run.begun:
                    (path / locks.NAME).unlink(missing_ok=True)
    finally:
        if run is None or not run.begun:
            remove_empty(made)


def _open(path: Path, config: schema.Config) -> Run:
    plain = schema.as_dict(config)
    fresh = Run(path, plain, None, Record(path, {}))
    if not (path / record.NAME).exists():
        foreign = sorted(
            p.name
            for p in path.iterdir()
            if p.name not in (locks.NAME, ".hydra") and not p.match(TEMPORARY)
        )
        if foreign:
            raise UserError(
                f"hydra.run.dir={path} holds other files ({', '.join(foreign[:3])}) and no run; "
                "choose a new or empty folder"
            )
        return fresh
    if config.overwrite:
        return fresh
    refuse_strange_below(path)  # the run will be written to, through any link in it
    old = record.read(path)
    before, now = schema.that_counts(old["config"]), schema.that_counts(plain)
    completed = old["status"] == "completed"
    if completed and not (config.resume == "auto" and _is_longer(now, before)):
        raise UserError(
            f"{path} holds a completed run; overwrite=true replaces it, a larger epochs continues "
            "it, hydra.run.dir=PATH chooses another folder"
        )
    if completed and depends_on_length(schedules.build(config.schedule)):
        raise UserError(
            f"{path} holds a completed run, and its schedule spans its {old['config']['epochs']} "
            "epochs: more of them would have had other learning rates from the start; start a new "
            "run with another hydra.run.dir, or overwrite=true"
        )
    if config.resume == "never":
        raise UserError(
            f"{path} holds an unfinished run; resume=auto continues it, overwrite=true replaces it"
        )
    if not completed and before != now:
        keys = ", ".join(schema.differing_keys(before, now))
        raise UserError(
            f"{path} holds an unfinished run of another configuration (differs in {keys}); "
            "use the same one to continue it, overwrite=true to replace it"
        )
    state = checkpoint.load_newest(path / "checkpoints")
    if not completed:
        return Run(path, plain, state, Record(path, old if state else {}))
    if state is None or state.get("stopped"):
        raise UserError(
            f"{path} holds a completed run that stopped early; more epochs would change nothing"
            if state
            else f"{path} holds a completed run without its checkpoint; overwrite=true replaces it"
        )
    parents = [*old.pop("parents", []), old]
    return Run(path, plain, state, Record(path, {"parents": parents}), parent=old)


def _is_longer(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Returns whether a configuration is an earlier one with more epochs."""
    is_same = {**now, "epochs": 0} == {**before, "epochs": 0}
    return is_same and (now["epochs"] or 0) > (before["epochs"] or 0)


def _note_end(run: Run, status: str, error: BaseException) -> None:
    text = one_line(error) or f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # the error itself reports a full disk
        run.record.update(status=status, error=text, finished=utc_now())


def _refuse_a_file(path: Path) -> None:
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f"hydra.run.dir={path}: {part} is a file, not a folder")
            if not os.access(part, os.W_OK | os.X_OK):
                raise UserError(f"hydra.run.dir={path}: {part} cannot be written to")
            return
