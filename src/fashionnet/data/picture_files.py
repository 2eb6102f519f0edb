"""Opening picture files, with limits on the work that one may cause, checked before it is decoded.

A small file can occupy a decoder for minutes: a JPEG of thousands of scans over the same pixels, a
PNG of millions of chunks, a TIFF whose thousands of tags all refer to the same megabytes. The bound
on pixels does not cover these, so the structure of a file is checked first, which takes a fraction
of a second for the largest file that is read. Real files are far within these bounds.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from PIL import Image, UnidentifiedImageError

from fashionnet.errors import UserError

MAX_BYTES = 100 * 2**20
MAX_PIXELS = 64_000_000  # decoded, up to 1 GB for a while
MAX_TEXT_PIXELS = 1_000_000  # of a PPM in text form, which is read slowly

# The formats that people have photos in; Pillow's other parsers stay out of a stranger's reach.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
# What the first bytes of other files hold, what the file is, and the way out.
_OTHER_FILES = (
    (b"<svg", "an SVG drawing; export it as PNG first"),
    (b"ftyphe", "a HEIC photo; export it as JPEG first"),
    (b"ftypmif1", "a HEIC photo; export it as JPEG first"),
    (b"ftypavi", "an AVIF picture; export it as PNG or JPEG first"),
    (b"%PDF", "a PDF document; export its picture as PNG first"),
)

# Each scan of a JPEG goes over all pixels. Encoders write about 10 of a progressive one, a few
# write 20 and more.
_MAX_SCANNED_PIXELS = 640_000_000
_MAX_SEGMENTS = 5_000  # of a JPEG; 100 MiB in the largest segments are 1,600
_MAX_FILL_BYTES = 10_000  # of a JPEG, between segments before the first scan
_MAX_EXIF_BYTES = 2**20
_MAX_CHUNKS = 100_000  # of a PNG; 100 MiB in chunks of 4 KiB are 25,600
_MAX_BLOCKS = 1_000_000  # of a GIF's first frame; 100 MiB in full blocks are 411,000
_MAX_EXTENSION_BYTES = 2**20  # of a GIF, up to its second frame
_EXTENSION_HEAD = 100  # what an empty one counts
_MAX_TAGS = 1_000  # of a TIFF
_MAX_STRIPS = 70_000  # and tiles
_MAX_TILE_PIXELS = 64_000_000
_MAX_HEADER_BYTES = 10_000  # of a PPM, comments included
_MAX_TEXT_BYTES = 32 * 2**20  # of a PPM in text form
_MAX_COMMENTS = 1_000  # there
# Of a BMP in run-length encoding, whose decoder is slow. No encoder writes more than 4 bytes a
# pixel and the palette.
_MAX_RLE_PIXELS, _MAX_RLE_BYTES = 2_000_000, 8 * 2**20

_WAY_OUT = "open it in an image program and save it anew as PNG or JPEG"


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Names the file in the errors of the body; a lack of memory is one of them."""
    try:
        yield
    except UserError as error:
        raise UserError(f"picture {str(path)!r}: {error}") from error
    except MemoryError as error:
        raise UserError(f"picture {str(path)!r}: no memory to open it; scale it down") from error


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file of sensible size."""
    try:
        status = os.stat(path)  # before open, which would wait for the writer of a FIFO
        if stat.S_ISREG(status.st_mode):
            check_size(status.st_size)
            return open(path, "rb")
    except FileNotFoundError:
        raise UserError("no such file; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be read ({reason}); check the path and its rights") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError("a folder; name the pictures in it")
    raise UserError("not a regular file; save the picture to one first")


def check_size(num_bytes: int) -> None:
    """Refuses a file that is empty or larger than `MAX_BYTES`."""
    if num_bytes == 0:
        raise UserError("the file is empty; copy or export it again")
    if num_bytes > MAX_BYTES:
        raise UserError(f"larger than {MAX_BYTES >> 20} MiB; scale it down or save it as JPEG")


@contextlib.contextmanager
def decoded(file: BinaryIO, enough: int | None = None) -> Iterator[Image.Image]:
    """Yields the decoded first frame of an open picture file.

    Args:
        enough: a JPEG may be reduced, which is several times faster, to sides of no less than this.

    Raises:
        UserError: it is not a picture, is damaged, or has too many pixels to be opened safely.
        MemoryError: decoding it needs more memory than there is.
    """
    too_large = "too many pixels to be opened safely; scale it down to 2000x2000 or so first"
    content = checked(file.read())
    head = content[:512]
    limit = MAX_TEXT_PIXELS if head[:2] in (b"P1", b"P2", b"P3") else MAX_PIXELS
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        if image.width * image.height > limit:  # known from the file's header alone
            raise UserError(too_large)
        if enough is not None:
            image.draft(None, (enough, enough))
        image.load()
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UserError(too_large) from error
    except UnidentifiedImageError as error:
        advice = (advice for mark, advice in _OTHER_FILES if mark in head)
        unknown = "not a picture that can be read; export it as PNG or JPEG"
        raise UserError(next(advice, unknown)) from error
    except Exception as error:  # damage makes Pillow's parsers raise nearly anything
        reason = str(error) or type(error).__name__
        raise UserError(f"damaged or cut short ({reason}); copy or export it again") from error
    with image:
        yield image


def checked(content: bytes) -> bytes:
    """Returns a picture file as it can be decoded in reasonable time and memory.

    A PNG is returned without its color profile and its texts, which are not used: Pillow would
    refuse large ones. A file that is damaged or not a picture passes; the decoder names that.

    Raises:
        UserError: decoding would take too long or too much memory.
    """
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(content)
        if content.startswith(b"\xff\xd8"):
            _check_jpeg(content)
        elif content.startswith(b"GIF8"):
            _check_gif(content)
        elif content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            _check_tiff(content)
        elif content.startswith(b"BM"):
            _check_bmp(content)
        elif re.match(rb"P[0-9Ffy]", content):
            _check_ppm(content)
    except (struct.error, IndexError):
        pass  # cut short: the decoder names that
    return content


def _refuse(what: str) -> NoReturn:
    raise UserError(f"{what}, so it would take too long to open; {_WAY_OUT}")


# Where the data of a scan end: at an FF that no 00 (a value), restart marker or other FF follows.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _check_jpeg(content: bytes) -> None:
    at, num_segments, num_scans, pixels, exif = 2, 0, 0, 0, b""
    while (found := _MARKER.search(content, at)) is not None:
        if not num_scans and found.start() - at > _MAX_FILL_BYTES:
            _refuse(f"it has {found.start() - at} bytes between its segments")
        kind, start = content[found.start() + 1], found.end()
        if kind == 0xD9:  # the end
            return
        if kind in (0x01, 0xD8):  # without content
            at = start
        else:
            (length,) = struct.unpack_from(">H", content, start)
            at = start + max(length, 2)
        num_segments += 1
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame's header
            height, width = struct.unpack_from(">HH", content, start + 3)
            pixels = max(pixels, height * width)
        elif kind == 0xE1 and content[start + 2 : start + 6] == b"Exif":
            exif += content[start + 2 : at][6 if exif else 0 :]
        num_scans += kind == 0xDA
        if num_segments > _MAX_SEGMENTS:
            _refuse(f"it has more than {_MAX_SEGMENTS} segments")
        if num_scans > 1 and num_scans * pixels > _MAX_SCANNED_PIXELS:
            _refuse(f"it goes over its {pixels} pixels more than {num_scans - 1} times")
        if len(exif) > _MAX_EXIF_BYTES:
            _refuse(f"it has more than {_MAX_EXIF_BYTES} bytes of EXIF")
        if num_scans == 1 and exif:  # Pillow reads it as it opens the file
            check_exif(exif)


def _png(content: bytes) -> bytes:
    """Returns a PNG without color profile and texts."""
    kept, at, start, num_chunks = [], 8, 0, 0  # what lies from `start` on is kept
    while at + 8 <= len(content):
        num_chunks += 1
        if num_chunks > _MAX_CHUNKS:
            _refuse(f"it has more than {_MAX_CHUNKS} chunks")
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            # Old programs put EXIF into a text.
            is_exif = content.startswith(b"Raw profile type exif\0", at + 8)
            if not is_exif or length > _MAX_EXIF_BYTES // 16:
                kept.append(content[start:at])
                start = end
        elif kind == b"eXIf" and length > _MAX_EXIF_BYTES:
            _refuse(f"it has {length} bytes of EXIF")
        elif kind == b"IEND":
            break
        at = end
    return b"".join([*kept, content[start:]]) if kept else content


def _check_gif(content: bytes) -> None:
    flags = content[10]
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    num_frames = num_blocks = extension = 0
    while num_frames < 2 and at < len(content) and content[at] != 0x3B:
        is_frame = content[at] == 0x2C
        if is_frame:
            num_frames += 1
            flags = content[at + 9]
            at += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        elif content[at] == 0x21:
            at += 2
            extension += _EXTENSION_HEAD
        else:
            return  # damaged
        while size := content[at]:
            at += 1 + size
            num_blocks += 1
            extension += 0 if is_frame else size
            if num_blocks > _MAX_BLOCKS:
                _refuse(f"it has more than {_MAX_BLOCKS} blocks in a frame")
            if extension > _MAX_EXTENSION_BYTES:
                break
        if extension > _MAX_EXTENSION_BYTES:
            _refuse(f"it has more than {_MAX_EXTENSION_BYTES} bytes of comments")
        at += 1


_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_SIZES |= {16: 8, 17: 8, 18: 8}
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_PLACES = (273, 279, 324, 325)  # offsets and lengths of strips and tiles


def _tiff_tags(content: bytes, at: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """Yields tag, bytes a value, number of values and the first four bytes of the first directory.

    `content` from `at` on may be a TIFF or what EXIF holds, which has the same form.
    """
    order = "<" if content[at : at + 2] == b"II" else ">"
    is_big = struct.unpack_from(f"{order}H", content, at + 2)[0] == 43
    (first,) = struct.unpack_from(f"{order}{'8xQ' if is_big else '4xI'}", content, at)
    (num,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", content, at + first)
    for i in range(num):
        place = at + first + (8 + 20 * i if is_big else 2 + 12 * i)
        tag, kind, count = struct.unpack_from(f"{order}HH{'Q' if is_big else 'I'}", content, place)
        value_format = f"{order}{'H' if kind == 3 else 'I'}"
        (value,) = struct.unpack_from(value_format, content, place + (12 if is_big else 8))
        yield tag, _TIFF_SIZES.get(kind, 1), count, value


def _check_tiff(content: bytes) -> None:
    total, tile = 0, {}
    for number, (tag, size, count, value) in enumerate(_tiff_tags(content), 1):
        if number > _MAX_TAGS:
            _refuse(f"it has more than {_MAX_TAGS} tags")
        total += size * count if size * count <= len(content) else 0  # else it is cut short
        if total > len(content) + _MAX_EXIF_BYTES:
            _refuse("its tags refer to more than the file holds")
        if tag in _PLACES and count > _MAX_STRIPS:
            _refuse(f"it has {count} strips or tiles")
        if tag in (_TILE_WIDTH, _TILE_LENGTH):
            tile[tag] = value
    if tile.get(_TILE_WIDTH, 1) * tile.get(_TILE_LENGTH, 1) > _MAX_TILE_PIXELS:
        _refuse("its tiles are too large")


def check_exif(exif: bytes) -> None:
    """Refuses EXIF whose tags refer to far more than it holds.

    Raises:
        UserError: they do.
    """
    at, total = 6 if exif.startswith(b"Exif\0\0") else 0, 0
    with contextlib.suppress(struct.error):  # damaged EXIF does no harm
        for _, size, count, _ in _tiff_tags(exif, at):
            total += size * count if size * count <= len(exif) else 0
            if total > len(exif) + _MAX_EXIF_BYTES:
                _refuse("its EXIF refers to more than it holds")


def _check_bmp(content: bytes) -> None:
    (header,) = struct.unpack_from("<I", content, 14)
    if header < 40:
        return
    width, height, _, _, compression = struct.unpack_from("<iiHHI", content, 18)
    if compression in (1, 2) and (
        abs(width * height) > _MAX_RLE_PIXELS or len(content) > _MAX_RLE_BYTES
    ):
        _refuse("run-length encoding is accepted for small pictures only")


def _check_ppm(content: bytes) -> None:
    head, num_numbers = content[:_MAX_HEADER_BYTES], 2 if content[1:2] in b"14" else 3
    number = rb"(?:\s|#[^\r\n]*[\r\n])+[^\s#]+"
    if len(content) > len(head) and not re.match(rb"P.(?:%b){%d}\s" % (number, num_numbers), head):
        _refuse(f"its header takes more than {_MAX_HEADER_BYTES} bytes")
    if content[1:2] in b"123" and len(content) > _MAX_TEXT_BYTES:
        _refuse(f"it is text of more than {_MAX_TEXT_BYTES >> 20} MiB")
    if content[1:2] in b"123" and content.count(b"#") > _MAX_COMMENTS:
        _refuse(f"it has more than {_MAX_COMMENTS} comments")
