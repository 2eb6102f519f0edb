"""Checks a GPU machine: equal bits, resuming, several processes, transfer, the commands.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --only bits,resume --weights resnet18.safetensors --keep checked

Run it in a checkout whose packages are installed. It trains short and full runs of the lesson and
of a small ResNet, one check after another, in about three minutes on one H100-class GPU, and prints
a line for each. The exit status is 1 if any check failed; the folder with all runs is kept then.

`syncs` reports how often the host waits for the GPU in one epoch, and where; it checks nothing.
`--device cpu` runs the same checks without a GPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAIN = (sys.executable, "-m", "fashionnet.train")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
KILLS = 3

# Counts the places at which torch waits for the GPU.
COUNT_SYNCS = """
import collections, sys, traceback, warnings
import torch
from fashionnet.train import train
torch.zeros(1, device="cuda")
found = collections.Counter()
def note(message, *_, **__):
    if "synchroniz" in str(message).lower():
        ours = [f for f in traceback.extract_stack() if "/fashionnet/" in f.filename]
        at = ours[-1] if ours else None
        found[f"{at.filename.rpartition('/fashionnet/')[2]}: {at.line}" if at else "?"] += 1
warnings.showwarning = note
warnings.simplefilter("always")
torch.cuda.set_sync_debug_mode("warn")
train(*sys.argv[2:], run_dir=sys.argv[1])
for place, count in [("in all", sum(found.values())), *found.most_common(8)]:
    print(f"SYNC {count:5} {place}")
"""


@dataclass(frozen=True)
class Outcome:
    """What a check found."""

    name: str
    is_good: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.is_good else 'FAILED'}  {self.name}: {self.detail}"


@dataclass(frozen=True)
class Machine:
    """Where and on what the checks run.

    Attributes:
        folder: for the runs.
        device: the `device` of every run.
        overrides: of every run, e.g. to make all of them short.
        weights: a file of ResNet-18 weights to fine-tune; None: only from scratch.
    """

    folder: Path
    device: str
    overrides: tuple[str, ...]
    weights: Path | None

    def command(self, name: str, *overrides: str) -> list[str]:
        run_dir = f"hydra.run.dir={self.folder / name}"
        given = {word.partition("=")[0]: word for word in (*self.overrides, *overrides)}
        return [*TRAIN, run_dir, f"device={self.device}", *given.values()]

    def train(self, name: str, *overrides: str) -> dict[str, Any]:
        """Trains a run and returns its record.

        Raises:
            RuntimeError: the run failed; the message holds the last line of its output.
        """
        self.call(self.command(name, *overrides))
        record: dict[str, Any] = json.loads((self.folder / name / "run.json").read_text())
        return record

    def call(self, command: Sequence[str], status: int = 0) -> str:
        """Runs a command and returns its output, standard error included.

        Raises:
            RuntimeError: it ended with another status.
        """
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode != status:
            last = (done.stdout.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"status {done.returncode}: {last} ({' '.join(command[2:])})")
        return done.stdout


def same(name: str, records: Sequence[dict[str, Any]]) -> Outcome:
    """Compares the final weights and test figures of runs."""
    found = {(record["weights_sha256"], record["test"]["loss"]) for record in records}
    first = records[0]
    figures = f"test accuracy {first['test']['accuracy']:.4f}, fit {first['fit_seconds']:.2f} s"
    detail = f"{len(records)} runs on {first['device']}, weights {first['weights_sha256'][:10]}"
    return Outcome(name, len(found) == 1, f"{detail}, {figures}")


def tests(machine: Machine) -> Iterator[Outcome]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    yield Outcome("gpu tests", True, machine.call(command).strip().splitlines()[-1])


def bits(machine: Machine) -> Iterator[Outcome]:
    """Two runs of one configuration are bit-identical; the lesson reaches its accuracy."""
    machine.train("start", "epochs=1")  # the first process pays for CUDA's start
    for options in (
        (),
        ("gradients=autograd",),
        ("deterministic=true",),
        ("tf32=true",),
        ("precision=bfloat16",),
    ):
        name = options[0].replace("=", "_") if options else "lesson"
        runs = [machine.train(f"{name}_{number}", *options) for number in (1, 2)]
        yield same(f"two runs, {' '.join(options) or 'the lesson'}", runs)


def resume(machine: Machine) -> Iterator[Outcome]:
    """A run that is killed several times is bit-identical to an undisturbed one."""
    options = ("epochs=20", "checkpoint.every_seconds=0.2")
    began = time.monotonic()
    whole = machine.train("whole", *options)
    seconds = time.monotonic() - began
    for number in range(KILLS):
        process = subprocess.Popen(
            machine.command("killed", *options),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds * (0.4 + 0.15 * number))
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = machine.train("killed", *options)
    yield same(f"killed {KILLS} times and resumed", [whole, killed])


def processes(machine: Machine) -> Iterator[Outcome]:
    """torchrun with one process equals no torchrun; too many processes are refused."""
    alone = machine.train("alone", "epochs=1")
    command = machine.command("torchrun", "epochs=1")
    machine.call([*TORCHRUN, "--nproc-per-node=1", *command[1:]])
    record = json.loads((machine.folder / "torchrun" / "run.json").read_text())
    yield same("torchrun with one process", [alone, record])
    if machine.device == "cuda":
        import torch

        too_many = torch.cuda.device_count() + 1
        command = machine.command("too_many", "epochs=1", f"batch_size={32 * too_many}")
        line = [*TORCHRUN, f"--nproc-per-node={too_many}", *command[1:]]
        output = machine.call(line, status=1)
        refusal = next((row for row in output.splitlines() if row.startswith("error: ")), "")
        yield Outcome("more processes than devices", "CUDA devices" in refusal, refusal)


def transfer(machine: Machine) -> Iterator[Outcome]:
    """A ResNet: two runs from scratch, and fine-tuned from a file if one is given."""
    options = ["experiment=thousand_labels"]
    scratch = [*options, "model.trained=scratch"]
    yield same("ResNet from scratch", [machine.train(f"scratch_{n}", *scratch) for n in (1, 2)])
    if machine.weights is not None:
        options.append(f"model.pretrained={machine.weights}")
        yield same("ResNet fine-tuned", [machine.train(f"tuned_{n}", *options) for n in (1, 2)])


def commands(machine: Machine) -> Iterator[Outcome]:
    """The commands that read a run."""
    machine.train("read", "epochs=1")
    run = str(machine.folder / "read")
    for name, *arguments in (
        ("evaluate", run),
        ("evaluate", run, "--device", "cpu"),
        ("mistakes", run),
        ("list", str(machine.folder)),
        ("reproduce", run),
    ):
        line = [sys.executable, "-m", f"fashionnet.{name}", *arguments]
        last = machine.call(line).strip().splitlines()[-1]
        yield Outcome(f"fashionnet.{name}", True, last.replace(str(machine.folder), "…"))


def syncs(machine: Machine) -> Iterator[Outcome]:
    """Where the host waits for the GPU in one epoch of the lesson."""
    if machine.device != "cuda":
        yield Outcome("syncs", True, "needs CUDA")
        return
    run = str(machine.folder / "syncs")
    line = [sys.executable, "-c", COUNT_SYNCS, run, *machine.overrides, "epochs=1"]
    found = [row for row in machine.call(line).splitlines() if row.startswith("SYNC")]
    for row in found:
        _, count, place = row.split(maxsplit=2)
        yield Outcome("the host waits", True, f"{count} times {place}")


CHECKS: dict[str, Callable[[Machine], Iterator[Outcome]]] = {
    check.__name__: check for check in (tests, bits, resume, processes, transfer, commands, syncs)
}


def main() -> int:
    """Runs the checks and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CHECKS), help="of these, e.g. bits,resume")
    parser.add_argument("--device", default="cuda", help="of every run; default: cuda")
    parser.add_argument("--weights", type=Path, help="a file of ResNet-18 weights to fine-tune")
    parser.add_argument("--keep", type=Path, help="a folder to keep the runs in")
    parser.add_argument("overrides", nargs="*", help="of every run, e.g. data.limit=6400")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="gpu_check-"))
    weights = given.weights and given.weights.absolute()
    machine = Machine(folder.absolute(), given.device, tuple(given.overrides), weights)
    is_good = True
    for name in given.only.split(","):
        try:
            for outcome in CHECKS[name](machine):
                print(outcome, flush=True)
                is_good &= outcome.is_good
        except RuntimeError as error:
            print(Outcome(name, False, str(error)), flush=True)
            is_good = False
    if is_good and given.keep is None:
        shutil.rmtree(folder)
    elif not is_good:
        print(f"the runs are in {folder}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
