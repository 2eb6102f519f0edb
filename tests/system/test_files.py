"""Files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fashionnet.errors import UserError
from fashionnet.system.files import (
    MOST_FOLDERS,
    atomic_write,
    check_place,
    missing_folders,
    open_appending,
    open_inside,
    read_bounded,
    read_json,
    refuse_strange,
    refuse_strange_below,
    remove,
    remove_empty,
    remove_temporary,
    walk,
    write_json,
    write_output,
)
from tests.conftest import raised_without_waiting


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_whole_file_takes_the_place(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with atomic_write(path) as file:
        file.write(b"new" * 9999)
        assert (path.read_bytes() if path.exists() else None) == before
    assert path.read_bytes() == b"new" * 9999
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_body_that_fails_changes_nothing(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (path.read_bytes() if path.exists() else None) == before
    assert names(tmp_path) == ([] if before is None else ["file"])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("chunks", [[b"x" * 100_001], [b"x" * 4_000] * 40, [b"x"] * 100_001])
def test_a_full_disk_changes_nothing(tmp_path: Path, chunks: list[bytes]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"), atomic_write(path) as file:
            for chunk in chunks:
                file.write(chunk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_file_is_on_the_disk_before_it_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        is_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        calls.append("fsync of the folder" if is_folder else "fsync of the file")
        fsync(descriptor)

    def replacing(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    # Without the last, a loss of power might bring back the old file.
    assert calls == ["fsync of the file", "replace", "fsync of the folder"]


def test_a_folder_that_cannot_be_synced_hinders_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=_json)
def test_write_json_keeps_every_value(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("\n")


def test_write_json_of_what_is_not_json_keeps_the_old(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"a": object()})
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["value.json"]


def test_only_the_folders_that_were_missing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    folder = tmp_path / "mine/b/c/d"
    made = missing_folders(folder)
    assert made == [folder, folder.parent, folder.parent.parent]
    folder.mkdir(parents=True)
    assert missing_folders(folder) == []
    remove_empty(made)
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == []


def test_more_folders_than_can_be_made_are_refused(tmp_path: Path) -> None:
    for count in (MOST_FOLDERS + 1, 1500):  # Python's own way recurses
        with pytest.raises(UserError, match="a cannot be made with"):
            missing_folders(tmp_path.joinpath(*["a"] * count))
    missing_folders(tmp_path.joinpath(*["a"] * MOST_FOLDERS))[0].mkdir(parents=True)


def test_a_folder_that_holds_something_stays(tmp_path: Path) -> None:
    folder = tmp_path / "a/b/c"
    made = missing_folders(folder)
    folder.mkdir(parents=True)
    (tmp_path / "a/file").touch()
    remove_empty(made)
    assert names(tmp_path / "a") == ["file"]
    remove_empty([tmp_path / "a"])
    assert names(tmp_path / "a") == ["file"]
    remove_empty([tmp_path / "nowhere"])


def test_two_writers_of_one_file_never_share_a_temporary_file(tmp_path: Path) -> None:
    # As two processes of the same number do, on two hosts that share a folder.
    path = tmp_path / "file"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write(b"first" * 9999)
        second.write(b"second")
    assert path.read_bytes() == b"first" * 9999  # the last to end, whole
    assert names(tmp_path) == ["file"]


def test_a_file_of_any_name_is_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "é" * 127):
        write_output(tmp_path / name, b"new")
    assert len(names(tmp_path)) == 2


def test_nothing_is_written_through_a_link_in_place_of_the_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")  # as an attacker would have it
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / ".file.known.tmp").symlink_to("victim")
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert names(tmp_path) == [".file.known.tmp", "victim"]


def test_a_link_or_a_second_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("victim")
    os.link(tmp_path / "victim", tmp_path / "second")
    for name in ("link", "second"):
        with atomic_write(tmp_path / name) as file:
            file.write(b"new")
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "victim").read_bytes() == b"mine"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("before", [None, 0o600, 0o664])
def test_permissions_are_those_of_a_new_file_or_stay(
    tmp_path: Path, umask: int, before: int | None
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.touch()
        path.chmod(before)
    old = os.umask(umask)
    try:
        with atomic_write(path):
            pass
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o7777 == (0o666 & ~umask if before is None else before)


# ------------------------------------------------------------- files that the user names


@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_written_to_a_pipe_reaches_its_reader(tmp_path: Path, is_link: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    path = tmp_path / ("link" if is_link else "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    reader.start()
    check_place(path, "the table")
    write_output(path, b"a,b\n")
    reader.join(timeout=20)
    assert read == [b"a,b\n"]
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_a_device_is_written_into_and_stays_one(tmp_path: Path) -> None:
    # By links alone: broken code, run by root, would replace the machine's own device.
    for name in ("null", "full"):
        (tmp_path / name).symlink_to(f"/dev/{name}")
        check_place(tmp_path / name, "the table")
    write_output(tmp_path / "null", b"a,b\n")
    with pytest.raises(OSError) as full:
        write_output(tmp_path / "full", b"a,b\n")
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(tmp_path / "full")
    assert all((tmp_path / name).is_symlink() for name in ("null", "full"))


PRINT = """
import sys
from pathlib import Path
from fashionnet.system.files import check_place, write_output

print("before")
check_place(Path(sys.argv[1]), "the table")
write_output(Path(sys.argv[1]), b"a,b\\n")
print("after")
"""


@pytest.mark.parametrize(
    ("target", "to"),
    [("/dev/stdout", "pipe"), ("/dev/stdout", "file"), ("/proc/self/fd/1", "file")],
)
def test_standard_output_given_by_a_name_is_continued(tmp_path: Path, target: str, to: str) -> None:
    if not Path(target).parent.exists():
        pytest.skip("the system has no such name")
    (tmp_path / "link").symlink_to(target)
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", PRINT, "link"],
            stdout=out if to == "file" else subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=tmp_path,
            timeout=60,
            check=True,
        )
    printed = (tmp_path / "out").read_bytes() if to == "file" else done.stdout
    assert printed == b"before\na,b\nafter\n"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["folder", "missing/table.csv", "socket", "/dev/fd/987"])
def test_a_place_that_takes_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path must be short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        with pytest.raises(UserError, match=r"the table .* cannot be written"):
            check_place(tmp_path / name, "the table")


# ------------------------------------------------------------------------- growing files


def test_a_log_is_continued_and_never_through_a_link_or_a_second_name(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    for text in ("a\n", "b\n"):
        with open_appending(path) as file:
            file.write(text)
    os.link(path, tmp_path / "backup")
    with open_appending(path) as file:
        file.write("é\n")
    assert path.read_text(encoding="utf-8") == "a\nb\né\n"
    assert (tmp_path / "backup").read_text() == "a\nb\n"
    for plant in (
        lambda: path.symlink_to("backup"),
        lambda: path.symlink_to("nothing"),
        lambda: os.mkfifo(path),
        path.mkdir,
    ):
        remove(path)
        plant()
        with pytest.raises(UserError, match=r"train\.log is not a file of its own"):
            open_appending(path)
    assert names(tmp_path) == ["backup", "train.log"]


# ------------------------------------------------------------------------------- strangers


def test_a_walk_is_that_of_os_walk(tmp_path: Path) -> None:
    for name in ("b/c/d", "b/a", "e"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "b/a/link").symlink_to("../c")
    for follow in (False, True):
        found, expected = [], []
        for path, inner, files in walk(tmp_path, follow_links=follow):
            found.append((str(path), [*inner], files))
        for parent, folders, files in os.walk(tmp_path, followlinks=follow):
            folders.sort()
            expected.append((parent, [*folders], sorted(files)))
        assert found == expected
    pruned = []
    for path, inner, _ in walk(tmp_path):
        pruned.append(path.name)
        inner[:] = [name for name in inner if name != "b"]
    assert pruned == [tmp_path.name, "e"]
    assert list(walk(tmp_path / "nowhere")) == []


def test_a_walk_ends_at_its_bound(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a"] * MOST_FOLDERS)
    deep.mkdir(parents=True)
    assert [parent for parent, *_ in walk(tmp_path)][-1] == deep
    (deep / "a").mkdir()
    with pytest.raises(UserError, match="nested more than"):
        list(walk(tmp_path))
    assert [parent for parent, *_ in walk(tmp_path, skip_deep=True)][-1] == deep
    (tmp_path / "file").touch()
    (deep / "a/a").mkdir()
    with pytest.raises(UserError, match="nested more than"):
        remove(tmp_path / "file", tmp_path / "a")
    assert names(tmp_path) == ["a", "file"]  # nothing was removed
    remove(deep / "a", tmp_path / "file", tmp_path / "nothing")
    remove(tmp_path / "a")
    assert names(tmp_path) == []


def test_what_killed_writers_left_is_removed_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "victim").touch()
    (tmp_path / ".a.json.0123.tmp").touch()
    (tmp_path / ".b.json.0123.tmp").symlink_to("victim")
    (tmp_path / ".c.json.0123.tmp").mkdir()
    remove_temporary(tmp_path)
    assert names(tmp_path) == [".c.json.0123.tmp", "victim"]
    remove_temporary(tmp_path / "nowhere")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert read_bounded(tmp_path / "file", tmp_path, 3) == b"abc"
    with pytest.raises(UserError, match="file is larger than the limit of 2 bytes"):
        read_bounded(tmp_path / "file", tmp_path, 2)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "nothing", tmp_path, 2)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for refuse in (refuse_strange, open_inside):
        with pytest.raises(UserError, match="pipe is neither a file nor a folder"):
            refuse(tmp_path / "pipe", tmp_path)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("fashionnet.system.files.refuse_strange", lambda *_: None)
    refusal = raised_without_waiting(open_inside, tmp_path / "pipe", tmp_path)
    assert isinstance(refusal, UserError) and "pipe is not a regular file" in str(refusal)


def test_a_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder is a folder"):
        read_bounded(tmp_path / "folder", tmp_path, 9)


@pytest.mark.parametrize("target", ["../other/secret", "sub", "{}/other/secret", "loop", "dots"])
def test_a_link_that_leads_out_is_refused(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "run"
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/secret").write_text("secret")
    (folder / "sub").symlink_to("../other")
    paths = {"sub": folder / "sub/secret", "dots": folder / "../other/secret"}
    path = paths.get(target, folder / "loop")
    if target not in paths:
        path.symlink_to(target.format(tmp_path))
    with pytest.raises(UserError, match=r"(secret|loop) (leads out|cannot be read)"):
        read_bounded(path, folder, 100)
    with pytest.raises(UserError, match="leads out"):
        refuse_strange_below(folder)


def test_links_within_and_into_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").write_bytes(b"abc")
    (tmp_path / "run/link").symlink_to("file")
    (tmp_path / "alias").symlink_to("run")
    assert read_bounded(tmp_path / "run/link", tmp_path / "run", 9) == b"abc"
    assert read_bounded(tmp_path / "alias/link", tmp_path / "alias", 9) == b"abc"
    refuse_strange_below(tmp_path / "alias")


def test_pipes_anywhere_below_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    refuse_strange_below(tmp_path)
    os.mkfifo(tmp_path / "a/b/pipe")
    with pytest.raises(UserError, match="pipe is neither"):
        refuse_strange_below(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 50_000, "nested too deeply"),
        ("\ud800", "damaged"),
        ("1" * 5000, "damaged"),
        (" " * 200_001, "larger"),
    ],
    ids=["list", "dict", "text", "number", "long"],
)
def test_json_of_strangers_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=rf"a\.json is .*{reason}|a\.json is {reason}"):
        read_json(tmp_path / "a.json", tmp_path, 250_000 if reason != "larger" else 200_000)


def test_json_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json", tmp_path, 1000) == {"a": [1, 2.5, None]}
