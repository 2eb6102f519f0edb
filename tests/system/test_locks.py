"""Locks of folders."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fashionnet.errors import UserError, one_line
from fashionnet.system import locks

HOLD = """
import sys
from pathlib import Path
from fashionnet.system import locks
with locks.exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# Adds 1 to a number in a file, slowly: what two processes at once would get wrong.
COUNT = """
import sys, time
from pathlib import Path
from fashionnet.system import locks
number = Path(sys.argv[1], "number")
for _ in range(10):
    with locks.in_turn(number.parent, "waiting") as is_alone:
        assert is_alone
        before = int(number.read_text())
        time.sleep(0.005)
        number.write_text(str(before + 1))
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the folder."""
    with start(HOLD, folder) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_kept_out_until_the_holder_dies(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        with (
            pytest.raises(UserError, match="in use by another run or command"),
            locks.exclusive(tmp_path),
        ):
            pytest.fail("it was not refused")
        assert (tmp_path / locks.NAME).exists()  # it is the holder's
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locks.exclusive(tmp_path):
            pass


def test_two_processes_take_turns(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    processes = [start(COUNT, tmp_path) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert (tmp_path / "number").read_text() == "20"


def test_a_process_that_waits_says_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fashionnet")
    entered = threading.Event()

    def enter() -> None:
        with locks.in_turn(tmp_path, "somebody else is in there"):
            entered.set()

    with ThreadPoolExecutor(1) as threads:
        with locks.exclusive(tmp_path):
            threads.submit(enter)
            assert not entered.wait(timeout=0.2)
        assert entered.wait(timeout=20)
    assert [record.getMessage() for record in caplog.records] == ["somebody else is in there"]


@pytest.mark.parametrize("remove", [False, True])
def test_the_file_stays_or_goes(tmp_path: Path, remove: bool) -> None:
    with locks.exclusive(tmp_path, remove=remove):
        assert os.listdir(tmp_path) == [locks.NAME]
    assert os.listdir(tmp_path) == ([] if remove else [locks.NAME])


def test_a_folder_that_is_deleted_meanwhile_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with locks.exclusive(tmp_path / "a", remove=True):
        (tmp_path / "a").rename(tmp_path / "b")
    with locks.exclusive(tmp_path / "b"):
        pass


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_that_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    # Its holder removes it between this one's opening of the file and its locking it.
    lock, flock, calls = tmp_path / locks.NAME, fcntl.flock, []

    def slowly(*arguments: Any) -> Any:
        if arguments[1] & fcntl.LOCK_EX:
            calls.append(arguments)
            if len(calls) == 1:
                lock.unlink()
                if again:  # and yet another one has come
                    lock.touch()
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", slowly)
    with locks.exclusive(tmp_path):
        assert len(calls) > 1
        monkeypatch.undo()
        with pytest.raises(UserError, match="in use"), locks.exclusive(tmp_path):
            pytest.fail("two are in the folder")


# ------------------------------------------------------------------------------ no locks


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system has no locks."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks_is_refused_where_one_must_be_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError) as failed, locks.exclusive(tmp_path):
        pytest.fail("a process that is killed would never let go")
    line = one_line(failed.value)
    assert line is not None and "choose a folder whose file system can lock files" in line
    assert str(tmp_path / locks.NAME) in line
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_a_cache_does_without_locks(tmp_path: Path) -> None:
    with locks.in_turn(tmp_path, "waiting") as is_alone:
        assert not is_alone
        assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written_to_needs_none(tmp_path: Path) -> None:
    with locks.in_turn(tmp_path / "nowhere", "waiting") as is_alone:
        assert not is_alone


# ------------------------------------------------------------------------------ strangers

VICTIM = b"export PATH=/bin\n"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside of the folder, which nothing may touch."""
    path = tmp_path / "victim"
    path.write_bytes(VICTIM)
    path.chmod(0o640)
    yield path
    assert path.read_bytes() == VICTIM
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


PLANTED: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda lock, victim: lock.symlink_to(victim),
    "link to nothing": lambda lock, victim: lock.symlink_to(victim.with_name("new")),
    "second name": lambda lock, victim: os.link(victim, lock),
    "link within": lambda lock, _: lock.symlink_to("run.json"),
    "pipe": lambda lock, _: os.mkfifo(lock),
    "folder": lambda lock, _: lock.mkdir(),
    "device": lambda lock, _: lock.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("takes_turns", [False, True])
def test_what_lies_in_the_place_of_a_lock_is_not_touched(
    tmp_path: Path, victim: Path, planted: str, takes_turns: bool
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").touch()
    PLANTED[planted](folder / locks.NAME, victim)
    entered = locks.in_turn(folder, "waiting") if takes_turns else locks.exclusive(folder)
    with pytest.raises(UserError, match=r"\.lock is not a file of its own.*remove it"), entered:
        pytest.fail("it was not refused")
    assert sorted(os.listdir(folder)) == [locks.NAME, "run.json"]
    assert sorted(os.listdir(tmp_path)) == ["run", "victim"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_lock_has_the_permissions_of_a_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with locks.exclusive(tmp_path):
            mode = (tmp_path / locks.NAME).stat().st_mode
    finally:
        os.umask(before)
    assert stat.S_IMODE(mode) == 0o666 & ~umask


def test_a_lock_keeps_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / locks.NAME).write_text("mine")
    (tmp_path / locks.NAME).chmod(0o660)
    with locks.exclusive(tmp_path):
        pass
    assert stat.S_IMODE((tmp_path / locks.NAME).stat().st_mode) == 0o660
