"""What somebody else's run directory can do to the files around it: nothing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fashionnet.data.photos import photos as load_photos
from fashionnet.errors import UserError
from fashionnet.evaluate import evaluate
from fashionnet.export import export
from fashionnet.list import list_runs
from fashionnet.mistakes import mistakes
from fashionnet.reproduce import reproduce
from fashionnet.runs import directory, record, saved
from fashionnet.runs.tensorboard import EventFile
from fashionnet.system import locks
from fashionnet.system.files import MOST_FOLDERS, remove
from fashionnet.train import train

if TYPE_CHECKING:
    from tests.conftest import Commands

TINY = ("data.limit=40", "model.hidden=4", "epochs=1", "device=cpu", "git_patch=true")
DEEP = 1500  # beyond Python's limit on recursion


def snapshot(folder: Path) -> dict[str, Any]:
    """Returns all there is below a folder: kinds, permissions, contents, targets of links."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            content = path.read_bytes() if stat.S_ISREG(mode) else None
            found[str(path)] = (mode, os.readlink(path) if path.is_symlink() else content)
    return found


@pytest.fixture(autouse=True, scope="module")
def _quick(one_thread: None) -> None:
    """Keeps torch to one thread."""


@pytest.fixture(scope="module")
def trained(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run; tests copy it."""
    path = tmp_path_factory.mktemp("trained") / "run"
    train(*TINY, run_dir=path)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run that a stranger sent."""
    return shutil.copytree(trained, tmp_path / "sent/run", symlinks=True)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The user's own files, which must stay as they are."""
    folder = tmp_path / "home"
    (folder / "photos").mkdir(parents=True)
    (folder / ".bashrc").write_text("export PATH=/bin\n")
    (folder / ".bashrc").chmod(0o600)
    (folder / "photos/last.pt").write_bytes(b"mine")
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


def interrupted(run: Path) -> None:
    """Lets a run look as one that was cut short in its last epoch."""
    values = record.read(run)
    values["status"] = "interrupted"
    record.Record(run, values).update()


def resume(run: Path) -> None:
    interrupted(run)
    train(*TINY, run_dir=run)


def to_more_epochs(run: Path) -> None:
    train(*TINY, "epochs=2", run_dir=run)


def overwrite(run: Path) -> None:
    train(*TINY, "overwrite=true", "seed=9", run_dir=run)


def profile(run: Path) -> None:
    train(*TINY, "epochs=2", "debug.profile=true", run_dir=run)


# All commands that write into a run directory, or beside it.
WRITERS: dict[str, Callable[[Path], object]] = {
    "evaluate": lambda run: evaluate(run, split="test", device="cpu"),
    "mistakes": lambda run: mistakes(run, device="cpu"),
    "export": lambda run: export(run, formats=["pt2"]),
    "reproduce": reproduce,
    "resume": resume,
    "more epochs": to_more_epochs,
    "overwrite": overwrite,
    "profile": profile,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_no_command_writes_through_a_second_name_or_a_link_in_place_of_a_temporary_file(
    run: Path, home: Path, name: str
) -> None:
    # A copy of hard links, as backups are made: each file of the run has a name there, too.
    for name_of_trace in ("trace.json", "trace.json.tmp"):
        (run / name_of_trace).write_text("{}")
    backup = run.parents[1] / "backup"
    shutil.copytree(run, backup, copy_function=os.link)
    (run / ".lock").unlink(missing_ok=True)  # this one is refused, see system/test_locks.py
    before = snapshot(backup)
    names = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    for path in (*names, Path("export/model.json"), Path("mistakes/validation/mistakes.png")):
        for number in (os.getpid(), os.getppid()):
            link = run / path.with_name(f".{path.name}.{number}.tmp")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(home / ".bashrc")
    try:
        WRITERS[name](run)
    except UserError as error:  # such links lead out of the directory
        assert "leads out of" in str(error)
        for link in run.rglob(".*.tmp"):
            link.unlink()
        WRITERS[name](run)
    assert snapshot(backup) == before


LINKED = (
    *("run.json", "history.jsonl", "train.log", "git.patch", "trace.json", ".lock", ".hydra"),
    *(".hydra/config.yaml", "checkpoints", "checkpoints/last.pt", "checkpoints/epoch-1.pt"),
    *("tensorboard", "tensorboard/train", "tensorboard/mistakes", "mistakes"),
    *("mistakes/validation", "export", "export/model.json", "checkpoints/best.pt"),
)


@pytest.mark.parametrize("target", [".bashrc", "photos", "new"])
@pytest.mark.parametrize("name", LINKED)
def test_a_link_that_leads_out_is_refused_before_anything_is_written(
    run: Path, home: Path, name: str, target: str
) -> None:
    config = saved.read(run).config
    config.epochs = 2
    remove(run / name)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(home / target)
    before = snapshot(run)
    with pytest.raises(UserError):
        saved.count_test_use(run)
    with pytest.raises(UserError), directory.claimed(run, config) as claimed:
        claimed.begin({"config.yaml": ""}, {"config": claimed.config})
    after = snapshot(run)
    if name != ".lock":
        assert after.pop(str(run / ".lock"), None) in (None, before.pop(str(run / ".lock"), None))
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoints", "train.log", "tensorboard", ".hydra", "run.json"])
def test_overwrite_removes_links_and_not_what_they_lead_to(
    run: Path, home: Path, name: str
) -> None:
    remove(run / name)
    (run / name).symlink_to(home / ("photos" if "." not in name else ".bashrc"))
    overwrite(run)
    assert not (run / name).is_symlink()
    assert record.read(run)["seed"] == 9


@pytest.mark.parametrize("command", [mistakes, export])
def test_links_in_a_folder_given_as_out_are_replaced(
    run: Path, home: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    names = ("mistakes.png", "confusion.csv", "model.json", "model.pt2")
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).symlink_to(home / ".bashrc")
    options: dict[str, Any] = {"formats": ["pt2"]} if command is export else {"device": "cpu"}
    command(run, out=tmp_path / "out", **options)
    written = [name for name in names if not (tmp_path / "out" / name).is_symlink()]
    assert written == list(names[2:] if command is export else names[:2])
    (tmp_path / "out/.lock").symlink_to(home / ".bashrc")
    with pytest.raises(UserError, match=r"\.lock is not a file of its own"):
        command(run, out=tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("command", "folder"), [(mistakes, "mistakes/validation"), (export, "export")]
)
def test_two_at_once_do_not_mix_their_files(
    run: Path, command: Callable[..., Any], folder: str
) -> None:
    (run / folder).mkdir(parents=True)
    with locks.exclusive(run / folder, remove=True):
        with pytest.raises(UserError, match=f"{folder} is in use by another"):
            command(run)
        assert os.listdir(run / folder) == [locks.NAME]
    command(run)
    assert locks.NAME not in os.listdir(run / folder)


def test_event_files_are_new_ones(home: Path, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)  # as an attacker would have it
    path = EventFile(run / "one").path
    (run / "other").mkdir()
    (run / "other" / path.name).symlink_to(home / ".bashrc")
    with pytest.raises(FileExistsError):
        EventFile(run / "other")


def test_a_rerun_is_not_begun_where_a_link_leads(run: Path, home: Path) -> None:
    (run.parent / "run-reproduced").symlink_to(home / "new")
    outcome = reproduce(run)
    assert outcome.run_dir.resolve() == (run.parent / "run-reproduced-2").resolve()


@pytest.mark.parametrize("name", ["multirun.yaml", ".submitit", "0"])
def test_a_sweep_in_a_strangers_folder_writes_nothing_elsewhere(
    commands: Commands, home: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "sweep").mkdir()
    target = home / (".bashrc" if name == "multirun.yaml" else "photos")
    (tmp_path / "sweep" / name).symlink_to(target)
    line = ("train", "-m", *TINY, "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra:job.num}")
    done = commands.run(*line, cwd=tmp_path)
    assert done.returncode == 2
    assert f"sweep/{name} leads out of" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_commands_refuse_in_one_line(commands: Commands, run: Path, home: Path) -> None:
    interrupted(run)
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").symlink_to(home / "photos")
    line = ("train", *TINY, f"hydra.run.dir={run}")
    assert "tensorboard leads out of" in commands.fail(*line, cwd=run.parent)
    record.Record(run, record.read(run) | {"status": "completed"}).update()
    command = ("evaluate", run, "--split", "test")  # others as functions, above
    assert "tensorboard leads out of" in commands.fail(*command, cwd=run.parent)
    assert record.read(run)["test"]["evaluations"] == 1


@pytest.mark.slow
def test_a_new_file_has_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(*TINY, run_dir=tmp_path / "run")
        evaluate(tmp_path / "run", split="test", device="cpu")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}


# --------------------------------------------------------------------- folders without end


def nest(folder: Path, depth: int = DEEP) -> None:
    """Makes folders, each in the one before; by steps, since a whole path would be too long."""
    folder.mkdir(parents=True, exist_ok=True)
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(depth):
            os.mkdir("a")
            os.chdir("a")
    finally:
        os.chdir(here)


@pytest.fixture(scope="module")
def nested(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run in which folders are nested without end; nothing can be written to it."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("nested") / "run")
    nest(run / "tensorboard/train/deep")
    yield run
    subprocess.run(["rm", "-rf", str(run)], check=True)  # Python could not, nor could pytest


@pytest.mark.parametrize("name", ["evaluate", "mistakes", "export", "more epochs", "overwrite"])
def test_folders_nested_without_end_are_refused_in_one_line(nested: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in nested.glob("*/*.pt")}
    with pytest.raises(UserError, match=f"nested more than {MOST_FOLDERS} deep"):
        WRITERS[name](nested)
    assert {path: path.read_bytes() for path in nested.glob("*/*.pt")} == before
    assert record.read(nested)["test"]["evaluations"] == 1


def test_a_place_too_deep_is_refused_in_one_line(commands: Commands, tmp_path: Path) -> None:
    deep = "/".join(["a"] * DEEP)
    for line in (("train", f"hydra.run.dir={deep}"), ("train", "-m", f"hydra.sweep.dir={deep}")):
        assert "a cannot be made with 1499 folders" in commands.fail(*line, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_search_for_runs_passes_folders_nested_without_end(nested: Path) -> None:
    assert [row["status"] for row in list_runs(nested.parent)] == ["completed"]
    assert list_runs(nested / "tensorboard") == []  # all the way down


def test_photos_nested_without_end_are_refused_in_one_line(
    nested: Path, photos: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(photos, tmp_path / "photos")
    (root / "train/red/deep").symlink_to(nested / "tensorboard")  # photos may lie behind links
    with pytest.raises(UserError, match=f"nested more than {MOST_FOLDERS} deep"):
        load_photos(root, cache=tmp_path / "cache")
