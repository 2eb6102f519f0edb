"""Composing a configuration with Hydra, as the command line does, and explaining refusals."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fashionnet.config import refusals, schema
from fashionnet.config.schema import Config
from fashionnet.config.source import RAISED, Source
from fashionnet.errors import UserError, interruption, shortened
from fashionnet.system import launchers, spelling, submitted
from fashionnet.system.files import (
    missing_folders,
    refuse_strange,
    refuse_strange_below,
    remove,
    remove_empty,
)

_HERE = Path(__file__).resolve().parents[1]
# A wheel carries conf/ inside the package; a checkout has it at the top.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parents[1] / "conf"
_LONG_NUMBER = re.compile(r"[\d_]{300,}")  # of fewer digits any number is a float
_DEVICE = re.compile(r"auto|cpu|(cuda|mps)(:\d+)?")


@cache
def register() -> None:
    """Registers the schema and the resolvers of `conf/` with Hydra, once."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver(
        "unique", lambda: uuid.uuid4().hex[:6], use_cache=True, replace=True
    )
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("if_equal", if_equal, replace=True)


class Refused(BaseException):
    """Carries a user error past Hydra, which would print its own lines about it or continue."""


@contextlib.contextmanager
def _past_hydra() -> Iterator[None]:
    """Lets a callback refuse; Hydra would turn its errors into warnings and continue."""
    try:
        yield
    except UserError as error:
        raise Refused from error


class MadeFolders(Callback):
    """Records the folders that Hydra is about to make, to remove them if the run is refused."""

    made: ClassVar[list[Path]] = []
    sweep: ClassVar[Path | None] = None  # the folder of the sweep under way

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it makes the run's folder."""
        HydraConfig.instance().set_config(config)  # the folder's name refers to it
        with contextlib.suppress(InterpolationResolutionError):  # Hydra will meet and raise it
            run_dir = Path(config.hydra.run.dir).absolute()
            with _past_hydra():
                MadeFolders.made = missing_folders(run_dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it makes the sweep's folder."""
        HydraConfig.instance().set_config(config)
        folder = Path(config.hydra.sweep.dir)
        with _past_hydra():
            _refuse_strange_sweep(folder)
            MadeFolders.made = missing_folders(folder.absolute())
        MadeFolders.sweep = folder

    @classmethod
    def take_back(cls) -> None:
        """Removes the folders of a run or sweep that was refused before it began."""
        if cls.made:
            with contextlib.suppress(OSError):
                whole, top = cls.made[0], set(os.listdir(cls.made[0]))
                # What was to be submitted lies there; a job that was has a folder of its own.
                if top <= {"multirun.yaml", submitted.FOLDER} and not any(
                    part.is_dir() for part in (whole / submitted.FOLDER).glob("*")
                ):
                    (whole / "multirun.yaml").unlink()
                    remove(whole / submitted.FOLDER)
            remove_empty(cls.made)


def _refuse_strange_sweep(folder: Path) -> None:
    """Refuses a sweep's folder through which Hydra and submitit would write elsewhere."""
    for name in ("multirun.yaml", submitted.FOLDER):
        refuse_strange(folder / name, folder)
    refuse_strange_below(folder / submitted.FOLDER)
    with contextlib.suppress(FileNotFoundError):
        plan = folder / "multirun.yaml"
        if plan.is_symlink() or plan.lstat().st_nlink > 1:  # Hydra would write through it
            plan.unlink()


def run_name(seed: int) -> str:
    """Returns a name for a run's folder: the time, the seed and something unique.

    The processes of a job, and its restarts, share it: there it is the job's id.

    Raises:
        UserError: several processes of a job without an id.
    """
    if launchers.world_size() == 1:
        now, number = datetime.now(), str(seed)[:20]  # one beyond its range is refused later on
        return f"{now:%Y-%m-%d_%H-%M-%S}_seed{number}_{uuid.uuid4().hex[:6]}"
    job = launchers.job_id()
    if job is None:
        raise UserError(
            "several processes need one run directory: give hydra.run.dir=PATH, or start them with "
            "torchrun --standalone or torchrun --rdzv-id=ID"
        )
    return f"seed{str(seed)[:20]}_{folder_name(job)}"


def if_equal(value: Any, other: Any, then: Any, otherwise: Any) -> Any:
    """Returns `then` if two values are equal, else `otherwise`; for keys that depend on another."""
    return then if value == other else otherwise


def folder_name(text: str) -> str:
    """Returns `text` as the name of a folder: no separators, at most 150 characters."""
    name = "".join(c if c.isalnum() or c in "=,.+-_[]" else "_" for c in text) or "default"
    name = "_" * len(name) if name in (".", "..") else name
    if len(name) <= 150:
        return name
    return f"{name[:130]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def typed(
    config: DictConfig, overrides: Sequence[str] = (), source: Source | None = None
) -> Config:
    """Returns the resolved, checked configuration of a composed one.

    Args:
        overrides: the overrides it was composed from, for suggestions.
        source: where it was composed from; None for `conf/`.

    Raises:
        UserError: a value out of its range, or two that do not go together.
    """
    for text in overrides:
        if text.startswith("~") and text[1:].partition("=")[0] in Config.__dataclass_fields__:
            raise UserError(f"{text}: a key cannot be removed; leave it out to have its default")
    try:
        checked = _checked(config)
    except (UserError, OmegaConfBaseException, OverflowError) as error:
        raise UserError(explain(error, overrides, source)) from None
    if checked.steps is not None or checked.budget_seconds is not None:
        _refuse_two_lengths(checked, overrides)
        checked.epochs = None
    return checked


def _refuse_two_lengths(config: Config, overrides: Sequence[str]) -> None:
    """Refuses more than one length of a training; the default of `epochs` gives way to others."""
    is_given = any(text.lstrip("+").startswith("epochs=") for text in overrides)
    lengths = {key: getattr(config, key) for key in ("epochs", "steps", "budget_seconds")}
    if config.epochs == schema.EPOCHS and not is_given:
        del lengths["epochs"]
    given = [f"{key}={value:g}" for key, value in lengths.items() if value is not None]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given[:2])} are two lengths of one training; leave one out, or set it "
            "to null"
        )


def _checked(config: DictConfig) -> Config:
    checked = OmegaConf.to_object(config)
    assert isinstance(checked, Config)
    _refuse_unknown(checked)
    if not _DEVICE.fullmatch(checked.device):
        raise UserError(
            f"device={checked.device} is not known; choose auto, cpu, cuda, cuda:1, mps"
        )
    schema.check(checked, launchers.world_size())
    return checked


def _refuse_unknown(node: Any, prefix: str = "") -> None:
    """Refuses keys that the schema does not have; Hydra's `+key=value` adds any."""
    known = [item.name for item in fields(node)]
    for key, value in vars(node).items():
        if key not in known:
            near = spelling.closest(key, known)
            raise UserError(f"unknown key {prefix}{key}{near}; known here: {', '.join(known)}")
        if is_dataclass(value):
            _refuse_unknown(value, f"{prefix}{key}.")


def compose(*overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """Composes a configuration from overrides, as the command line does, without running it.

    Raises:
        UserError: an override that Hydra refuses.
    """
    refuse_long_numbers(overrides)
    register()
    source = Source(CONF)
    try:
        return (source.compose_anew if return_hydra_config else source.compose)(overrides)
    except RAISED as error:
        raise UserError(explain(error, overrides, source)) from None


def refuse_long_numbers(overrides: Iterable[str]) -> None:
    """Refuses overrides with numbers of more digits than Python and OmegaConf read.

    Raises:
        UserError: with the key of the first.
    """
    for override in overrides:
        if long := _LONG_NUMBER.search(override):
            key = shortened(override.partition("=")[0])
            raise UserError(f"{key} has a number of {len(long[0])} digits; give a smaller one")


def check_search(*overrides: str) -> None:
    """Refuses overrides, also with several values, as single values would be refused.

    Raises:
        UserError: with the override as typed, and what to type instead.
    """
    register()
    source = Source(CONF, is_sweep=True)
    try:
        refusals.accept(source, overrides, _checked)
    except RAISED as error:
        raise UserError(explain(error, overrides, source)) from None


def explain(
    error: BaseException, overrides: Sequence[str] = (), source: Source | None = None
) -> str:
    """Returns one line for a refused configuration, with what to type instead where that is known.

    Args:
        overrides: as they were typed.
        source: where the configuration is composed from; None for `conf/`.

    Raises:
        KeyboardInterrupt: Hydra failed because it was interrupted.
    """
    if (interrupted := interruption(error)) is not None:
        raise interrupted
    register()
    return refusals.explain(error, source or Source(CONF), overrides, _checked)
