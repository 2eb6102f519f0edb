"""Checkpoints: whole or not there, sound or refused, and never executed."""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import logging
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

from fashionnet import models
from fashionnet.data.examples import Examples
from fashionnet.errors import UserError
from fashionnet.models import backbones
from fashionnet.models.weights import weights_sha256
from fashionnet.runs import checkpoint, network, resume
from fashionnet.runs.checkpoint import BEST, LAST, PREVIOUS
from fashionnet.system import devices
from fashionnet.training import loop
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.gradients import Autograd
from fashionnet.training.optim import Adam, Optimizer
from fashionnet.training.state import TrainState

FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from fashionnet.runs import checkpoint
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
    with pytest.raises(UserError, match=r"last\.pt is damaged or no checkpoint: Bad CRC"):
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
    with pytest.raises(UserError, match=r"last\.pt is a folder"):
        checkpoint.load(tmp_path / LAST)


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), {"weights": 1}, 3])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / LAST)
    with pytest.raises(UserError, match="not a checkpoint of this package"):
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
    said = "holds more than tensors and plain values and was not opened" if zipped else "zip"
    with pytest.raises(UserError, match=rf"last\.pt .*{said}") as refused:
        checkpoint.load(tmp_path / LAST)
    assert "weights_only" not in str(refused.value)  # torch's advice would set it off
    with pytest.raises(UserError):
        checkpoint.load_newest(tmp_path)
    assert not trace.exists()
    torch.load(tmp_path / LAST, weights_only=False)  # it was a live one
    assert trace.exists()


# ------------------------------------------------------------------------------- strangers


def short(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def whole(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]


def a_tensor(
    shape: tuple[int, ...], stride: tuple[int, ...], stored: int, offset: int = 0
) -> bytes:
    """The pickle of a tensor over `data/0`, of which it says that it holds `stored` floats."""
    storage = short("storage") + b"ctorch\nFloatStorage\n" + short("0") + short("cpu")
    sizes = b"".join(b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (shape, stride))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + storage
        + whole(stored)
        + b"tQ"
        + whole(offset)
        + sizes
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def call(function: str, *arguments: int) -> bytes:
    return f"c{function}\n".encode() + b"(" + b"".join(map(whole, arguments)) + b"tR"


def doubled(times: int) -> bytes:
    """A list that holds a list twice, which holds a list twice, and so on."""
    if not times:
        return b"]q\x00"
    return b"](" + doubled(times - 1) + b"h%c" % (times - 1) + b"eq%c" % times


def archive(path: Path, value: bytes, data: bytes = bytes(16), **options: Any) -> None:
    """Writes {"model": {"w": value}}, as torch lays it out, the value as it stands in a pickle."""
    with zipfile.ZipFile(path, "w", **options) as file:
        pickled = b"\x80\x02}" + short("model") + b"}" + short("w") + value + b"ss."
        parts = {"data.pkl": pickled, "byteorder": b"little", "version": b"3", "data/0": data}
        for name, content in parts.items():
            file.writestr(f"archive/{name}", content)


def assert_refused(path: Path, said: str) -> None:
    """It is refused in one line, without using memory, and by what looks for the newest too."""
    tracemalloc.start()
    try:
        for read in (checkpoint.load, lambda path: checkpoint.load_newest(path.parent)):
            with pytest.raises(UserError, match=rf"last\.pt.*{said}") as refused:
                read(path)
            assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()


def test_a_tensor_made_by_hand_is_read(tmp_path: Path) -> None:
    archive(tmp_path / LAST, a_tensor((2, 2), (2, 1), 4), struct.pack("<4f", 1, 2, 3, 4))
    assert checkpoint.load(tmp_path / LAST)["model"]["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (a_tensor((10**12,), (0,), 4), "claims more values than it holds"),
        (a_tensor((10**6, 10**6), (0, 0), 4), "claims more values than it holds"),
        (a_tensor((5,), (0,), 4), "claims more values than it holds"),
        (a_tensor((10**9,), (1,), 4), "damaged"),
        (a_tensor((2,), (1,), 4, offset=10), "damaged"),
        (a_tensor((4000,), (1,), 4000), "damaged"),
        (call("builtins\nbytearray", 10**9), "not opened; .*bytearray"),
        (call("torch\nTensor", 10**9), "not opened; .*Tensor"),
        (call("torch._utils\n_rebuild_parameter", 1), "not opened"),
        (call("os\nsystem", 1), "not opened; .*os system"),
        (doubled(40), "over and over"),
        (b"]q\x00h\x00a", "over and over"),  # a list that holds itself
        (b"}K\x01K\x02\x86K\x03s", "neither a word nor a number"),
        (b"\x8f", "holds a set"),
    ],
    ids=[*map(str, range(14))],
)
def test_values_that_would_grow_are_refused(tmp_path: Path, value: bytes, said: str) -> None:
    archive(tmp_path / LAST, value)
    assert_refused(tmp_path / LAST, said)


def test_nesting_of_any_depth_is_read(tmp_path: Path) -> None:
    archive(tmp_path / LAST, b"]" * 10**5 + b"a" * (10**5 - 1))
    assert len(checkpoint.load(tmp_path / LAST)["model"]["w"]) == 1


def test_a_compressed_one_is_refused_unpacked(tmp_path: Path) -> None:
    # Kilobytes that unpack to 200 MB.
    with zipfile.ZipFile(tmp_path / LAST, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("archive/data/0", "w", force_zip64=True) as part:
            for _ in range(20):
                part.write(bytes(10**7))
        file.writestr("archive/data.pkl", b"}.")
    assert_refused(tmp_path / LAST, "its parts are compressed")


def test_parts_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    archive(tmp_path / LAST, b"K\x01", bytes(10**6))
    content = bytearray((tmp_path / LAST).read_bytes())
    at = content.index(b"PK\x01\x02")  # its directory, of which an entry is named once more
    end = content.index(b"PK\x05\x06")
    entry = content[content.rindex(b"PK\x01\x02") : end]
    more = b"".join(entry.replace(b"data/0", b"data/%c" % name) for name in b"123456789")
    struct.pack_into("<HHI", content, end + 8, 13, 13, end - at + len(more))
    (tmp_path / LAST).write_bytes(content[:end] + more + content[end:])
    assert len(zipfile.ZipFile(tmp_path / LAST).infolist()) == 13
    assert_refused(tmp_path / LAST, "its parts are larger than itself")


def test_a_part_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    archive(tmp_path / LAST, b"K\x01")
    content = bytearray((tmp_path / LAST).read_bytes())
    at = content.rindex(b"PK\x01\x02")
    struct.pack_into("<II", content, at + 20, 2**31, 2**31)
    (tmp_path / LAST).write_bytes(content)
    assert_refused(tmp_path / LAST, "its parts are larger than itself")


def test_an_endless_pickle_is_refused_unread(tmp_path: Path) -> None:
    archive(tmp_path / LAST, b"]" + b"0]" * 9_000_000)
    assert_refused(tmp_path / LAST, "its data.pkl is larger than any run's")


def test_a_file_larger_than_any_run_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / LAST, "wb") as file:
        file.truncate(checkpoint.MAX_BYTES + 1)  # takes no room on the disk
    assert_refused(tmp_path / LAST, "larger than the 4 GiB")


def test_two_archives_in_one_file_are_read_as_one(tmp_path: Path) -> None:
    # Python's reader of zip takes the second, torch's does not: what was checked is read.
    archive(tmp_path / "evil", call("builtins\nbytearray", 10**8))
    archive(tmp_path / "good", a_tensor((4,), (1,), 4))
    both = (tmp_path / "evil").read_bytes() + (tmp_path / "good").read_bytes()
    (tmp_path / LAST).write_bytes(both)
    assert isinstance(checkpoint.load(tmp_path / LAST)["model"]["w"], Tensor)


@pytest.mark.parametrize("strange", ["pipe", "link", "folder link", "link to itself"])
def test_a_file_that_is_none_is_refused_without_waiting(tmp_path: Path, strange: str) -> None:
    folder = tmp_path / "run/checkpoints"
    checkpoint.save(a_state(), tmp_path / "other" / LAST)
    folder.parent.mkdir()
    if strange == "folder link":
        folder.symlink_to(tmp_path / "other")
    else:
        folder.mkdir()
        if strange == "pipe":
            os.mkfifo(folder / LAST)
        else:
            (folder / LAST).symlink_to(tmp_path / "other" / LAST if strange == "link" else LAST)
    with pytest.raises(UserError, match=r"last\.pt (leads out|is neither|cannot be read)"):
        checkpoint.load(folder / LAST)


def test_a_link_inside_the_run_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint.save(a_state(), folder / BEST)
    (folder / LAST).symlink_to(BEST)
    assert same(checkpoint.load(folder / LAST), a_state())


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


# ------------------------------------------------------------------------------ what it fits


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "ours": Adam,
    "adam": torch.optim.Adam,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adagrad": torch.optim.Adagrad,
}
IMAGES = Examples(torch.arange(96, dtype=torch.uint8).view(16, 2, 3), torch.arange(16) % 4)


def a_model(hidden: Any = 5) -> nn.Module:
    return models.build(
        {"_target_": "fashionnet.models.mlp.MLP", "hidden": hidden}, (2, 3), 4, seed=0
    )


def a_fit(optimizer: str = "ours", restores: bool = False) -> TrainState:
    model = a_model()
    stopping = EarlyStopping(restore_best_weights=restores)
    made = OPTIMIZERS[optimizer](model.parameters())
    return TrainState(model, made, Autograd(model), stopping, 0, 4, 255.0)


class Quiet(loop.Watcher):
    """Watches a fit and keeps each state that a checkpoint would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, Any]] = []

    def steps_taken(self, fit: TrainState, num_steps: int) -> None:
        self.states.append(copy.deepcopy(fit.state_dict()))

    def epoch_ended(self, fit: TrainState, row: Any) -> None:
        self.states.append(copy.deepcopy(fit.state_dict()))


@functools.cache
def trained(optimizer: str, restores: bool) -> list[dict[str, Any]]:
    watcher = Quiet()
    loop.fit(a_fit(optimizer, restores), IMAGES[:12], IMAGES[12:], 2, watcher)
    return watcher.states


def states(optimizer: str = "ours", restores: bool = False) -> list[dict[str, Any]]:
    """What the checkpoints of a small fit hold, from the first to the last."""
    return copy.deepcopy(trained(optimizer, restores))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("restores", [False, True])
def test_a_fit_is_put_back_where_it_was(tmp_path: Path, optimizer: str, restores: bool) -> None:
    for state in states(optimizer, restores):
        checkpoint.save(state, tmp_path / LAST)
        fit = a_fit(optimizer, restores)
        resume.restore(fit, checkpoint.load(tmp_path / LAST))
        restored = fit.state_dict()
        assert same({**restored, "fit_seconds": 0}, {**state, "fit_seconds": 0})


def changed(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        part: Any = state
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = to

    return change


def without(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        part: Any = state
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]

    return change


WEIGHT = "1.weight"  # (5, 6)
FOREIGN: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"no {key}": without(key) for key in a_fit().state_dict() if key != "model"},
    **{f"{key} is a word": changed(key, to="a") for key in a_fit().state_dict() if key != "model"},
    **{f"{key} is a list": changed(key, to=[]) for key in a_fit().state_dict() if key != "model"},
    "no weight": without("model", WEIGHT),
    "one more weight": changed("model", "w", to=torch.zeros(2)),
    "one more key": changed("extra", to=1),
    "shape": changed("model", WEIGHT, to=torch.zeros(6, 5)),
    "dtype": changed("model", WEIGHT, to=torch.zeros(5, 6, dtype=torch.float64)),
    "no tensor": changed("model", WEIGHT, to=[0.0]),
    "shape of a mean": changed("optimizer", "means", 0, to=torch.zeros(())),
    "dtype of a mean": changed("optimizer", "means", 0, to=torch.zeros(5, 6, dtype=torch.int64)),
    "fewer means": without("optimizer", "means", 0),
    "steps are a tensor": changed("optimizer", "steps", to=torch.zeros(3)),
    "no rate": without("optimizer", "lr"),
    "shape of the best": changed("best_weights", WEIGHT, to=torch.zeros(3)),
    "best of another stop": changed("early_stopping", "best_weights", to={"w": torch.zeros(3)}),
    "no patience": without("early_stopping", "wait"),
    "generators beyond their words": changed("generators", "numpy", "position", to=10**9),
    "generators of none": changed("generators", "python", "words", to=torch.zeros(3)),
    "generators of other bits": changed("generators", "torch", to=torch.zeros(5056).byte()),
    "weights to go on from": changed("unrestored", to={"w": torch.zeros(3)}),
    "too few hashes": without("weight_hashes", 0),
    "figures between two epochs": changed("figures", to=torch.zeros(2, 3)),
    "epoch 0": changed("epoch", to=0),
    "epoch without end": changed("epoch", to=10**300),
    "a row without a loss": without("history", 0, "loss"),
    "a row of words": changed("history", 0, "val_accuracy", to="good"),
    "a row that is none": changed("history", 0, to=3),
    "a row with half of the validation": without("history", 0, "val_accuracy"),
}


def test_a_fit_of_another_kind_of_device_is_refused_and_names_it(tmp_path: Path) -> None:
    checkpoint.save(states()[-1] | {"device": "cuda"}, tmp_path / LAST)
    with pytest.raises(UserError, match=r"a fit on cuda.* on cpu; use device=cuda"):
        resume.restore(a_fit(), checkpoint.load(tmp_path / LAST))


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_state_is_refused_by_its_file(tmp_path: Path, name: str) -> None:
    state = states()[-1]
    FOREIGN[name](state)
    checkpoint.save(state, tmp_path / LAST)
    with pytest.raises(UserError, match=r"last\.pt does not fit this run: .*overwrite=true") as no:
        resume.restore(a_fit(), checkpoint.load(tmp_path / LAST))
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    "to",
    [None, [], torch.zeros(()), torch.zeros(2), torch.zeros(2, 10**6), torch.zeros(2, 0)],
    ids=["none", "list", "scalar", "losses alone", "of more steps", "of no step"],
)
def test_figures_of_other_steps_than_were_taken_are_refused(tmp_path: Path, to: Any) -> None:
    state = next(state for state in states() if state["step"])
    checkpoint.save(state | {"figures": to}, tmp_path / LAST)
    with pytest.raises(UserError, match=r"last\.pt does not fit this run: .*figures"):
        resume.restore(a_fit(), checkpoint.load(tmp_path / LAST))


@pytest.mark.parametrize(
    "change",
    [
        changed("optimizer", "state", 0, "exp_avg", to=torch.zeros(3)),
        changed("optimizer", "state", 0, "step", to="a"),
        changed("optimizer", "state", 9, to={}),
        changed("optimizer", "state", to=[]),
        without("optimizer", "state", 0, "exp_avg_sq"),
        without("optimizer", "param_groups", 0, "lr"),
        changed("optimizer", "param_groups", 0, "lr", to="fast"),
        changed("optimizer", "param_groups", 0, "params", to=[0]),
    ],
)
def test_a_foreign_state_of_torchs_optimizers_is_refused(tmp_path: Path, change: Any) -> None:
    state = states("adam")[-1]
    change(state)
    checkpoint.save(state, tmp_path / LAST)
    with pytest.raises(UserError, match=r"last\.pt does not fit this run: "):
        resume.restore(a_fit("adam"), checkpoint.load(tmp_path / LAST))


def test_the_model_of_a_checkpoint(tmp_path: Path) -> None:
    state = states()[-1]
    checkpoint.save(state, tmp_path / LAST)
    model = network.load_model(tmp_path / LAST, a_model)
    assert weights_sha256(model.state_dict()) == weights_sha256(state["model"])


@pytest.mark.parametrize("name", ["no weight", "one more weight", "shape", "dtype", "no tensor"])
def test_weights_of_another_model_are_refused(tmp_path: Path, name: str) -> None:
    state = states()[-1]
    FOREIGN[name](state)
    checkpoint.save(state, tmp_path / LAST)
    with pytest.raises(UserError, match=r"last\.pt does not fit the recorded model: "):
        network.load_model(tmp_path / LAST, a_model)


def test_versions_that_are_none_are_refused(tmp_path: Path) -> None:
    state = states()[-1]
    state["model"]._metadata = {"": 3}
    checkpoint.save(state, tmp_path / LAST)
    with pytest.raises(UserError, match=r"last\.pt does not fit the recorded model: "):
        network.load_model(tmp_path / LAST, a_model)


@pytest.mark.usefixtures("little_memory")
def test_a_model_much_larger_than_its_weights_is_not_built(tmp_path: Path) -> None:
    # Those of a network that was asked for by name, of one wide layer, and of many layers: of each
    # a gigabyte would be taken, were the record believed.
    filled: list[int] = []

    class Layer(nn.Linear):
        def reset_parameters(self) -> None:
            filled.append(self.weight.nbytes)
            super().reset_parameters()

    checkpoint.save(states()[-1], tmp_path / LAST)
    backbones.build("torchvision", "shufflenet_v2_x0_5")  # what importing takes is not counted
    for build in (
        lambda: backbones.build("torchvision", "vit_l_16")[0],
        lambda: Layer(2**14, 2**14),
        lambda: nn.Sequential(*(Layer(2**11, 2**11) for _ in range(2**6))),
    ):
        devices.restart_peak_memory(torch.device("cpu"))
        before = devices.peak_memory_bytes()
        with pytest.raises(UserError, match=r"last\.pt does not fit .*: it has fewer weights than"):
            network.load_model(tmp_path / LAST, build)
        assert sum(filled) <= network._DROPPED_BYTES + 10**6
        if sys.platform == "linux":
            assert devices.peak_memory_bytes() - before < 3 * network._DROPPED_BYTES


@pytest.mark.parametrize("error", [MemoryError, AssertionError, KeyError, ZeroDivisionError])
def test_a_model_that_cannot_be_built_from_the_record_is_refused(
    tmp_path: Path, error: type[Exception]
) -> None:
    def build() -> nn.Module:
        raise error("it went\nwrong")

    checkpoint.save(states()[-1], tmp_path / LAST)
    with pytest.raises(UserError, match=r"last\.pt does not fit the recorded model: .*it went"):
        network.load_model(tmp_path / LAST, build)


def test_one_storage_under_many_names_does_not_pass_for_many_weights(tmp_path: Path) -> None:
    weight = torch.zeros(2**20)
    checkpoint.save({"model": {str(i): weight for i in range(1000)}}, tmp_path / LAST)
    with pytest.raises(UserError, match="it has fewer weights than"):
        network.load_model(
            tmp_path / LAST, lambda: nn.Sequential(*(nn.Linear(2**11, 2**11) for _ in range(32)))
        )


def test_a_model_is_built_once(tmp_path: Path) -> None:
    built: list[nn.Module] = []

    def build() -> nn.Module:
        built.append(a_model())
        return built[-1]

    checkpoint.save(states()[-1], tmp_path / LAST)
    assert network.load_model(tmp_path / LAST, build) is built[0]
    assert len(built) == 1


def test_a_model_that_looks_at_its_weights_is_built(tmp_path: Path) -> None:
    class Looks(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.first = self.weight[0, 0].item()

    checkpoint.save({"model": Looks().state_dict()}, tmp_path / LAST)
    assert isinstance(network.load_model(tmp_path / LAST, Looks), Looks)


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
