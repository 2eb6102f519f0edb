"""The lesson here and in its peers, in turn, and the same arithmetic without anything around it."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import runs

_HERE = Path(__file__).resolve().parent
PEERS = _HERE.parent / "peers"
OURS = "fashionnet"
FLOOR = "its arithmetic alone"
KERAS = "Keras on JAX"


def lesson(rounds: int, only: list[str] | None) -> dict[str, Any]:
    """Runs each contestant once a round, so that all meet the same moments of a noisy machine."""
    names = [OURS, *(only or CONTESTANTS)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "keras"
        write_keras_home(home)
        for number in range(1, rounds + 1):
            for name, costs in found.items():
                costs.append(CONTESTANTS[name](home))
                shown = "  ".join(f"{key} {value:.2f}" for key, value in costs[-1].items())
                print(f"round {number}/{rounds}  {name:<24} {shown}", flush=True)
    return {"rounds": rounds, "contestants": found}


def ours(threads: int) -> Callable[[Path], dict[str, Any]]:
    def run(home: Path) -> dict[str, Any]:
        cost = runs.trained("experiment=lesson", "device=cpu", f"threads={threads}")
        return {key: cost[key] for key in ("fit", "process", "memory", "test_accuracy")}

    return run


def peer(script: Path, **environment: str) -> Callable[[Path], dict[str, Any]]:
    def run(home: Path) -> dict[str, Any]:
        return peer_run(home, script, **environment)

    return run


def peer_run(home: Path, script: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """Runs a peer, which prints its figures as JSON in its last line."""
    with tempfile.TemporaryDirectory() as scratch:
        line = [sys.executable, str(script), *arguments]
        cost = runs.timed(
            line, Path(scratch), KERAS_HOME=str(home), TF_CPP_MIN_LOG_LEVEL="3", **environment
        )
    found = json.loads(cost.said.strip().splitlines()[-1])
    return {
        "fit": found.pop("fit_seconds"),
        "process": cost.seconds,
        "memory": cost.memory,
        **found,
    }


def floor(home: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        said = runs.timed([sys.executable, str(_HERE / "floor.py")], Path(scratch)).said
    return {"fit": float(said)}


KERAS_SCRIPT = PEERS / "keras_lesson.py"
CONTESTANTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    OURS: ours(1),
    f"{OURS}, threads=2": ours(2),
    KERAS: peer(KERAS_SCRIPT, KERAS_BACKEND="jax"),
    "Keras on TensorFlow": peer(KERAS_SCRIPT, KERAS_BACKEND="tensorflow"),
    "PyTorch DataLoader loop": peer(PEERS / "dataloader_lesson.py"),
    FLOOR: floor,
}


def write_keras_home(home: Path) -> None:
    """Lays Fashion-MNIST out where keras.datasets.fashion_mnist.load_data looks for it.

    This needs torch, and Linux counts the memory of a process among that of its children, so that
    a process of its own does it.
    """
    process = multiprocessing.get_context("spawn").Process(target=_write_keras_home, args=(home,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(1)


def _write_keras_home(home: Path) -> None:
    from fashionnet.data import published

    folder = home / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    dataset = published.load("fashion_mnist")
    for part, examples in (("train", dataset.train), ("t10k", dataset.open_test())):
        count = len(examples)
        images = struct.pack(">4i", 2051, count, 28, 28) + examples.images.numpy().tobytes()
        labels = struct.pack(">2i", 2049, count) + bytes(examples.labels.tolist())
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            packed = gzip.compress(content, compresslevel=1)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(packed)
