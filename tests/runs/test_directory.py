"""Run directories: claiming, refusing, going on, and reading a run back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fashionnet import models
from fashionnet.config import schema
from fashionnet.config.schema import CheckpointConfig, Config, DataConfig
from fashionnet.errors import UserError, one_line
from fashionnet.models import weights
from fashionnet.runs import checkpoint, record, saved
from fashionnet.runs.checkpoint import LAST
from fashionnet.runs.directory import Run, claimed
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.gradients import Autograd
from fashionnet.training.metrics import Metrics
from fashionnet.training.optim import Adam
from fashionnet.training.state import TrainState

HYDRA_FILES = {"config.yaml": "seed: 0\n", "overrides.yaml": "[]\n"}
CLASSES = ["a", "b", "c", "d"]


def a_config(**changes: Any) -> Config:
    return Config(
        model={"_target_": "fashionnet.models.mlp.MLP", "hidden": 5, "dropout": 0.2},
        optimizer={"_target_": "fashionnet.training.optim.Adam", "lr": 0.01},
        **{"data": DataConfig("fashion_mnist"), **changes},
    )


def a_fit() -> TrainState:
    model = models.build(a_config().model, (2, 3), 4, seed=0)
    optimizer = Adam(model.parameters())
    fit = TrainState(model, optimizer, Autograd(model), EarlyStopping(), 0, 4, 255.0)
    fit.history = [{"epoch": 1, "loss": 1.0, "val_loss": 2.0}]
    fit.best_epoch = 1
    return fit


def facts(config: Config) -> dict[str, Any]:
    plain = schema.as_dict(config)
    data: dict[str, Any] = {"name": "fashion_mnist", "image_shape": [2, 3], "class_names": CLASSES}
    data |= {"sha256": {}, "split_sha256": "", "train": 9, "validation": 1, "test": 2}
    values = {"schema_version": record.SCHEMA_VERSION, "config": plain, "seed": config.seed}
    return values | {"config_hash": "", "device": "cpu", "threads": 1, "data": data}


def begin(run: Run, config: Config) -> TrainState:
    """Begins a run and lets it write its first checkpoint."""
    run.begin(HYDRA_FILES, facts(config))
    fit = a_fit()
    checkpoint.save(fit.state_dict(), run.checkpoints / LAST)
    (run.path / "history.jsonl").write_text("{}\n")
    return fit


def complete(path: Path, config: Config | None = None) -> Path:
    """Makes a completed run."""
    config = config or a_config()
    with claimed(path, config) as run:
        fit = begin(run, config)
        run.count_test_use()
        run.complete(fit, 1.5, Metrics(0.5, 0.75), Metrics(0.6, 0.7), 2.5)
    return path


def interrupt(path: Path, config: Config | None = None, end: str = "interrupted") -> Path:
    """Makes a run that ended before it was complete."""
    error: BaseException = KeyboardInterrupt() if end == "interrupted" else UserError("it failed")
    config = config or a_config()
    with pytest.raises(type(error)), claimed(path, config) as run:
        begin(run, config)
        raise error
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Returns every file below a folder with what it holds; folders hold None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(path: Path, config: Config | None = None) -> str:
    """Returns why a claim is refused; it must leave everything as it was."""
    around = path if path.is_dir() else next(p for p in path.parents if p.is_dir())
    before = contents(around)
    before.pop(".lock", None)  # an old one, which nobody holds
    with pytest.raises(UserError) as caught, claimed(path, config or a_config()):
        pytest.fail("it was not refused")
    assert contents(around) == before
    assert around.is_dir()
    return str(caught.value)


# ----------------------------------------------------------------------------------- fresh


def test_a_fresh_run_from_its_claim_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "some/where/run"
    config = a_config(seed=3)
    with claimed(path, config) as run:
        assert run.path == path.resolve()
        assert run.config == schema.as_dict(config)
        assert run.resumed is None
        assert set(contents(path)) == {".lock"}  # nothing is written before the run begins
        fit = begin(run, config)
        assert record.read(path)["status"] == "running"
        run.count_test_use()
        assert record.read(path)["test"] == {"evaluations": 1}  # before the set is read
        run.complete(fit, 1.5, Metrics(0.5, 0.75), Metrics(0.6, 0.7), 2.5)
    values = record.read(path)
    assert values["status"] == "completed"
    assert values["config"] == schema.as_dict(config)
    assert values["validation"] == {"loss": 0.5, "accuracy": 0.75}
    assert values["test"] == {"loss": 0.6, "accuracy": 0.7, "evaluations": 1}
    assert (values["fit_seconds"], values["total_seconds"]) == (1.5, 2.5)
    assert (values["best_epoch"], values["epochs_done"]) == (1, 1)
    assert values["weights_sha256"] == weights.weights_sha256(fit.model.state_dict())
    assert values["peak_memory_bytes"] > 2**20
    assert values["started"] <= values["finished"]
    assert "error" not in values
    assert (path / ".hydra/config.yaml").read_text() == "seed: 0\n"


def test_without_validation_there_are_no_such_figures(tmp_path: Path) -> None:
    with claimed(tmp_path, a_config()) as run:
        fit = begin(run, a_config())
        run.count_test_use()
        run.complete(fit, 1.5, None, Metrics(0.6, 0.7), 2.5)
    assert record.read(tmp_path)["validation"] is None


def test_a_claim_that_never_begins_leaves_nothing(tmp_path: Path) -> None:
    with claimed(tmp_path / "outputs/mlp/run", a_config()):
        pass
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "outputs/mlp/run", a_config()):
        raise ZeroDivisionError
    assert contents(tmp_path) == {}


def test_an_empty_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "mine", tmp_path / "mine/outputs/run"):
        with claimed(path, a_config()):
            pass
        assert contents(tmp_path) == {"mine": None}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("the loss became\nnan"), "failed", "the loss became nan"),
        (ZeroDivisionError("a fault"), "failed", "ZeroDivisionError: a fault"),
        (OSError(28, "No space left on device"), "failed", "No space left on device"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_the_record_says_how_a_run_ended(
    tmp_path: Path, error: BaseException, status: str, said: str
) -> None:
    with pytest.raises(type(error)), claimed(tmp_path / "run", a_config()) as run:
        begin(run, a_config())
        raise error
    values = record.read(tmp_path / "run")
    assert values["status"] == status
    assert said in values["error"]
    assert values["finished"]


def test_a_record_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(ZeroDivisionError),
        claimed(tmp_path / "run", a_config()) as run,
    ):
        begin(run, a_config())
        monkeypatch.setattr(record, "write_json", full)
        raise ZeroDivisionError


def test_a_name_is_what_one_would_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with claimed(Path("outputs/run"), a_config()) as run:
        assert run.name == "outputs/run"
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert run.name == str(tmp_path / "outputs/run")


# -------------------------------------------------------------------------------- refusals


def test_a_completed_run_is_refused(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    assert "holds a completed run; overwrite=true" in refused(path)
    assert "holds a completed run" in refused(path, a_config(seed=9))


def test_an_unfinished_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    path = interrupt(tmp_path / "run")
    other = a_config(seed=9)
    other.model["hidden"] = 6
    said = refused(path, other)
    assert "another configuration (differs in model.hidden, seed)" in said
    assert "overwrite=true" in said


def test_an_unfinished_run_is_refused_where_resuming_is_off(tmp_path: Path) -> None:
    path = interrupt(tmp_path / "run")
    said = refused(path, a_config(resume="never"))
    assert "holds an unfinished run; resume=auto continues it" in said


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["thesis.tex", "checkpoints/mine.pt", "train.log", "history.jsonl"]
)
def test_a_folder_of_other_files_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    file = tmp_path / "work" / name
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    said = refused(tmp_path / "work", a_config(overwrite=overwrite))
    assert f"holds other files ({Path(name).parts[0]}) and no run" in said


def test_what_hydra_leaves_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run/.hydra").mkdir(parents=True)
    complete(tmp_path / "run")


@pytest.mark.parametrize("below", ["", "run", "some/where/run"])
def test_a_path_through_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("text")
    said = refused(tmp_path / "file" / below)
    assert f"{tmp_path / 'file'} is a file, not a folder" in said


def as_ordinary_user(action: Callable[[], str]) -> str:
    """Returns what `action` returns where root's rights do not open every folder."""
    if os.geteuid() != 0:
        return action()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            os.write(writing, action().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that everybody may look into and only root may write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "a.txt").touch()
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs users and rights")
@pytest.mark.parametrize("below", ["", "run", "some/where/run"])
def test_a_folder_that_cannot_be_written_to_is_refused(read_only: Path, below: str) -> None:
    said = as_ordinary_user(lambda: refused(read_only / below))
    assert f"hydra.run.dir={read_only / below}" in said
    assert f"{read_only} cannot be written to" in said


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc here")
def test_a_folder_that_nobody_can_make_is_told_in_one_line() -> None:
    with (
        pytest.raises((UserError, OSError)) as caught,
        claimed(Path("/proc/no/such/run"), a_config()),
    ):
        pytest.fail("it was not refused")
    assert "/proc" in (one_line(caught.value) or "")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "completed"}'])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    path = complete(tmp_path / "run")
    (path / "run.json").write_text(content)
    assert "run.json is damaged" in refused(path)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path = interrupt(tmp_path / "run")
    os.truncate(path / "checkpoints" / LAST, 100)
    assert "overwrite=true starts the run anew" in refused(path)


# ------------------------------------------------------------------------------- overwriting


@pytest.mark.parametrize("old", ["completed", "unfinished", "damaged"])
def test_overwrite_replaces_what_the_run_owned(tmp_path: Path, old: str) -> None:
    path = interrupt(tmp_path / "run") if old == "unfinished" else complete(tmp_path / "run")
    if old == "damaged":
        (path / "run.json").write_text("{")
    (path / "notes.txt").write_text("mine")
    (path / "checkpoints/old.pt").touch()
    (path / ".hydra/old.yaml").touch()
    (path / "tensorboard/train").mkdir(parents=True)
    config = a_config(seed=9, overwrite=True)
    with claimed(path, config) as run:
        assert run.resumed is None
        assert (path / "checkpoints/old.pt").exists()  # until the run begins
        run.begin(HYDRA_FILES, facts(config))
        assert set(contents(path)) == {
            ".hydra",
            ".hydra/config.yaml",
            ".hydra/overrides.yaml",
            ".lock",
            "checkpoints",
            "notes.txt",
            "run.json",
        }
        assert record.read(path)["seed"] == 9
        assert "test" not in record.read(path)
    assert (path / "notes.txt").read_text() == "mine"


def test_overwrite_does_not_follow_links(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious.pt").touch()
    os.rename(path / "checkpoints", tmp_path / "old")
    os.symlink(tmp_path / "elsewhere", path / "checkpoints")
    complete(path, a_config(overwrite=True))
    assert (tmp_path / "elsewhere/precious.pt").exists()
    assert not (path / "checkpoints").is_symlink()


def test_an_overwrite_that_is_refused_later_keeps_the_old_run(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    before = contents(path)
    del before[".lock"]
    with pytest.raises(UserError), claimed(path, a_config(overwrite=True)):
        raise UserError("the data cannot be found")
    assert contents(path) == before


def test_an_overwrite_cut_short_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = complete(tmp_path / "run")
    (path / "tensorboard").mkdir()
    remove = shutil.rmtree

    def removing(folder: Path) -> None:
        if folder.name == "tensorboard":
            raise KeyboardInterrupt
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", removing)
    with pytest.raises(KeyboardInterrupt), claimed(path, a_config(overwrite=True)) as run:
        run.begin(HYDRA_FILES, facts(a_config()))
    monkeypatch.undo()
    complete(path, a_config(overwrite=True))
    assert record.read(path)["status"] == "completed"


# ----------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("end", ["interrupted", "failed"])
def test_an_unfinished_run_is_continued(tmp_path: Path, end: str) -> None:
    path = interrupt(tmp_path / "run", end=end)
    (path / ".lock").unlink()
    first = record.read(path)
    with claimed(path, a_config()) as run:
        assert run.resumed is not None
        assert run.resumed["epoch"] == 1
        fit = a_fit()
        fit.load_state_dict(run.resumed)
        run.begin(HYDRA_FILES, facts(a_config()))
        values = record.read(path)
        assert values["status"] == "running"
        assert values["started"] == first["started"]
        assert "error" not in values and "finished" not in values
        assert (path / "checkpoints" / LAST).exists()
        run.count_test_use()
        run.complete(fit, 1.5, None, Metrics(0.6, 0.7), 2.5)
    values = record.read(path)
    assert values["status"] == "completed"
    assert "error" not in values


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    path = interrupt(tmp_path / "run")
    left = [path / ".run.json.123.tmp", path / "checkpoints/.last.pt.123.tmp"]
    for file in left:
        file.touch()
    with claimed(path, a_config()) as run:
        run.begin(HYDRA_FILES, facts(a_config()))
        assert not any(file.exists() for file in left)


def test_a_run_killed_before_its_first_record_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / ".run.json.123.tmp").touch()
    with claimed(tmp_path, a_config()) as run:
        assert run.resumed is None
        run.begin(HYDRA_FILES, facts(a_config()))
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_killed_final_evaluation_is_counted_with_the_next(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path, a_config()) as run:
        begin(run, a_config())
        run.count_test_use()
        raise KeyboardInterrupt
    with claimed(tmp_path, a_config()) as run:
        run.begin(HYDRA_FILES, facts(a_config()))
        run.count_test_use()
        run.complete(a_fit(), 1.5, None, Metrics(0.6, 0.7), 2.5)
    assert record.read(tmp_path)["test"] == {"loss": 0.6, "accuracy": 0.7, "evaluations": 2}


# -------------------------------------------------------------------------------- more epochs


def test_more_epochs_continue_a_completed_run_and_name_it(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    first, weights = record.read(path), (path / "checkpoints" / LAST).read_bytes()
    with claimed(path, a_config(epochs=9)) as run:
        assert run.resumed is not None and run.parent == first
        fit = begin(run, a_config(epochs=9))
        run.count_test_use()
        run.complete(fit, 1.5, None, Metrics(0.6, 0.7), 2.5)
    second = record.read(path)
    assert second["parents"] == [first]
    assert second["config"]["epochs"] == 9
    assert (path / "checkpoints/epoch-5.pt").read_bytes() == weights
    with claimed(path, a_config(epochs=12)) as run:
        assert run.record.values["parents"] == [
            first,
            {key: value for key, value in second.items() if key != "parents"},
        ]


def test_a_schedule_that_spans_the_training_is_not_extended(tmp_path: Path) -> None:
    cosine = {"_target_": "fashionnet.training.schedule.Cosine"}
    path = complete(tmp_path / "run", a_config(schedule=cosine))
    before = contents(path)
    longer = a_config(epochs=9, schedule=cosine)
    with (
        pytest.raises(UserError, match=r"its schedule spans its 5 epochs.*overwrite=true"),
        claimed(path, longer),
    ):
        pytest.fail("it was extended")
    assert contents(path) == {name: before[name] for name in before if name != ".lock"}


def test_a_run_of_so_many_steps_is_not_extended(tmp_path: Path) -> None:
    path = complete(tmp_path / "run", a_config(epochs=None, steps=300))
    longer = a_config(epochs=None, steps=600)
    with pytest.raises(UserError, match="holds a completed run"), claimed(path, longer):
        pytest.fail("it was extended")


def test_a_longer_run_that_was_killed_is_an_unfinished_run_like_any(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    interrupt(path, a_config(epochs=9))
    assert record.read(path)["status"] == "interrupted"
    assert "differs in epochs" in refused(path, a_config())
    with claimed(path, a_config(epochs=9)) as run:
        assert run.resumed is not None and run.parent is None
        run.begin(HYDRA_FILES, facts(a_config(epochs=9)))
        assert len(run.record.values["parents"]) == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"epochs": 5}, "a larger epochs continues it"),
        ({"epochs": 4}, "a larger epochs continues it"),
        ({"epochs": 9, "seed": 1}, "a larger epochs continues it"),
        ({"epochs": 9, "resume": "never"}, "a larger epochs continues it"),
    ],
)
def test_only_more_epochs_continue_a_completed_run(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    assert why in refused(complete(tmp_path / "run"), a_config(**changes))


def test_a_run_that_stopped_early_has_no_use_for_more_epochs(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    file = path / "checkpoints" / LAST
    state = torch.load(file, weights_only=True)
    torch.save({**state, "stopped": True}, file)
    assert "stopped early; more epochs would change nothing" in refused(path, a_config(epochs=9))


# ------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": CheckpointConfig(1)},
        {"data": DataConfig("fashion_mnist", root="/elsewhere")},
    ],
)
def test_what_cannot_change_the_numbers_does_not_hinder(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = interrupt(tmp_path / "run")
    with claimed(path, a_config(**changes)) as run:
        assert run.resumed is not None


def test_an_unfinished_run_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    path = interrupt(tmp_path / "run")
    (path / "checkpoints" / LAST).unlink()
    with claimed(path, a_config()) as run:
        assert run.resumed is None
        run.begin(HYDRA_FILES, facts(a_config()))
        assert not (path / "history.jsonl").exists()


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    path = interrupt(tmp_path / "run")
    state = checkpoint.load(path / "checkpoints" / LAST)
    checkpoint.save({**state, "epoch": 2}, path / "checkpoints" / LAST)
    os.truncate(path / "checkpoints" / LAST, 100)
    with claimed(path, a_config()) as run:
        assert run.resumed is not None and run.resumed["epoch"] == 1


# --------------------------------------------------------------------------- two processes

HOLDER = """
import sys
from pathlib import Path
from fashionnet.config import schema
from fashionnet.runs import directory

plain, facts = map(eval, sys.argv[2:])
own = schema.Config(**plain, data=schema.DataConfig("fashion_mnist"))
with directory.claimed(Path(sys.argv[1]), own) as run:
    run.begin({}, facts)
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run directory that another process holds, and that process."""
    path = tmp_path / "run"
    plain = {"model": a_config().model, "optimizer": a_config().optimizer}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), repr(plain), repr(facts(a_config()))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "claimed\n"
        yield path, holder
        holder.kill()


def test_a_run_in_use_is_refused_until_its_process_dies(
    held: tuple[Path, subprocess.Popen[str]],
) -> None:
    path, holder = held
    before = contents(path)
    for config in (a_config(), a_config(overwrite=True), a_config(seed=9)):
        with pytest.raises(UserError, match="in use by another"), claimed(path, config):
            pytest.fail("it was not refused")
    with pytest.raises(UserError, match="in use by another"):
        saved.count_test_use(path)
    assert contents(path) == before  # the lock included

    holder.kill()
    holder.wait()
    assert record.read(path)["status"] == "running"  # it had no time to say anything else
    with claimed(path, a_config()) as run:
        assert run.resumed is None  # it had no checkpoint yet


def test_two_claims_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", a_config()) as run:
        run.begin({}, facts(a_config()))
        with (
            pytest.raises(UserError, match="in use by another"),
            claimed(tmp_path / "run", a_config()),
        ):
            pytest.fail("it was not refused")
        with claimed(tmp_path / "other", a_config()):
            pass


# ------------------------------------------------------------------------------ the test set


def test_each_use_of_the_test_set_is_counted(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    before = record.read(path)
    for used in (2, 3):
        saved.count_test_use(path)
        assert record.read(path)["test"] == {**before["test"], "evaluations": used}
    assert {**record.read(path), "test": None} == {**before, "test": None}


def test_the_test_set_stays_sealed_until_a_run_completes(tmp_path: Path) -> None:
    path = interrupt(tmp_path / "run")
    before = record.read(path)
    with pytest.raises(UserError, match="is interrupted: the test set stays sealed"):
        saved.count_test_use(path)
    assert record.read(path) == before


@pytest.mark.parametrize("test", [3, {"loss": 0.6}, {"evaluations": "many"}])
def test_uses_that_cannot_be_counted_are_refused(tmp_path: Path, test: Any) -> None:
    path = complete(tmp_path / "run")
    edit(path, test=test)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        saved.count_test_use(path)
    assert json.loads((path / "run.json").read_text())["test"] == test


# ------------------------------------------------------------------- a stranger's directory


@pytest.mark.parametrize(
    "name", ["history.jsonl", "checkpoints", "checkpoints/last.pt", "run.json"]
)
def test_a_link_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    path = interrupt(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (path / name).rename(elsewhere)
    (path / name).symlink_to(elsewhere)
    assert "leads out of" in refused(path)
    assert (path / name).is_symlink()


@pytest.mark.parametrize("name", [".lock", "history.jsonl", "run.json"])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    path = interrupt(tmp_path / "run")
    (path / name).unlink()
    os.mkfifo(path / name)
    said = r"neither a file nor a folder|holds no run|not a file of its own"
    with pytest.raises(UserError, match=said), claimed(path, a_config()):
        pytest.fail("it was not refused")


def test_a_link_in_place_of_a_record_is_not_read(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    (path / "run.json").rename(tmp_path / "elsewhere.json")
    (path / "run.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="leads out of"):
        _ = saved.read(path).model


# --------------------------------------------------------------------------------- reading


def edit(path: Path, **values: Any) -> None:
    (path / "run.json").write_text(json.dumps(record.read(path) | values))


def with_data(**changes: Any) -> dict[str, Any]:
    return {"data": {**facts(a_config())["data"], **changes}}


def test_a_run_is_read_back(tmp_path: Path) -> None:
    path = complete(tmp_path / "run", a_config(seed=3))
    run = saved.read(str(path))
    assert run.config == a_config(seed=3)
    assert run.record == record.read(path)
    assert not run.model.training
    assert weights.weights_sha256(run.model.state_dict()) == run.record["weights_sha256"]
    assert run.model(torch.zeros(1, 2, 3)).shape == (1, 4)


def test_an_interrupted_run_is_read_back(tmp_path: Path) -> None:
    run = saved.read(interrupt(tmp_path / "run"))
    assert run.record["status"] == "interrupted"


def test_a_run_killed_between_two_renames_is_read_from_what_there_is(tmp_path: Path) -> None:
    path = interrupt(tmp_path / "run")
    (path / "checkpoints" / LAST).rename(path / "checkpoints/previous.pt")
    assert saved.read(path).model(torch.zeros(1, 2, 3)).shape == (1, 4)
    path = complete(tmp_path / "completed")
    weights = (path / "checkpoints" / LAST).read_bytes()
    (path / "checkpoints" / LAST).rename(path / "checkpoints/previous.pt")
    with claimed(path, a_config(epochs=9)) as run:
        run.begin(HYDRA_FILES, facts(a_config(epochs=9)))
    assert (path / "checkpoints/epoch-5.pt").read_bytes() == weights


def test_reading_a_run_writes_nothing(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    before = contents(tmp_path)
    _ = saved.read(path).model
    assert contents(tmp_path) == before


def with_config(**changes: Any) -> dict[str, Any]:
    return {"config": {**schema.as_dict(a_config()), **changes}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data": None}, r"run\.json is damaged: data=None must be a group"),
        ({"data": {}}, r"run\.json is damaged: data\.name is missing"),
        (with_data(image_shape=3), r"run\.json is damaged: data\.image_shape=3"),
        (with_data(image_shape=[-2, 3]), r"run\.json is damaged: data\.image_shape\[0\]=-2"),
        (with_data(class_names=[1, 2]), r"run\.json is damaged: data\.class_names\[0\]=1"),
        (with_data(class_names=CLASSES[:3]), r"last\.pt does not fit the recorded model"),
        ({"config": {}}, r"run\.json is damaged: config\.\w+ is missing"),
        (with_config(epochs="many"), r"run\.json is damaged: config\.epochs=many"),
        (with_config(epochs=0), r"run\.json is damaged: config\.epochs=0"),
        (with_config(color="red"), r"run\.json is damaged: .*color"),
        (with_config(model="mlp"), r"run\.json is damaged: config\.model=mlp"),
        (with_config(model={}), r"run\.json is damaged: config\.model\._target_ is missing"),
        (with_config(seed="${nothing}"), r"run\.json is damaged: config\.seed="),
        (with_config(model="???"), r"run\.json is damaged: config\.model="),
        (with_config(device="${oc.env:HOME}"), r"run\.json is damaged: .*interpolation"),
        (
            with_config(model={"_target_": "fashionnet.models.mlp.MLP", "hidden": 10**9}),
            r"model\.hidden=1000000000 makes a network of",  # and nothing of that size is made
        ),
        (
            with_config(model={"_target_": "fashionnet.models.mlp.MLP", "hidden": 10**6}),
            r"last\.pt does not fit the recorded model",
        ),
        (
            with_config(model={"_target_": "fashionnet.models.mlp.MLP", "wide": 3}),
            r"model\.wide: .* no such argument",
        ),
        (
            with_config(model={"_target_": "fashionnet.models.mlp.MLP", "hidden": 6}),
            r"last\.pt does not fit the recorded model",
        ),
    ],
)
def test_a_damaged_run_is_told_in_one_line(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    path = complete(tmp_path / "run")
    edit(path, **values)
    with pytest.raises(UserError, match=said) as caught:
        _ = saved.read(path).model
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [3, [1], {"1.weight": 3}, {"1.weight": torch.zeros(5, 6)}])
def test_a_checkpoint_of_something_else(tmp_path: Path, state: Any) -> None:
    path = complete(tmp_path / "run")
    checkpoint.save({"model": state}, path / "checkpoints" / LAST)
    said = r"last\.pt (does not fit the recorded model|is not a checkpoint of this package)"
    with pytest.raises(UserError, match=said):
        _ = saved.read(path).model


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    path = complete(tmp_path / "run")
    (path / "checkpoints" / LAST).unlink()
    with pytest.raises(UserError, match=r"last\.pt is missing"):
        _ = saved.read(path).model


def test_a_run_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            _ = saved.read(path).model


@pytest.mark.parametrize("place", ["model", "argument", "optimizer"])
def test_nothing_that_a_run_names_is_executed(tmp_path: Path, place: str) -> None:
    path, trace = complete(tmp_path / "run"), tmp_path / "trace"
    bomb = {"_target_": "os.system", "command": f"touch {trace}"}
    node = {
        "model": {"model": bomb},
        "argument": {"model": {**a_config().model, "hidden": bomb}},
        "optimizer": {"optimizer": bomb},
    }[place]
    edit(path, **with_config(**node))
    if place == "optimizer":
        _ = saved.read(path).model  # reading a run builds no optimizer
    else:
        with pytest.raises(UserError, match=r"os\.system is not on|_target_ inside an argument"):
            _ = saved.read(path).model
    assert not trace.exists()


# --------------------------------------------------------------------------------- finding


def test_runs_are_found_in_order_of_their_names(tmp_path: Path) -> None:
    expected = [complete(tmp_path / name) for name in ("a/2", "a/3", "b", "c/d/e/1")]
    (tmp_path / "empty").mkdir()
    complete(tmp_path / "b/nested/in/a/run")
    assert saved.find(tmp_path) == expected
    assert saved.find(tmp_path / "b") == [tmp_path / "b"]
    assert saved.find(tmp_path / "empty") == []


def test_finding_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        saved.find(tmp_path / "nowhere")
