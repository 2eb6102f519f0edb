"""Runs gathered for a comparison: which make a group, what it is called, what is left out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fashionnet.analysis.groups import gather
from fashionnet.errors import UserError

if TYPE_CHECKING:
    from tests.conftest import WriteRun

OTHER_DATA = {"sha256": {"images": "c" * 64}}


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(*folders: str | Path) -> list[str]:
    return [group.name for group in gather(folders).groups]


def test_runs_that_differ_in_the_seed_alone_are_one_group(write_run: WriteRun) -> None:
    for seed in (10, 0, 2):
        write_run(Path(f"runs/{seed}"), seed)
    write_run(Path("runs/elsewhere"), 1, config={"overwrite": True, "data.root": "/data"})
    (group,) = gather(["runs"]).groups
    assert [member.seed for member in group.members] == [0, 1, 2, 10]
    assert [member.name for member in group.members][::3] == ["runs/0", "runs/10"]
    assert group.name == "model=mlp"


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"model": "mlp_no_dropout"}, ["model=mlp", "model=mlp_no_dropout"]),
        ({"config": {"optimizer.lr": 0.01}}, ["optimizer.lr=0.001", "optimizer.lr=0.01"]),
        ({"config": {"data.limit": 9}}, ["data.limit=null", "data.limit=9"]),
        # The same option, changed: its name says too little.
        ({"config": {"model.dropout": 0.5}}, ["model.dropout=0.2", "model.dropout=0.5"]),
        # Another option and a key that did not come with it.
        (
            {"model": "mlp_no_dropout", "config": {"model.hidden": 64}},
            ["model=mlp model.hidden=128", "model=mlp_no_dropout model.hidden=64"],
        ),
        (
            {"model": "mlp_no_dropout", "choices": None},
            ["model.dropout=0.2", "model.dropout=0.0"],
        ),
        (
            {"model": "mlp_no_dropout", "config": {"batch_size": 64}},
            ["batch_size=32 model=mlp", "batch_size=64 model=mlp_no_dropout"],
        ),
        (
            {"data": OTHER_DATA},
            ["sha256.images=aaaaaaaa", "sha256.images=cccccccc"],
        ),
        (
            {"data": {"split_sha256": "d" * 64}},
            ["split_sha256=bbbbbbbb", "split_sha256=dddddddd"],
        ),
    ],
)
def test_groups_are_called_by_the_keys_in_which_they_differ(
    write_run: WriteRun, second: dict[str, Any], expected: list[str]
) -> None:
    write_run(Path("runs/a"))
    write_run(Path("runs/b"), **second)
    assert names("runs") == expected
    assert names("runs/b", "runs/a") == expected[::-1]  # in the order given


def test_groups_of_experiments_go_by_those(write_run: WriteRun) -> None:
    for experiment, lr in (("calm", 0.001), ("wild", 0.1)):
        choices = {"model": "mlp", "experiment": experiment}
        run = write_run(Path("runs", experiment), config={"optimizer.lr": lr}, choices=choices)
        overrides = f"- experiment={experiment}\n- seed=1\n- batch_size=32\n"
        (run.path / ".hydra/overrides.yaml").write_text(overrides)
    assert names("runs") == ["experiment=calm", "experiment=wild"]


def test_an_option_and_a_key_of_it_are_both_named(write_run: WriteRun) -> None:
    write_run(Path("runs/a"))
    write_run(Path("runs/b"), model="mlp_no_dropout")
    write_run(Path("runs/c"), model="mlp_no_dropout", config={"model.dropout": 0.5})
    assert names("runs") == [
        *("model=mlp model.dropout=0.2", "model=mlp_no_dropout model.dropout=0.0"),
        "model=mlp_no_dropout model.dropout=0.5",
    ]


def test_names_of_groups_are_distinct(write_run: WriteRun) -> None:
    write_run(Path("runs/a"), config={"optimizer.betas": "1"})
    write_run(Path("runs/b"), config={"optimizer.betas": 1})
    assert names("runs") == ["optimizer.betas=1 #0", "optimizer.betas=1 #1"]


def test_figures_of_a_run(write_run: WriteRun) -> None:
    rows = [{"val_loss": 0.5}, {"val_loss": 0.3}, {"accuracy": 0.9, "val_accuracy": 0.8}]
    write_run(Path("run"), 0, rows)
    (group,) = gather(["run"]).groups
    figures = dict(group.members[0].figures)
    assert figures.pop("gap") == pytest.approx(0.1)
    assert figures == {
        **{"loss": 0.5, "accuracy": 0.9, "val_loss": 0.4, "val_accuracy": 0.8},
        **{"test_loss": 0.45, "test_accuracy": 0.7, "fit_seconds": 2.0},
        **{"best_epoch": 2, "lowest_val_loss": 0.3},
    }


def test_final_is_the_epoch_whose_weights_were_restored(write_run: WriteRun) -> None:
    rows = [{"accuracy": 0.7}, {"accuracy": 0.8}, {"accuracy": 0.9}]
    hashes = {"weight_hashes": ["x", "y", "z"], "weights_sha256": "y"}
    write_run(Path("run"), 0, rows, **hashes)
    (group,) = gather(["run"]).groups
    assert group.members[0].figures["accuracy"] == 0.8


def test_a_run_without_validation_or_test_has_no_figures_of_it(write_run: WriteRun) -> None:
    run = write_run(Path("run"))
    (run.path / "history.jsonl").write_text('{"epoch": 1, "loss": 0.5, "accuracy": 0.8}\n')
    write_run(Path("sealed"), 1, test=None)
    (group,) = gather(["run", "sealed"]).groups
    absent = [[k for k, v in member.figures.items() if v is None] for member in group.members]
    validation = ["val_loss", "val_accuracy", "gap", "best_epoch", "lowest_val_loss"]
    assert absent == [validation, ["test_loss", "test_accuracy"]]


def test_unfinished_and_damaged_runs_are_left_out_by_name(write_run: WriteRun) -> None:
    write_run(Path("runs/fine"))
    write_run(Path("runs/failed"), status="failed", error="the loss is nan")
    write_run(Path("runs/going on"), status="running")
    write_run(Path("runs/no figure"), test={"loss": 0.5})
    write_run(Path("runs/no seed"), config={"seed": None})
    for name, text in {
        "no epoch": "",
        "text": '{"epoch": 1, "loss": "low", "accuracy": 0.8}\n',
        "cut": '{"epoch": 1, "lo',
    }.items():
        (write_run(Path("runs", name)).path / "history.jsonl").write_text(text)
    (write_run(Path("runs/record")).path / "run.json").write_text("{")
    found = gather(["runs"])
    assert [m.name for group in found.groups for m in group.members] == ["runs/fine"]
    reasons = {left.run.removeprefix("runs/"): left.reason for left in found.left_out}
    assert reasons.pop("failed") == "it is not completed but failed (the loss is nan)"
    assert reasons.pop("going on") == "it is not completed but running"
    assert sorted(reasons) == ["cut", "no epoch", "no figure", "no seed", "record", "text"]
    assert all("is damaged" in reason for reason in reasons.values())


def test_the_same_run_given_twice_counts_once(write_run: WriteRun) -> None:
    write_run(Path("runs/a"))
    write_run(Path("runs/b"), 1)
    os.symlink("runs", "link")
    found = gather(["runs", "runs/a", "link/b"])
    assert [m.seed for group in found.groups for m in group.members] == [0, 1]


def test_a_rerun_is_no_further_seed(write_run: WriteRun) -> None:
    write_run(Path("runs/a"))
    shutil.copytree("runs/a", "runs/b")
    write_run(Path("runs/c"), 0, [{"loss": 0.6}])
    found = gather(["runs"])
    assert [m.name for group in found.groups for m in group.members] == ["runs/a"]
    assert [(left.run, left.reason.split(", ")[1]) for left in found.left_out] == [
        ("runs/b", "and the same figures"),
        ("runs/c", "and different figures"),
    ]


def rerun(write_run: WriteRun, path: str, *originals: str, **values: Any) -> None:
    """Writes what `reproduce` makes: the device and threads as they were, its originals named."""
    parents = [
        {"path": str(Path(each).absolute()), "reproduced": True, "weights_sha256": each}
        for each in originals
    ]
    write_run(Path(path), config={"device": "cpu", "threads": 1}, parents=parents, **values)


def test_reruns_by_reproduce_give_way_to_their_original(write_run: WriteRun) -> None:
    write_run(Path("runs/b"), config={"device": "auto", "threads": None})
    rerun(write_run, "runs/a", "runs/b")
    rerun(write_run, "runs/c", "runs/b", "elsewhere/a")  # of a rerun that is not given
    rerun(write_run, "runs/d", "runs/b", weights_sha256="0" * 64)  # with other figures
    found = gather(["runs"])
    assert [m.name for group in found.groups for m in group.members] == ["runs/b"]
    assert [left.run for left in found.left_out] == ["runs/a", "runs/c", "runs/d"]
    assert all("the configuration and seed of runs/b" in left.reason for left in found.left_out)


def test_a_rerun_is_known_by_its_originals_weights_where_that_was_moved(
    write_run: WriteRun,
) -> None:
    write_run(Path("runs/b"), weights_sha256="before/b")
    rerun(write_run, "runs/a", "before/b", weights_sha256="before/b")
    found = gather(["runs"])
    assert [m.name for group in found.groups for m in group.members] == ["runs/b"]


def test_a_rerun_stands_for_an_original_that_is_not_given(write_run: WriteRun) -> None:
    write_run(Path("runs/b"), 1, config={"device": "auto", "threads": None})
    rerun(write_run, "runs/a", "elsewhere/a")
    (group,) = gather(["runs"]).groups
    assert [member.name for member in group.members] == ["runs/a", "runs/b"]


def test_a_rerun_that_was_trained_on_is_a_run_of_its_own(write_run: WriteRun) -> None:
    write_run(Path("runs/b"))
    original = {"path": str(Path("runs/b").absolute()), "reproduced": True}
    write_run(Path("runs/a"), epochs=[{}, {}], parents=[original, {"status": "completed"}])
    assert names("runs") == ["epochs=2", "epochs=1"]


def test_runs_are_compared_by_the_device_and_threads_that_they_used(write_run: WriteRun) -> None:
    for seed, (asked, used) in enumerate(
        [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
    ):
        write_run(Path(f"gpu/{seed}"), seed, config={"device": asked}, device=used)
    write_run(Path("cpu/0"), config={"device": "auto", "threads": None}, threads=2)
    write_run(Path("cpu/1"), 1, config={"device": "cpu", "threads": 2}, threads=2)
    assert [len(group.members) for group in gather(["gpu"]).groups] == [3]
    assert [len(group.members) for group in gather(["cpu"]).groups] == [2]
    assert names("cpu", "gpu") == ["device=cpu threads=2", "device=cuda threads=1"]


def test_folders_that_hold_nothing_to_compare_are_refused(write_run: WriteRun) -> None:
    Path("empty").mkdir()
    Path("file").touch()
    write_run(Path("runs/a"))
    write_run(Path("failed/a"), status="failed")
    for folder, message in {
        "empty": "empty is not a run directory, and there is none below it",
        "file": "file is not a folder",
        "missing": "missing is not a folder",
    }.items():
        with pytest.raises(UserError, match=message):
            gather(["runs", folder])
    with pytest.raises(UserError, match=r"no completed run is left to compare \(failed/a: it is"):
        gather(["failed"])
    with pytest.raises(UserError, match="nothing to compare"):
        gather([])
