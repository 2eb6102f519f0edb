"""Files that strangers damaged on purpose: they are read, or refused with a user error."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from fashionnet import checkpoint, data, pictures
from fashionnet.errors import UserError

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


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + values


IMAGES, LABELS = idx((3, 28, 28), bytes(range(147)) * 16), idx((3,), b"\x01\x00\x09")


@many
@given(damage=damages, seed=seeds, of_labels=st.booleans())
def test_data(damage: list[str], seed: int, of_labels: bool) -> None:
    images, labels = IMAGES, LABELS
    if of_labels:
        labels = damaged(labels, images, damage, seed)
    else:
        images = damaged(images, labels, damage, seed)
    contents = [np.frombuffer(bytearray(content), np.uint8) for content in (images, labels)]
    for content in contents:
        try:
            values = data.parse_idx(content)
        except UserError:
            pass
        else:
            assert values.tobytes() == content[4 + 4 * values.ndim :].tobytes()
    try:
        examples = data.examples_from_idx(contents[0], contents[1], 3)
    except UserError:
        return
    assert tuple(examples.images.shape) == (3, 28, 28)
    assert examples.labels.min() >= 0 and examples.labels.max() <= 9


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
