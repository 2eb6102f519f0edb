"""`python -m fashionnet.compare`: groups of runs, and what differs between two."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fashionnet.compare import compare, compare_configs, main
from fashionnet.errors import UserError
from fashionnet.system import extras

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun, WriteRun


def test_two_runs_of_one_command_are_the_same(small: tuple[FinishedRun, FinishedRun]) -> None:
    first, second = small
    assert compare_configs(first.path, second.path) == {
        "config": [],
        "environment": [],
        "results": [],
    }


def test_a_table_and_a_plot_are_written_into_pipes_and_devices(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", epochs=[{}, {}])
    (tmp_path / "device").symlink_to(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(
        target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True
    )
    reader.start()
    arguments = ("compare", "run", "--csv", "device", "--plot", "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(arguments))
    main()
    reader.join(timeout=20)
    assert read[0].startswith(b"\x89PNG")
    assert (tmp_path / "device").is_symlink() and (tmp_path / "pipe").is_fifo()


def test_what_differs_is_told_by_part(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], failed: FinishedRun, tmp_path: Path
) -> None:
    first, second = small[0], failed
    told = commands.succeed("compare", "--config", first.path, second.path, cwd=tmp_path)
    config, _, results = (
        told[told.index(f"{part}:") :] for part in ("config", "environment", "results")
    )
    assert "  batch_size: 2 -> 32\n" in config
    assert "  optimizer.lr: 0.001 -> 1e+30\n" in config
    assert "environment:" in told
    assert "  status: completed -> failed\n" in results
    assert "  validation: {'loss': " in results

    answer = commands.succeed(
        "compare", "--json", "--config", first.path, second.path, cwd=tmp_path
    )
    found = json.loads(answer)
    assert {"key": "batch_size", "first": 2, "second": 32, "epoch": None} in found["config"]


def test_the_first_epoch_and_quantity_that_part_are_named(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    for name in ("one", "other"):
        shutil.copytree(small[0].path, tmp_path / name)
    one, other = (commands.opened(tmp_path / name) for name in ("one", "other"))
    # Where there is no checkout, or no GPU, there is no record of one.
    one.edit(git={"commit": "def", "dirty": True}, gpu={"name": "NVIDIA H200", "cudnn": 91002})
    rows = other.history
    rows[1]["val_accuracy"] = 0.5
    (other.path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.edit(threads=7, device="cuda:0", git={"commit": "abc", "dirty": True})
    other.edit(gpu={"name": "NVIDIA H100", "cudnn": 91002})
    (other.path / "git.patch").write_text("+1")
    found = compare_configs(one.path, other.path)
    (parted,) = found["results"]
    assert (parted.key, parted.epoch, parted.second) == ("val_accuracy", 2, 0.5)
    assert str(parted).startswith("epoch 2, val_accuracy: ")
    environment = {difference.key: difference.second for difference in found["environment"]}
    assert {"threads": 7, "device": "cuda:0", "git.commit": "abc"}.items() <= environment.items()
    assert environment["gpu.name"] == "NVIDIA H100"
    assert "gpu.cudnn" not in environment
    assert "git.patch" in environment


def test_what_is_no_run_is_told(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        compare_configs(small[0].path, tmp_path / "nowhere")
    assert "expected 2" in commands.fail("compare", "--config", small[0].path, cwd=tmp_path)
    assert "--config" in commands.fail("compare", cwd=tmp_path)


def test_groups_of_real_runs(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], failed: FinishedRun, tmp_path: Path
) -> None:
    sweep = tmp_path / "outputs/sweep"
    train = ("epochs=2", "data.limit=200", "device=cpu", "seed=0,1", "model=mlp,mlp_no_dropout")
    commands.succeed("train", "-m", *train, "hydra.sweep.dir=outputs/sweep", cwd=tmp_path)
    shutil.copytree(failed.path, sweep / "failed")
    files = ("--plot", "curves.svg", "--csv", "figures.csv")
    told = commands.succeed("compare", "outputs/sweep", *files, cwd=tmp_path)
    assert told.splitlines()[0].split() == ["model=mlp", "model=mlp_no_dropout"]
    assert "model=mlp_no_dropout minus model=mlp, paired by seed" in told
    assert "left out: outputs/sweep/failed: it is not completed but failed (" in told
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    head, *rows = (tmp_path / "figures.csv").read_text().splitlines()
    assert head == "group,metric,num_seeds,mean,sd,low,high"
    assert len(rows) == 2 * 10

    answer = commands.succeed(
        "compare", sweep, small[0].path, "--metric", "gap", "--json", cwd=tmp_path
    )
    plain = json.loads(answer)
    runs = [commands.opened(tmp_path / name) for name in plain["groups"][0]["runs"]]
    tested = [run.record["test"]["accuracy"] for run in runs]
    figures = plain["groups"][0]["figures"]["test_accuracy"]
    assert figures["mean"] == pytest.approx(sum(tested) / 2)
    assert [len(group["seeds"]) for group in plain["groups"]] == [2, 2, 1]
    assert "batch_size=2" in plain["groups"][2]["name"]
    assert {row["metric"] for row in plain["differences"]} == {"gap"}
    assert "| --- |" in commands.succeed("compare", sweep, "--markdown", cwd=tmp_path)


def test_two_runs_of_one_seed_are_one(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    told = commands.succeed("compare", small[0].path, small[1].path, cwd=tmp_path)
    assert f"left out: {small[1].path}: it has the configuration and seed of" in told
    assert "and the same figures" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["empty"], "error: empty is not a run directory, and there is none below it\n"),
        (["run", "nowhere"], "error: nowhere is not a folder\n"),
        (["failed"], "error: no completed run is left to compare (failed: it is not completed but"),
        (["run", "--metric", "f1"], "error: --metric f1 is not known; choose loss, accuracy, val_"),
        (["run", "--plot", "plot.gif"], "end its name in .png or .svg\n"),
        (["run", "--plot", "no/plot.png"], "error: the plot no/plot.png cannot be written"),
        (["run", "--csv", "no/a.csv"], "error: the table no/a.csv cannot be written"),
        (["run", "--json", "--markdown"], "not allowed with"),
        (["run", "--config", "run", "run"], "leave out all but --json"),
        (["--config", "run", "run", "--markdown"], "leave out all but --json"),
    ],
)
def test_what_cannot_be_compared_is_told(
    arguments: list[str],
    told: str,
    write_run: WriteRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    write_run(Path("failed"), status="failed")
    Path("empty").mkdir()
    assert told in refused(arguments, monkeypatch, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "failed", "run"]


def refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Runs the command in this process, which must end with one line; returns it."""
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    return printed.err


@pytest.mark.parametrize("package", ["pandas", "scipy.special", "matplotlib"])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    package: str,
    write_run: WriteRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    plot = ["--plot", str(tmp_path / "plot.png")]
    told = refused([str(tmp_path / "run"), *plot], monkeypatch, capsys)
    assert extras.install_command("plots") in told
    if package == "matplotlib":
        compare(tmp_path)


def test_two_runs_are_compared_without_the_extra(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> None:
    for package in ("pandas", "scipy", "matplotlib"):
        (tmp_path / f"{package}.py").write_text("raise ImportError\n")
    missing = commands.importing(tmp_path)
    first, second = (run.path for run in small)
    told = commands.succeed("compare", "--config", first, second, cwd=tmp_path, **missing)
    assert "config: the same" in told
