"""Parts of the package: starting commands, checkpoints, transfer, processes, features, a GPU."""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import lesson, runs

# A network and what it trains on: epochs long enough that the meeting of processes is not all.
SHARED = {
    "mlp": ("model=mlp", "data.limit=25600", "gradients=autograd"),
    "resnet18": (
        *("model=resnet18", "model.trained=scratch", "model.size=64", "data.limit=1280"),
        "validation_split=0.001",
    ),
}
SHARED_NAMES = {
    "mlp": "the lesson's network, 25,600 pictures an epoch",
    "resnet18": "ResNet-18 at 64 pixels, 1,280 pictures an epoch",
}
# A GPU's steps one by one, as where a network cannot be captured.
_EAGER = """
from fashionnet import train
from fashionnet.training import captured, steps
captured.choose = lambda state: steps.Eager()
train.main()
"""
_TOGETHER = 100


def startup(rounds: int) -> dict[str, Any]:
    """Times commands that compute next to nothing, in turn, beside an import of torch."""
    from PIL import Image

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        module = [sys.executable, "-m"]
        small = ["fashionnet.train", "epochs=1", "data.limit=64", "device=cpu"]
        runs.timed([*module, *small, "hydra.run.dir=runs/run"], folder)
        picture = np.arange(784, dtype=np.uint8).reshape(28, 28)
        Image.fromarray(picture).save(folder / "picture.png")
        for number in range(rounds):
            lines = {
                "import torch": [sys.executable, "-c", "import torch"],
                "train --help": [*module, "fashionnet.train", "--help"],
                "list": [*module, "fashionnet.list", "runs"],
                "compare --help": [*module, "fashionnet.compare", "--help"],
                "predict, one picture": [*module, "fashionnet.predict", "runs/run", "picture.png"],
                "train, one epoch of 64 pictures": [*module, *small, f"hydra.run.dir=new{number}"],
            }
            for name, line in lines.items():
                seconds.setdefault(name, []).append(runs.timed(line, folder).seconds)
    for name, found in seconds.items():
        print(f"{name}: {runs.spread(found, 2)} s")
    return {"seconds": seconds}


def checkpoints(epochs: list[int]) -> dict[str, Any]:
    """Measures which fraction of the lesson's fit goes into writing checkpoints."""
    from fashionnet.runs import checkpoint
    from fashionnet.train import train

    found = []
    save = checkpoint.save
    for num in epochs:
        spent: list[float] = []

        def timed(*arguments: Any, spent: list[float] = spent) -> None:
            began = time.perf_counter()
            save(*arguments)
            spent.append(time.perf_counter() - began)

        checkpoint.save = timed
        try:
            quiet = contextlib.redirect_stdout(io.StringIO())
            with tempfile.TemporaryDirectory() as scratch, quiet:
                result = train(f"epochs={num}", "device=cpu", run_dir=Path(scratch) / "run")
        finally:
            checkpoint.save = save
        fit = result.record["fit_seconds"]
        found.append({"epochs": num, "fit": fit, "seconds": spent})
        print(
            f"{num} epochs: fit {fit:.1f} s, {len(spent)} checkpoints of "
            f"{1000 * statistics.median(spent):.0f} ms (median), {100 * sum(spent) / fit:.1f} % of "
            "the fit"
        )
    return {"runs": found}


def transfer(weights: str, rounds: int) -> dict[str, Any]:
    """Times `experiment=thousand_labels` from pretrained weights and from scratch, in turn."""
    ways = {
        "pretrained": (f"model.pretrained={weights}",),
        "from scratch": ("model.trained=scratch",),
    }
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for seed in range(rounds):
        for way, overrides in ways.items():
            cost = runs.trained("experiment=thousand_labels", f"seed={seed}", *overrides)
            found[way].append({"seed": seed, **cost})
            print(f"seed {seed}  {way}: process {cost['process']:.0f} s", flush=True)
    return {"runs": found}


def gpu(rounds: int) -> dict[str, Any]:
    """Times the lesson on a GPU, in turn: as it is, in other ways, in Keras, and 100 seeds of it.

    Raises:
        SystemExit: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        print("error: this machine has no CUDA device", file=sys.stderr)
        raise SystemExit(2)
    chosen = ("experiment=lesson", "device=cuda")
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        lesson.OURS: lambda: runs.trained(*chosen),
        "one step at a time": lambda: runs.trained(*chosen, program=("-c", _EAGER)),
        "gradients=autograd": lambda: runs.trained(*chosen, "gradients=autograd"),
        f"{_TOGETHER} seeds together": lambda: _together(*chosen),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        if _jax_has_gpu():
            lesson.write_keras_home(home)
            ways[lesson.KERAS] = lambda: lesson.CONTESTANTS[lesson.KERAS](home)
        else:
            print(f"{lesson.KERAS} is left out: jax finds no GPU", flush=True)
        for _ in range(rounds):
            for way, run in ways.items():
                found.setdefault(way, []).append(run())
                print(f"{way}: fit {found[way][-1]['fit']:.2f} s", flush=True)
    return {"runs": found}


def _together(*overrides: str) -> dict[str, Any]:
    """Trains many seeds as one computation; returns its seconds and the mean accuracy."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        process = runs.swept("vectorized", folder, *overrides, f"seed=range({_TOGETHER})")
        records = [json.loads(p.read_text()) for p in folder.glob("sweep/*/run.json")]
    return {
        "fit": records[0]["group"]["fit_seconds"],
        "process": process,
        "test_accuracy": statistics.mean(record["test"]["accuracy"] for record in records),
    }


def _jax_has_gpu() -> bool:
    line = [sys.executable, "-c", "import jax; raise SystemExit(jax.default_backend() != 'gpu')"]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


def processes(rounds: int) -> dict[str, Any]:
    """Times an epoch of two processes against one with two threads, batches of 256, in turn."""
    alone = [sys.executable, "-m", "fashionnet.train", "threads=2"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two += ["-m", "fashionnet.train", "threads=1"]
    found: dict[str, dict[str, list[float]]] = {}
    for model, overrides in SHARED.items():
        seconds: dict[str, list[float]] = {"one process": [], "two processes": []}
        for _ in range(rounds):
            for name, line in zip(seconds, (alone, two), strict=True):
                with tempfile.TemporaryDirectory() as scratch:
                    more = ("batch_size=256", "epochs=3", "device=cpu", "hydra.run.dir=run")
                    runs.timed([*line, *overrides, *more], Path(scratch))
                    history = (Path(scratch) / "run/history.jsonl").read_text().splitlines()
                later = [json.loads(row)["epoch_seconds"] for row in history][1:]
                seconds[name].append(statistics.median(later))
        found[model] = seconds
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        shown = ", ".join(f"{name} {runs.spread(values)} s" for name, values in seconds.items())
        print(f"{model}: an epoch, {shown}; ratio {statistics.median(ratios):.2f}", flush=True)
    return {"epoch_seconds": found}


def features(rounds: int) -> dict[str, Any]:
    """Times twenty epochs of a head on features computed once, and with the backbone each time."""
    import torch

    from fashionnet import data as datasets, models
    from fashionnet.config import compose
    from fashionnet.models import backbones
    from fashionnet.runs import pretrained
    from fashionnet.training import features as once, gradients, loop, optim, state
    from fashionnet.training.early_stopping import EarlyStopping

    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights.pth"  # how long it takes does not depend on them
        torch.save(backbones.build("torchvision", "resnet18")[0].state_dict(), weights)
        overrides = ["experiment=transfer", "data.limit=1000", "model.size=64"]
        chosen = compose.typed(compose.compose(*overrides, f"model.pretrained={weights}"))
        dataset = datasets.load(chosen.data)
        train, validation = dataset.split(0.0, chosen.data.limit)
        for number in range(rounds):
            seconds = {}
            for way in ("features", "backbone"):
                os.environ["FASHIONNET_DATA"] = f"{scratch}/{number}"  # nothing is kept there yet
                model = models.build(chosen.model, dataset.image_shape, 10, chosen.seed)
                pretrained.load_pretrained(model)
                fit = state.TrainState(
                    model,
                    optim.build(chosen.optimizer, model),
                    gradients.choose("autograd", model),
                    EarlyStopping(),
                    chosen.seed,
                    chosen.batch_size,
                    chosen.data.scale,
                )
                began = time.perf_counter()
                seen = once.inputs(model, train, fit.scale) if way == "features" else train
                loop.fit(fit, seen, validation, chosen.epochs, loop.Watcher())
                seconds[way] = time.perf_counter() - began
            found.append(seconds)
            ratio = seconds["backbone"] / seconds["features"]
            print(f"round {number + 1}: {ratio:.1f} times as fast on features", flush=True)
    return {"seconds": found}
