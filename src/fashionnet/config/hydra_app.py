"""Hydra's command line: reading it, running its jobs, and reporting its refusals in one line."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fashionnet.config import compose, schema
from fashionnet.config.source import RAISED, Source, shell
from fashionnet.errors import UserError, one_line, visible
from fashionnet.system import launchers, spelling, submitted, terminal
from fashionnet.system.files import refuse_strange, remove_empty

# What in an override or a file may set `hydra.mode`.
_MAY_SET_MODE = re.compile(r"hydra\.(mode|searchpath)|RUN\b|mode:\s*\d|searchpath:")
# The groups whose chosen options a record holds.
_GROUPS = ("model", "optimizer", "schedule", "augmentation", "data", "experiment")


@dataclass(frozen=True)
class Job:
    """One run, as Hydra asks for it.

    Attributes:
        run_dir: the run's directory.
        choices: the option chosen from each group of `conf/`.
        hydra_files: the files of `.hydra/`, name to text.
        is_of_sweep: whether it is one of many.
    """

    config: schema.Config
    run_dir: Path
    choices: dict[str, str]
    hydra_files: dict[str, str]
    is_of_sweep: bool


def described(checked: schema.Config, config: DictConfig, run_dir: Path) -> Job:
    """Returns the job of a composed configuration, with what Hydra knows of it."""
    hydra_config = HydraConfig.get()
    hydra_files = {
        "config.yaml": OmegaConf.to_yaml(config),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra_config})),
        "overrides.yaml": OmegaConf.to_yaml(hydra_config.overrides.task),
    }
    choices = {g: str(c) for g, c in hydra_config.runtime.choices.items() if g in _GROUPS and c}
    return Job(checked, run_dir, choices, hydra_files, hydra_config.mode == RunMode.MULTIRUN)


def run_job(config: DictConfig, run: Callable[[Job], float | None]) -> float | None:
    """Runs a job that Hydra composed; what Hydra's task function calls.

    Args:
        run: trains and returns the lowest validation loss.

    Raises:
        Exception: what `run` raised, so that the other jobs of a sweep go on.
    """
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    terminal.survive()  # here too, since a job of a sweep may be a process of its own
    try:
        if hydra_config.mode == RunMode.MULTIRUN:  # a folder that Hydra found may be a link
            sweep = Path(hydra_config.sweep.dir).absolute()
            if run_dir.is_relative_to(sweep) and ".." not in run_dir.parts:
                refuse_strange(run_dir, sweep)
        checked = compose.typed(config, hydra_config.overrides.task, _source())
        return run(described(checked, config, run_dir))
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        # Hydra made the folder before anything was checked.
        made = compose.MadeFolders.made
        remove_empty(made if run_dir in made else [run_dir])
        if hydra_config.mode == RunMode.RUN:
            raise compose.Refused from error
        # Hydra raises the first error of a sweep again at its end.
        overrides = " ".join(hydra_config.overrides.task)
        print(f"{submitted.FAILED}{overrides}: {line}", file=sys.stderr)
        raise


def run(task: Callable[[], object], summary: Callable[[Path, float], str]) -> None:
    """Runs Hydra's task, once or for each job of a sweep, as the command line asks.

    Args:
        task: a function decorated with `hydra.main`.
        summary: how the runs of a sweep ended, from its folder and the time of its start.

    Raises:
        UserError: what Hydra, a launcher or a job refused.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    # The profiler reports errors alone; torch reads this when it is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    compose.register()
    given = _read_options()
    try:
        with given.composed_once():
            _run_jobs(task, summary)
    except KeyboardInterrupt:
        compose.MadeFolders.take_back()
        raise
    except compose.Refused as refused:
        assert refused.__cause__ is not None
        raise refused.__cause__ from None
    except Exception as error:
        line = given.explained(error) if _is_of_composing(error) else submitted.explained(error)
        if line is None:
            raise
        compose.MadeFolders.take_back()
        raise UserError(line) from None
    if launchers.world_size() > 1:
        # The threads of a process group may abort the interpreter at its end.
        sys.stdout.flush()
        os._exit(0)


def _run_jobs(task: Callable[[], object], summary: Callable[[Path, float], str]) -> None:
    began, is_complete = time.time(), False
    try:
        task()
        is_complete = True
    finally:
        folder = compose.MadeFolders.sweep
        if folder and (text := summary(folder, began)):
            print(text)
            if not is_complete:
                named = visible(str(folder))
                print(f"the same command with hydra.sweep.dir={named} runs what is missing")


def _source() -> Source:
    """Returns where Hydra composed the job's configuration from."""
    runtime, name = HydraConfig.get().runtime, HydraConfig.get().job.config_name or "train"
    paths = {each.provider: Path(each.path) for each in runtime.config_sources if each.path}
    folders = [paths["command-line"]] if "command-line" in paths else []
    return Source(paths["main"], name, tuple(folders))


@dataclass(frozen=True)
class _Given:
    """What the command line says: overrides, and where they are composed from."""

    overrides: list[str]
    source: Source

    def explained(self, error: BaseException) -> str:
        return compose.explain(error, self.overrides, self.source)

    @contextlib.contextmanager
    def composed_once(self) -> Iterator[None]:
        """Keeps Hydra from composing all of it a first time, for its key `hydra.mode` alone.

        That is left to Hydra where an override or a file may set the key.
        """
        texts = [*self.overrides]
        with contextlib.suppress(*RAISED):
            texts += [path.read_text() for path, _group in self.source.files(self.overrides)]
        hydras = Hydra.get_mode
        if not (self.source.folders or any(_MAY_SET_MODE.search(text) for text in texts)):
            setattr(Hydra, hydras.__name__, lambda *args, **kwargs: None)
        try:
            yield
        finally:
            setattr(Hydra, hydras.__name__, hydras)


def _read_options() -> _Given:
    """Reads the command line, and refuses what Hydra's own parser would answer with its usage.

    Raises:
        UserError: an option that Hydra does not have, or overrides on both sides of one.
    """
    parser, words = get_args_parser(), sys.argv[1:]
    parser.exit_on_error = False
    options = [name for name in parser._option_string_actions if name.startswith("--")]
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("-") and len(name) > 3 and name not in options:
            meant = [each for each in options if spelling.is_same_word(name, each)]
            if meant:
                raise UserError(f"unknown option {name}; type {meant[0]}")
    try:
        given, unknown = parser.parse_known_args()
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see python -m fashionnet.train --help") from None
    folders = [] if given.config_dir is None else [Path(given.config_dir)]
    conf = compose.CONF / (given.config_path or "")
    source = Source(conf, given.config_name or "train", tuple(folders), given.multirun)
    if any(word.startswith("-") for word in unknown):
        typed = [word for word in words if word in (*given.overrides, *unknown)]
        text = _Given(typed, source).explained(UserError(f"unknown option {unknown[0]}"))
        way_out = "" if "; type " in text else "; see python -m fashionnet.train --help"
        raise UserError(f"{text}{way_out}")
    compose.refuse_long_numbers(given.overrides)
    if launchers.world_size() > 1 and given.multirun:
        raise UserError(
            "a sweep starts its runs itself and takes no processes from torchrun; "
            "start torchrun once a run, or the sweep without it"
        )
    for word in given.overrides:
        node = re.fullmatch(r"\+*hydra\.(launcher|sweeper)=(\w+)", word)
        if node:
            raise UserError(f"{word}: a group is chosen with /; type hydra/{node[1]}={node[2]}")
    if unknown:
        overrides = [*given.overrides, *unknown]
        first = [word for word in words if word not in overrides]
        raise UserError(
            f"{unknown[0]} stands apart from the other overrides; type {shell(*first, *overrides)}"
        )
    printing = ("help", "hydra_help", "cfg", "info", "shell_completion")
    if not any(getattr(given, option) for option in printing):
        terminal.survive()
    return _Given(given.overrides, source)


def _is_of_composing(error: BaseException) -> bool:
    """Returns whether Hydra refused the configuration, before any job."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    names = [
        f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"
        for frame, _line in traceback.walk_tb(error.__traceback__)
    ]
    if not isinstance(error, RAISED) or f"{__name__}.{run_job.__name__}" in names:
        return False
    # The last of them may lie in yaml or codecs; e.g. model=null, or --run with --cfg, in Hydra.
    return names[-1].startswith("hydra.") or any("hydra._internal.config" in n for n in names)
