"""The lesson, top to bottom: load, build, compile, summary, fit, evaluate once, predict one.

python -m fashionnet.train model=mlp seed=0
python -m fashionnet.train -m model=mlp,mlp_no_dropout 'seed=range(10)'
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from fashionnet.config import compose, hydra_app, schema
from fashionnet.config.hydra_app import Job
from fashionnet.errors import visible
from fashionnet.runs import jobs
from fashionnet.runs.jobs import Result
from fashionnet.system import command_line, signals
from fashionnet.system.command_line import reported

if TYPE_CHECKING:
    from fashionnet.data.examples import Dataset

log = logging.getLogger("fashionnet.train")  # __name__ is __main__ under `python -m`


def lesson(  # noqa: PLR0915  (the lesson, top to bottom)
    config: schema.Config,
    run_dir: Path,
    choices: Mapping[str, str] | None = None,
    hydra_files: Mapping[str, str] | None = None,
    dataset: Dataset | None = None,
    brief: bool = False,
    plan: Mapping[str, int] | None = None,
) -> Result:
    """Trains, evaluates and records one run; each step names the Keras line that it mirrors.

    Args:
        config: the checked configuration.
        run_dir: the run's own directory; an unfinished run in it is continued.
        choices: the option chosen from each group of `conf/`, for the record.
        hydra_files: what goes into `.hydra/`, name to text.
        dataset: the data set of the configuration, where it is loaded already.
        brief: whether the console is spared what `train.log` keeps in any case, as one run of many.
        plan: how many steps a run took that fitted into a time, to repeat it.

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
        budget,
        captured,
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

    began = command_line.job_began()
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
        step_gradients = gradients.choose(config.gradients, model, minimized)

        stopping = early_stopping.EarlyStopping(**run.config["early_stopping"])
        fit = state.TrainState(
            *(model, optimizer, step_gradients, stopping, seed, config.batch_size, scale),
            schedule=rates,
            augment=augment,
        )
        if config.budget_seconds is not None:
            num_tested = dataset.num_test if config.evaluate_test else 0
            fit.budget = budget.Budget(config.budget_seconds, began, num_tested, plan)
        fit.steps = captured.choose(fit)
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
            parts = train, validation
            with (
                stop.deferred(),
                profiling.observed(config.debug.anomaly, trace, device),
                tracking.tracked(run, fit, config, stop, table, parts, classes) as tracker,
            ):
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
    job = hydra_app.described(checked, config, Path(run_dir or composed.hydra.run.dir))
    return _lesson_of(job, dataset)


def _lesson_of(job: Job, dataset: Dataset | None = None) -> Result:
    return lesson(
        job.config, job.run_dir, job.choices, job.hydra_files, dataset, brief=job.is_of_sweep
    )


@hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="train")
def task(config: DictConfig) -> float | None:
    """Hydra's task: one run; returns the lowest validation loss to a sweeper."""
    return hydra_app.run_job(config, lambda job: jobs.run(job, _lesson_of))


@reported()
def main() -> None:
    """The command: `python -m fashionnet.train`."""
    hydra_app.run(task, jobs.sweep_summary)


if __name__ == "__main__":
    main()
