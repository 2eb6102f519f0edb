"""What several test files share: commands in real processes, and the runs that they look at."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol

import numpy as np
import pytest
from PIL import Image

from tests.warm import Forked, Server, keep_data

# A run of half a second: 600 steps an epoch, hence several occasions for a checkpoint.
_SMALL = ("epochs=2", "data.limit=1200", "batch_size=2", "device=cpu")

# What the environment of the tests must not decide.
_UNSET = ("COMP_LINE", "COLUMNS", "FASHIONNET_ALLOW", "HYDRA_FULL_ERROR", "PYTHONWARNINGS")


# Whoever starts the tests may ignore Ctrl-C, as nohup does; their processes would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# TensorBoard reads its files without TensorFlow, which takes seconds to import.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))

# Files that cannot even be imported where an extra is missing, as on a GPU machine of others.
_NEED = {
    "analysis/test_diagrams.py": "matplotlib",
    "analysis/test_intervals.py": "pandas",
    "test_search.py": "optuna",
}
collect_ignore = [name for name, package in _NEED.items() if find_spec(package) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: side by side with others they end sooner."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _data_read_once() -> None:
    """Reads the data once for all tests of a process, which change nothing in it."""
    keep_data()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Lets a test take 2 GiB more than there is by now: what it guards must not fill a machine."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def raised_without_waiting(function: Callable[..., object], *arguments: object) -> object:
    """Returns what a call raises; fails, and does not hang, if the call waits for a pipe."""
    future: Future[object] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.exception(timeout=20)


@contextlib.contextmanager
def own_data_folder(place: Path) -> Iterator[Path]:
    """Makes `place` the data folder in the body; Fashion-MNIST is in it without a download."""
    from fashionnet.data import folders, published

    published.load("fashion_mnist")
    (place / "FashionMNIST").symlink_to(folders.default_root().absolute() / "FashionMNIST")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASHIONNET_DATA", str(place))
        yield place


@dataclass
class Commands:
    """Runs `python -m fashionnet.…` as a user does, each command in a process of its own."""

    server: Server  # imports once for many commands
    environment: dict[str, str]
    small: tuple[str, ...] = _SMALL  # the overrides of the fixture `small`

    def line(self, module: str, *arguments: str | Path) -> list[str]:
        """Returns the command line of a command."""
        return [sys.executable, "-m", f"fashionnet.{module}", *map(str, arguments)]

    def run(
        self, module: str, *arguments: str | Path, cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, with `environment` on top of the tests' own."""
        if self.server.can_start(environment):
            command = self.start(module, *arguments, cwd=cwd, **environment)
            out, err = command.communicate()
            return subprocess.CompletedProcess(command.args, command.wait(), out, err)
        return self.call(self.line(module, *arguments), cwd, environment)

    def start(
        self,
        module: str,
        *arguments: str | Path,
        cwd: Path,
        stdout: IO[bytes] | None = None,
        **environment: str,
    ) -> Forked:
        """Starts a command that need not import anything: see `tests/warm.py`."""
        assert self.server.can_start(environment)
        variables = self.environment | environment
        words = (f"fashionnet.{module}", *arguments)
        return self.server.start(*words, cwd=cwd, environment=variables, stdout=stdout)

    def execute(
        self, program: str, *arguments: str, cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs `python -c PROGRAM` in a process in which the package is imported already."""
        variables = self.environment | environment
        process = self.server.start(
            program, *arguments, cwd=cwd, environment=variables, option="-c"
        )
        out, err = process.communicate()
        return subprocess.CompletedProcess(program, process.wait(), out, err)

    def call(
        self, line: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs any command line in the tests' environment, from the start of its process on."""
        return subprocess.run(
            line,
            cwd=cwd,
            env=self.environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=600,
            check=False,
        )

    def succeed(self, module: str, *arguments: str | Path, cwd: Path, **environment: str) -> str:
        """Runs a command that must work and complain of nothing; returns what it printed."""
        done = self.run(module, *arguments, cwd=cwd, **environment)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout

    def fail(self, module: str, *arguments: str | Path, cwd: Path, **environment: str) -> str:
        """Runs a command that a user got wrong; returns its one line, without `error: `."""
        return self.error(self.run(module, *arguments, cwd=cwd, **environment))

    def error(self, done: subprocess.CompletedProcess[str]) -> str:
        """Checks the form that every user error has; returns the line without `error: `."""
        lines = done.stderr.splitlines()
        assert done.returncode == 2, (done.returncode, done.stderr)
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    def opened(self, run_dir: Path) -> FinishedRun:
        """Returns the run in a directory."""
        return FinishedRun(run_dir)

    def importing(self, folder: Path) -> dict[str, str]:
        """Returns the variable that lets Python import a user's modules from `folder`."""
        others = self.environment.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), others)))}


@dataclass(frozen=True)
class FinishedRun:
    """A run that a command made: where it lies, and what it printed."""

    path: Path
    stdout: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """What `run.json` holds now."""
        return dict(json.loads((self.path / "run.json").read_text()))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of `history.jsonl`."""
        lines = (self.path / "history.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def bits(self) -> tuple[str, list[dict[str, Any]]]:
        """What two runs of the same configuration share: weights, and history but its seconds."""
        rows = [{k: v for k, v in row.items() if k != "epoch_seconds"} for row in self.history]
        return self.record["weights_sha256"], rows

    def edit(self, **values: Any) -> None:
        """Changes keys of `run.json`."""
        (self.path / "run.json").write_text(json.dumps(self.record | values))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keeps threads of torch from waiting for each other over small tensors."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


COLORS = {"blue": (40, 40, 200), "green": (30, 180, 40), "red": (200, 40, 40)}


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small photos of three colors: train/ with 20 of each, val/ with 8."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for part, num in (("train", 20), ("val", 8)):
        for name, color in COLORS.items():
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(num):
                noise = random.integers(-40, 40, (40, 48, 3)) + np.array(color)
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Commands on the real data, which is fetched here if this is the first use of it."""
    from fashionnet.data import published

    published.load("fashion_mnist")
    environment = {k: v for k, v in os.environ.items() if k not in _UNSET}
    with contextlib.closing(Server(environment)) as server:
        yield Commands(server, environment)


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Runs independent commands side by side: most of what each costs is importing."""
    with ThreadPoolExecutor(max_workers=min(max(os.cpu_count() or 2, 2), 8)) as executor:
        yield executor
        executor.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def lesson(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Two epochs of the lesson on all of the data. Tests read it and change nothing in it."""
    folder = tmp_path_factory.mktemp("lesson")
    stdout = commands.succeed("train", "epochs=2", "hydra.run.dir=run", cwd=folder)
    return FinishedRun(folder / "run", stdout)


@pytest.fixture(scope="session")
def small(
    commands: Commands, pool: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinishedRun, FinishedRun]:
    """The same small run twice: one command, started at the same instant in the same folder."""
    folder = tmp_path_factory.mktemp("small")
    started: list[Future[str]] = [
        pool.submit(commands.succeed, "train", *commands.small, cwd=folder) for _ in range(2)
    ]
    for future in started:
        future.result()
    first, second = folder.glob("outputs/mlp/*")
    return FinishedRun(first), FinishedRun(second)


@pytest.fixture(scope="session")
def failed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run whose loss became nan in its first epoch, before there was a checkpoint."""
    folder = tmp_path_factory.mktemp("failed")
    commands.fail(
        *("train", "optimizer=sgd", "optimizer.lr=1e30", "data.limit=2000", "hydra.run.dir=run"),
        cwd=folder,
    )
    return FinishedRun(folder / "run")


class WriteRun(Protocol):
    """Writes a completed run that never ran, for tests of what is done with its figures."""

    def __call__(
        self,
        path: Path,
        seed: int = 0,
        epochs: Sequence[Mapping[str, float]] = (),
        *,
        model: str = "mlp",
        config: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> FinishedRun:
        """Writes it.

        Args:
            epochs: what differs from the defaults in the rows of its history.
            config: dotted keys.
            values: further keys of `run.json`, or of its `data`.
        """
        ...


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    return _write_run


def _write_run(
    path: Path,
    seed: int = 0,
    epochs: Sequence[Mapping[str, float]] = ({},),
    *,
    model: str = "mlp",
    config: Mapping[str, Any] | None = None,
    **values: Any,
) -> FinishedRun:
    settings: dict[str, Any] = {"seed": seed, "epochs": len(epochs), "batch_size": 32}
    data: dict[str, Any] = {"name": "fashion_mnist", "limit": None}
    settings |= {"data": data, "optimizer": {"_target_": "Adam", "lr": 0.001}}
    settings |= {"model": {"_target_": "MLP", "hidden": 128, "dropout": 0.2}}
    if model == "mlp_no_dropout":
        settings["model"]["dropout"] = 0.0
    for key, value in (config or {}).items():
        node, parts = settings, key.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = value
    defaults = {"loss": 0.5, "accuracy": 0.8, "val_loss": 0.4, "val_accuracy": 0.75}
    rows = [{"epoch": i, **defaults, **row} for i, row in enumerate(epochs, 1)]
    record: dict[str, Any] = {
        "schema_version": 2,
        "status": "completed",
        "config_hash": "c" * 64,
        "seed": seed,
        "device": "cpu",
        "threads": 1,
        "started": "2026-01-01T00:00:00.000+00:00",
        "choices": {"data": "fashion_mnist", "optimizer": "adam", "model": model},
        "config": settings,
        "data": {
            "name": "fashion_mnist",
            "sha256": {"images": "a" * 64},
            "train": 54000,
            "validation": 6000,
            "test": 10000,
            "split_sha256": "b" * 64,
            "image_shape": [28, 28],
            "class_names": ["Bag", "Coat"],
        },
        "validation": {"loss": 0.4, "accuracy": 0.75},
        "test": {"loss": 0.45, "accuracy": 0.7, "evaluations": 1},
        "fit_seconds": 2.0,
        "weights_sha256": "d" * 64,
    }
    if isinstance(values.get("data"), dict):
        values["data"] = record["data"] | values["data"]
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(record | values))
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"- model={model}", *(f"- {key}={value}" for key, value in (config or {}).items())]
    (path / ".hydra").mkdir()
    (path / ".hydra/overrides.yaml").write_text("\n".join(overrides) + "\n")
    return FinishedRun(path)
