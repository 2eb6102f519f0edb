"""Times the lesson here and in its peers, in turn, on this machine.

    .venv/bin/python -m pip install -c constraints.txt -e '.[peers]'
    python scripts/benchmark.py lesson --rounds 5 --plot docs/benchmark.png
    python scripts/benchmark.py seeds --first 300 --seeds 300 --keras 100
    python scripts/benchmark.py checkpoints --epochs 5 100
    python scripts/benchmark.py sweep --runs 10
    python scripts/benchmark.py processes
    python scripts/benchmark.py features

`lesson` runs each contestant once a round as a process of its own, so that all meet the same
moments of a noisy machine, and compares by the median of the ratios within a round. `seeds` runs
the lesson with several seeds and prints mean and spread of its figures, with `--keras` beside those
of Keras on JAX. `checkpoints` measures which fraction of a fit goes into writing checkpoints.
`sweep` runs the lesson with several seeds through several launchers, in turn; with `--launchers
slurm joblib` it needs a Slurm, which `python -m tests.slurm python scripts/benchmark.py …` brings.
`processes` times epochs of two processes under torchrun beside those of one process with two
threads. `features` fits the head of a frozen ResNet-18 for twenty epochs to features that are
computed once, and with the backbone in each epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fashionnet.data import fashion_mnist
from fashionnet.system import files

HERE = Path(__file__).resolve().parent
OURS = "fashionnet"


@dataclass(frozen=True)
class Timing:
    """One process: seconds of the fit, of the whole process, and its peak memory in MB."""

    fit: float
    process: float
    memory: float
    accuracy: float


def contestants() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Returns each contestant's command and the environment it adds."""
    keras = [sys.executable, str(HERE / "peers" / "keras_lesson.py")]
    return {
        OURS: ([sys.executable, "-m", "fashionnet.train", "experiment=lesson"], {}),
        "Keras on JAX": (keras, {"KERAS_BACKEND": "jax"}),
        "Keras on TensorFlow": (keras, {"KERAS_BACKEND": "tensorflow"}),
        "PyTorch DataLoader loop": (
            [sys.executable, str(HERE / "peers" / "dataloader_lesson.py")],
            {},
        ),
    }


def write_keras_home(home: Path) -> None:
    """Lays Fashion-MNIST out where keras.datasets.fashion_mnist.load_data looks for it."""
    folder = home / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    dataset = fashion_mnist.fashion_mnist()
    for part, examples in (("train", dataset.train), ("t10k", dataset.open_test())):
        count = len(examples)
        images = struct.pack(">4i", 2051, count, 28, 28) + examples.images.numpy().tobytes()
        labels = struct.pack(">2i", 2049, count) + bytes(examples.labels.tolist())
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            packed = gzip.compress(content, compresslevel=1)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(packed)


def run_once(name: str, home: Path, folder: Path) -> Timing:
    """Runs one contestant to its end and returns what it cost."""
    command, extra = contestants()[name]
    if name == OURS:
        run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
        command = [*command, f"hydra.run.dir={run_dir}"]
    began = time.perf_counter()
    said, memory = output_of(name, command, extra, home, folder)
    seconds = time.perf_counter() - began
    if name == OURS:
        record = json.loads((run_dir / "run.json").read_text())
        fit, accuracy = record["fit_seconds"], record["test"]["accuracy"]
    else:
        told = json.loads(said.strip().splitlines()[-1])
        fit, accuracy = told["fit_seconds"], told["test_accuracy"]
    return Timing(fit, seconds, memory, accuracy)


def output_of(
    name: str, command: list[str], extra: dict[str, str], home: Path, folder: Path
) -> tuple[str, float]:
    """Runs a contestant's command; returns what it printed and its peak memory in MB."""
    environment = os.environ | extra | {"KERAS_HOME": str(home), "TF_CPP_MIN_LOG_LEVEL": "3"}
    with open(folder / "stdout", "w+b") as out, open(folder / "stderr", "w+b") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        said, complaint = out.read().decode(), err.read().decode()
    if process.returncode:
        last = complaint.strip().splitlines()[-1:] or ["no message"]
        raise SystemExit(f"error: {name} failed: {last[0]}; the peers need the extra `peers`")
    return said, usage.ru_maxrss / 1024


def lesson(rounds: int, names: list[str], plot: Path | None) -> None:
    """Runs the contestants in turn and prints medians, ranges and ratios."""
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "keras"
        write_keras_home(home)
        for number in range(1, rounds + 1):
            for name in names:
                timing = run_once(name, home, Path(scratch))
                timings[name].append(timing)
                print(
                    f"round {number}/{rounds}  {name:<24} fit {timing.fit:6.2f} s  "
                    f"process {timing.process:6.2f} s  {timing.memory:5.0f} MB  "
                    f"test accuracy {timing.accuracy:.4f}",
                    flush=True,
                )
    print("\n" + table(timings))
    if plot is not None:
        draw(timings, plot)
        print(f"\nplot: {plot}")


def table(timings: dict[str, list[Timing]]) -> str:
    """Returns the comparison as a Markdown table: median (least–most), ratio by round."""
    lines = [
        "| | fit, s | whole process, s | peak memory, MB | ratio of fits | ratio of processes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in timings.items():
        cells = [name, spread([t.fit for t in runs]), spread([t.process for t in runs])]
        cells.append(f"{statistics.median(t.memory for t in runs):.0f}")
        for figure in ("fit", "process"):
            ratios = [
                getattr(ours, figure) / getattr(theirs, figure)
                for ours, theirs in zip(timings[OURS], runs, strict=True)
            ]
            cells.append("" if name == OURS else f"{statistics.median(ratios):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Returns `median (least–most)`."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def draw(timings: dict[str, list[Timing]], path: Path) -> None:
    """Draws medians as bars, the fit within the process, with each round as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(timings)[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(names) + 1.3), layout="constrained")
    for row, name in enumerate(names):
        fit = statistics.median(t.fit for t in timings[name])
        process = statistics.median(t.process for t in timings[name])
        colour = "tab:red" if name == OURS else "tab:gray"
        axes.barh(row, process, color=colour, alpha=0.35, label="whole process" if not row else "")
        axes.barh(row, fit, color=colour, height=0.5, label="fit" if not row else "")
        axes.plot([t.process for t in timings[name]], [row] * len(timings[name]), "k.", ms=4)
        axes.annotate(
            f"fit {fit:.1f} s, process {process:.1f} s",
            (max(t.process for t in timings[name]), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("seconds, median of the rounds; dots: each round's process")
    axes.set_title("The lesson: 5 epochs of the MLP on Fashion-MNIST, batch 32")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.removeprefix(".") or "png"
    figure.savefig(content := io.BytesIO(), format=kind, dpi=150)
    files.write_output(path, content.getvalue())


FIGURES = {
    "test accuracy": "test_accuracy",
    "test loss": "test_loss",
    "final training accuracy": "accuracy",
    "final validation accuracy": "val_accuracy",
}


def seeds(first: int, count: int, keras_count: int) -> None:
    """Runs the lesson with seeds from `first` on and prints mean and spread of its figures."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sweep_seconds("vectorized", f"{first},{first + count}", folder)
        for path in sorted(folder.glob("sweep/*/run.json")):
            record = json.loads(path.read_text())
            final = json.loads((path.parent / "history.jsonl").read_text().splitlines()[-1])
            test = {f"test_{key}": record["test"][key] for key in ("accuracy", "loss")}
            ours.append({**final, **test})
        if keras_count:
            write_keras_home(folder / "keras")
        for seed in range(first, first + keras_count):
            name = "Keras on JAX"
            command, extra = contestants()[name]
            said, _ = output_of(name, [*command, str(seed)], extra, folder / "keras", folder)
            theirs.append(json.loads(said.strip().splitlines()[-1]))
    print("\n" + seed_table(ours, theirs))


def seed_table(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> str:
    """Returns mean ± sd of each figure as Markdown; if Keras' are given, how both differ.

    The difference of the means has its 95 % interval by Welch, the ratio of the standard deviations
    one by the bootstrap: 10,000 times as many seeds of each are drawn from them, with replacement.
    """
    here_head = f"{len(ours)} seeds here"
    head = f"| mean ± sd | {here_head} |"
    if theirs:
        head += f" {len(theirs)} of Keras | difference of means | ratio of sd |"
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for name, key in FIGURES.items():
        here, there = [run[key] for run in ours], [run[key] for run in theirs]
        cells = [name, f"{statistics.mean(here):.4f} ± {statistics.stdev(here):.4f}"]
        if there:
            from scipy import stats

            interval = stats.ttest_ind(here, there, equal_var=False).confidence_interval()
            cells.append(f"{statistics.mean(there):.4f} ± {statistics.stdev(there):.4f}")
            difference = statistics.mean(here) - statistics.mean(there)
            cells.append(f"{difference:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})")
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio_of_sd(here, there)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio_of_sd(here: list[float], there: list[float]) -> tuple[float, float, float]:
    """Returns the ratio of two standard deviations and the ends of its 95 % interval."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(values, (10_000, len(values))).std(1, ddof=1) for values in (here, there)]
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975))
    return statistics.stdev(here) / statistics.stdev(there), float(low), float(high)


def checkpoints(epochs: int) -> None:
    """Runs the lesson for some epochs and prints the share that its checkpoints take of the fit."""
    from fashionnet.runs import checkpoint
    from fashionnet.train import train

    spent: list[float] = []
    save = checkpoint.save

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        save(*arguments)
        spent.append(time.perf_counter() - began)

    checkpoint.save = timed
    try:
        quiet = contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory() as scratch, quiet:
            result = train(f"epochs={epochs}", run_dir=Path(scratch) / "run")
    finally:
        checkpoint.save = save
    fit = result.record["fit_seconds"]
    each, share = 1000 * statistics.median(spent), 100 * sum(spent) / fit
    print(
        f"{epochs} epochs: fit {fit:.1f} s, {len(spent)} checkpoints of {each:.0f} ms (median), "
        f"{share:.1f} % of the fit"
    )


def sweep_seconds(launcher: str, seeds: str, folder: Path) -> float:
    """Runs the lesson with some seeds below `folder`/sweep; returns the seconds of the process."""
    line = [sys.executable, "-m", "fashionnet.train", "-m", f"seed=range({seeds})"]
    line += ["experiment=lesson", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"]
    began = time.perf_counter()
    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def sweep(launchers: list[str], runs: int, rounds: int) -> None:
    """Times a sweep of the lesson through several launchers in turn, and compares the bits."""
    seconds: dict[str, list[float]] = {launcher: [] for launcher in launchers}
    weights: dict[str, dict[str, str]] = {}
    for number in range(rounds):
        for launcher, found in seconds.items():
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                found.append(sweep_seconds(launcher, str(runs), folder))
                weights[launcher] = {
                    path.parent.name: json.loads(path.read_text())["weights_sha256"]
                    for path in folder.glob("sweep/*/run.json")
                }
        last = ", ".join(f"{launcher} {found[-1]:.1f} s" for launcher, found in seconds.items())
        print(f"round {number + 1}: {last}", flush=True)
    first, *others = launchers
    for launcher in launchers:
        print(f"{launcher}: {runs} lessons in {spread(seconds[launcher])} s")
    for launcher in others:
        ratios = [a / b for a, b in zip(seconds[first], seconds[launcher], strict=True)]
        same = "the same" if weights[first] == weights[launcher] else "OTHER"
        print(f"{first} / {launcher}: {statistics.median(ratios):.2f}, with {same} bits")


# A network and what it trains on: epochs long enough that the meeting of processes is not all.
SHARED = {
    "mlp": ("model=mlp", "data.limit=25600", "gradients=autograd"),
    "resnet18": (
        *("model=resnet18", "model.trained=scratch", "model.size=64", "data.limit=1280"),
        "validation_split=0.001",
    ),
}


def processes(rounds: int) -> None:
    """Times an epoch of two processes against one with two threads, batches of 256, in turn."""
    alone = [sys.executable, "-m", "fashionnet.train", "threads=2"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two += ["-m", "fashionnet.train", "threads=1"]
    for model, overrides in SHARED.items():
        ratios, epochs = [], []
        for _ in range(rounds):
            found = []
            for line in (alone, two):
                with tempfile.TemporaryDirectory() as scratch:
                    more = ("batch_size=256", "epochs=3", "device=cpu", "hydra.run.dir=run")
                    subprocess.run(
                        [*line, *overrides, *more], cwd=scratch, check=True, capture_output=True
                    )
                    history = (Path(scratch) / "run/history.jsonl").read_text().splitlines()
                seconds = [json.loads(row)["epoch_seconds"] for row in history]
                found.append(statistics.median(seconds[1:]))
            epochs.append(found)
            ratios.append(found[1] / found[0])
        one, shared = ([found[i] for found in epochs] for i in (0, 1))
        print(
            f"{model}: an epoch {spread(one)} s in one process of two threads, {spread(shared)} s "
            f"in two processes; ratio {statistics.median(ratios):.2f}",
            flush=True,
        )


def features_once(rounds: int) -> None:
    """Times twenty epochs of a head on features computed once, and with the backbone each time."""
    import torch

    from fashionnet import data as datasets, models
    from fashionnet.config import compose
    from fashionnet.models import backbones
    from fashionnet.runs import pretrained
    from fashionnet.training import features, gradients, loop, optim, state
    from fashionnet.training.early_stopping import EarlyStopping

    ratios = []
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
                seen = features.inputs(model, train, fit.scale) if way == "features" else train
                loop.fit(fit, seen, validation, chosen.epochs, loop.Watcher())
                seconds[way] = time.perf_counter() - began
            ratios.append(seconds["backbone"] / seconds["features"])
            told = ", ".join(f"{way} {found:.1f} s" for way, found in seconds.items())
            print(f"round {number + 1}: {told}: {ratios[-1]:.1f} times", flush=True)
    print(f"twenty epochs on features computed once: {statistics.median(ratios):.1f} times as fast")


def main() -> None:
    """The command: `python scripts/benchmark.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("lesson", help="time the lesson here and in its peers")
    timed.add_argument("--rounds", type=int, default=5)
    timed.add_argument("--plot", type=Path, metavar="FILE")
    timed.add_argument("--only", nargs="+", choices=list(contestants()), default=None)
    seeded = commands.add_parser("seeds", help="the lesson's accuracies over several seeds")
    seeded.add_argument("--first", type=int, default=0, help="the first seed")
    seeded.add_argument("--seeds", type=int, default=10, help="at least 2")
    seeded.add_argument("--keras", type=int, default=0, help="seeds of Keras on JAX, beside it")
    saved = commands.add_parser("checkpoints", help="what checkpoints cost")
    saved.add_argument("--epochs", type=int, nargs="+", default=[5])
    swept = commands.add_parser("sweep", help="a sweep through several launchers, in turn")
    swept.add_argument("--launchers", nargs="+", default=["vectorized", "joblib"])
    swept.add_argument("--runs", type=int, default=10)
    swept.add_argument("--rounds", type=int, default=3)
    shared = commands.add_parser("processes", help="an epoch in two processes beside one")
    shared.add_argument("--rounds", type=int, default=3)
    frozen = commands.add_parser("features", help="features once beside the backbone each epoch")
    frozen.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.command == "sweep":
        sweep(given.launchers, given.runs, given.rounds)
    elif given.command == "processes":
        processes(given.rounds)
    elif given.command == "features":
        features_once(given.rounds)
    elif given.command == "seeds":
        seeds(given.first, given.seeds, given.keras)
    elif given.command == "checkpoints":
        for epochs in given.epochs:
            checkpoints(epochs)
    else:
        names = list(contestants()) if given.only is None else [OURS, *given.only]
        lesson(given.rounds, list(dict.fromkeys(names)), given.plot)


if __name__ == "__main__":
    main()
