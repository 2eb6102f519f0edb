"""Files that strangers damaged on purpose: they are read, or refused with a user error."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from fashionnet import compare, evaluate, list as lists, mistakes, models, predict, reproduce
from fashionnet.data import pictures
from fashionnet.errors import UserError, one_line
from fashionnet.runs import checkpoint, directory, network, saved

if TYPE_CHECKING:
    from tests.conftest import FinishedRun

# A failure is shown as it was found: shrinking takes minutes.
many = settings(
    max_examples=400,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
damages = st.lists(
    st.sampled_from(["truncate", "flip", "splice", "duplicate", "overwrite"]),
    min_size=1,
    max_size=4,
)
seeds = st.integers(0, 2**32)


def damaged(content: bytes, other: bytes, damage: list[str], seed: int) -> bytes:
    """Returns `content` after each kind of damage; `other` is what is spliced into it."""
    rng = random.Random(seed)
    result = bytearray(content)
    for kind in damage:
        # Half of the damage hits the head, where a format says what is to come.
        start = rng.randrange(min(len(result), rng.choice([64, 10**9])) + 1)
        end = min(len(result), start + rng.choice([1, 4, 30, 500]))
        if kind == "truncate":
            del result[max(start, 1) :]
        elif kind == "duplicate":
            result[end:end] = result[start:end]
        elif kind == "splice":
            begin = rng.randrange(len(other))
            result[start:end] = other[begin : begin + rng.choice([1, 30, 500])]
        elif kind == "overwrite":  # a number as large as a format can tell
            result[start : start + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        elif start < len(result):
            result[start] ^= 1 << rng.randrange(8)
    return bytes(result)


def a_picture(file_format: str, mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(values).convert("L" if mode == "I;16" else mode).convert(mode).save(
        buffer, file_format, **options
    )
    return buffer.getvalue()


PICTURES = [
    a_picture("PNG", "RGB"),
    a_picture("PNG", "P", save_all=True, append_images=[Image.new("P", (24, 20), 3)]),
    a_picture("PNG", "I;16"),
    a_picture("JPEG", "CMYK"),
    a_picture("JPEG", "L", progressive=True),
    a_picture("GIF", "P", save_all=True, append_images=[Image.new("P", (24, 20), 3)]),
    a_picture("BMP", "RGB"),
    a_picture("TIFF", "RGB", compression="tiff_lzw"),
    a_picture("TIFF", "CMYK"),
    a_picture("WEBP", "RGBA"),
    a_picture("PPM", "L"),
]


@many
@given(which=st.sampled_from(PICTURES), other=st.sampled_from(PICTURES), damage=damages, seed=seeds)
def test_a_picture(
    tmp_path: Path, which: bytes, other: bytes, damage: list[str], seed: int
) -> None:
    path = tmp_path / "picture"
    path.write_bytes(damaged(which, other, damage, seed))
    try:
        pixels = pictures.read(path).pixels
    except UserError as error:
        assert "picture" in str(error)
    else:
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (28, 28))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two sound checkpoints."""
    path = tmp_path_factory.mktemp("sound") / checkpoint.LAST
    contents = []
    for size in (3, 40):
        weights = torch.arange(size * 2.0).view(size, 2)
        state = {"model": {"w": weights}, "history": [{"epoch": 1, "loss": 0.5}] * 3, "best": None}
        checkpoint.save(state, path)
        contents.append(path.read_bytes())
    return contents


@many
@given(damage=damages, seed=seeds, first=st.booleans())
def test_a_checkpoint(
    tmp_path: Path, checkpoints: list[bytes], damage: list[str], seed: int, first: bool
) -> None:
    path = tmp_path / checkpoint.LAST
    which, other = checkpoints if first else reversed(checkpoints)
    path.write_bytes(damaged(which, other, damage, seed))
    try:
        checkpoint.load(path)
    except UserError as error:
        assert "last.pt" in str(error) and "weights_only" not in str(error)


@many
@given(damage=damages, seed=seeds)
def test_the_pickle_of_a_checkpoint(
    tmp_path: Path, checkpoints: list[bytes], damage: list[str], seed: int
) -> None:
    # Most damage is found by the checksums; here they are right.
    path, whole = tmp_path / checkpoint.LAST, zipfile.ZipFile(io.BytesIO(checkpoints[0]))
    with zipfile.ZipFile(path, "w") as file:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("data.pkl"):
                content = damaged(content, checkpoints[1], damage, seed)
            file.writestr(name, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state = checkpoint.load(path)
    except UserError as error:
        assert "last.pt" in str(error) and "weights_only" not in str(error)
    else:
        assert "model" in state


# ------------------------------------------------------------------------------------- records


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        [],
        {},
        [[]],
        {"a": {"b": []}},
        [None],
        ["a", 1],
        {"_target_": "os.mkdir"},
    ),
    *(0, 1, -1, 2, 10**9, 2**31, 2**53, 2**63, -(2**63), 10**400, 10**4200),
    *(0.0, 0.5, -1.5, 1e-320, 1e38, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "x" * 5000, "a\0b", "\ud800", "\x1b[2J", "~nobody/x", "../../..", "${oc.env:HOME}"),
    *("auto", "cuda:99", "latest", "a" * 300, "nan", "/dev/zero", "hf-hub:a/b", "run:run"),
    *(_nested(20), _nested(300), list(range(30_000)), {str(i): i for i in range(3000)}),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields where each node of plain values lies, the root left out."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(part, (*path, key))


def mutations(values: Any) -> list[tuple[tuple[Any, ...], str, Any]]:
    """Returns every way to damage one node: another value, none, or one more beside it."""
    found: list[tuple[tuple[Any, ...], str, Any]] = []
    for path in paths(values):
        found += [(path, "set", value) for value in VALUES]
        found += [(path, "delete", None), (path, "add", _nested(3)), (path, "add", 10**400)]
    return found


def mutated(values: Any, mutation: tuple[tuple[Any, ...], str, Any]) -> Any:
    path, how, value = mutation
    result = copy.deepcopy(values)
    *parents, last = path
    node = result
    for key in parents:
        node = node[key]
    if how == "set":
        node[last] = value
    elif how == "delete":
        del node[last]
    elif isinstance(node, dict):
        node["another"] = value
    else:
        node.append(value)
    return result


@pytest.fixture(scope="module")
def recorded(
    small: tuple[FinishedRun, FinishedRun], tmp_path_factory: pytest.TempPathFactory
) -> list[FinishedRun]:
    """Two runs: the lesson's network as it was trained, and a network with a frozen backbone."""
    first, _ = small
    place = tmp_path_factory.mktemp("recorded")
    shutil.copytree(first.path, place / "mlp")
    shutil.copytree(first.path, place / "transfer")
    mlp, transfer = (type(first)(place / name) for name in ("mlp", "transfer"))
    mlp.edit(parents=[{"path": "/a", "reproduced": True, "weights_sha256": "b"}], processes=1)
    node: dict[str, Any] = {"_target_": "fashionnet.models.transfer.Transfer", "trained": "head"}
    node |= {"library": "torchvision", "name": "shufflenet_v2_x0_5", "mean": [0.5, 0.5, 0.5]}
    node |= {"pretrained": str(place / "never opened")}
    model = models.build(node, (28, 28), 10, 0)
    state = checkpoint.load(transfer.path / "checkpoints/last.pt")
    checkpoint.save(state | {"model": model.state_dict()}, transfer.path / "checkpoints/last.pt")
    network.save_frozen(model, transfer.path / "checkpoints")
    transfer.edit(config=transfer.record["config"] | {"model": node}, head={"epochs": 1})
    return [mlp, transfer]


def resume(run: Path) -> None:
    """Claims a run as a command with its own configuration would, and more epochs."""
    first = saved.read(run)
    config = copy.deepcopy(first.config)
    for more in (0, 1):
        config.epochs += more
        with contextlib.suppress(UserError), directory.claimed(run, config):
            pass


def reread(run: Path) -> None:
    """Reads a run as `reproduce` does, up to the point where it trains."""
    first = saved.read(run)
    reproduce._rerun_config(first, None, "imagenet")
    reproduce.report(reproduce.judged(first, first))


# What a command does with a run; the slow ones look at fewer records.
READERS: dict[str, tuple[Callable[[Path, Path], object], int]] = {
    "list": (lambda run, _: lists.table(lists.list_runs(run)), 1),
    "compare": (compare.compare, 6),
    "compare --config": (
        lambda run, other: compare.describe(compare.compare_configs(run, other)),
        1,
    ),
    "predict": (lambda run, _: predict.predict(run, [run / "picture.png"]), 2),
    "reproduce": (lambda run, _: reread(run), 2),
    "resume": (lambda run, _: resume(run), 2),
    "evaluate": (lambda run, _: evaluate.evaluate(run, device="cpu"), 40),
    "mistakes": (lambda run, _: mistakes.mistakes(run, device="cpu", out=run / "out"), 150),
}


def read_by_all(run: Path, other: Path, number: int, what: object) -> None:
    """Lets commands read a run; a user error, or a refusal of the system's, is fine."""
    for name, (reader, every) in READERS.items():
        if number % every == 0:
            try:
                reader(run, other)
            except Exception as error:
                line = one_line(error)
                assert line is not None, (name, what)
                assert len(line) < 2000, (name, what)


def damaged_values(run: FinishedRun, name: str, num: int) -> Iterator[tuple[Any, Any]]:
    """Yields samples of what a file may be damaged to, with the damage."""
    values = run.record if name == "record" else run.history
    every = mutations(values)
    for mutation in random.Random(name).sample(every, min(num, len(every))):
        yield mutated(values, mutation), mutation


NUM_DAMAGED = int(os.environ.get("FASHIONNET_FUZZ", "50"))  # of a few thousand ways


@pytest.mark.parametrize(
    ("name", "index"),
    [("record", 0), ("record", 1), ("history", 0)],
    ids=["record", "record of a transfer", "history"],
)
def test_no_field_of_a_run_makes_a_command_fail(
    recorded: list[FinishedRun],
    small: tuple[FinishedRun, FinishedRun],
    name: str,
    index: int,
    tmp_path: Path,
) -> None:
    run = type(recorded[index])(tmp_path / "run")
    shutil.copytree(recorded[index].path, run.path)
    Image.new("L", (28, 28), 7).save(run.path / "picture.png")
    read_by_all(run.path, small[1].path, 0, "as it was")
    num = NUM_DAMAGED if name == "record" else NUM_DAMAGED // 5
    for number, (values, mutation) in enumerate(damaged_values(recorded[index], name, num)):
        if name == "record":
            (run.path / "run.json").write_text(json.dumps(values))
        else:
            text = "".join(json.dumps(row) + "\n" for row in values)
            (run.path / "history.jsonl").write_text(text)
        read_by_all(run.path, small[1].path, number, mutation)


watched: list[tuple[str, str]] = []  # what was opened and called
watching = threading.Event()


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if watching.is_set() and event in ("open", "socket.connect", "socket.getaddrinfo"):
        watched.append((event, str(arguments[:2])))


sys.addaudithook(_watch)  # stays for the life of the process


@pytest.mark.parametrize(
    ("source", "trained"),
    [
        ("imagenet", "head"),
        ("imagenet", "all"),
        ("a file", "all"),
        ("run:itself", "head"),
        ("hf-hub:a/b", 1),
        ("a pipe", "all"),
    ],
)
def test_reading_a_run_opens_nothing_that_it_names_and_calls_nobody(
    recorded: list[FinishedRun],
    small: tuple[FinishedRun, FinishedRun],
    source: str,
    trained: str | int,
    tmp_path: Path,
) -> None:
    run = type(recorded[1])(tmp_path / "run")
    shutil.copytree(recorded[1].path, run.path)
    Image.new("L", (28, 28), 7).save(run.path / "picture.png")
    secret = tmp_path / "secret.pth"
    os.mkfifo(secret) if source == "a pipe" else torch.save({"a": torch.zeros(1)}, secret)
    named = {"run:itself": f"run:{run.path}", "a file": str(secret), "a pipe": str(secret)}
    config = run.record["config"]
    config["model"] |= {"pretrained": named.get(source, source), "trained": trained}
    run.edit(config=config)
    before = sorted(tmp_path.iterdir())
    watched.clear()
    watching.set()
    try:
        read_by_all(run.path, small[1].path, 1, source)
        for number in (0, 2):
            read_by_all(run.path, small[1].path, number, source)
    finally:
        watching.clear()
    assert not [each for each in watched if each[0] != "open" or str(secret) in each[1]]
    assert any("last.pt" in each[1] for each in watched)  # it does watch
    assert sorted(tmp_path.iterdir()) == sorted({*before, tmp_path / "run"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("fresh", True), ("input_shape", [3, 9999, 9999]), ("num_classes", 10**6)),
        *(("name", "hf-hub:timm/resnet18"), ("name", "local-dir:/etc"), ("library", "/etc")),
    ],
)
def test_a_run_that_sets_what_is_the_packages_is_refused(
    recorded: list[FinishedRun], key: str, value: object, tmp_path: Path
) -> None:
    run = type(recorded[1])(tmp_path / "run")
    shutil.copytree(recorded[1].path, run.path)
    config = run.record["config"]
    config["model"] |= {"library": "timm", key: value} if key == "name" else {key: value}
    run.edit(config=config)
    with pytest.raises(UserError, match=rf"model\.{key}"):
        _ = saved.read(run.path).model
