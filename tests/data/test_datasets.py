"""Whether the data are those that a run has seen, at every door where a run meets data again."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fashionnet import data as datasets
from fashionnet.config.schema import DataConfig
from fashionnet.data import published
from fashionnet.data.folders import default_root
from fashionnet.errors import UserError
from fashionnet.evaluate import evaluate
from fashionnet.mistakes import mistakes
from fashionnet.reproduce import reproduce
from fashionnet.train import train
from tests.conftest import Commands, own_data_folder

REAL = default_root()  # the real data, whatever a test puts in its place
SETTINGS = ("data=photos", "data.size=16", "batch_size=8", "device=cpu", "model.hidden=8")


@pytest.fixture(autouse=True, scope="module")
def _quick(one_thread: None) -> None:
    """Small networks on one thread."""


@pytest.fixture(autouse=True, scope="module")
def _own_cache(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Photos are decoded into a folder of the tests' own; `commands` outlive it."""
    with own_data_folder(tmp_path_factory.mktemp("cache")):
        yield


@dataclass(frozen=True)
class Trained:
    """A completed run, and the photos that it was trained on."""

    path: Path
    photos: Path

    @property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "run.json").read_text()))

    def edit(self, **values: Any) -> None:
        (self.path / "run.json").write_text(json.dumps(self.record | values))

    def again(self, *overrides: str, root: Path | None = None) -> Any:
        """Starts the same command again."""
        place = f"data.root={root or self.photos}"
        return train(*SETTINGS, "epochs=2", place, *overrides, run_dir=self.path)


def add(folder: Path, name: str = "new.png") -> None:
    values = np.random.default_rng(len(name)).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / name)


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("made")
    trained = Trained(place / "run", place / "photos")
    shutil.copytree(photos / "train", trained.photos)  # what is tested on is split off
    trained.again()
    return trained


@pytest.fixture
def run(made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """A copy of the run and its photos."""
    shutil.copytree(made.path, tmp_path / "run")
    shutil.copytree(made.photos, tmp_path / "photos")
    copied = Trained(tmp_path / "run", tmp_path / "photos")
    config = copied.record["config"]
    config["data"]["root"] = str(copied.photos)
    copied.edit(config=config)
    monkeypatch.chdir(tmp_path)
    return copied


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def resume(run: Trained) -> None:
    run.edit(status="interrupted")
    run.again()


def move_into_a_part(photos: Path) -> None:
    moved = photos.rename(photos.with_name("train"))
    photos.mkdir()
    moved.rename(photos / "train")


# Each way in which a run meets data again.
DOORS: dict[str, Callable[[Trained], object]] = {
    "resume": resume,
    "more epochs": lambda run: run.again("epochs=3"),
    "evaluate": lambda run: evaluate(run.path),
    "evaluate the test set": lambda run: evaluate(run.path, "test"),
    "mistakes": lambda run: mistakes(run.path),
    "reproduce": lambda run: reproduce(run.path),
    "reproduce elsewhere": lambda run: reproduce(run.path, root=run.photos),
}

CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "grown": (
        lambda photos: add(photos / "red"),
        "photos has changed (60 pictures then, 61 now)",
    ),
    "a photo exchanged": (
        lambda photos: add(photos / "red", "0.png"),
        "photos has changed (60 pictures then, as many now",
    ),
    "a photo in another class": (
        lambda photos: (photos / "red/0.png").rename(photos / "blue/x.png"),
        "photos has changed (60 pictures then, as many now",
    ),
    "a class renamed": (
        lambda photos: (photos / "red").rename(photos / "rouge"),
        "classes: blue, green, red then, blue, green, rouge now",
    ),
    "moved into a part": (move_into_a_part, "photos is gone; train is new"),
}


@pytest.mark.parametrize("door", DOORS)
def test_changed_photos_are_refused_at_every_door(door: str, run: Trained) -> None:
    add(run.photos / "red")
    if door == "resume":
        run.edit(status="interrupted")
    before = contents(run.path)
    with pytest.raises(UserError) as refusal:
        DOORS[door](run)
    assert "was trained on other data: photos has changed (60 pictures then, 61 now); " in str(
        refusal.value
    )
    assert contents(run.path) == before
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["photos", "run"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named(change: str, run: Trained) -> None:
    alter, words = CHANGES[change]
    alter(run.photos)
    with pytest.raises(UserError) as refusal:
        evaluate(run.path)
    assert words in str(refusal.value)


def test_the_same_photos_elsewhere_are_the_same_data(run: Trained) -> None:
    moved = run.photos.rename(run.photos.with_name("moved"))
    for split in ("validation", "test"):
        with pytest.raises(UserError, match=rf"were in {run.photos}, .*--data-root names"):
            evaluate(run.path, split)
        recorded = run.record[split]
        found = evaluate(run.path, split, root=str(moved))
        assert (found.loss, found.accuracy) == (recorded["loss"], recorded["accuracy"])
        assert found.other_data is None
    here = replace(run, photos=moved)
    for door in ("reproduce elsewhere", "resume", "more epochs"):
        DOORS[door](here)
        if door == "resume":
            assert here.record["config"]["data"]["root"] == str(moved)


def test_a_split_of_its_own_is_other_data(run: Trained) -> None:
    """What another version, seed or fraction splits off is not what the run left unseen."""
    config = run.record["config"]
    for key, value in {"seed": 1, "test_split": 0.3}.items():
        run.edit(config=config | {"data": config["data"] | {key: value}})
        with pytest.raises(UserError, match="the same pictures are split differently"):
            evaluate(run.path, "test")
    run.edit(config=config | {"validation_split": 0.3})
    with pytest.raises(UserError, match="the same pictures are split differently"):
        evaluate(run.path)


def test_other_data_by_choice_are_reported_and_never_the_runs_own(run: Trained) -> None:
    mistakes(run.path)
    other = run.photos.with_name("other")
    shutil.copytree(run.photos, other)
    add(other / "blue")
    before = contents(run.path)
    found = evaluate(run.path, root=str(other))
    assert found.other_data == "photos has changed (60 pictures then, 61 now)"
    with pytest.raises(UserError, match=r"other data: .*; --out DIR keeps"):
        mistakes(run.path, root=str(other))
    with pytest.raises(UserError, match=r"other data: .*; --out DIR keeps"):
        mistakes(run.path, root=str(other), out=run.path / "mistakes/validation")
    report = mistakes(run.path, root=str(other), out=other.with_name("out"))
    assert report.other_data == found.other_data
    assert contents(run.path) == before
    evaluate(run.path, "test", root=str(other))  # a use of photos that may be the run's
    assert run.record["test"] == {**json.loads(before["run.json"])["test"], "evaluations": 2}


def test_other_data_are_named_in_the_output(commands: Commands, run: Trained) -> None:
    add(run.photos / "red")
    line = ("evaluate", "run", "--data-root", run.photos)
    said = commands.succeed(*line, cwd=run.path.parent)
    assert said.splitlines()[1].startswith("on other data than the run's: photos has changed (60")
    answer = json.loads(commands.succeed(*line, "--json", cwd=run.path.parent))
    assert set(answer) == {"split", "loss", "accuracy", "other_data"}


def test_other_classes_are_refused_by_choice_too(run: Trained) -> None:
    (run.photos / "red").rename(run.photos / "rouge")
    with pytest.raises(UserError, match=r"classes: .* then, .* now; .*choose data of the same"):
        evaluate(run.path, root=str(run.photos))


# ------------------------------------------------------------------------------------ where


def test_a_relative_folder_is_recorded_absolute(run: Trained, tmp_path: Path) -> None:
    done = train(*SETTINGS, "epochs=1", "data.root=photos", run_dir=tmp_path / "new")
    assert done.record["config"]["data"]["root"] == str(tmp_path / "photos")
    (tmp_path / "deeper").mkdir()
    os.chdir(tmp_path / "deeper")
    assert evaluate(done.run_dir).loss == done.record["validation"]["loss"]


def test_a_folder_whose_name_is_not_utf_8(run: Trained, tmp_path: Path) -> None:
    place = run.photos.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    add(place / "red", os.fsdecode(b"\xe9.png"))
    done = train(*SETTINGS, "epochs=1", f"data.root='{place}'", run_dir=tmp_path / "new")
    assert evaluate(done.run_dir).loss == done.record["validation"]["loss"]


def test_a_search_that_goes_on_refuses_changed_photos(run: Trained, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from fashionnet.search import search

    line = (*SETTINGS, "epochs=1", f"data.root={run.photos}", "optimizer.lr=0.01,0.001")
    search(*line, num=1, out=tmp_path / "search")
    add(run.photos / "red")
    with pytest.raises(UserError, match=r"other data: photos has changed \(60 pictures then, 61"):
        search(*line, num=2, out=tmp_path / "search")


def test_photos_that_change_during_a_search_end_it(run: Trained, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from fashionnet import search
    from fashionnet.runs.study import propose

    def change_and_propose(*arguments: Any) -> None:
        add(run.photos / "red")
        propose(*arguments)

    line = (*SETTINGS, "epochs=1", f"data.root={run.photos}", "optimizer.lr=0.01,0.001")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "propose", change_and_propose)
        with pytest.raises(UserError, match=r"^the data changed during the search: photos has"):
            search.search(*line, num=2, out=tmp_path / "search")
    assert not list((tmp_path / "search").glob("trial-*/checkpoints"))


def test_a_sweep_that_is_started_again_refuses_changed_photos(
    commands: Commands, run: Trained, tmp_path: Path
) -> None:
    line = [*SETTINGS, "epochs=1", f"data.root={run.photos}", "hydra.sweep.dir=sweep", "seed=0,1"]
    assert commands.run("train", "-m", *line, cwd=tmp_path).returncode == 0
    add(run.photos / "red")
    done = commands.run("train", "-m", *line, cwd=tmp_path)
    assert done.returncode == 2
    assert "was trained on other data: photos has changed (60 pictures then, 61" in done.stderr


@pytest.mark.parametrize("kept", ["nothing", "packed", "training set", "damaged"])
def test_a_recorded_folder_is_never_written_to(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it decide where files are fetched to."""
    place = tmp_path / "strangers"
    place.mkdir()
    monkeypatch.setenv("FASHIONNET_DATA", str(REAL))
    data = published.SETS["fashion_mnist"]
    for source in {"nothing": (), "training set": data.train}.get(kept, data.files):
        content = (REAL / data.folder / source.name).read_bytes()
        if kept == "packed":
            (place / f"{source.name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (place / source.name).write_bytes(content)
    if kept == "damaged":
        with open(place / data.train[1].name, "r+b") as file:
            file.write(b"damage")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    config = DataConfig(name="fashion_mnist", root=str(place))
    dataset = datasets.load_recorded(config, (28, 28))
    assert len(dataset.train) == 60_000 and len(dataset.open_test()) == 10_000
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
