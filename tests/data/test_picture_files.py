"""Files that would hold a decoder for minutes are refused at once; real ones are read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fashionnet.data import photos, picture_files, pictures
from fashionnet.data.photos import cache
from fashionnet.errors import UserError
from tests.data.conftest import encoded

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def with_scans(times: int, size: tuple[int, int]) -> bytes:
    """A progressive JPEG whose last scan stands there so many times."""
    content = encoded(Image.new("RGB", size, "red"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * times + content[-2:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(*before: bytes, after: bytes = b"") -> bytes:
    """The picture as PNG, with chunks before and after its pixels."""
    content = encoded(NOISE, "PNG")
    place = content.index(b"IDAT") - 4
    return content[:place] + b"".join(before) + content[place:-12] + after + content[-12:]


def gif(extensions: bytes) -> bytes:
    content = encoded(NOISE.convert("P"), "GIF")
    place = 13 + (3 << ((content[10] & 7) + 1))
    return content[:place] + extensions + content[place:]


def exif(num: int, size: int) -> bytes:
    """EXIF of so many tags that all refer to the same bytes."""
    tags = [struct.pack("<HHII", 40_000 + i, 7, size, 8) for i in range(num)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", num) + b"".join(tags) + b"\0" * (4 + size)


def tiff(num_tags: int = 0, num_strips: int = 1, tile: int = 0) -> bytes:
    entries = {256: 1, 257: num_strips, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
    listed = [(tag, 4, 1, value) for tag, value in entries.items()]
    end = 14 + 12 * (len(listed) + num_tags + (4 if tile else 2))
    listed += [(40_000 + i, 7, 4, end) for i in range(num_tags)]
    if tile:
        listed += [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, end), (325, 4, 1, 1)]
    else:
        listed += [(273, 4, num_strips, end), (279, 4, num_strips, end)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(listed))
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(listed)) + directory + b"\0\0\0\0"
    return head + struct.pack("<I", 1) * num_strips


def run_length_bmp(side: int, data: bytes) -> bytes:
    sizes = (40, side, side, 1, 8, 1, len(data), 0, 0, 256, 0)
    head = b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078)
    return head + struct.pack("<IiiHHIIiiII", *sizes) + b"\0\1\2\3" * 256 + data


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans": (lambda: with_scans(3000, (2000, 1500)), "goes over its 3000000 pixels"),
    "fill bytes": (
        lambda: b"\xff\xd8" + b"\xff" * 100_000 + encoded(NOISE, "JPEG")[2:],
        "bytes between its segments",
    ),
    "escaped bytes": (
        lambda: b"\xff\xd8" + b"\xff\0" * 100_000 + encoded(NOISE, "JPEG")[2:],
        "bytes between its segments",
    ),
    "segments": (
        lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 10_000 + encoded(NOISE, "JPEG")[2:],
        "more than 5000 segments",
    ),
    "long EXIF": (
        lambda: (
            b"\xff\xd8"
            + (b"\xff\xe1\xff\xffExif\0\0" + b"a" * 65_527) * 30
            + encoded(NOISE, "JPEG")[2:]
        ),
        "more than 1048576 bytes of EXIF",
    ),
    "EXIF of a JPEG": (
        lambda: encoded(NOISE, "JPEG", exif=b"Exif\0\0" + exif(900, 50_000)),
        "EXIF refers to more than it holds",
    ),
    "empty chunks": (lambda: png(chunk(b"IDAT") * 200_000), "more than 100000 chunks"),
    "chunks at the end": (lambda: png(after=chunk(b"prVt") * 200_000), "more than 100000 chunks"),
    "comments": (
        lambda: gif(b"\x21\xfe" + (b"\xff" + b"a" * 255) * 10_000 + b"\0"),
        "bytes of comments",
    ),
    "empty comments": (lambda: gif(b"\x21\xfe\0" * 20_000), "bytes of comments"),
    "blocks": (
        lambda: gif(b"\x2c" + bytes(9) + b"\2" + b"\1a" * 1_100_000 + b"\0"),
        "more than 1000000 blocks",
    ),
    "tags": (lambda: tiff(num_tags=5000), "more than 1000 tags"),
    "strips": (lambda: tiff(num_strips=500_000), "it has 500000 strips"),
    "tile": (lambda: tiff(tile=50_000), "its tiles are too large"),
    "runs of nothing": (lambda: run_length_bmp(100, b"\0\0" * 6_000_000), "run-length"),
    "many runs": (lambda: run_length_bmp(2000, b"\x01\x05" * 10), "run-length"),
    "header": (lambda: b"P6 #" + b"a" * 100_000 + b"\n1 1 255\nabc", "its header takes more"),
    "spaces": (lambda: b"P6" + b" " * 100_000 + b"1 1 255\nabc", "its header takes more"),
    "comments in text": (
        lambda: b"P2 9 9 255\n" + b"#\n" * 20_000 + b"1 " * 81,
        "more than 1000 comments",
    ),
    "text": (lambda: b"P2 9 9 255\n" + b" " * 34_000_000, "text of more than 32 MiB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_take_minutes_is_refused_unopened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = HOSTILE[name]
    (tmp_path / "a").write_bytes(make())

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("given to Pillow")

    monkeypatch.setattr(Image, "open", opened)
    for read in (pictures.read, lambda path: photos.read(path, 16)):
        with pytest.raises(UserError, match=rf"picture '.*/a': .*{words}.*; open it in an image"):
            read(tmp_path / "a")


@pytest.mark.parametrize(("times", "size"), [(1, (400, 300)), (25, (4000, 3000))])
def test_progressive_photos_are_read(times: int, size: tuple[int, int]) -> None:
    red = np.array([255, 0, 0])[:, None, None]
    assert np.abs(cache.decode(with_scans(times, size), 16) - red.astype(int)).max() < 4


def test_many_scans_of_a_small_picture_cost_little() -> None:
    assert cache.decode(with_scans(500, (100, 100)), 16).shape == (3, 16, 16)


def test_a_thumbnails_scans_do_not_count() -> None:
    thumbnail = with_scans(3000, (16, 16))[:60_000]
    content = encoded(Image.new("RGB", (4000, 3000)), "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert cache.decode(content, 16).shape == (3, 16, 16)


PROFILE = chunk(b"iCCP", b"large\0\0" + zlib.compress(bytes(3 << 20)))
TEXT = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(3 << 20)))


def test_a_png_with_a_large_profile_and_texts_is_not_damaged() -> None:
    assert (cache.decode(png(PROFILE, TEXT * 100), 16) == cache.decode(png(), 16)).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_a_large_profile_elsewhere_does_no_harm(kind: str) -> None:
    plain, profiled = (
        encoded(NOISE, kind, **options) for options in ({}, {"icc_profile": bytes(3 << 20)})
    )
    assert (cache.decode(profiled, 16) == cache.decode(plain, 16)).all()


@pytest.mark.parametrize("where", ["eXIf", "text"])
def test_orientation_is_kept(where: str) -> None:
    turned = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06" + b"\0" * 7
    if where == "eXIf":
        extra = chunk(b"eXIf", turned)
    else:  # as ImageMagick wrote it
        text = f"\nexif\n{len(turned) + 6:8}\n{(b'Exif' + bytes(2) + turned).hex()}\n".encode()
        extra = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    upright = encoded(NOISE.transpose(Image.Transpose.ROTATE_270), "PNG")
    assert (cache.decode(png(PROFILE, extra), 16) == cache.decode(upright, 16)).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_that_refers_to_gigabytes_is_ignored(kind: str) -> None:
    bomb = exif(20_000, 300_000)
    content = encoded(NOISE, "WEBP", lossless=True, exif=bomb)
    if kind == "PNG":
        content = png(chunk(b"eXIf", bomb))
    assert (cache.decode(content, 16) == cache.decode(png(), 16)).all()


def test_every_kind_of_plain_file_is_left_as_it_is() -> None:
    for kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"):
        content = encoded(NOISE, kind)
        assert picture_files.checked(content) == content
        for length in range(0, len(content), len(content) // 50 or 1):
            picture_files.checked(content[:length])  # cut short: not its business
