"""`run.json`: what it holds, how it is read, and what it says of the code and the command."""

from __future__ import annotations

import copy
import json
import platform
import random
import re
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fashionnet.config import schema
from fashionnet.config.schema import Config, DataConfig
from fashionnet.data import describe, examples
from fashionnet.data.examples import Dataset, Examples
from fashionnet.errors import UserError
from fashionnet.models.mlp import MLP
from fashionnet.models.weights import weights_sha256
from fashionnet.runs import facts, record
from fashionnet.runs.record import Record

SOUND: dict[str, Any] = {
    "schema_version": 2,
    "status": "completed",
    "config": {
        "seed": 0,
        "epochs": 1,
        "model": {"_target_": "fashionnet.models.mlp.MLP"},
        "optimizer": {"_target_": "fashionnet.training.optim.Adam"},
        "data": {"name": "fashion_mnist"},
    },
    "config_hash": "a" * 64,
    "seed": 0,
    "device": "cpu",
    "threads": 1,
    "data": {
        **{"name": "fashion_mnist", "sha256": {"images": "b" * 64}, "split_sha256": "c" * 64},
        **{"train": 9, "validation": 1, "test": 2},
        **{"image_shape": [28, 28], "class_names": ["a", "b"]},
    },
    "started": "2026-01-01T00:00:00.000+00:00",
    "validation": None,
    "test": {"loss": 0.5, "accuracy": 0.5, "evaluations": 1},
    "fit_seconds": 1.0,
    "weights_sha256": "d" * 64,
}


def a_config(**changes: Any) -> Config:
    return Config(
        model={"_target_": "fashionnet.models.mlp.MLP"},
        optimizer={"_target_": "fashionnet.training.optim.Adam"},
        data=DataConfig("fashion_mnist"),
        **changes,
    )


# ---------------------------------------------------------------------------------- file


def test_every_change_reaches_the_disk(tmp_path: Path) -> None:
    kept = Record(tmp_path, {})
    kept.update(**SOUND | {"status": "running"})
    assert record.read(tmp_path) == SOUND | {"status": "running"}
    kept.update(status="completed", fit_seconds=2.0)
    assert record.read(tmp_path) == SOUND | {"fit_seconds": 2.0}
    assert record.read(tmp_path) == kept.values
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_figures_keep_their_full_precision(tmp_path: Path) -> None:
    test = SOUND["test"] | {"loss": 0.1 + 0.2}
    Record(tmp_path, dict(SOUND)).update(test=test)
    assert record.read(tmp_path)["test"] == test


@pytest.mark.parametrize("version", [0, 1, 10**300])
def test_a_record_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    Record(tmp_path, SOUND | {"schema_version": version, "status": "melted"}).update()
    with pytest.raises(UserError, match=r"run\.json has the schema_version .* reads 2") as caught:
        record.read(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["test", "validation", "fit_seconds", "weights_sha256"])
def test_what_only_a_completed_run_has(tmp_path: Path, key: str) -> None:
    values = {name: value for name, value in SOUND.items() if name != key}
    Record(tmp_path, values).update(status="interrupted")
    assert record.read(tmp_path) == values | {"status": "interrupted"}
    Record(tmp_path, values).update(status="completed")
    with pytest.raises(UserError, match=rf"run\.json is damaged: {key} is missing"):
        record.read(tmp_path)


DAMAGED: dict[str, tuple[Any, str]] = {
    "seed": (True, "seed=True must be a whole number"),
    "threads": (0, "threads=0 must be 1 or more"),
    "started": ({}, "started={} must be text"),
    "choices": ({"data": []}, r"choices\.data=\[\] must be text"),
    "config.seed": (10**400, r"config\.seed=1e\d+ must be at most"),
    "config.epochs": (1.5, r"config\.epochs=1\.5 must be a whole number"),
    "config.validation_split": (1, r"config\.validation_split=1 must be below 1"),
    "config.model": ({"_target_": "a", "hidden": [[[[[[[[[]]]]]]]]]}, "nested too deeply"),
    "config.model.hidden": (10**30, r"config\.model\.hidden=10+ must be at most"),
    "config.optimizer": ({}, r"config\.optimizer\._target_ is missing"),
    "config.data.classes": ([1], r"config\.data\.classes\[0\]=1 must be text"),
    "data.image_shape": ([1, 10**6], r"data\.image_shape\[1\]=1000000 must be at most 1,024"),
    "data.class_names": ([], r"data\.class_names has 0 items"),
    "data.class_names ": (["a", "a"], "names one thing twice"),
    "data.sha256": ({"images": None}, r"data\.sha256\.images=None must be text"),
    "test.evaluations": (-1, r"test\.evaluations=-1 must be 0 or more"),
    "test.evaluations ": (10**20, r"test\.evaluations=\d+ must be at most"),
    "test.loss": ("low", r"test\.loss=low must be a number"),
    "weight_hashes": (["a", 3], r"weight_hashes\[1\]=3 must be text"),
    "parents": ([{"path": 3}], r"parents\[0\]\.path=3 must be text"),
    "parents ": ([{"config": {"epochs": None}}], r"parents\[0\]\.config\.\w+ is missing"),
    "git": ({"a": [[[[[[[[]]]]]]]]}, "git is nested too deeply"),
    "whatever": ([0] * 30_000, "whatever holds more than 20000 values"),
}


@pytest.mark.parametrize("key", DAMAGED)
def test_a_value_of_the_wrong_form_is_named(tmp_path: Path, key: str) -> None:
    value, said = DAMAGED[key]
    values = copy.deepcopy(SOUND)
    node, parts = values, key.strip().split(".")
    for part in parts[:-1]:
        node = node[part]
    node[parts[-1]] = value
    Record(tmp_path, values).update()
    with pytest.raises(UserError, match=rf"run\.json is damaged: .*{said}") as caught:
        record.read(tmp_path)
    assert len(str(caught.value)) < 400


def test_figures_that_are_no_numbers_are_read(tmp_path: Path) -> None:
    # What a network that overflows in evaluation ends with.
    test = SOUND["test"] | {"loss": float("inf"), "accuracy": float("nan")}
    Record(tmp_path, SOUND | {"test": test}).update()
    assert str(record.read(tmp_path)["test"]) == str(test)


@pytest.mark.parametrize("status", record.STATUSES)
def test_every_status_is_known(tmp_path: Path, status: str) -> None:
    Record(tmp_path, dict(SOUND)).update(status=status)
    assert record.read(tmp_path)["status"] == status


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder; .*fashionnet\.list"):
        record.read(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        record.read(tmp_path / "file")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: it holds no run\.json"):
        record.read(tmp_path)
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UserError, match="is not a run directory"):
        record.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"{}",
        b'{"status": "completed"}',
        b'{"status": "done", "config": {}}',
        b'{"status": ["completed"], "config": {}}',
        b'{"status": "completed", "config": []}',
        b'{"status": "completed", "config": null}',
        b'{"config": {}}',
        json.dumps(SOUND).encode()[:-1],
        pytest.param(b'{"config":' * 60_000, id="nested"),
    ],
)
def test_a_damaged_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json is damaged: "):
        record.read(tmp_path)


def test_a_record_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b" " * (5 * 2**20))
    with pytest.raises(UserError, match=r"run\.json is larger than"):
        record.read(tmp_path)


# ----------------------------------------------------------------------------------- facts


def test_at_start_holds_what_the_contract_names() -> None:
    images, model = torch.zeros(10, 28, 28, dtype=torch.uint8), MLP()
    dataset = Dataset(
        name="fashion_mnist",
        class_names=("a", "b"),
        image_shape=(28, 28),
        train=Examples(images, torch.zeros(10, dtype=torch.int64)),
        num_test=7,
        sources={"images": "ab12"},
        read_test=lambda: Examples(images[:7], torch.zeros(7, dtype=torch.int64)),
    )
    config = a_config(seed=3, deterministic=True)
    sizes = {"train": 9, "validation": 1, "test": 7}
    found = facts.at_start(config, {"model": "mlp"}, describe(dataset, 0.1, None), model)
    assert json.loads(json.dumps(found)) == found
    assert found["schema_version"] == 2
    assert found["choices"] == {"model": "mlp"}
    assert found["config"] == schema.as_dict(config)
    assert found["config_hash"] == schema.config_hash(found["config"])
    assert (found["seed"], found["device"], found["deterministic"]) == (3, "cpu", True)
    assert found["threads"] == torch.get_num_threads()
    assert found["data"] == {
        "name": "fashion_mnist",
        "sha256": {"images": "ab12"},
        **sizes,
        "split_sha256": examples.split_sha256([range(9), range(9, 10)]),
        "image_shape": [28, 28],
        "class_names": ["a", "b"],
    }
    assert found["parameters"] == 101_770
    assert found["initial_weights_sha256"] == weights_sha256(model.state_dict())
    assert {"command", "packages", "python", "platform", "git"} <= found.keys()


def test_the_environment_names_versions() -> None:
    found = facts.environment(torch.device("cpu"))
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["packages"]) >= {"fashionnet", "torch", "numpy", "hydra-core", "omegaconf"}


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert facts._version("a-package-that-nobody-has") is None


def test_times_are_utc_to_the_millisecond() -> None:
    text = facts.utc_now()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", text)
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(text)) < timedelta(minutes=1)


# --------------------------------------------------------------------------------- command


def test_the_command_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/train.py", "model=mlp", "seed=range(3)", "a b"])
    main = SimpleNamespace(__spec__=SimpleNamespace(name="fashionnet.train"))
    monkeypatch.setitem(sys.modules, "__main__", main)  # type: ignore[arg-type]
    assert facts.command_line() == "python -m fashionnet.train model=mlp 'seed=range(3)' 'a b'"
    main.__spec__.name = "pytest.__main__"
    assert facts.command_line().startswith("python -m pytest model=mlp")


def test_the_command_of_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/fashionnet-train", "seed=1"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))  # type: ignore[arg-type]
    assert facts.command_line() == "/x/fashionnet-train seed=1"


# ------------------------------------------------------------------------------------- git


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which the package's code seems to lie, with one commit."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    try:
        git(tmp_path, "init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (tmp_path / "record.py").touch()
    git(tmp_path, "add", "record.py")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.setattr(facts, "__file__", str(tmp_path / "record.py"))
    return tmp_path


def test_the_commit_of_a_clean_checkout(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert facts.git_state() == {"commit": commit, "dirty": False, "untracked": []}


@pytest.mark.parametrize("name", ["record.py", "new.py"])
def test_changes_make_a_checkout_dirty(checkout: Path, name: str) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / name).write_text("changed")
    untracked = [name] if name == "new.py" else []
    assert facts.git_state() == {"commit": commit, "dirty": True, "untracked": untracked}


def test_the_patch_holds_what_was_changed(checkout: Path, tmp_path_factory: Any) -> None:
    run_dir, clone = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("clone")
    git(clone, "clone", str(checkout), ".")
    (checkout / "record.py").write_bytes(b"changed\x00\xff")
    (checkout / "staged.py").write_text("new")
    git(checkout, "add", "staged.py")
    facts.write_patch(run_dir)
    git(clone, "apply", str(run_dir / "git.patch"))
    assert (clone / "record.py").read_bytes() == b"changed\x00\xff"
    assert (clone / "staged.py").read_text() == "new"


def test_no_patch_of_a_clean_checkout_nor_of_a_huge_change(
    checkout: Path, tmp_path_factory: Any
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    facts.write_patch(run_dir)
    (checkout / "record.py").write_bytes(random.Random(0).randbytes(2**21))
    facts.write_patch(run_dir)
    assert not list(run_dir.iterdir())


def test_the_patch_of_the_start_stays(checkout: Path, tmp_path_factory: Any) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    (checkout / "record.py").write_text("one")
    facts.write_patch(run_dir)
    first = (run_dir / "git.patch").read_bytes()
    facts.write_patch(run_dir, part=2)
    (checkout / "record.py").write_text("two")
    facts.write_patch(run_dir, part=3)
    assert (run_dir / "git.patch").read_bytes() == first
    assert b"two" in (run_dir / "git.3.patch").read_bytes()
    assert not (run_dir / "git.2.patch").exists()


def test_many_untracked_files_are_not_all_named(checkout: Path) -> None:
    for number in range(150):
        (checkout / f"new{number}.py").touch()
    state = facts.git_state()
    assert state is not None and len(state["untracked"]) == 100


def test_an_installed_package_inside_somebody_elses_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "venv").mkdir()
    (checkout / "venv/record.py").touch()
    monkeypatch.setattr(facts, "__file__", str(checkout / "venv/record.py"))
    assert facts.git_state() is None


def test_no_checkout_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "record.py").touch()
    monkeypatch.setattr(facts, "__file__", str(tmp_path / "record.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert facts.git_state() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.git_state() is None
