"""What a run tells: history file, TensorBoard curves, checkpoints, lines, and its log."""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fashionnet.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    as_dict,
)
from fashionnet.data.examples import Examples
from fashionnet.models import mlp
from fashionnet.models.weights import weights_sha256
from fashionnet.runs import checkpoint, tensorboard, tiles, tracking
from fashionnet.runs.directory import Run
from fashionnet.runs.record import Record
from fashionnet.runs.tracking import Tracker, epoch_line
from fashionnet.system import seeds
from fashionnet.training import loop
from fashionnet.training.by_hand import ByHand
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.metrics import Metrics
from fashionnet.training.optim import Adam
from fashionnet.training.state import TrainState

ROWS: list[dict[str, Any]] = [
    {
        "epoch": epoch,
        "loss": 1 / epoch / 3,
        "accuracy": 0.5 + epoch / 100,
        "val_loss": 2 / epoch / 3,
        "val_accuracy": 0.4 + epoch / 100,
        "lr": 0.001,
        "epoch_seconds": 1.234567,
    }
    for epoch in (1, 2, 3)
]
EVERY_STEP, NEVER = CheckpointConfig(1e-9), CheckpointConfig(float("inf"))


@pytest.fixture(autouse=True, scope="module")
def _small_and_on_one_thread() -> Iterator[None]:
    """Gives an epoch of a few steps several looks; threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_CHUNK_BATCHES", 2)
        patch.setattr("fashionnet.training.steps._SECONDS_BETWEEN_LOOKS", 0.0)
        # TensorBoard reads its files without TensorFlow, which takes seconds to import.
        patch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))
        yield
    torch.set_num_threads(before)


def some_examples(num: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 2, 3), dtype=torch.uint8, generator=generator)
    return Examples(images, images.flatten(1)[:, :4].long().argmax(1))


TRAIN, HELD_OUT = some_examples(22), some_examples(9, seed=1)


def a_config(**changes: Any) -> Config:
    return Config(
        model={"_target_": "fashionnet.models.mlp.MLP"},
        optimizer={"_target_": "fashionnet.training.optim.Adam"},
        data=DataConfig("fashion_mnist"),
        **{"epochs": 3, "checkpoint": NEVER, **changes},
    )


def a_run(path: Path) -> Run:
    return Run(path, as_dict(a_config()), None, Record(path, {}))


def a_fit(stopping: EarlyStopping | None = None) -> TrainState:
    seeds.seed_everything(0)
    model = mlp.MLP(6, 0.3, (2, 3), 4)
    optimizer = Adam(model.parameters(), lr=0.02)
    return TrainState(model, optimizer, ByHand(model), stopping or EarlyStopping(), 0, 4, 255.0)


def tracked(
    path: Path, fit: TrainState, config: Config, held_out: Examples = HELD_OUT
) -> TrainState:
    with Tracker(a_run(path), fit, config) as tracker:
        loop.fit(fit, TRAIN, held_out, config.epochs, tracker)
    return fit


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def curves_of(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns steps and values by tag, as TensorBoard reads a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    event_files = EventAccumulator(str(path))
    event_files.Reload()
    return {
        tag: [(event.step, event.value) for event in event_files.Scalars(tag)]
        for tag in event_files.Tags()["scalars"]
    }


def expected_curve(rows: list[dict[str, Any]], key: str) -> list[tuple[int, Any]]:
    return [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in rows]


# ---------------------------------------------------------------------------------- history


def test_history_has_a_line_an_epoch_in_full_precision(tmp_path: Path) -> None:
    fit = tracked(tmp_path, a_fit(), a_config())
    assert rows_of(tmp_path) == fit.history
    assert [row["epoch"] for row in fit.history] == [1, 2, 3]
    keys = ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "lr", "epoch_seconds"]
    assert all(list(row) == keys for row in rows_of(tmp_path))


def test_history_without_validation(tmp_path: Path) -> None:
    fit = tracked(tmp_path, a_fit(), a_config(), some_examples(0))
    assert rows_of(tmp_path) == fit.history
    assert not any(key.startswith("val_") for row in fit.history for key in row)
    assert not (tmp_path / "tensorboard/validation").exists()


def test_each_epochs_line_is_there_at_once(tmp_path: Path) -> None:
    fit = a_fit()
    with Tracker(a_run(tmp_path), fit, a_config()) as tracker:
        for row in ROWS:
            fit.history.append(row)
            tracker.epoch_ended(fit, row)
            assert rows_of(tmp_path) == fit.history
            steps = [step for step, _ in curves_of(tmp_path / "tensorboard/train")["epoch_loss"]]
            assert steps == [row["epoch"] for row in fit.history]


# ------------------------------------------------------------------------------- TensorBoard


def test_curves_of_train_and_validation_have_the_same_tags(tmp_path: Path) -> None:
    fit = tracked(tmp_path, a_fit(), a_config())
    train = curves_of(tmp_path / "tensorboard/train")
    validation = curves_of(tmp_path / "tensorboard/validation")
    for tag, key in (("epoch_loss", "loss"), ("epoch_accuracy", "accuracy")):
        assert train[tag] == expected_curve(fit.history, key)
        assert validation[tag] == expected_curve(fit.history, f"val_{key}")
    assert train["learning_rate"] == expected_curve(fit.history, "lr")
    assert set(validation) == {"epoch_loss", "epoch_accuracy"}


def test_a_resumed_run_has_one_history_and_one_curve(tmp_path: Path) -> None:
    tracked(tmp_path, a_fit(), a_config(epochs=2))
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"epoch": 3, "loss"')  # an epoch that was cut short
    # Killed while it wrote the second epoch: the checkpoint has but one.
    resumed = a_fit()
    state = checkpoint.load(tmp_path / "checkpoints/previous.pt")
    assert len(state["history"]) == 1
    resumed.load_state_dict(state)
    tracked(tmp_path, resumed, a_config())
    assert rows_of(tmp_path) == resumed.history
    assert resumed.history[0] == state["history"][0]
    for split, prefix in (("train", ""), ("validation", "val_")):
        folder = tmp_path / "tensorboard" / split
        assert len(list(folder.iterdir())) == 1
        curve = curves_of(folder)["epoch_loss"]
        assert curve == expected_curve(resumed.history, f"{prefix}loss")
        assert [step for step, _ in curve] == [1, 2, 3]


def introduced(path: Path, fit: TrainState, epochs: int) -> TrainState:
    config = a_config(epochs=epochs, checkpoint=EVERY_STEP)
    record = {"command": "the command", "config": as_dict(config), "config_hash": "c" * 64}
    run = Run(path, as_dict(config), None, Record(path, {**record, "choices": {"model": "mlp"}}))
    with Tracker(run, fit, config) as tracker:
        tracker.introduce("the summary", TRAIN, ("a", "b", "c", "d"), len(HELD_OUT))
        loop.fit(fit, TRAIN, HELD_OUT, epochs, tracker)
    return fit


def pictures_of(path: Path) -> list[tuple[str, int, bytes]]:
    return [
        (value.tag, event.step, value.image.encoded_image_string)
        for file in sorted((path / "tensorboard/train").iterdir())
        for event in tensorboard.read_events(file)
        for value in event.summary.value
        if value.HasField("image")
    ]


def test_a_run_is_introduced_with_texts_examples_and_its_first_weights(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = tiles.first_layer(a_fit().model, (2, 3))
    assert before is not None
    fit = introduced(tmp_path, a_fit(), 1)
    after = tiles.first_layer(fit.model, (2, 3))
    assert after is not None
    assert pictures_of(tmp_path) == [
        ("train/examples", 0, tiles.examples(TRAIN, ("a", "b", "c", "d"))),
        ("train/weights", 0, tiles.weights(before)),
        ("train/weights", 1, tiles.weights(after)),
    ]
    accumulator = EventAccumulator(str(tmp_path / "tensorboard/train"))
    accumulator.Reload()
    said = {
        tag: accumulator.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in accumulator.Tags()["tensors"]
    }
    assert "the command" in said["command"]
    assert "batch_size: 32" in said["config"]
    assert "the summary" in said["summary"]


def test_weights_of_a_few_epochs_and_of_the_last_are_shown(tmp_path: Path) -> None:
    introduced(tmp_path, a_fit(), 23)
    steps = [step for tag, step, _ in pictures_of(tmp_path) if tag == "train/weights"]
    assert steps == [0, 1, 2, 5, 10, 20, 23]


def test_a_resumed_run_has_the_pictures_of_one_that_never_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    introduced(whole, a_fit(), 3)

    class Interrupting(Tracker):
        def steps_taken(self, fit: TrainState, num_steps: int) -> None:
            super().steps_taken(fit, num_steps)
            if (fit.epoch, fit.step) in {(1, 2), (3, 2)}:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Tracker", Interrupting)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                introduced(parts, restored(parts), 3)
    introduced(parts, restored(parts), 3)
    assert pictures_of(parts) == pictures_of(whole)


def restored(path: Path) -> TrainState:
    fit = a_fit()
    state = checkpoint.load_newest(path / "checkpoints")
    if state is not None:
        fit.load_state_dict(state)
    return fit


# ------------------------------------------------------------------------------- checkpoints


def with_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Lets the epochs end with these validation losses."""
    scripted = iter(losses)
    monkeypatch.setattr(loop, "evaluate", lambda *_: Metrics(next(scripted), 0.5))


def stands(path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> list[tuple[Any, ...]]:
    """Returns name, epoch and step of each checkpoint that a fit writes."""
    saved = []
    save = checkpoint.save

    def note(state: Any, to: Path) -> None:
        saved.append((to.name, state["epoch"], state.get("step")))
        save(state, to)

    monkeypatch.setattr(checkpoint, "save", note)
    tracked(path, a_fit(), config)
    return saved


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Lets a checkpoint take so many seconds by the tracker's clock, and all else next to none."""
    save, now = checkpoint.save, 0.0

    def slow(state: Any, to: Path) -> None:
        nonlocal now
        save(state, to)
        now += seconds

    def clock() -> float:
        nonlocal now
        now += 1e-6
        return now

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(time, "monotonic", clock)


def test_a_checkpoint_at_every_epochs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_losses(monkeypatch, 1, 2)
    saved = stands(tmp_path, monkeypatch, a_config(epochs=2))
    assert saved == [("last.pt", 2, 0), ("last.pt", 3, 0), ("best.pt", 1, None)]


@pytest.mark.parametrize(("seconds", "expected"), [(20, [2, 5]), (0.05, [2, 3, 4, 5])])
def test_no_checkpoint_at_an_epochs_end_where_it_takes_longer_than_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: list[int]
) -> None:
    slowed(monkeypatch, seconds)
    saved = stands(tmp_path, monkeypatch, a_config(epochs=4))
    assert [stand[1] for stand in saved if stand[0] == "last.pt"] == expected


def test_a_slow_checkpoint_is_written_when_it_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, 20)
    saved = stands(tmp_path, monkeypatch, a_config(epochs=3, checkpoint=EVERY_STEP))
    assert (3, 0) in [stand[1:] for stand in saved]


def test_checkpoints_between_when_they_are_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = stands(tmp_path, monkeypatch, a_config(epochs=2, checkpoint=EVERY_STEP))
    expected = [(1, 2), (1, 4), (2, 0), (2, 2), (2, 4), (3, 0)]  # six steps an epoch
    assert [stand[1:] for stand in saved if stand[0] == "last.pt"] == expected


def test_best_holds_the_weights_of_the_lowest_validation_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tracked(tmp_path, a_fit(), a_config(epochs=2))
    with_losses(monkeypatch, 3, 1, 2, 1)
    tracked(tmp_path, a_fit(), a_config(epochs=4))
    best = checkpoint.load(tmp_path / "checkpoints/best.pt")
    assert (best["epoch"], best["val_loss"]) == (2, 1)
    ended = weights_sha256(second.model.state_dict())
    assert weights_sha256(best["model"]) == ended


@pytest.mark.parametrize("restore", [True, False])
def test_last_holds_the_weights_that_the_fit_ended_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restore: bool
) -> None:
    with_losses(monkeypatch, 3, 1, 2)
    fit = a_fit(EarlyStopping(restore_best_weights=restore))
    stopping = EarlyStoppingConfig(restore_best_weights=restore)
    tracked(tmp_path, fit, a_config(early_stopping=stopping))
    last = checkpoint.load(tmp_path / "checkpoints/last.pt")
    ended = weights_sha256(fit.model.state_dict())
    assert weights_sha256(last["model"]) == ended
    best = checkpoint.load(tmp_path / "checkpoints/best.pt")
    assert (weights_sha256(best["model"]) == ended) is restore


def test_an_interrupted_fit_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = tracked(tmp_path / "whole", a_fit(), a_config())

    class Interrupting(Tracker):
        def steps_taken(self, fit: TrainState, num_steps: int) -> None:
            super().steps_taken(fit, num_steps)
            if (fit.epoch, fit.step) == (2, 4):
                raise KeyboardInterrupt

    part, path = a_fit(), tmp_path / "part"
    path.mkdir()
    config = a_config(checkpoint=EVERY_STEP)
    with (
        pytest.raises(KeyboardInterrupt),
        Interrupting(a_run(path), part, config) as tracker,
    ):
        loop.fit(part, TRAIN, HELD_OUT, 3, tracker)
    assert checkpoint.load(path / "checkpoints/best.pt")["epoch"] == 1
    resumed = a_fit()
    state = checkpoint.load_newest(path / "checkpoints")
    assert state is not None and (state["epoch"], state["step"]) == (2, 4)
    resumed.load_state_dict(state)
    tracked(path, resumed, config)
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weights)
    for row, other in zip(rows_of(path), rows_of(tmp_path / "whole"), strict=True):
        assert {**row, "epoch_seconds": 0} == {**other, "epoch_seconds": 0}


def test_a_fit_that_fails_in_its_first_epoch_leaves_no_checkpoint(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Tracker(a_run(tmp_path), a_fit(), a_config()),
    ):
        raise ZeroDivisionError
    assert not (tmp_path / "checkpoints").exists()
    assert rows_of(tmp_path) == []


def test_tracking_does_not_change_the_fit(tmp_path: Path) -> None:
    silent = a_fit()
    loop.fit(silent, TRAIN, HELD_OUT, 3, loop.Watcher())
    fit = tracked(tmp_path, a_fit(), a_config(checkpoint=EVERY_STEP))
    for name, weights in silent.model.state_dict().items():
        assert torch.equal(fit.model.state_dict()[name], weights)


# ------------------------------------------------------------------------------------- lines


def test_epoch_line() -> None:
    assert epoch_line(ROWS[1], 5) == (
        "epoch 2/5  loss 0.1667  accuracy 0.5200  val_loss 0.3333  val_accuracy 0.4200  1.23 s"
    )
    short = {key: value for key, value in ROWS[1].items() if not key.startswith("val_")}
    assert epoch_line(short, 5) == "epoch 2/5  loss 0.1667  accuracy 0.5200  1.23 s"


def test_without_a_terminal_each_epoch_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking.console():
        fit = tracked(tmp_path, a_fit(), a_config())
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [epoch_line(row, 3) for row in fit.history]
    assert not printed.err


def test_a_terminal_gets_a_bar_that_goes_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(tracking, "_SECONDS_BETWEEN_REFRESHES", 0)
    with tracking.console():
        fit = tracked(tmp_path, a_fit(), a_config())
    printed = capsys.readouterr().out
    assert "epoch 1/3:" in printed and "/6 [" in printed
    for row in fit.history:
        # Each line begins on a row that the bar has left blank.
        assert f"\r{epoch_line(row, 3)}\n" in printed.replace(" \r", "\r")


# --------------------------------------------------------------------------------- the logger


@pytest.fixture
def package_log() -> Iterator[logging.Logger]:
    """The package's logger, in a state of its own."""
    log = logging.getLogger("fashionnet")
    before = log.level, log.propagate, list(log.handlers)
    log.setLevel(logging.WARNING)
    yield log
    log.level, log.propagate, log.handlers = before


def state_of(log: logging.Logger) -> tuple[Any, ...]:
    return log.level, log.propagate, list(log.handlers)


def test_console_lets_lines_through_while_it_lasts(
    package_log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(package_log)
    with tracking.console():
        package_log.info("one %d", 1)
        logging.getLogger("fashionnet.runs.checkpoint").warning("two")
        package_log.debug("not this")
        assert not package_log.propagate
    package_log.info("not this either")
    assert capsys.readouterr().out == "one 1\ntwo\n"
    assert state_of(package_log) == before


def test_the_log_file_has_times_and_levels(package_log: logging.Logger, tmp_path: Path) -> None:
    before = state_of(package_log)
    (tmp_path / "train.log").write_text("the part before\n")
    with tracking.log_file(a_run(tmp_path)):
        package_log.info("größer")
    package_log.warning("not this")
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "the part before"
    assert lines[1].endswith(" INFO größer") and lines[1][:2] == "20"
    assert len(lines) == 2
    assert state_of(package_log) == before


def test_console_and_file_together(
    package_log: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(package_log)
    with tracking.console():
        with tracking.log_file(a_run(tmp_path)):
            package_log.info("both")
        package_log.info("console")
    assert capsys.readouterr().out == "both\nconsole\n"
    assert (tmp_path / "train.log").read_text().count("\n") == 1
    assert state_of(package_log) == before


def test_a_full_disk_under_the_log_is_an_error_that_names_it(
    package_log: logging.Logger, tmp_path: Path
) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = state_of(package_log)
    with pytest.raises(OSError, match=r"train\.log"), tracking.log_file(a_run(tmp_path)):
        (handler,) = (h for h in package_log.handlers if isinstance(h, logging.FileHandler))
        handler.setStream(Full())  # type: ignore[arg-type]
        package_log.info("something")
    assert state_of(package_log) == before


def test_an_error_restores_the_logger_too(package_log: logging.Logger, tmp_path: Path) -> None:
    before = state_of(package_log)
    with (
        pytest.raises(ZeroDivisionError),
        tracking.console(),
        tracking.log_file(a_run(tmp_path)),
    ):
        raise ZeroDivisionError
    assert state_of(package_log) == before
