"""The lesson, top to bottom: load, build, compile, summary, fit, evaluate once, predict one.

python -m fashionnet.train model=mlp seed=0
python -m fashionnet.train -m model=mlp,mlp_no_dropout 'seed=range(10)'
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from fashionnet.config import compose, refusals, schema
from fashionnet.errors import UserError, one_line, visible
from fashionnet.system import launchers, signals, spelling, submitted, terminal
from fashionnet.system.command_line import reported
from fashionnet.system.files import as_typed, refuse_strange, remove_empty

if TYPE_CHECKING:
    from fashionnet.data.examples import Dataset

log = logging.getLogger("fashionnet.train")  # __name__ is __main__ under `python -m`


@dataclass(frozen=True)
class Result:
    """What a run leaves: its directory, its record (`run.json`) and Keras' history."""

    run_dir: Path
    record: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def best_val_loss(self) -> float | None:
        """The lowest validation loss, what a sweeper minimises; None without a validation set."""
        return min((row["val_loss"] for row in self.history if "val_loss" in row), default=None)


def lesson(  # noqa: PLR0915  (the lesson, top to bottom)
    config: schema.Config,
    run_dir: Path,
    choices: Mapping[str, str] | None = None,
    hydra_files: Mapping[str, str] | None = None,
    dataset: Dataset | None = None,
    brief: bool = False,
) -> Result:
    """Trains, evaluates and records one run; each step names the Keras line that it mirrors.

    Args:
        config: the checked configuration.
        run_dir: the run's own directory; an unfinished run in it is continued.
        choices: the option chosen from each group of `conf/`, for the record.
        hydra_files: what goes into `.hydra/`, name to text.
        dataset: the data set of the configuration, where it is loaded already.
        brief: whether the console is spared what `train.log` keeps in any case, as one run of many.

    Raises:
        UserError: wrong input, a directory that is taken, data that changed, or a loss that is no
            number.
    """
    # torch takes a second to import; --help, --cfg and tab completion come without it.
    from fashionnet import data as datasets, models
    from fashionnet.models.summary import summary
    from fashionnet.runs import directory, facts, network, pretrained, tracking
    from fashionnet.system import devices, processes
    from fashionnet.training import (
        augmentation,
        dry_run,
        early_stopping,
        evaluation,
        features,
        gradients,
        heads,
        loop,
        objective,
        optim,
        profiling,
        schedule,
        state,
    )

    began = time.perf_counter()
    with (
        tracking.console(brief),
        signals.watched() as stop,
        processes.joined(config.device, config.distributed.timeout_seconds) as own_device,
        devices.started(
            own_device, config.threads, config.deterministic, config.tf32, config.precision
        ) as device,
        directory.claimed(run_dir, config) as run,
        processes.lost_processes_reported(),
    ):
        # keras: (X_train, y_train), (X_test, y_test) = keras.datasets.fashion_mnist.load_data()
        if dataset is None:
            dataset = datasets.load(config.data, network.photo_size(config.model, run.before))

        # keras: X_train = X_train / 255.0
        scale = config.data.scale  # pixels stay bytes in memory and are divided as they are used

        # keras: model = keras.Sequential([
        seed, classes = config.seed, dataset.class_names
        node = network.with_input(config.model, run.before)
        model = models.build(node, dataset.image_shape, len(classes), seed)
        if run.resumed is None:
            pretrained.load_pretrained(model)
        model.to(device)

        # keras: validation_split=0.1
        train, validation = dataset.split(config.validation_split, config.data.limit)

        # keras: model.compile(optimizer="adam", loss="sparse_categorical_crossentropy",
        heads.check(model, config.fine_tuning)
        optimizer = optim.build(config.optimizer, model, config.fine_tuning.backbone_lr)
        rates = schedule.build(config.schedule)
        minimized = objective.build(config, model, train.labels, len(classes))
        augment = augmentation.build(config.augmentation, model, seed)
        step_gradients = gradients.choose(
            config.gradients, model, minimized, schema.mixes(config.augmentation)
        )

        stopping = early_stopping.EarlyStopping(**run.config["early_stopping"])
        fit = state.TrainState(
            *(model, optimizer, step_gradients, stopping, seed, config.batch_size, scale),
            schedule=rates,
            augment=augment,
        )
        dry_run.check(fit, train, len(classes))
        described = datasets.describe(dataset, config.validation_split, config.data.limit)
        started = facts.at_start(config, choices or {}, described, model)
        run.restore(fit, described)
        run.begin(hydra_files or {}, started)
        run.keep_frozen(model)

        with tracking.log_file(run):
            log.info("device %s, seed %d, %s", processes.describe(device), seed, run.begins(fit))
            datasets.warn_of_absent_classes(classes, train, validation)

            # keras: model.summary()
            table = summary(model, dataset.image_shape)
            log.info(table, extra=tracking.DETAIL)

            # keras: history = model.fit(X_train, y_train, epochs=5, batch_size=32,
            profiled = config.debug.profile and processes.is_main_process()
            trace = run.path / directory.TRACE if profiled else None
            with (
                stop.deferred(),
                profiling.observed(config.debug.anomaly, trace, device),
                tracking.tracked(run, fit, config, stop) as tracker,
            ):
                tracker.introduce(table, train, classes, len(validation))
                # Of a frozen backbone the features, computed once; else the pictures themselves.
                with processes.signals_raise(stop):
                    train, validation = (
                        features.inputs(model, part.to(device), scale)
                        for part in (train, validation)
                    )
                run.note_head(heads.fit_first(fit, train, validation, config.fine_tuning, stop))
                loop.fit(fit, train, validation, config.epochs, tracker, config.steps)
            fit_seconds = fit.fit_seconds()
            held_out = evaluation.evaluate(model, validation, scale) if len(validation) else None

            # keras: test_loss, test_acc = model.evaluate(X_test, y_test)
            tested, shown = None, validation if len(validation) else train
            if config.evaluate_test:
                run.count_test_use()
                shown = features.inputs(model, dataset.open_test().to(device), scale)
                tested = evaluation.evaluate(model, shown, scale)
                # keras: print(f"test accuracy: {test_acc:.2%}")
                log.info("test accuracy: %.2f%%  (loss %.4f)", 100 * tested.accuracy, tested.loss)

            # keras: probs = model.predict(X_test[:1])
            probs = evaluation.probabilities(model, shown.images[:1], scale)[0]
            # keras: print("class probabilities:", np.round(probs[0], 2))
            log.info("class probabilities: %s", _named(probs.tolist(), classes))
            # keras: print("best guess:", probs[0].argmax())
            guess, truth = int(probs.argmax()), int(shown.labels[0])
            log.info("best guess: %d, %s (it is: %s)", guess, classes[guess], classes[truth])

            run.complete(fit, fit_seconds, held_out, tested, time.perf_counter() - began)
    return Result(run.path, run.record.values, fit.history)


def _named(probs: list[float], classes: tuple[str, ...]) -> str:
    pairs = zip(classes, probs, strict=True)
    return ", ".join(f"{visible(name)} {p:.2f}" for name, p in pairs)


def train(
    *overrides: str, run_dir: str | Path | None = None, dataset: Dataset | None = None
) -> Result:
    """Trains one run from overrides, as the command does; for notebooks and scripts.

    Args:
        *overrides: what one would type, e.g. "model=mlp", "epochs=1".
        run_dir: the run's directory; None takes the command's default below `outputs/`.
        dataset: the data set that these name, where it is loaded already.

    Raises:
        UserError: as `lesson`, or an override that Hydra refuses.
    """
    composed = compose.compose(*overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    config = copy.deepcopy(composed)
    with read_write(config), open_dict(config):
        del config["hydra"]  # as Hydra does before it calls a job
    checked = compose.typed(config, overrides)
    return _run(checked, config, Path(run_dir or composed.hydra.run.dir), dataset)


def _run(
    checked: schema.Config, config: DictConfig, run_dir: Path, dataset: Dataset | None = None
) -> Result:
    """Runs a composed configuration, with what Hydra knows of it for `.hydra/`."""
    hydra_config = HydraConfig.get()
    hydra_files = {
        "config.yaml": OmegaConf.to_yaml(config),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra_config})),
        "overrides.yaml": OmegaConf.to_yaml(hydra_config.overrides.task),
    }
    groups = ("model", "optimizer", "schedule", "augmentation", "data", "experiment")
    choices = {g: str(c) for g, c in hydra_config.runtime.choices.items() if g in groups and c}
    brief = hydra_config.mode == RunMode.MULTIRUN
    return lesson(checked, run_dir, choices, hydra_files, dataset, brief)


def _run_alone(checked: schema.Config, config: DictConfig, run_dir: Path) -> Result:
    """Runs a single run, and prints what one may want to run next, or what continues it."""
    from fashionnet.runs import next_commands, record

    try:
        result = _run(checked, config, run_dir)
    except KeyboardInterrupt:
        if launchers.rank() == 0 and (run_dir / record.NAME).exists():
            print(f"continue with: {next_commands.continuing(run_dir, checked)}")
        raise
    if launchers.rank() == 0:
        advice = [f"  {line}" for line in next_commands.after(run_dir, result.record)]
        print(f"run: {visible(as_typed(run_dir))}", "next:", *advice, sep="\n")
    return result


def _run_if_missing(checked: schema.Config, config: DictConfig, run_dir: Path) -> Result:
    """Runs a job that may have been run before, or returns what came of it where it completed."""
    from fashionnet.runs import saved

    if checked.overwrite or not saved.is_complete(run_dir, checked):
        return _run(checked, config, run_dir)
    before = saved.read(run_dir)
    _check_photos(checked, before.record, run_dir)
    print(f"completed before: {visible(as_typed(run_dir))}")
    return Result(run_dir, before.record, before.history)


def _check_photos(checked: schema.Config, record: Mapping[str, Any], run_dir: Path) -> None:
    """Refuses a completed run where the photos changed since: other jobs would train on others."""
    from fashionnet import data as datasets

    if checked.data.name == "photos":
        dataset = datasets.load(checked.data, record["data"]["image_shape"][-1])
        now = datasets.describe(dataset, checked.validation_split, checked.data.limit)
        if changed := datasets.difference(record["data"], now):
            raise datasets.OtherData(
                f"{as_typed(run_dir)} was trained on other data: {changed}; put these back as they "
                "were, or train anew with overwrite=true or another hydra.sweep.dir"
            )


def _sweep_summary(folder: Path, since: float) -> str:
    """Returns how the runs of a sweep ended, with a line for each that is not complete.

    Nothing of a sweep of which no run began.

    Args:
        since: when the sweep began, in seconds since 1970.
    """
    from fashionnet.runs import record, saved

    found = [(path, record.read(path)) for path in saved.find(folder)]
    counts = Counter(str(values["status"]) for _, values in found)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    lines = [
        f"  {values['status']}: {visible(path.name)}: {visible(str(values.get('error', '')))}"
        for path, values in found
        if values["status"] != "completed"
    ]
    errors = tuple(str(values["error"]) for _, values in found if values.get("error"))
    refused = [line for line in submitted.failures(folder, since) if not line.endswith(errors)]
    lines += [f"  failed: {visible(line)}" for line in refused]  # of these no folder is left
    head = f"sweep {visible(as_typed(folder))}: {told or 'no run'}"
    return "\n".join([head, *lines]) if told or lines else ""


@hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="train")
def job(config: DictConfig) -> float | None:
    """Hydra's task: one run; returns the lowest validation loss to a sweeper."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    # A job that is started again may have been killed after its last word.
    is_first = hydra_config.mode == RunMode.RUN and not launchers.is_restarted()
    run = _run_alone if is_first else _run_if_missing
    terminal.survive()  # here too, for a job of a sweep may be a process of its own
    try:
        if hydra_config.mode == RunMode.MULTIRUN:  # a folder that Hydra found may be a link
            _refuse_elsewhere(run_dir, Path(hydra_config.sweep.dir).absolute())
        checked = compose.typed(config, hydra_config.overrides.task, _source())
        return run(checked, config, run_dir).best_val_loss
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        # Hydra made the folder before anything was checked.
        made = compose.MadeFolders.made
        remove_empty(made if run_dir in made else [run_dir])
        if hydra_config.mode == RunMode.RUN:
            raise compose.Refused from error
        # The other jobs of a sweep go on; Hydra raises the first error again at the end.
        overrides = " ".join(hydra_config.overrides.task)
        print(f"{submitted.FAILED}{overrides}: {line}", file=sys.stderr)
        raise


def _refuse_elsewhere(run_dir: Path, sweep: Path) -> None:
    """Refuses a job's folder in a sweep's own from which a link leads out of it."""
    if run_dir.is_relative_to(sweep) and ".." not in run_dir.parts:
        refuse_strange(run_dir, sweep)


def _source() -> refusals.Source:
    """Returns where Hydra composed the job's configuration from."""
    runtime, name = HydraConfig.get().runtime, HydraConfig.get().job.config_name or "train"
    paths = {each.provider: Path(each.path) for each in runtime.config_sources if each.path}
    folders = [paths["command-line"]] if "command-line" in paths else []
    return refusals.Source(paths["main"], name, tuple(folders))


@dataclass(frozen=True)
class _Given:
    """What the command line says: overrides, and where they are composed from."""

    overrides: list[str]
    source: refusals.Source

    def explained(self, error: BaseException) -> str:
        return compose.explain(error, self.overrides, self.source)


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
    source = refusals.Source(conf, given.config_name or "train", tuple(folders), given.multirun)
    if any(word.startswith("-") for word in unknown):
        typed = [word for word in words if word in (*given.overrides, *unknown)]
        told = _Given(typed, source).explained(UserError(f"unknown option {unknown[0]}"))
        way_out = "" if "; type " in told else "; see python -m fashionnet.train --help"
        raise UserError(f"{told}{way_out}")
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
            f"{unknown[0]} stands apart from the other overrides; "
            f"type {refusals.shell(*first, *overrides)}"
        )
    printing = ("help", "hydra_help", "cfg", "info", "shell_completion")
    if not any(getattr(given, option) for option in printing):
        terminal.survive()
    return _Given(given.overrides, source)


def _run_jobs() -> None:
    """Runs the job or the sweep that the command line asks for; a sweep ends with a summary."""
    began = time.time()
    try:
        job()
    except BaseException:
        _tell_sweep(began, is_whole=False)
        raise
    _tell_sweep(began, is_whole=True)


def _tell_sweep(began: float, is_whole: bool) -> None:
    folder = compose.MadeFolders.sweep
    told = folder and _sweep_summary(folder, began)
    if told:
        print(told)
        if not is_whole:
            named = visible(str(folder))
            print(f"the same command with hydra.sweep.dir={named} runs what is missing")


@reported()
def main() -> None:
    """The command: `python -m fashionnet.train`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them
    # Nothing but errors of the profiler, which reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    compose.register()
    given = _read_options()
    try:
        _run_jobs()
    except KeyboardInterrupt:
        compose.MadeFolders.take_back()
        raise
    except compose.Refused as refused:
        assert refused.__cause__ is not None
        raise refused.__cause__ from None
    except Exception as error:
        if _is_of_composing(error):
            told: str | None = given.explained(error)
        else:
            told = submitted.explained(error)
        if told is None:
            raise
        compose.MadeFolders.take_back()
        raise UserError(told) from None
    if launchers.world_size() > 1:
        # The threads of a group that was left may abort the interpreter's end.
        sys.stdout.flush()
        os._exit(0)


def _is_of_composing(error: BaseException) -> bool:
    """Returns whether Hydra refused the configuration, before any job."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    names = [
        f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"
        for frame, _line in traceback.walk_tb(error.__traceback__)
    ]
    if not isinstance(error, refusals.RAISED) or f"{__name__}.{job.__name__}" in names:
        return False
    # The last of them may lie in yaml or codecs; e.g. model=null, or --run with --cfg, in Hydra.
    return names[-1].startswith("hydra.") or any("hydra._internal.config" in n for n in names)


if __name__ == "__main__":
    main()
