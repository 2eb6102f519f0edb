"""Kills runs at random moments, again and again, and checks that each comes to the same bits.

    python scripts/soak.py --kills 100
    python scripts/soak.py --kills 20 --only stopped --seed 1 --keep soak

Short runs of several kinds are trained once undisturbed. Then each kind is trained anew, in a
process that is killed by SIGKILL or SIGTERM, and the same command is started again until it ends
by itself. What came out must be what came out undisturbed: the record's figures and hashes, the
history, the curves and the checkpoints with all their state; only seconds and the number of looks
at the test set may differ. Nobody lends a hand: a restart that is refused ends the soak.

A quarter of the kills falls anywhere in the life of a process and another after it wrote its
record, so that importing is not all that is hit; a quarter falls while a checkpoint is written.
The exit status is 1 if anything differed or failed; the folders are kept then.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import torch

TRAIN = [sys.executable, "-m", "fashionnet.train"]
# A second of fitting; steps enough for checkpoints within an epoch, at every occasion.
SHORT = ("data.limit=6400", "epochs=3", "batch_size=8", "checkpoint.every_seconds=0.001")
KINDS: dict[str, tuple[str, ...]] = {
    "mlp": ("model=mlp",),
    "mlp_no_dropout": ("model=mlp_no_dropout", "seed=1"),
    "stopped": (  # with a rate so high that the validation loss soon rises
        *("epochs=20", "optimizer.lr=0.02", "early_stopping.patience=1"),
        "early_stopping.restore_best_weights=true",
    ),
    "autograd": ("gradients=autograd",),
    "sgd": ("optimizer=sgd",),
    "no_validation": ("validation_split=0",),
}

STARTING = "starting, before its first record"
FITTING = "fitting"
WRITING = "writing a checkpoint"
EVALUATING = "evaluating at the end"
DONE = "done, after completion"
PHASES = (STARTING, FITTING, WRITING, EVALUATING, DONE)

# What of the record must be the same.
_RECORDED = (
    *("status", "config_hash", "data", "parameters", "initial_weights_sha256"),
    *("weights_sha256", "weight_hashes", "best_epoch", "epochs_done", "validation", "test"),
)
_MAY_DIFFER = ("epoch_seconds", "fit_seconds", "evaluations")
_MOST_SECONDS = 300.0  # for one process, on the slowest machine
_GLANCE = 0.0005  # a checkpoint is written in a few milliseconds


class Fault(Exception):
    """A process ended as it must not."""


# ------------------------------------------------------------------------------- what came out


def facts(run_dir: Path) -> dict[str, Any]:
    """Returns all of a finished run that a kill must not change, by the name of each part."""
    record = json.loads((run_dir / "run.json").read_text())
    history = (run_dir / "history.jsonl").read_text().splitlines()
    nest = {
        "run.json": {key: record.get(key) for key in _RECORDED},
        "history.jsonl": [json.loads(line) for line in history],
        "tensorboard": {p.name: curves(p) for p in (run_dir / "tensorboard").iterdir()},
        "checkpoints": {
            name: torch.load(run_dir / "checkpoints" / name, weights_only=True)
            for name in ("last.pt", "best.pt")
        },
        "temporary files": sorted(path.name for path in run_dir.rglob(".*.tmp")),
    }
    return dict(leaves(nest))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns tag → (step, value) pairs of all event files in a TensorBoard folder."""
    # TensorBoard's own loader would import TensorFlow where that is installed.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.errors import OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.iterdir()):
        reader = PyRecordReader_New(str(file))
        with contextlib.suppress(OutOfRangeError):  # the end of the file
            while True:
                reader.GetNext()
                event = Event.FromString(reader.record())
                for value in event.summary.value:
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def leaves(nest: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what a nest of dicts and lists holds, by name; a tensor as the hash of its bytes."""
    if isinstance(nest, torch.Tensor):
        content = nest.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{nest.dtype} {tuple(nest.shape)} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(nest, Mapping):
        for key, value in nest.items():
            if key not in _MAY_DIFFER:
                yield from leaves(value, f"{name} {key}".lstrip())
    elif isinstance(nest, list | tuple):
        yield f"{name}, length", len(nest)
        for number, value in enumerate(nest, 1):
            yield from leaves(value, f"{name} {number}")
    else:
        yield name, nest


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Returns a line for each of the `facts` that two runs do not share."""
    nothing = "nothing"
    return [
        f"{name}: {found.get(name, nothing)}, undisturbed {expected.get(name, nothing)}"
        for name in [*expected, *(found.keys() - expected.keys())]
        if (name in expected, expected.get(name)) != (name in found, found.get(name))
    ]


# ------------------------------------------------------------------------------------- killing


@dataclass(frozen=True)
class Reference:
    """What a kind of run comes to undisturbed, and the seconds that it takes to.

    Attributes:
        seconds: of the process.
        working: of them, once everything is imported.
    """

    facts: dict[str, Any]
    num_epochs: int
    seconds: float
    working: float


@dataclass(frozen=True)
class Kill:
    """A signal and its moment.

    Attributes:
        aim: "start": `delay` counts from the start of the process; "record": from when it has
            written its record; "write": the signal waits for a checkpoint under way after that.
        delay: seconds.
    """

    signal: signal.Signals
    aim: str
    delay: float


def draw(chance: random.Random, reference: Reference) -> Kill:
    """Draws how and when the next process is killed; it may well end before."""
    number = SIGTERM if chance.random() < 0.25 else SIGKILL
    aim = chance.choice(("start", "start", "record", "write"))
    span = reference.seconds if aim == "start" else reference.working
    return Kill(number, aim, chance.uniform(0, span))


def strike(process: subprocess.Popen[bytes], kill: Kill, run_dir: Path, before: object) -> None:
    """Sends the signal at its moment, unless the process ends before."""

    def wait_for(condition: Callable[[], object]) -> None:
        while process.poll() is None and not condition():
            time.sleep(_GLANCE)

    if kill.aim != "start":
        wait_for(lambda: stamp(run_dir) != before)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(kill.delay)
    if kill.aim == "write":
        wait_for(lambda: half_written(run_dir))
    process.send_signal(kill.signal)


def stamp(run_dir: Path) -> tuple[int, int] | None:
    """Returns what tells one version of a run's record from the next; None if there is none."""
    try:
        found = (run_dir / "run.json").stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def half_written(run_dir: Path) -> list[Path]:
    """Returns the temporary files of the checkpoints that a process was writing.

    It has removed those of earlier ones before it writes its record.
    """
    return list((run_dir / "checkpoints").glob(".*.tmp"))


def phase_of(run_dir: Path, before: object, num_epochs: int) -> str:
    """Returns what a process that has ended was doing, by what it left.

    Args:
        before: the record's `stamp` before the process started.
        num_epochs: how many the whole run has.
    """
    if stamp(run_dir) in (before, None):
        return STARTING
    if read_status(run_dir) == "completed":
        return DONE
    if half_written(run_dir):
        return WRITING
    history = run_dir / "history.jsonl"
    rows = history.read_text().count("\n") if history.exists() else 0
    return EVALUATING if rows == num_epochs else FITTING


def read_status(run_dir: Path) -> str:
    """Returns the status in the record of a run."""
    return str(json.loads((run_dir / "run.json").read_text())["status"])


def start(kind: str, run_dir: Path, kill: Kill | None = None, num_epochs: int = 0) -> str | None:
    """Trains in a process of its own until it ends or is killed.

    Returns:
        The phase in which it was killed, or None if it came to its end.

    Raises:
        Fault: it was refused, failed, or took the signal in another way than it should.
    """
    command = [*TRAIN, *SHORT, *KINDS[kind], "device=cpu", f"hydra.run.dir={run_dir.name}"]
    said, before = run_dir.with_name(f"{run_dir.name}.out"), stamp(run_dir)
    with (
        open(said, "wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, cwd=run_dir.parent) as process,
    ):
        if kill is not None:
            strike(process, kill, run_dir, before)
        try:
            status = process.wait(_MOST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
    if status == 0:
        return None
    phase = phase_of(run_dir, before, num_epochs)
    if kill is None or not is_right_end(kill, status, phase, run_dir):
        raise Fault(
            f"ended with status {status}, {phase}; sent: {kill}\n"
            f"cd {run_dir.parent} && {shlex.join(command)}\n{said.read_text(errors='replace')}"
        )
    return phase


def is_right_end(kill: Kill, status: int | None, phase: str, run_dir: Path) -> bool:
    """Returns whether a killed process ended as it should.

    SIGTERM lets a run note its end and leave with status 143; while Python or torch is being
    imported, and when all is done, nothing catches it yet or any more.
    """
    if kill.signal == SIGKILL:
        return status == -SIGKILL
    if phase in (STARTING, DONE):
        return status in (-SIGTERM, 128 + SIGTERM)
    return status == 128 + SIGTERM and phase != WRITING and read_status(run_dir) == "interrupted"


# ------------------------------------------------------------------------------------ the soak


@dataclass
class Tally:
    """What happened so far; `phases` counts the kills by phase and signal."""

    phases: Counter[tuple[str, signal.Signals]] = field(default_factory=Counter)
    restarts: int = 0
    completed: int = 0
    differing: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def kills(self) -> int:
        return sum(self.phases.values())

    def tables(self) -> str:
        """Returns the tally in Markdown."""
        lines = ["| killed while | SIGKILL | SIGTERM |", "| --- | --- | --- |"]
        lines += [
            f"| {p} | {self.phases[p, SIGKILL]} | {self.phases[p, SIGTERM]} |" for p in PHASES
        ]
        cells = (self.kills, self.restarts, self.completed, self.differing)
        lines += ["", "| kills | restarts | runs completed | differing runs | total time, s |"]
        lines += ["| --- " * 5 + "|"]
        lines += [f"| {' | '.join(map(str, cells))} | {time.monotonic() - self.began:.0f} |"]
        return "\n".join(lines)


def tell(text: str) -> None:
    """Prints a line of progress at once, also into a file."""
    print(text, flush=True)


def undisturbed(kind: str, folder: Path) -> Reference:
    """Trains one run of a kind, to compare the others with."""
    began, run_dir = time.perf_counter(), folder / kind
    start(kind, run_dir)
    seconds = time.perf_counter() - began
    record = json.loads((run_dir / "run.json").read_text())
    tell(f"undisturbed  {kind:<15} {record['epochs_done']} epochs, {seconds:.1f} s")
    return Reference(facts(run_dir), record["epochs_done"], seconds, record["total_seconds"])


def soak(kinds: list[str], kills: int, chance: random.Random, folder: Path, keep: bool) -> Tally:
    """Kills runs of all kinds, in turn, until so many kills were survived.

    Raises:
        Fault: a process ended as it must not.
    """
    tally = Tally()
    references = {kind: undisturbed(kind, folder) for kind in kinds}
    for number, kind in enumerate(itertools.cycle(kinds), 1):
        run_dir = folder / f"{kind}-{number:03}"
        train_through_kills(kind, run_dir, references[kind], kills, chance, tally)
        tally.completed += 1
        wrong = differences(references[kind].facts, facts(run_dir))
        tally.differing += bool(wrong)
        tell(f"completed  {run_dir.name}: " + ("DIFFERS" if wrong else "the same bits"))
        for line in wrong:
            tell(f"  {line}")
        if not (keep or wrong):
            shutil.rmtree(run_dir)
        if tally.kills >= kills:
            break
    return tally


def train_through_kills(
    kind: str, run_dir: Path, reference: Reference, kills: int, chance: random.Random, tally: Tally
) -> None:
    """Starts one run again and again until it is complete; at most `kills` are sent in all."""
    while True:
        kill = draw(chance, reference) if tally.kills < kills else None
        phase = start(kind, run_dir, kill, reference.num_epochs)
        if phase is None or kill is None:
            return
        tally.phases[phase, kill.signal] += 1
        tell(f"kill {tally.kills}/{kills}  {run_dir.name}  {kill.signal.name}  {phase}")
        if phase == DONE:
            return
        tally.restarts += 1


def main() -> int:
    """The command: `python scripts/soak.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs in this new folder")
    given = parser.parse_args()
    if given.keep is not None and given.keep.exists():
        parser.error(f"--keep {given.keep} is there already; name a new folder")
    folder = Path(tempfile.mkdtemp(prefix="soak-")) if given.keep is None else given.keep.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    keep = given.keep is not None
    try:
        chance = random.Random(given.seed)
        tally = soak(list(dict.fromkeys(given.only)), given.kills, chance, folder, keep)
        keep |= tally.differing > 0
        tell("\n" + tally.tables())
        return int(tally.differing > 0)
    except Fault as fault:
        keep = True
        print(f"error: with --seed {given.seed}: {fault}", file=sys.stderr)
        return 1
    finally:
        if keep:
            tell(f"\nkept in {folder}")
        else:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
