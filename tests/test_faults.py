"""What happens when the machine fails under a run; docs/reliability.md points here.

A fault and the same command after it run in forks of a process that has imported all there is to
import, see `tests/warm.py`. Each fork gets a short program, which puts the fault in place and calls
the command.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fashionnet.data.folders import default_root
from fashionnet.errors import one_line
from fashionnet.runs import checkpoint, saved
from fashionnet.system.files import atomic_write
from tests.conftest import Commands, FinishedRun
from tests.warm import Server

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="faults are made with Linux' means"),
]

# What each program begins with.
BEGIN = """\
import ctypes, os, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
from fashionnet import train
from fashionnet.runs import checkpoint, directory, facts, tracking
from fashionnet.training import steps

steps._SECONDS_BETWEEN_LOOKS = 0  # a checkpoint may be written after each chunk

def command(*overrides):
    '''What `python -m fashionnet.train` does.'''
    sys.argv[1:] = overrides
    train.main()

def at_call(number, module, name, fault):
    '''Calls `fault` with the arguments of a function's call of that number, and before it.'''
    function, calls = getattr(module, name), []
    def counting(*arguments, **more):
        calls.append(arguments)
        if len(calls) == number:
            fault(*arguments)
        return function(*arguments, **more)
    setattr(module, name, counting)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def powerless():
    '''Gives up a superuser's rights, who would write into any folder.'''
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0

"""
NAMESPACE = ("unshare", "--map-root-user", "--mount")


@dataclass
class Parent:
    """Runs programs in forks of a process that has the package imported."""

    commands: Commands
    can_mount: bool

    def run(self, folder: Path, program: str) -> subprocess.CompletedProcess[str]:
        """Runs a program in `folder`; returns its exit status and what it said on stderr."""
        return self.commands.execute(BEGIN + program, cwd=folder)

    def succeed(self, folder: Path, program: str) -> None:
        """Runs a program that must work."""
        done = self.run(folder, program)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def parent(commands: Commands) -> Iterator[Parent]:
    """The process, with mounts of its own where the machine allows that."""
    try:
        mounting = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        subprocess.run(mounting, check=True, capture_output=True)
        prefix: tuple[str, ...] = NAMESPACE
    except (OSError, subprocess.CalledProcessError):
        prefix = ()
    with contextlib.closing(Server(commands.environment, prefix=prefix)) as server:
        yield Parent(Commands(server, commands.environment), bool(prefix))


# 192 steps an epoch, and a checkpoint after each chunk of 64: six checkpoints.
RUN = ("epochs=2", "data.limit=384", "batch_size=2", "device=cpu")
OFTEN = (*RUN, "checkpoint.every_seconds=0.0001")


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    commands.succeed("train", *RUN, "hydra.run.dir=run", cwd=folder)
    return FinishedRun(folder / "run")


def call(*overrides: str) -> str:
    """The line of a program that calls the command."""
    return f"\ncommand(*{overrides!r})\n"


def stand(path: Path) -> tuple[int, int]:
    """Epoch and step of a checkpoint, which must be sound."""
    state = torch.load(path, weights_only=True)
    return state["epoch"], state["step"]


def temporaries(folder: Path) -> list[str]:
    """What writes that were not finished left."""
    return [path.name for path in folder.rglob("*.tmp")]


# ------------------------------------------------------------------------------------ full disk

MOUNT = """
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", "disk"], check=True)
"""
# Leaves so many bytes; a limit on the size of files allows each of them so many.
FILL = {
    "mounted": """
def fill(room):
    filler = os.open("disk/filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(filler, bytes(4096))
    except OSError:
        os.ftruncate(filler, os.fstat(filler).st_size - room)
""",
    "limited": """
read, write = os.pipe()  # which no limit holds for, unlike the file that stderr may be
if child := os.fork():
    os.close(write)
    with open(read) as printed:
        sys.stderr.write(printed.read())
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.dup2(write, 2)
def fill(room):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
""",
}
FULL = {  # when: the fault, and the file that the line names
    "at the start": ("fill(0)", "run.json"),
    "in a checkpoint": ("at_call(4, checkpoint, 'save', lambda *_: fill(500_000))", "last.pt"),
    "in the record": ("at_call(1, directory.Run, 'complete', lambda *_: fill(0))", "run.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("when", FULL)
@pytest.mark.parametrize("disk", FILL)
def test_a_full_disk_is_told_and_with_room_the_run_goes_on_to_the_same_bits(
    disk: str,
    when: str,
    parent: Parent,
    commands: Commands,
    whole: FinishedRun,
    tmp_path: Path,
) -> None:
    if disk == "mounted":
        if not parent.can_mount:
            pytest.skip("this machine lets nobody mount a disk of one's own")
        parent.succeed(tmp_path, MOUNT)
    train = call(*OFTEN, "hydra.run.dir=disk/run")
    fault, named = FULL[when]
    told = commands.error(parent.run(tmp_path, FILL[disk] + fault + train))
    assert named in told
    assert ("No space left" if disk == "mounted" else "File too large") in told

    # Mounts of the other process are seen by it alone.
    parent.succeed(tmp_path, "if os.path.exists('disk'): shutil.copytree('disk', 'seen')")
    left = FinishedRun(tmp_path / "seen/run")
    if when == "at the start":
        assert not left.path.exists()
    else:
        assert not temporaries(left.path)
        in_fit = when == "in a checkpoint"
        assert left.record["status"] == ("failed" if in_fit else "running")
        assert stand(left.path / "checkpoints/last.pt") == ((2, 0) if in_fit else (3, 0))
        assert len(left.history) == (1 if in_fit else 2)

    more = "Path('disk/filler').unlink(missing_ok=True)" + train
    parent.succeed(tmp_path, more + "shutil.copytree('disk/run', 'done')")
    done = FinishedRun(tmp_path / "done")
    assert done.bits == whole.bits
    assert done.record["status"] == "completed"
    assert done.record["test"]["evaluations"] == (2 if when == "in the record" else 1)
    assert not temporaries(done.path)


@pytest.mark.slow
def test_a_disk_that_is_full_under_the_history_is_told_by_its_name(
    parent: Parent, commands: Commands, tmp_path: Path
) -> None:
    fault = FILL["limited"] + "at_call(2, tracking.Tracker, '_write', lambda *_: fill(0))"
    told = commands.error(parent.run(tmp_path, fault + call(*OFTEN, "hydra.run.dir=run")))
    assert "history.jsonl" in told and "File too large" in told
    assert stand(tmp_path / "run/checkpoints/last.pt") == (2, 128)


# -------------------------------------------------------------------------------- rights, disks


@pytest.mark.slow
def test_a_folder_that_turns_read_only_is_told_and_the_run_goes_on_when_it_is_not(
    parent: Parent,
    commands: Commands,
    whole: FinishedRun,
    tmp_path: Path,
) -> None:
    (tmp_path / "probe").mkdir(0o555)
    if parent.run(tmp_path, "powerless(); os.mkdir('probe/inside')").returncode == 0:
        pytest.skip("this file system lets its owner write into any folder")
    run = FinishedRun(tmp_path / "run")
    train = call(*OFTEN, "hydra.run.dir=run")
    turn = "at_call(4, checkpoint, 'save', lambda *_: os.chmod('run/checkpoints', 0o555))"
    told = commands.error(parent.run(tmp_path, f"powerless(); {turn}" + train))
    assert "last.pt" in told and "Permission denied" in told
    assert run.record["status"] == "failed"
    assert stand(run.path / "checkpoints/last.pt") == (2, 0)

    run.path.chmod(0o555)
    before = {path: path.lstat().st_mtime_ns for path in run.path.rglob("*")}
    told = commands.error(parent.run(tmp_path, "powerless()" + train))
    assert str(run.path) in told and "cannot be written to" in told
    assert {path: path.lstat().st_mtime_ns for path in run.path.rglob("*")} == before

    for folder in (run.path, run.path / "checkpoints"):
        folder.chmod(0o755)
    parent.succeed(tmp_path, "powerless()" + train)
    assert run.bits == whole.bits


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_told_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "run.json").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as failed, atomic_write(tmp_path / "run.json") as file:
        file.write(b"new")
    line = one_line(failed.value)
    assert line is not None
    assert str(tmp_path / "run.json") in line and os.strerror(number) in line
    assert "choose another folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError) as failed:
        saved.count_test_use(tmp_path)
    line = one_line(failed.value)
    assert line is not None and "choose a folder whose file system can lock files" in line


# ------------------------------------------------------------------------------------ the clock

JUMPS = """
import datetime as real
jumped = 0
def jump():
    global jumped
    jumped += 86400 * {days}
    return jumped
wall = time.time
time.time = lambda: wall() + jump()
class Jumping(real.datetime):
    @classmethod
    def now(cls, zone=None):
        return real.datetime.now(zone) + real.timedelta(seconds=jump())
facts.datetime = Jumping
"""


@pytest.mark.slow
@pytest.mark.parametrize(("days", "every_seconds"), [(-1, 0.0001), (1, 3600)])
def test_a_clock_that_jumps_changes_neither_durations_nor_checkpoints(
    days: int,
    every_seconds: float,
    parent: Parent,
    commands: Commands,
    whole: FinishedRun,
    tmp_path: Path,
) -> None:
    every = f"checkpoint.every_seconds={every_seconds}"
    train = call(*RUN, every, "hydra.run.dir=run")
    parent.succeed(tmp_path, JUMPS.format(days=days) + train)
    run = FinishedRun(tmp_path / "run")
    assert run.bits == whole.bits
    record = run.record
    assert (record["finished"] > record["started"]) is (days > 0)  # times as the clock gave them
    seconds = [row["epoch_seconds"] for row in run.history]
    assert all(0 < figure < 60 for figure in seconds)
    assert sum(seconds) <= record["fit_seconds"] <= record["total_seconds"] < 60
    # Before the last epoch's end: one in its middle where they are due, else that of the first.
    epoch, step = stand(run.path / "checkpoints/previous.pt")
    assert (epoch, step > 0) == (2, days < 0)


# --------------------------------------------------------------------------- damaged checkpoints


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal in every bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def pair(whole: FinishedRun, tmp_path: Path) -> Path:
    """A real `last.pt`, and a small `previous.pt` that is known by its epoch."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copy(whole.path / "checkpoints/last.pt", folder / "last.pt")
    torch.save({"model": {}, "epoch": -1}, folder / "previous.pt")
    return folder


def regions(path: Path) -> dict[str, tuple[int, int]]:
    """Every part of a checkpoint: its name, where it begins and where it ends."""
    with zipfile.ZipFile(path) as archive:
        parts, directory = archive.infolist(), archive.start_dir
    found, content = {}, path.read_bytes()
    for part, end in zip(
        parts, [*(part.header_offset for part in parts[1:]), directory], strict=True
    ):
        start = part.header_offset
        lengths = content[start + 26 : start + 30]  # of the name and of torch's padding
        data = start + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        found[f"header of {part.filename}"] = start, data
        found[part.filename] = data, data + part.file_size
        found[f"after {part.filename}"] = data + part.file_size, end
    for number, part in enumerate(parts):
        start = directory
        directory = content.find(b"PK\x01\x02", start + 4)
        if directory < 0 or number == len(parts) - 1:
            directory = content.index(b"PK\x06\x06", start)  # the end in its 64-bit form
        found[f"entry of {part.filename}"] = start, directory
    found["end"] = directory, len(content)
    return found


def spread(start: int, end: int, most: int) -> list[int]:
    """At most so many offsets of a region: its first, its last and some between."""
    steps = max(min(most, end - start) - 1, 1)
    return sorted({start + (end - 1 - start) * i // steps for i in range(steps + 1)})


def newest_is_sound(folder: Path, whole: Any) -> bool:
    """Reads what the next run would go on from; returns whether that is the newest."""
    state = checkpoint.load_newest(folder)
    assert state is not None
    if state["epoch"] == -1:
        return False
    assert same(dict(state), whole)
    return True


@pytest.mark.slow
def test_a_bit_flipped_in_any_region_is_refused_or_harmless(
    pair: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "fashionnet")
    last, bits = pair / "last.pt", random.Random(0)
    whole = dict(checkpoint.load(last))
    harmless: dict[str, int] = {}
    with open(last, "r+b", buffering=0) as file:
        for region, (start, end) in regions(last).items():
            for offset in spread(start, end, 5) if end > start else ():
                was = os.pread(file.fileno(), 1, offset)
                os.pwrite(file.fileno(), bytes([was[0] ^ 1 << bits.randrange(8)]), offset)
                harmless[region] = harmless.get(region, 0) + newest_is_sound(pair, whole)
                os.pwrite(file.fileno(), was, offset)
    assert newest_is_sound(pair, whole)
    assert len(harmless) > 100
    # What a run goes on from is never taken from damaged bytes: only what nobody reads may differ.
    read = ("data.pkl", "byteorder", "version")
    data = [name for name in harmless if name.startswith("archive/data/") or name[8:] in read]
    assert len(data) >= 20
    assert not any(harmless[name] for name in data)


@pytest.mark.slow
def test_one_cut_off_anywhere_is_refused(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "fashionnet")
    last = pair / "last.pt"
    lengths = {0, 1, 2, 3, 4}
    for start, end in regions(last).values():
        lengths |= {start, (start + end) // 2, end - 1}
    for length in sorted(lengths - {last.stat().st_size}, reverse=True):
        os.truncate(last, length)
        assert not newest_is_sound(pair, None)


@pytest.mark.slow
def test_blocks_of_zeros_or_of_elsewhere_are_refused_or_harmless(
    pair: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "fashionnet")
    last = pair / "last.pt"
    content, whole = last.read_bytes(), dict(checkpoint.load(last))
    with open(last, "r+b", buffering=0) as file:
        for offset in range(0, len(content), 4096):
            was = content[offset : offset + 4096]
            for other in (bytes(len(was)), content[: len(was)]):
                os.pwrite(file.fileno(), other, offset)
                assert newest_is_sound(pair, whole) is (other == was)
            os.pwrite(file.fileno(), was, offset)


# ------------------------------------------------------------------------- killed while writing

# The renames of a checkpoint are last.pt → previous.pt and temporary → last.pt.
# When: the target of a rename, what the file holds, the how-manieth of these; then epoch and step
# of the last.pt and the previous.pt that are left.
KILLED = {
    "before the first record": ("run.json", "running", 1, None, None),
    "before the first checkpoint": ("last.pt", "", 1, None, None),
    "before both renames": ("previous.pt", "", 3, (2, 0), (1, 128)),
    "between the renames": ("last.pt", "", 4, None, (2, 0)),
    "before the best": ("best.pt", "", 1, (3, 0), (2, 128)),
    "before the last record": ("run.json", "completed", 1, (3, 0), (2, 128)),
}
KILL = """
def killing(source, target, replace=os.replace, seen=[]):
    if os.path.basename(target) == {name!r} and {holds!r} in Path(source).read_text("latin-1"):
        seen.append(target)
    if len(seen) == {number}:
        die()
    replace(source, target)
os.replace = killing
"""
# In the third last.pt: the first is synced once, the others twice.
HALF = """
def half(descriptor, fsync=os.fsync, seen=[]):
    if "/.last.pt." in os.readlink(f"/proc/self/fd/{descriptor}"):
        seen.append(descriptor)
    if len(seen) == 4:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        die()
    fsync(descriptor)
os.fsync = half
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", [*KILLED, "half-way"])
def test_killed_while_it_writes_a_run_goes_on_to_the_same_bits(
    when: str,
    parent: Parent,
    commands: Commands,
    whole: FinishedRun,
    tmp_path: Path,
) -> None:
    name, holds, number, *stands = KILLED.get(when, ("", "", 0, (1, 128), (1, 64)))
    kill = KILL.format(name=name, holds=holds, number=number) if name else HALF
    train = call(*OFTEN, "hydra.run.dir=run")
    assert parent.run(tmp_path, kill + train).returncode == -9

    run = FinishedRun(tmp_path / "run")
    assert len(temporaries(run.path)) == 1
    for file, expected in zip(("last.pt", "previous.pt"), stands, strict=True):
        path = run.path / "checkpoints" / file
        assert (stand(path) if path.exists() else None) == expected
    if (run.path / "run.json").exists():
        assert run.record["status"] == "running"
    parent.succeed(tmp_path, train)
    assert run.bits == whole.bits
    assert run.record["status"] == "completed"
    assert not temporaries(run.path)


# -------------------------------------------------------------------------------- out of memory

LIMIT = """
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {more}, resource.RLIM_INFINITY))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "what", "asked"),
    [
        (2**30, "model.hidden=8000 batch_size=54000", "tried to allocate 1728000000 bytes"),
        (2**24, "data.root=data", None),  # too little for the data
    ],
)
def test_too_little_memory_is_told_in_one_line(
    more: int, what: str, asked: str | None, parent: Parent, commands: Commands, tmp_path: Path
) -> None:
    if "data" in what:  # which no test has read before
        shutil.copytree(default_root() / "FashionMNIST", tmp_path / "data")
    train = call(*what.split(), "device=cpu", "hydra.run.dir=run")
    done = parent.run(tmp_path, LIMIT.format(more=more) + train)
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and told.startswith("error: out of memory")
    assert "Traceback" not in done.stderr
    assert "a smaller batch_size or a smaller model" in told
    assert asked is None or asked in told
    run = FinishedRun(tmp_path / "run")
    if "batch_size" in what:
        assert run.record["status"] == "failed"
        assert run.record["error"] == told.removeprefix("error: ")
    else:
        assert not run.path.exists() or not list(run.path.iterdir())


@pytest.mark.slow
def test_too_little_memory_leaves_one_line_and_no_folder(
    parent: Parent, commands: Commands, tmp_path: Path
) -> None:
    train = call("model.hidden=300000", "device=cpu", "hydra.run.dir=run")
    told = commands.error(parent.run(tmp_path, LIMIT.format(more=2**29) + train))
    assert told.startswith("out of memory") and "tried to allocate 940800000 bytes" in told
    assert not list(tmp_path.iterdir())


SHORT = (
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
        " memory: you tried to allocate 64 bytes. Error code 12 (Cannot allocate memory)"
    ),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total…"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 2 GB"),
)


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_a_sound_checkpoint_is_not_called_damaged_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    for epoch in (1, 2):
        checkpoint.save({"model": {}, "epoch": epoch}, tmp_path / "last.pt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as told:
        checkpoint.load_newest(tmp_path)
    line = one_line(told.value)
    assert line is not None and line.startswith("out of memory")
    assert "batch_size" in line and "overwrite" not in line


# ---------------------------------------------------------------------------- a deleted directory


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 5])  # in the first epoch, at its end, in the second
def test_a_directory_deleted_under_a_run_ends_it_and_is_not_made_anew(
    number: int, parent: Parent, commands: Commands, tmp_path: Path
) -> None:
    delete = f"at_call({number}, checkpoint, 'save', lambda *_: shutil.rmtree('run'))"
    train = call(*OFTEN, "hydra.run.dir=run")
    told = commands.error(parent.run(tmp_path, delete + train))
    assert str(tmp_path / "run") in told and "No such file or directory" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_deleted_before_its_first_curve_is_not_made_anew(
    parent: Parent, commands: Commands, tmp_path: Path
) -> None:
    delete = "at_call(1, tracking.Tracker, 'epoch_ended', lambda *_: shutil.rmtree('run'))"
    told = commands.error(parent.run(tmp_path, delete + call(*OFTEN, "hydra.run.dir=run")))
    assert str(tmp_path / "run") in told and "No such file or directory" in told
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- the table


def test_every_test_that_the_table_names_is_there() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (root / "docs/reliability.md").read_text())
    assert len(named) > 30
    for file, name in named:
        (path,) = (root / "tests").rglob(file)
        assert f"def {name}(" in path.read_text(), f"{file}::{name}"
