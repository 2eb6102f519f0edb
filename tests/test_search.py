"""`python -m fashionnet.search`: what is searched over, trials that are runs, and going on."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fashionnet.config.search_space import parse
from fashionnet.errors import Interrupted, UserError, one_line
from fashionnet.list import list_runs
from fashionnet.runs.jobs import Result
from fashionnet.runs.study import DATABASE
from fashionnet.search import Search, Trial, as_dict, report, search
from fashionnet.system import extras, locks
from fashionnet.train import train

if TYPE_CHECKING:
    from tests.conftest import Commands

LR = "optimizer.lr=tag(log,interval(1e-4,1e-1))"
WIDTH = "model.hidden=choice(8,[8,8])"
# Runs of a second and three epochs: there is time to kill one between its checkpoints.
SHORT = ("epochs=3", "data.limit=1200", "batch_size=2", "device=cpu", WIDTH, LR)


class Objective:
    """Stands in for training: a validation loss from the overrides alone, or a failure."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.errors: dict[str, BaseException] = {}  # by the name of the run directory
        self.sign = 1.0

    def __call__(self, *overrides: str, run_dir: Path, dataset: object = None) -> Result:
        self.calls.append(run_dir.name)
        print("epoch 1/1")
        if error := self.errors.pop(run_dir.name, None):
            raise error
        values = dict(override.split("=", 1) for override in overrides)
        width = len(values.get("model.hidden", ""))
        loss = (math.log10(float(values["optimizer.lr"])) + 2.5) ** 2 + width
        return Result(run_dir, {}, [{"val_loss": 90.0}, {"val_loss": 50 + self.sign * loss}])


@pytest.fixture
def objective(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Objective:
    monkeypatch.chdir(tmp_path)
    stand_in = Objective()
    monkeypatch.setattr("fashionnet.train.train", stand_in)
    return stand_in


def results(found: Search) -> list[tuple[dict[str, Any], float | None, str | None]]:
    return [(trial.params, trial.val_loss, trial.error) for trial in found.trials]


def states(folder: Path) -> list[str]:
    """The states of the trials in a database, which is read as it is."""
    with sqlite3.connect(f"file:{folder / DATABASE}?mode=ro", uri=True) as database:
        return [row[0] for row in database.execute("SELECT state FROM trials ORDER BY number")]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


# What is searched over


@pytest.mark.parametrize(
    ("sweep", "distribution"),
    [
        ("64,128", CategoricalDistribution([64, 128])),
        ("choice(0.5,true,mlp)", CategoricalDistribution([0.5, True, "mlp"])),
        ("[64,32],64,null,'a b'", CategoricalDistribution(["[64,32]", 64, "null", "'a b'"])),
        ("interval(0,1)", FloatDistribution(0.0, 1.0)),
        ("int(interval(1,5))", IntDistribution(1, 5)),
        ("tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("range(16,65,16)", IntDistribution(16, 64, step=16)),
        ("range(4)", IntDistribution(0, 3)),
        ("range(9,0,-4)", IntDistribution(1, 9, step=4)),
        ("range(0,1,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
    ],
)
def test_sweeps_become_distributions(sweep: str, distribution: object) -> None:
    fixed, space = parse(["epochs=1", f"model.x={sweep}", "+a=b"])
    assert fixed == ["epochs=1", "+a=b"]
    assert space == {"model.x": distribution}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["epochs=3"], "nothing to search over"),
        ([], "nothing to search over"),
        (["x=interval(1,0.5)"], "(low=1.0, high=0.5)"),
        (["x=tag(log,interval(0,1))"], "(low=0.0, high=1.0)"),
        (["x=interval(0,inf)"], "its ends are not finite"),
        (["x=range(0,inf)"], "its ends are not finite"),
        (["x=range(3,3)"], "holds no number"),
        (["x=range(0,1,0)"], "x=range(0,1,0) cannot be searched over"),
        (["x=range(0.5,1,0)"], "Invalid range values"),
        (["model=glob(*)"], "see python -m fashionnet.search --help"),
        (["x=tag(log,choice(1,2))"], "see python -m fashionnet.search --help"),
        (["x=tag(lin,interval(1,2))"], "see python -m fashionnet.search --help"),
        (["x=choice("], "choice("),
        (["x"], "is not KEY=VALUE"),
        (["x=1,2", "x=1"], "x is given twice"),
        (["seed=range(5)"], "seed cannot be searched over"),
        (["validation_split=0.1,0.2"], "validation_split cannot be searched over"),
        (["data.classes=[Bag,Coat],[Bag,Dress]"], "data.classes cannot be searched over"),
        ([LR, "overwrite=true"], "overwrite cannot be used in a search"),
        ([LR, "resume=never"], "resume cannot be used in a search"),
        ([LR, "hydra.run.dir=here"], "hydra.run.dir cannot be used in a search"),
        ([LR, "hydra/launcher=joblib"], "hydra/launcher cannot be used in a search"),
    ],
)
def test_what_cannot_be_searched_over_is_reported(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimiser.lr=interval(1e-4,1e-2)"], "optimiser"),
        ([LR, "model.hiden=3"], "model.hiden"),
        (["model=mlp,mlp_no_dropout,mpl"], "mpl"),  # reported before the trials with mlp
        (["optimizer.lr=interval(0,0.1)"], "optimizer.lr=0.0 must be"),
        (["epochs=int(interval(1,9))", "batch_size=8,0"], "batch_size=0 must be"),
        ([LR, "validation_split=0"], "validation_split=0 leaves"),
        ([LR, "device=cuda:99"], "device=cuda:99"),
        ([LR, "data.root=file"], "file"),
        (["model.hidden=choice(8,0)"], "model.hidden=0"),
    ],
)
def test_what_no_trial_could_run_with_is_reported_first(
    objective: Objective, tmp_path: Path, overrides: list[str], words: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        search(*overrides, num=2)
    assert words in str(caught.value)
    assert not objective.calls
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_users_own_options_are_found(objective: Objective, tmp_path: Path) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/mine.yaml").write_text("defaults: [mlp]\nhidden: 16\n")
    path = f"hydra.searchpath=[file://{tmp_path}/conf]"
    found = search(path, LR, "model=mlp,mine", num=1, out="s")
    assert shlex.split(found.command)[3] == path


@pytest.mark.parametrize("num", [0, -1])
def test_a_search_has_a_trial(objective: Objective, tmp_path: Path, num: int) -> None:
    with pytest.raises(UserError, match=f"num={num} must be at least 1"):
        search(LR, num=num)
    assert not list(tmp_path.iterdir())


def test_optuna_missing_is_reported(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=re.escape(extras.install_command("search"))):
        search(LR)
    assert not list(tmp_path.iterdir())


# The same trials, whatever comes between


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """An undisturbed search; beyond the tenth trial Optuna goes by the results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fashionnet.train.train", Objective())
        return search(LR, WIDTH, num=16, out=tmp_path_factory.mktemp("sixteen"))


def test_results_guide_the_search(objective: Objective, sixteen: Search) -> None:
    objective.sign = -1
    upside_down = search(LR, WIDTH, num=16, out="s")
    first, second = ([trial.params for trial in s.trials] for s in (sixteen, upside_down))
    assert first[:10] == second[:10]
    assert all(a != b for a, b in zip(first[10:], second[10:], strict=True))
    assert len({trial.params["optimizer.lr"] for trial in sixteen.trials}) == 16


def test_typing_order_does_not_matter_and_the_seed_does(
    objective: Objective, sixteen: Search
) -> None:
    assert results(search(WIDTH, LR, num=3, out="a")) == results(sixteen)[:3]
    other = search(LR, WIDTH, "seed=1", num=3, out="b")
    assert other.trials[0].params != sixteen.trials[0].params


def test_in_parts_and_interrupted_anywhere_it_is_the_same_search(
    objective: Objective, sixteen: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(num: int) -> Search:
        return search(LR, WIDTH, num=num, out="s")

    again(2)
    objective.errors = {"trial-003": Interrupted(signal.SIGTERM)}
    with pytest.raises(Interrupted):
        again(5)
    assert states(Path("s")) == ["COMPLETE"] * 3 + ["RUNNING"]
    tell = optuna.Study.tell
    for last in (4, 12):  # killed when the run was done, before that was noted

        def killed(study: optuna.Study, trial: int, value: float, last: int = last) -> object:
            if trial == last:
                raise KeyboardInterrupt
            return tell(study, trial, value)

        with monkeypatch.context() as patch:
            patch.setattr(optuna.Study, "tell", killed)
            with pytest.raises(KeyboardInterrupt):
                again(16)
    with monkeypatch.context() as patch:  # killed between a result and the next proposal
        patch.setattr("fashionnet.search.propose", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            again(16)
    assert results(again(16)) == results(sixteen)
    assert objective.calls.count("trial-013") == 1
    assert objective.calls.count("trial-012") == 2


def test_a_signal_outside_a_run_stops_it_as_inside(
    objective: Objective, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fashionnet.search.propose", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        search(LR, num=2, out="my search")
    assert isinstance(caught.value, Interrupted) and caught.value.status == 128 + signal.SIGINT
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "stopped; the same command with --out 'my search' goes on"


def test_a_finished_search_says_so_and_gives_its_result(
    objective: Objective, capsys: pytest.CaptureFixture[str]
) -> None:
    before = search(LR, WIDTH, num=3, out="s")
    objective.calls.clear()
    capsys.readouterr()
    for num in (3, 1):  # never fewer than there are
        assert search(LR, WIDTH, num=num, out="s") == before
    assert capsys.readouterr().out == "search s: nothing is missing\n" * 2
    assert not objective.calls


def test_failed_trials_are_named_and_the_others_go_on(
    objective: Objective, sixteen: Search, capsys: pytest.CaptureFixture[str]
) -> None:
    objective.errors = {
        "trial-000": UserError("the loss became nan\nat step 1"),
        "trial-002": RuntimeError("can't allocate memory: you tried to allocate 9 bytes"),
    }
    found = search(LR, WIDTH, num=4, out="s")
    assert states(Path("s")) == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert found.trials[0].error == "the loss became nan at step 1"
    assert "out of memory" in str(found.trials[2].error)
    assert [trial.params for trial in found.trials] == [t.params for t in sixteen.trials[:4]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("failed: the loss became nan at step 1")
    assert [line.split()[0] for line in lines] == [
        *("search", "trial-000", "trial-001", "trial-002", "trial-003")
    ]
    assert search(LR, WIDTH, num=4, out="s") == found  # they are not tried again
    text = report(found)
    assert "4 trials, 2 failed" in text
    assert "failed: trial-000: the loss became nan at step 1" in text


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_failure(
    objective: Objective, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    result = Result(Path(), {}, [{"val_loss": loss}])
    monkeypatch.setattr("fashionnet.train.train", lambda *_, run_dir, dataset: result)
    with pytest.raises(UserError, match=f"none of 2 trials completed: .* is {loss}"):
        search(LR, num=2, out="s")


def test_what_the_values_did_not_cause_is_tried_again(
    objective: Objective, sixteen: Search
) -> None:
    objective.errors = {"trial-001": OSError(28, "No space left on device")}
    with pytest.raises(OSError, match="No space"):
        search(LR, WIDTH, num=3, out="s")
    assert results(search(LR, WIDTH, num=3, out="s")) == results(sixteen)[:3]


def test_an_error_that_was_noted_counts_only_with_its_failure(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective.errors = {"trial-000": MemoryError()}
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            search(LR, WIDTH, num=1, out="s")
    (trial,) = search(LR, WIDTH, num=1, out="s").trials
    assert trial.val_loss is not None and trial.error is None


# Its folder


@pytest.fixture(scope="module")
def one_trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fashionnet.train.train", Objective())
        return search(LR, WIDTH, num=1, out=tmp_path_factory.mktemp("one")).folder


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([LR, WIDTH, "epochs=3"], "epochs"),
        ([LR, WIDTH, "seed=1"], "seed"),
        ([LR, "model.hidden=choice(8,16)"], "model.hidden"),
        ([LR], "model.hidden"),
        ([LR, WIDTH, "model.dropout=interval(0.2,0.5)"], "model.dropout"),
        (["optimizer.lr=tag(log,interval(1e-4,1))", WIDTH], "optimizer.lr"),
    ],
)
def test_another_search_is_refused_by_what_differs(
    objective: Objective, tmp_path: Path, one_trial: Path, overrides: list[str], keys: str
) -> None:
    shutil.copytree(one_trial, "s")
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        search(*overrides, num=2, out="s")
    assert f"s holds another search (differs in {keys});" in str(caught.value)
    assert contents(tmp_path) == before


def test_what_changes_no_number_may_be_written_otherwise(
    objective: Objective, one_trial: Path
) -> None:
    shutil.copytree(one_trial, "s")
    search(WIDTH, LR, "epochs=5", "model=mlp", "git_patch=false", num=2, out="s")
    assert objective.calls == ["trial-001"]


def altered(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as database:
        database.execute(statement)


def another_study(path: Path) -> None:
    path.unlink()
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    optuna.create_study(storage=storage, study_name="mine")


def another_trial(path: Path) -> None:
    study = optuna.load_study(study_name="fashionnet", storage=f"sqlite:///{path}")
    study.add_trial(optuna.create_trial(value=0.0))


def other_tables(path: Path) -> None:
    path.unlink()
    altered(path, "CREATE TABLE trials (x INTEGER)")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    path.symlink_to(path.rename(path.parents[1] / "elsewhere"))


STRANGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "no database": lambda path: path.write_bytes(b"no database" * 1000),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:9000]),
    "folder": folder,
    "link": link,
    "other tables": other_tables,
    "another study": another_study,
    "another trial": another_trial,
    "trial waiting": lambda path: altered(path, "UPDATE trials SET state = 'WAITING'"),
    "another version": lambda path: altered(path, "UPDATE alembic_version SET version_num = 'v9'"),
    "no plan": lambda path: altered(path, "UPDATE study_user_attributes SET value_json = '[1]'"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_database_is_reported_and_left_alone(
    objective: Objective, tmp_path: Path, one_trial: Path, what: str
) -> None:
    shutil.copytree(one_trial, "s")
    STRANGE[what](tmp_path / "s" / DATABASE)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"s/search\.db (is damaged|leads out)"):
        search(LR, WIDTH, num=2, out="s")
    assert contents(tmp_path) == before


def test_a_database_that_cannot_be_written_is_reported(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        try:
            raise sqlite3.OperationalError("database or disk is full")
        except sqlite3.OperationalError as error:
            raise optuna.exceptions.StorageInternalError("something went wrong") from error

    monkeypatch.setattr(optuna.Study, "add_trial", full)
    with pytest.raises(UserError, match=r"search\.db cannot be used: database or disk is full"):
        search(LR, WIDTH, num=2, out="s")


@pytest.mark.parametrize("name", ["photo.png", "run.json", "trial-000"])
def test_a_folder_that_holds_other_things_is_refused(
    objective: Objective, tmp_path: Path, name: str
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).touch()
    with pytest.raises(UserError, match=rf"s holds other files \({name}\) and no search\.db"):
        search(LR, num=2, out="s")
    assert [path.name for path in (tmp_path / "s").iterdir()] == [name]


def test_a_database_that_cannot_be_made_leaves_no_folder(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = optuna.exceptions.StorageInternalError("the disk is full")
    monkeypatch.setattr(optuna, "create_study", lambda **_: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="the disk is full"):
        search(LR, num=2, out="a/b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["file", "file/s"])
def test_no_folder_is_made_of_a_file(objective: Objective, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught:
        search(LR, num=2, out=out)
    assert "choose another path" in str(one_line(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_search_killed_at_its_beginning_left_is_no_hindrance(
    objective: Objective, tmp_path: Path, sixteen: Search
) -> None:
    (tmp_path / "s").mkdir()
    for name in (".lock", f".{DATABASE}", f".{DATABASE}-journal"):
        (tmp_path / "s" / name).write_text("half")
    assert results(search(LR, WIDTH, num=2, out="s")) == results(sixteen)[:2]
    assert [path.name for path in (tmp_path / "s").iterdir()] == [DATABASE]


def test_a_backup_of_hard_links_stays_as_it_is(objective: Objective, tmp_path: Path) -> None:
    search(LR, num=1, out="s")
    os.link(tmp_path / "s" / DATABASE, tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    assert len(search(LR, num=2, out="s").trials) == 2
    assert (tmp_path / "backup").read_bytes() == before


def test_a_folder_in_use_is_refused(objective: Objective, tmp_path: Path) -> None:
    search(LR, num=1, out="s")
    with locks.exclusive(tmp_path / "s"), pytest.raises(UserError, match="s is in use"):
        search(LR, num=2, out="s")
    assert len(search(LR, num=2, out="s").trials) == 2


def test_a_folder_may_have_any_name(objective: Objective, tmp_path: Path) -> None:
    name = "what? #1 100%20 ä"
    search(LR, num=1, out=name)
    assert (tmp_path / name / DATABASE).is_file()
    assert len(search(LR, num=2, out=name).trials) == 2


def test_by_default_it_is_a_new_one_below_outputs(objective: Objective, tmp_path: Path) -> None:
    folders = {search(LR, num=1).folder.resolve() for _ in range(2)}
    assert {folder.parent for folder in folders} == {tmp_path / "outputs/search"}
    assert len(folders) == 2


def test_optunas_log_is_as_before(objective: Objective, capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    search(LR, num=1, out="s")
    assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    assert capfd.readouterr().err == ""


# The report


def test_the_best_are_listed_best_first(tmp_path: Path) -> None:
    losses = [0.5, None, 0.3, 0.4, 0.2, 0.9, 0.3]
    trials = [
        Trial(tmp_path / f"trial-{i:03d}", {"model.hidden": "[8,8]", "lr": 1e-4 / 3}, loss, "oh")
        for i, loss in enumerate(losses)
    ]
    found = Search(tmp_path, ["epochs=1"], trials)
    lines = report(found).splitlines()
    assert lines[0] == "7 trials, 1 failed; the best:"
    assert [line.split() for line in lines[1:4]] == [
        ["trial", "val_loss", "model.hidden", "lr"],
        ["trial-004", "0.2000", "[8,8]", "3.333e-05"],
        ["trial-002", "0.3000", "[8,8]", "3.333e-05"],
    ]
    assert [line.split()[0] for line in lines[4:7]] == ["trial-006", "trial-003", "trial-000"]
    assert lines[7] == "failed: trial-001: oh"
    assert shlex.split(lines[-1])[1:] == [
        *("-m", "fashionnet.train", "epochs=1"),
        *("model.hidden=[8,8]", f"lr={1e-4 / 3!r}"),
    ]
    assert as_dict(found)["best"]["val_loss"] == 0.2


# Real searches


@pytest.fixture(scope="module")
def undisturbed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a search of three real runs, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder / "s", commands.succeed("search", *SHORT, "--num", "3", "--out", "s", cwd=folder)


@pytest.mark.slow
def test_trials_are_runs(commands: Commands, undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    folder, stdout = undisturbed
    head, *lines = stdout.splitlines()
    assert head == "search s: 3 of 3 trials to go"
    for i, line in enumerate(lines[:3]):
        run = commands.opened(folder / f"trial-{i:03d}")
        loss = min(row["val_loss"] for row in run.history)
        assert line.startswith(f"trial-{i:03d}  model.hidden=") and f"val_loss {loss:.4f}" in line
        assert run.record["test"] is None  # it stays sealed
    assert lines[3] == "3 trials, 0 failed; the best:"
    assert {path.name for path in folder.iterdir()} == {
        *(DATABASE, "trial-000", "trial-001", "trial-002")
    }
    assert [row["status"] for row in list_runs(folder)] == ["completed"] * 3
    # The command that is printed gives the best trial's run once more, to the bit.
    python, option, module, *overrides = shlex.split(lines[-1])
    assert shutil.which(python, path=os.environ["PATH"]) is not None
    assert (option, module) == ("-m", "fashionnet.train")
    again = train(*overrides, run_dir=tmp_path / "again")
    best = commands.opened(folder / lines[5].split()[0])
    assert best.bits == commands.opened(again.run_dir).bits
    losses = [trial.history[-1]["val_loss"] for trial in map(commands.opened, folder.glob("t*"))]
    assert min(row["val_loss"] for row in best.history) <= min(losses)


def stopped(
    commands: Commands, folder: Path, run: str, number: int
) -> tuple[int, str, dict[str, Any]]:
    """Starts the search, and sends it a signal once a run has its first checkpoint.

    Returns:
        Exit status, output, and the first line of that run's history.
    """
    process = commands.start("search", *SHORT, "--num", "3", "--out", "s", cwd=folder)
    checkpoint = folder / "s" / run / "checkpoints/last.pt"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    if number == signal.SIGKILL:
        with pytest.raises(UserError, match="in use"):
            search(*SHORT, num=3, out=folder / "s")
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    output, errors = process.communicate()
    row = json.loads((folder / "s" / run / "history.jsonl").read_text().splitlines()[0])
    return process.wait(), output + errors, row


@pytest.mark.slow
def test_killed_and_stopped_it_ends_as_if_undisturbed(
    commands: Commands, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    status, _, first = stopped(commands, tmp_path, "trial-001", signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert states(tmp_path / "s") == ["COMPLETE", "RUNNING"]
    status, output, second = stopped(commands, tmp_path, "trial-002", signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert output.splitlines()[-2:] == [
        "stopped; the same command with --out s goes on",
        "interrupted by SIGTERM",
    ]
    assert states(tmp_path / "s") == ["COMPLETE", "COMPLETE", "RUNNING"]
    done = commands.run("search", *SHORT, "--num=3", "--out=s", "--json", cwd=tmp_path)
    assert done.returncode == 0
    folder, whole = undisturbed
    # What is printed on the way goes beside the answer.
    assert done.stderr.splitlines() == ["search s: 1 of 3 trials to go", whole.splitlines()[3]]
    answer = json.loads(done.stdout)
    assert [trial["run_dir"] for trial in answer["trials"]] == [f"s/trial-00{i}" for i in range(3)]
    assert answer["best"] == min(answer["trials"], key=lambda trial: trial["val_loss"])
    assert answer["command"] == whole.splitlines()[-1].strip()
    for i in range(3):
        name = f"trial-{i:03d}"
        assert commands.opened(tmp_path / "s" / name).bits == commands.opened(folder / name).bits
    # They went on from their checkpoints: an epoch was not done twice.
    for name, row in (("trial-001", first), ("trial-002", second)):
        assert commands.opened(tmp_path / "s" / name).history[0] == row


def test_a_run_that_was_done_is_not_run_again(
    undisturbed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "s")
    with sqlite3.connect(tmp_path / "s" / DATABASE) as database:  # killed before it took note
        database.execute("DELETE FROM trial_values WHERE trial_id = 2")
        database.execute("UPDATE trials SET state = 'RUNNING' WHERE trial_id = 2")
    assert states(tmp_path / "s") == ["COMPLETE", "RUNNING", "COMPLETE"]
    objective = Objective()
    monkeypatch.setattr("fashionnet.train.train", objective)
    found = search(*SHORT, num=3, out=tmp_path / "s")
    assert not objective.calls
    rows = (tmp_path / "s/trial-001/history.jsonl").read_text().splitlines()
    assert found.trials[1].val_loss == min(json.loads(row)["val_loss"] for row in rows)


@pytest.mark.slow
def test_groups_are_searched_over_and_a_diverging_run_fails(
    commands: Commands, tmp_path: Path
) -> None:
    """A learning rate of 1e30 ends in nan; the search goes on without it."""
    found = search(
        *("model=choice(mlp,mlp_no_dropout)", "optimizer=sgd", "optimizer.lr=choice(0.01,1e30)"),
        *("epochs=1", "data.limit=500"),
        "seed=2",
        num=5,
        out=tmp_path / "s",
    )
    for trial in found.trials:
        record = commands.opened(trial.run_dir).record
        assert record["choices"]["model"] == trial.params["model"]
        diverged = trial.params["optimizer.lr"] == 1e30
        assert record["status"] == ("failed" if diverged else "completed")
        assert (trial.val_loss is None) == diverged
        assert ("became nan or infinite" in str(trial.error)) == diverged
    assert {trial.params["model"] for trial in found.trials} == {"mlp", "mlp_no_dropout"}
    assert 0 < len(found.ranked) < 5


def test_help_imports_nothing_slow(commands: Commands, tmp_path: Path) -> None:
    line = commands.line("search", "--help")
    done = commands.call([line[0], "-X", "importtime", *line[1:]], tmp_path)
    assert done.returncode == 0 and "--out DIR" in done.stdout
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"optuna", "torch", "hydra", "omegaconf", "numpy"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--num", "0", LR), "num=0 must be at least 1"), ((LR, "-m"), "unrecognized arguments: -m")],
)
def test_mistakes_end_in_one_line(
    commands: Commands, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    assert words in commands.fail("search", *arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
