"""Pictures: what is kept, what is turned into a Fashion-MNIST-like one, and what is refused."""

from __future__ import annotations

import functools
import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor

from fashionnet.data import picture_files, pictures
from fashionnet.errors import UserError
from tests.conftest import raised_without_waiting
from tests.data.conftest import encoded

Floats = npt.NDArray[np.float64]

SHAPES = {  # outlines on a square of 28x28
    "shirt": [
        *((9, 0), (19, 0), (28, 7), (24, 12), (21, 9), (21, 28)),
        *((7, 28), (7, 9), (4, 12), (0, 7)),
    ],
    "trousers": [(8, 0), (20, 0), (21, 28), (16, 28), (14, 8), (12, 28), (7, 28)],
    "shoe": [(0, 22), (0, 15), (6, 15), (15, 9), (21, 9), (28, 5), (28, 22)],
}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
EXIF_ORIENTATION = 0x0112


@functools.cache
def coverage(shape: str, scale: int = 8) -> Floats:
    """Where the garment is, 0..1: (28 scale, 28 scale), with a darker stripe inside it."""
    image = Image.new("L", (28 * scale, 28 * scale))
    draw = ImageDraw.Draw(image)
    draw.polygon([(x * scale, y * scale) for x, y in SHAPES[shape]], fill=200)
    draw.rectangle((12 * scale, 10 * scale, 15 * scale, 20 * scale), fill=120)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(scale / 3)), dtype=np.float64) / 255


def photo(
    shape: str,
    garment: tuple[int, int, int] = (0, 0, 0),
    backdrop: tuple[int, int, int] = (255, 255, 255),
    margins: tuple[int, int] = (40, 60),
    shade: float = 0.0,
    noise: float = 0.0,
) -> Image.Image:
    """A garment before a backdrop; `shade` darkens the right side and the corners."""
    amount = np.pad(coverage(shape), [(margins[1], margins[1] // 2), (margins[0], margins[0] // 2)])
    y, x = np.mgrid[-1 : 1 : amount.shape[0] * 1j, -1 : 1 : amount.shape[1] * 1j]
    light = 1 - shade * ((1 + x) / 4 + (x * x + y * y) / 4)
    rgb = np.array(backdrop) + amount[..., None] * (np.array(garment) - np.array(backdrop))
    rgb = rgb * light[..., None] + np.random.default_rng(0).normal(0, noise, rgb.shape)
    return Image.fromarray(np.rint(np.clip(rgb, 0, 255)).astype(np.uint8))


def truth(shape: str) -> Floats:
    """The shape as Fashion-MNIST would show it: light on black, its longest side 28, centered."""
    amount = coverage(shape)
    rows, columns = np.nonzero(amount.max(1) > 0.05)[0], np.nonzero(amount.max(0) > 0.05)[0]
    image = Image.fromarray(np.rint(255 * amount).astype(np.uint8))
    image = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    size = [round(side * 28 / max(image.size)) for side in image.size]
    result = Image.new("L", (28, 28))
    small = image.resize((size[0], size[1]), Image.Resampling.BOX)
    result.paste(small, ((29 - size[0]) // 2, (29 - size[1]) // 2))
    return np.asarray(result, dtype=np.float64)


def difference(one: Tensor, other: Tensor | Floats) -> float:
    return float(np.abs(one.numpy().astype(np.float64) - np.asarray(other, np.float64)).mean())


def read_bytes(content: bytes, path: Path) -> pictures.Picture:
    path.write_bytes(content)
    return pictures.read(path)


def assert_fits(pixels: Tensor) -> None:
    assert pixels.dtype == torch.uint8 and tuple(pixels.shape) == (28, 28)


# ---- pictures of 28x28 are used as they are


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=hnp.arrays(np.uint8, (28, 28)))
@example(values=np.full((28, 28), 250, np.uint8))  # light everywhere, and still not negated
def test_gray_28x28_keeps_every_byte(values: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    picture = read_bytes(encoded(Image.fromarray(values)), tmp_path / "a.png")
    assert picture.steps == ()
    assert picture.path == str(tmp_path / "a.png")
    assert_fits(picture.pixels)
    assert np.array_equal(picture.pixels.numpy(), values)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_28x28_of_any_opaque_gray_mode_keeps_its_values(
    mode: str, file_format: str, tmp_path: Path
) -> None:
    image = ImageOps.invert(photo("shirt").convert("L").resize((28, 28)))
    expected = np.asarray(image.convert(mode).convert("L") if mode == "1" else image)
    if mode == "P":
        image = image.convert("RGB").quantize(256)
        expected = np.asarray(image.convert("L"))
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    picture = read_bytes(encoded(image, file_format), tmp_path / "picture")
    assert np.array_equal(picture.pixels.numpy(), expected)
    assert picture.steps == (("scaled its values to 8 bits",) if mode == "I;16" else ())


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_is_read(file_format: str, tmp_path: Path) -> None:
    values = np.tile(np.arange(28, dtype=np.uint8) * 9, (28, 1))
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = encoded(Image.fromarray(values), file_format, **options)
    picture = read_bytes(content, tmp_path / "picture")
    assert picture.steps == ()
    assert difference(picture.pixels, values.astype(np.float64)) < 2  # JPEG loses a little


def test_color_or_transparency_at_28x28_is_not_kept() -> None:
    color = Image.new("RGB", (28, 28), "white")
    color.paste((120, 0, 0), (8, 8, 20, 20))
    cut_out = Image.new("LA", (28, 28), (0, 0))
    cut_out.paste((60, 255), (8, 8, 20, 20))
    for image in (color, cut_out):
        pixels, steps = pictures.prepare(image)
        assert "negated: it was dark on light" in steps
        assert "trimmed the backdrop: 28x28 -> 12x12" in steps
        assert int(pixels.min()) > 150  # the square fills the result, light


def test_damage_behind_the_first_frame_of_an_animation_does_not_matter(tmp_path: Path) -> None:
    gray = Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28) % 128)
    gray.save(tmp_path / "whole.gif")
    content = (tmp_path / "whole.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(content[:-1] + b",\0\0\0")  # a second frame's beginning
    whole, cut = (pictures.read(tmp_path / f"{name}.gif") for name in ("whole", "cut"))
    assert torch.equal(cut.pixels, whole.pixels)


# ---- photos become pictures like those of Fashion-MNIST


LOOKS: list[tuple[str, dict[str, Any]]] = [
    ("shirt", {}),
    ("shoe", {"margins": (2, 2)}),
    ("trousers", {"margins": (0, 0)}),
    ("shirt", {"garment": (20, 0, 0), "backdrop": (250, 245, 235), "noise": 3}),
    (
        "trousers",
        {"garment": (10, 10, 10), "backdrop": (205, 210, 215), "shade": 0.3, "noise": 4},
    ),
    ("shoe", {"garment": (0, 0, 0), "backdrop": (230, 230, 230), "noise": 12}),
    ("trousers", {"garment": (255, 255, 255), "backdrop": (0, 0, 0)}),
    ("shoe", {"garment": (255, 255, 255), "backdrop": (40, 30, 35), "noise": 4}),
    ("shirt", {"garment": (255, 255, 255), "backdrop": (160, 160, 160)}),  # both are light
]


@pytest.mark.parametrize(("shape", "look"), LOOKS, ids=str)
def test_photo_becomes_the_picture_it_was_made_of(shape: str, look: dict[str, Any]) -> None:
    image = photo(shape, **look)
    pixels, steps = pictures.prepare(Image.open(io.BytesIO(encoded(image, "JPEG", quality=75))))
    assert_fits(pixels)
    assert difference(pixels, truth(shape)) < 10
    is_light = sum(look.get("garment", (0, 0, 0))) > sum(look.get("backdrop", (255, 255, 255)))
    assert any("negated" in step for step in steps) != is_light


def test_steps_name_what_was_done_in_order() -> None:
    image = photo("trousers", garment=(0, 0, 60), margins=(200, 70))
    _, steps = pictures.prepare(image)
    wide, high = image.size
    assert steps[:2] == ("turned gray", "negated: it was dark on light")
    before, after = steps[2].removeprefix("trimmed the backdrop: ").split(" -> ")
    assert before == f"{wide}x{high}"
    trimmed = [int(side) for side in after.split("x")]
    assert trimmed == pytest.approx([14 * 8, 28 * 8], abs=10)
    assert steps[3:] == ("scaled to 15x28", "sharpened", "padded to 28x28")  # its edges are soft


def cross(side: int, color: str | int = 0, mode: str = "L") -> Image.Image:
    """A garment that touches all four edges, and fills most of each; the corners are backdrop."""
    image = Image.new(mode, (side, side), "white")
    arm = side // 5
    image.paste(color, (arm, 0, side - arm, side))
    image.paste(color, (0, arm, side, side - arm))
    return image


def test_corners_are_the_backdrop_where_the_garment_touches_every_edge() -> None:
    pixels, steps = pictures.prepare(cross(280))
    assert "uneven or hidden" in steps[0]
    assert steps[1:] == ("negated: it was dark on light", "scaled to 28x28", "sharpened")
    assert not pixels[:4, :4].any() and pixels[8:20].min() == 255


def test_steps_leave_out_what_was_not_needed() -> None:
    _, steps = pictures.prepare(cross(28, "maroon", "RGB"))
    assert steps[1:] == ("turned gray", "negated: it was dark on light", "sharpened")


def test_small_jpeg_is_trimmed_to_the_garment_not_to_its_halo() -> None:
    clean = photo("shirt", garment=(90, 20, 20)).resize((60, 70))
    jpeg = Image.open(io.BytesIO(encoded(clean, "JPEG", quality=50)))
    assert difference(pictures.prepare(jpeg)[0], pictures.prepare(clean)[0]) < 4


def test_dark_backdrop_with_a_darker_garment_is_black_all_the_same() -> None:
    pixels, steps = pictures.prepare(photo("trousers", backdrop=(25, 25, 25)))
    assert "negated: it was dark on light" in steps
    assert not pixels[20:, 14].any()  # between the legs
    assert 120 < pixels[4:24, 9:12].float().median() < 180  # little light is not stretched


def test_single_speck_is_better_than_nothing() -> None:
    image = Image.new("L", (400, 400), 255)
    image.paste(0, (100, 100, 102, 102))
    assert "trimmed the backdrop: 400x400 -> 2x2" in pictures.prepare(image)[1]


def test_margins_do_not_matter() -> None:
    wide = pictures.prepare(photo("shoe", margins=(80, 60)))[0]
    for margins in [(2, 2), (60, 2), (100, 0)]:
        assert difference(pictures.prepare(photo("shoe", margins=margins))[0], wide) < 3


def test_backdrop_is_black_even_where_it_is_shaded_and_noisy() -> None:
    image = photo("shoe", backdrop=(230, 220, 200), shade=0.4, noise=8)
    pixels, steps = pictures.prepare(image)
    assert pixels[7:14, :5].float().mean() < 1  # within the box, above the toe
    assert "evened the backdrop to black" in steps


def test_noise_is_not_taken_for_a_faint_garment() -> None:
    clean, noisy = (
        photo("shirt", garment=(130, 130, 130), backdrop=(230, 230, 230), noise=noise)
        for noise in (0, 12)
    )
    assert difference(pictures.prepare(noisy)[0], pictures.prepare(clean)[0]) < 4


def test_dust_does_not_widen_the_box() -> None:
    image = photo("shirt", margins=(100, 60))
    clean = pictures.prepare(image)[0]
    for x, y in [(3, 5), (image.width - 9, 40), (20, image.height - 6)]:
        image.paste((30, 30, 30), (x, y, x + 2, y + 2))
    assert difference(pictures.prepare(image)[0], clean) < 0.5


@pytest.mark.parametrize(("shape", "shade"), [("shirt", 0.0), ("shoe", 0.3)])
def test_negative_gives_the_same_result(shape: str, shade: float) -> None:
    image = photo(shape, garment=(40, 60, 30), backdrop=(240, 240, 250), shade=shade)
    assert difference(*(pictures.prepare(i)[0] for i in (image, ImageOps.invert(image)))) < 1


def test_odd_pixel_of_padding_goes_left_and_above() -> None:
    # So it is in Fashion-MNIST: where the margins differ, the left and upper ones are wider.
    tall = Image.new("L", (19 * 4, 28 * 4), 0)
    pixels = pictures.prepare(ImageOps.expand(tall, 20, 255))[0]
    assert torch.nonzero(pixels.any(dim=0)).flatten().tolist() == list(range(5, 24))
    pixels = pictures.prepare(ImageOps.expand(tall.transpose(Image.Transpose.ROTATE_90), 20, 255))[
        0
    ]
    assert torch.nonzero(pixels.any(dim=1)).flatten().tolist() == list(range(5, 24))


def test_sharpening_follows_the_kernel_of_the_paper() -> None:
    # Columns of 0, 100 and 200 on black, so that nothing clips: radius 1, sd 1 (normalized).
    columns = np.repeat(np.array([0] * 8 + [100] * 6 + [200] * 6 + [100] * 8), 4)
    image = Image.fromarray(np.tile(columns, (112, 1)).astype(np.uint8))
    row = pictures.prepare(ImageOps.expand(image.crop((32, 0, 112, 112)), 30, 0))[0][14].int()
    step = 100 * (0.1028 + 2 * 0.0624)
    first, last = 4, 23
    assert row[first + 2].item() == 100
    assert row[first + 5].item() == pytest.approx(100 - step, abs=1)
    assert row[first + 6].item() == pytest.approx(200 + step, abs=1)
    assert row[last].item() == pytest.approx(100 + step, abs=1)


@pytest.mark.parametrize(
    ("orientation", "file_format"),
    [*((orientation, "JPEG") for orientation in range(1, 9)), (6, "PNG"), (6, "WEBP")],
)
def test_exif_rotation_equals_rotating_by_hand(
    orientation: int, file_format: str, tmp_path: Path
) -> None:
    image = photo("shoe", garment=(90, 20, 20))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    content = encoded(image, file_format, exif=exif.tobytes())
    by_hand = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    picture = read_bytes(content, tmp_path / "photo")
    expected, steps = pictures.prepare(by_hand)
    assert difference(picture.pixels, expected) < 0.5
    assert picture.steps == (() if orientation == 1 else ("rotated as its EXIF tag says",)) + steps


def test_large_photo_is_averaged_not_skipped() -> None:
    # A checkerboard of single pixels is mid-gray from afar; skipping would show black or white.
    image = Image.new("L", (3000, 2000), 255)
    board = np.indices((1000, 1000)).sum(axis=0) % 2 * 255
    image.paste(Image.fromarray(board.astype(np.uint8)), (900, 500))
    pixels, steps = pictures.prepare(image)
    assert "trimmed the backdrop: 3000x2000 -> " in " ".join(steps)
    assert pixels[4:-4, 4:-4].float().sub(127.5).abs().max() < 6


# ---- other ways to store the same picture


def stored_as(mode: str, image: Image.Image) -> Image.Image:
    """`image`, gray, in another mode with the same meaning."""
    values = np.asarray(image)
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(values.astype(np.int32) * 257)
    if mode == "F of 1":
        return Image.fromarray((values / 255).astype(np.float32))
    if mode == "F":
        return Image.fromarray(values.astype(np.float32))
    if mode == "P":
        return image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    return image.convert("RGB").convert(mode) if mode == "CMYK" else image.convert(mode)


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "LA", "P", "CMYK", "YCbCr", "I;16", "I", "F", "F of 1"]
)
def test_mode_does_not_matter(mode: str) -> None:
    gray = photo("shirt", garment=(60, 60, 60), noise=2).convert("L")
    expected = pictures.prepare(gray)[0]
    assert difference(pictures.prepare(stored_as(mode, gray))[0], expected) < 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_picture_is_laid_on_white(mode: str, tmp_path: Path) -> None:
    image = photo("shirt", garment=(60, 60, 60))
    alpha = image.convert("L").point([255 if value < 250 else 0 for value in range(256)])
    key = (255, 0, 255)
    flat = Image.composite(image, Image.new("RGB", image.size, key), alpha)
    if mode in ("RGBA", "LA"):
        flat = image.convert("RGB").convert(mode)
        flat.putalpha(alpha)
        content = encoded(flat)
    elif mode == "P":
        flat = flat.quantize(200, dither=Image.Dither.NONE)
        content = encoded(flat, transparency=flat.getpixel((0, 0)))
    else:
        content = encoded(flat, transparency=key)
    picture = read_bytes(content, tmp_path / "cut-out.png")
    assert picture.steps[0] == "laid on white where transparent"
    assert difference(picture.pixels, pictures.prepare(image)[0]) < 3


def test_large_palette_and_color_key_are_not_averaged() -> None:
    # Every other column transparent over black: half white, half gray, and never any black.
    image = Image.new("RGB", (1200, 1200), (255, 255, 255))
    stripes = np.full((600, 600, 3), 100, np.uint8)
    stripes[:, ::2] = 0
    image.paste(Image.fromarray(stripes), (300, 300))
    keyed = Image.open(io.BytesIO(encoded(image, transparency=(0, 0, 0))))
    palette = image.quantize(8, dither=Image.Dither.NONE)
    for picture, expected in [(keyed, 255 - (255 + 100) / 2), (palette, 255 - (0 + 100) / 2)]:
        middle = pictures.prepare(picture)[0][8:20, 8:20].float()
        assert middle.mean().item() == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_animation_shows_its_first_frame_and_says_so(file_format: str, tmp_path: Path) -> None:
    first, second = photo("shirt").convert("L"), photo("trousers").convert("L")
    content = encoded(first, file_format, save_all=True, append_images=[second], duration=50)
    picture = read_bytes(content, tmp_path / "moving")
    assert difference(picture.pixels, truth("shirt")) < 10
    assert picture.steps[0] == "used one frame of an animation"
    still = read_bytes(encoded(first, file_format), tmp_path / "still")
    assert not any("animation" in step for step in still.steps)


def test_values_that_are_not_finite_do_not_matter() -> None:
    values = np.asarray(photo("shirt").convert("L")).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    assert difference(pictures.prepare(Image.fromarray(values))[0], truth("shirt")) < 10
    assert_fits(pictures.prepare(Image.fromarray(np.full((40, 30), np.nan, np.float32)))[0])


def test_values_on_a_scale_of_their_own_are_stretched() -> None:
    gray = ImageOps.autocontrast(photo("shirt").convert("L"))
    for factor, offset in [(1e4, -3e5), (1e4, 0), (0.5, -20)]:
        values = (np.asarray(gray) * factor + offset).astype(np.float32)
        pixels = pictures.prepare(Image.fromarray(values))[0]
        assert difference(pixels, pictures.prepare(gray)[0]) < 1


# ---- odd pictures


@pytest.mark.parametrize("color", ["white", "black", "gray", "red"])
def test_one_color_says_that_nothing_stands_out(color: str) -> None:
    pixels, steps = pictures.prepare(Image.new("RGB", (100, 60), color))
    assert not pixels.any()
    assert "nothing stands out from the backdrop, so used it whole" in steps


def test_uneven_backdrop_is_reported() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.uint8)
    assert any("uneven" in step for step in pictures.prepare(Image.fromarray(noise))[1])
    assert not any("uneven" in step for step in pictures.prepare(photo("shirt", noise=4))[1])


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 10_000), (10_000, 1), (29, 28)])
def test_any_size_fits(size: tuple[int, int]) -> None:
    image = Image.new("L", size, 255)
    image.putpixel((0, 0), 0)
    assert_fits(pictures.prepare(image)[0])


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["I", "F", "I;16", "I;16B"]


@settings(max_examples=100, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    seed=st.integers(0, 10**6),
)
def test_prepare_takes_any_mode_size_and_content(mode: str, size: Any, seed: int) -> None:
    image = Image.new(mode, size)
    length = len(image.tobytes())
    content = np.random.default_rng(seed).bytes(length)
    assert_fits(pictures.prepare(Image.frombytes(mode, size, content))[0])


# ---- what is refused


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PHOTO = photo("shirt", garment=(90, 20, 20), noise=2)
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "empty"),
    "text.png": (b"hello\n" * 50, "export it as PNG or JPEG"),
    "drawing.svg": (b'<?xml version="1.0"?>\n<svg width="28"></svg>', "SVG.*PNG"),
    "phone.heic": (b"\0\0\0\x18ftypheic" + b"\0" * 99, "HEIC.*JPEG"),
    "web.avif": (b"\0\0\0\x1cftypavif" + b"\0" * 99, "AVIF.*PNG"),
    "paper.pdf": (b"%PDF-1.7\n", "PDF.*PNG"),
    "cut.png": (encoded(PHOTO)[:-3000], "cut short"),
    "cut.jpg": (encoded(PHOTO, "JPEG")[:-3000], "cut short"),
    "cut.tif": (encoded(PHOTO, "TIFF")[:5000], "cut short"),
    "cut.gif": (encoded(PHOTO, "GIF")[:900], "cut short"),
    "bomb.png": (png_header(60_000, 60_000), "too many pixels.*scale it down"),
    "middle_bomb.png": (png_header(10_000, 10_000), "too many pixels"),  # Pillow warns of this one
    "text.ppm": (b"P3 2000 2000 255\n" + b"1 " * 99, "too many pixels"),
    "zero.png": (png_header(0, 9), "export|pixels"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "export it as PNG"),
    "game.dds": (encoded(PHOTO, "DDS"), "export it as PNG"),  # a parser that is not let in
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_file_and_the_way_out(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    with warnings.catch_warnings(), pytest.raises(UserError, match=message) as refusal:
        warnings.simplefilter("error")
        read_bytes(content, tmp_path / name)
    assert name in str(refusal.value) and ";" in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.png", r"missing\.png.*no such file; check the path"),
        ("a\0b.png", "check the path"),
        ("file.png/inside.png", "check the path"),
        ("/dev/zero", "not a regular file"),
        ("", "a folder; name the pictures"),
    ],
)
def test_a_path_without_a_picture_is_refused(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(encoded(PHOTO))
    with pytest.raises(UserError, match=message):
        pictures.read(tmp_path / path)


def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    refusal = raised_without_waiting(pictures.read, tmp_path / "pipe.png")
    assert isinstance(refusal, UserError) and "not a regular file" in str(refusal)


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "huge.png", "wb") as file:
        file.write(encoded(Image.new("L", (28, 28))))
        file.truncate(2 * 2**30)
    with pytest.raises(UserError, match="larger than 100 MiB"):
        pictures.read(tmp_path / "huge.png")


def test_pictures_that_cannot_be_prepared() -> None:
    for image, message in (
        (Image.new("La", (30, 30)), "mode La"),
        (Image.new("L", (0, 5)), "no pixels"),
    ):
        with pytest.raises(UserError, match=message):
            pictures.prepare(image)


@pytest.mark.parametrize(
    ("fault", "seen"), [(MemoryError, UserError), (ZeroDivisionError, ZeroDivisionError)]
)
def test_lack_of_memory_is_the_users_to_mend_other_faults_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Exception], seen: type[Exception]
) -> None:
    def prepare(*_: object) -> None:
        raise fault

    monkeypatch.setattr(pictures, "prepare", prepare)
    with pytest.raises(seen, match="memory" if seen is UserError else None):
        read_bytes(encoded(PHOTO), tmp_path / "a.png")


# ---- damage


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(exif=st.binary(max_size=60))
@example(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
@example(exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0")
@example(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\0\x06\0\0\0\0\0\0")
def test_damaged_exif_is_ignored(exif: bytes, tmp_path: Path) -> None:
    small = PHOTO.resize((60, 70))
    picture = read_bytes(encoded(small, "JPEG", exif=exif), tmp_path / "a.jpg")
    assert difference(picture.pixels, pictures.prepare(small)[0]) < 8


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_damaged_color_profile_is_ignored(file_format: str, tmp_path: Path) -> None:
    content = encoded(PHOTO, file_format, icc_profile=b"not a profile")
    assert difference(read_bytes(content, tmp_path / "a").pixels, pictures.prepare(PHOTO)[0]) < 5


TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06" + b"\0" * 7
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("PNG", "RGB", {}),
    ("PNG", "P", {"transparency": 0}),
    ("JPEG", "RGB", {"exif": TURNED}),
    ("JPEG", "CMYK", {"progressive": True}),
    ("BMP", "P", {}),
    ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (40, 33))]}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "F", {}),
    ("WEBP", "RGB", {}),
    ("PPM", "RGB", {}),
]
SMALL = [encoded(PHOTO.resize((40, 33)).convert(mode), kind, **o) for kind, mode, o in KINDS]


def assert_read_or_refused(content: bytes, path: Path) -> None:
    try:
        picture = read_bytes(content, path)
    except UserError as error:
        assert path.name in str(error)
    else:
        assert_fits(picture.pixels)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.sampled_from(SMALL),
    seed=st.integers(0, 10**6),
    num_flips=st.sampled_from([0, 1, 1, 3, 30]),
    kept=st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.5, 0.1]),
    within=st.sampled_from([40, 200, 10**9]),
)
def test_damaged_file_is_read_or_refused(
    content: bytes, seed: int, num_flips: int, kept: float, within: int, tmp_path: Path
) -> None:
    damaged = bytearray(content[: int(len(content) * kept)])
    rng = random.Random(seed)
    for _ in range(num_flips):
        damaged[rng.randrange(min(len(damaged), within))] ^= 1 << rng.randrange(8)
    assert_read_or_refused(bytes(damaged), tmp_path / "damaged")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    head=st.sampled_from(
        b"|\x89PNG\r\n\x1a\n|\xff\xd8\xff\xe0|BM|GIF89a|II*\0|MM\0*|RIFF\0\0\0\0WEBPVP8 "
        b"|P1 |P2 |P3 |P5 |P6 9 9 255\n|Pf 9 9 -1\n".split(b"|")
    ),
    tail=st.binary(max_size=600),
)
def test_random_bytes_are_read_or_refused(head: bytes, tail: bytes, tmp_path: Path) -> None:
    assert_read_or_refused(head + tail, tmp_path / "noise")


# ---- leaves nothing behind


def test_files_are_closed_and_warnings_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = []
    original = picture_files.open_file

    def remembered(path: str | Path) -> Any:
        files.append(original(path))
        return files[-1]

    monkeypatch.setattr(pictures, "open_file", remembered)
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    read_bytes(encoded(PHOTO), tmp_path / "good.png")
    with pytest.raises(UserError):
        read_bytes(REFUSED["cut.png"][0], tmp_path / "cut.png")
    assert [file.closed for file in files] == [True, True]
    assert list(warnings.filters) == filters and limit == Image.MAX_IMAGE_PIXELS
