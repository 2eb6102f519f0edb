"""Checkpoints: whole or not there, sound or refused, and never executed."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from fashionnet import checkpoint
from fashionnet.checkpoint import BEST, LAST, PREVIOUS, weights_sha256
from fashionnet.errors import UserError

FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from fashionnet import checkpoint
from fashionnet.errors import one_line

folder = Path(sys.argv[1])
size = (folder / "last.pt").stat().st_size
for limit in (0, 1, 5_000, size // 2, size - 5_000, size - 100, size - 1):
    for name in ("last.pt", "best.pt"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            checkpoint.save({"model": {"w": torch.ones(30_000)}, "epoch": 2}, folder / name)
        except OSError as error:
            assert "File too large" in (one_line(error) or ""), error
        else:
            raise SystemExit(f"the disk was not full at {limit} of {size} bytes")
"""

USUAL = [HealthCheck.function_scoped_fixture]


def a_state(epoch: int = 1) -> dict[str, Any]:
    weights = torch.arange(600.0).view(20, 30) * epoch
    return {
        "model": {"w": weights, "b": torch.full((3,), float(epoch))},
        "optimizer": {"steps": epoch, "means": [torch.zeros(3)]},
        "epoch": epoch,
        "stopped": False,
        "best_loss": None,
        "history": [{"epoch": epoch, "loss": 0.1}],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def epoch_of(path: Path) -> int:
    return int(checkpoint.load(path)["epoch"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------- writing


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(a_state(), tmp_path / "checkpoints" / LAST)
    assert same(checkpoint.load(tmp_path / "checkpoints" / LAST), a_state())
    assert names(tmp_path / "checkpoints") == [LAST]


def test_torch_alone_can_read_it(tmp_path: Path) -> None:
    checkpoint.save(a_state(), tmp_path / LAST)
    assert same(torch.load(tmp_path / LAST, weights_only=True), a_state())


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        checkpoint.save(a_state(epoch), tmp_path / LAST)
    assert names(tmp_path) == [LAST, PREVIOUS]
    assert (epoch_of(tmp_path / LAST), epoch_of(tmp_path / PREVIOUS)) == (3, 2)


def test_one_best_is_kept(tmp_path: Path) -> None:
    for epoch in (1, 2):
        checkpoint.save(a_state(epoch), tmp_path / BEST)
    assert names(tmp_path) == [BEST]
    assert epoch_of(tmp_path / BEST) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_a_full_disk_keeps_the_old_and_is_told(tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(30_000)}, "epoch": 1}
    for name in (LAST, BEST):
        checkpoint.save(state, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == [BEST, LAST]
    for name in (LAST, BEST):
        assert same(checkpoint.load(tmp_path / name), state)


def test_a_disk_that_fails_at_the_last_moment_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Network folders tell that they are full only when the file is to be on the disk.
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.save(a_state(1), tmp_path / LAST)
    checkpoint.save(a_state(2), tmp_path / LAST)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(a_state(3), tmp_path / LAST)
    assert names(tmp_path) == [LAST, PREVIOUS]
    assert (epoch_of(tmp_path / LAST), epoch_of(tmp_path / PREVIOUS)) == (2, 1)


# ---------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound checkpoint."""
    path = tmp_path_factory.mktemp("sound") / LAST
    checkpoint.save(a_state(), path)
    return path.read_bytes()


def test_a_missing_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"last\.pt is missing"):
        checkpoint.load(tmp_path / LAST)


@settings(deadline=None, max_examples=40, suppress_health_check=USUAL)
@given(data=st.data())
def test_a_truncated_one_is_refused(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(sound) - 1))
    (tmp_path / LAST).write_bytes(sound[:length])
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        checkpoint.load(tmp_path / LAST)


@settings(deadline=None, max_examples=100, suppress_health_check=USUAL)
@given(data=st.data(), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_harmless(
    tmp_path: Path, sound: bytes, data: st.DataObject, bit: int
) -> None:
    flipped = bytearray(sound)
    flipped[data.draw(st.integers(0, len(sound) - 1))] ^= 1 << bit
    (tmp_path / LAST).write_bytes(flipped)
    try:
        state = checkpoint.load(tmp_path / LAST)
    except UserError as error:
        assert "last.pt is" in str(error)
    else:
        assert same(state, a_state())  # it hit padding or a date


def test_a_flipped_bit_of_a_weight_is_refused(tmp_path: Path, sound: bytes) -> None:
    at = sound.index(struct.pack("<3f", 1, 1, 1))  # the bias
    flipped = bytearray(sound)
    flipped[at] ^= 1
    (tmp_path / LAST).write_bytes(flipped)
    with pytest.raises(UserError, match=r"last\.pt is damaged: .*checksum"):
        checkpoint.load(tmp_path / LAST)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 1000, b"PK\x03\x04", b"hello\n", pickle.dumps({"model": {}})]
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt is damaged or no checkpoint: [^\n]+$"):
        checkpoint.load(tmp_path / LAST)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / LAST).mkdir()
    with pytest.raises(UserError, match=r"last\.pt is damaged or no checkpoint"):
        checkpoint.load(tmp_path / LAST)


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), {"weights": 1}, 3])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / LAST)
    with pytest.raises(UserError, match="no checkpoint of this package"):
        checkpoint.load(tmp_path / LAST)


class Bomb:
    """Pickled, it creates a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["whole", "model", "beside"])
def test_a_bomb_does_not_go_off(tmp_path: Path, place: str, zipped: bool) -> None:
    trace = tmp_path / "trace"
    bomb: Any = Bomb(trace)
    state = {"whole": bomb, "model": {"model": bomb}, "beside": {**a_state(), "extra": bomb}}
    torch.save(state[place], tmp_path / LAST, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"last\.pt is damaged or no checkpoint"):
        checkpoint.load(tmp_path / LAST)
    with pytest.raises(UserError):
        checkpoint.load_newest(tmp_path)
    assert not trace.exists()
    torch.load(tmp_path / LAST, weights_only=False)  # it was a live one
    assert trace.exists()


# ---------------------------------------------------------------------------------- the newest


def test_the_newest_of_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "nowhere") is None


def test_the_newest_is_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in (1, 2):
        checkpoint.save(a_state(epoch), tmp_path / LAST)
    state = checkpoint.load_newest(tmp_path)
    assert state is not None and state["epoch"] == 2
    assert not caplog.records


def test_a_damaged_last_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2):
        checkpoint.save(a_state(epoch), tmp_path / LAST)
    os.truncate(tmp_path / LAST, 1000)
    with caplog.at_level(logging.WARNING, "fashionnet"):
        state = checkpoint.load_newest(tmp_path)
    assert state is not None and state["epoch"] == 1
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "last.pt is damaged" in warning.getMessage()
    assert "trying the one before it" in warning.getMessage()


def test_a_last_that_was_never_put_in_place_gives_way_to_the_one_before(tmp_path: Path) -> None:
    # Killed between the two renames of a save.
    for epoch in (1, 2):
        checkpoint.save(a_state(epoch), tmp_path / LAST)
    (tmp_path / LAST).unlink()
    state = checkpoint.load_newest(tmp_path)
    assert state is not None and state["epoch"] == 1


def test_two_damaged_ones_are_named_with_the_way_out(tmp_path: Path) -> None:
    for epoch in (1, 2):
        checkpoint.save(a_state(epoch), tmp_path / LAST)
    for name in (LAST, PREVIOUS):
        os.truncate(tmp_path / name, 1000)
    with pytest.raises(UserError, match=r"last\.pt is .*previous\.pt is .*overwrite=true"):
        checkpoint.load_newest(tmp_path)


# ------------------------------------------------------------------------------------ the hash


def test_the_hash_is_that_of_the_contract() -> None:
    # Sorted names, dtypes, shapes, little-endian bytes: written down once more, without torch.
    digest = hashlib.sha256()
    digest.update(b"a torch.int64 ()\n" + struct.pack("<q", -7))
    digest.update(b"b.weight torch.float32 (2, 2)\n" + struct.pack("<4f", 1, -2, 0.5, 3))
    state = {"b.weight": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "a": torch.tensor(-7)}
    assert weights_sha256(state) == digest.hexdigest()


def test_the_hash_depends_on_every_part() -> None:
    base = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    states = [
        {"w": base},
        {"v": base},
        {"w": base.double()},
        {"w": base.view(4)},
        {"w": base.view(1, 4)},
        {"w": base.t()},
        {"w": torch.nextafter(base, torch.tensor(9.0))},
        {"w": torch.tensor([[1.0, -0.0], [3.0, 4.0]])},
        {"w": base, "b": base},
        {"w": base.to(torch.bfloat16)},
        {"w": base.half()},
        {},
    ]
    assert len({weights_sha256(state) for state in states}) == len(states)


def test_the_hash_depends_on_nothing_else() -> None:
    base = torch.arange(24.0).view(2, 3, 2, 2)
    expected = weights_sha256({"a": base, "b": base + 1})
    assert weights_sha256({"b": base + 1, "a": base}) == expected
    lying_otherwise = base.to(memory_format=torch.channels_last)
    assert lying_otherwise.stride() != base.stride()
    assert weights_sha256({"a": lying_otherwise, "b": base + 1}) == expected
    part_of_more = torch.cat([base, base + 1])
    assert weights_sha256({"a": part_of_more[:2], "b": part_of_more[2:]}) == expected
    assert weights_sha256({"a": base.clone().requires_grad_(), "b": base + 1}) == expected


def test_the_hash_survives_a_file(tmp_path: Path) -> None:
    checkpoint.save(a_state(), tmp_path / LAST)
    read = checkpoint.load(tmp_path / LAST)["model"]
    assert weights_sha256(read) == weights_sha256(a_state()["model"])
