"""The cache of decoded photos: a file for each, named by the hash of the photo's content.

Order and split are not cached, so runs of every seed use the same files, and so do folders of the
same photos. A file holds the pixels, a thumbnail and the sha256 of both. A photo that cannot be
decoded has a text file with the reason instead.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fashionnet.data import picture_files, pictures
from fashionnet.data.photos import finding
from fashionnet.data.photos.finding import Photo
from fashionnet.errors import UserError
from fashionnet.system import locks
from fashionnet.system.files import atomic_write, file_sha256, name_file, remove_temporary

_MAX_THREADS = 8
_AT_A_TIME = 64  # photos in memory
_THUMBNAIL = (3, 8, 9)
# Two photos look alike if their 64-bit difference hashes differ by at most this many bits and their
# gray thumbnails by at most this many of 255 levels on average. Among 397 photos of insects, this
# finds 95 % of copies at half the size or JPEG quality 50, while no two photos are closer than 10
# bits.
_ALIKE_BITS, _ALIKE_LEVELS = 2, 4.0

Pixels = NDArray[np.uint8]


def decode(content: bytes, size: int) -> Pixels:
    """Turns a photo upright, lays it on white, resizes it and crops its center.

    The shorter side becomes 256/224 of `size`. The pixels are those of torchvision's `Resize`
    (bicubic, antialiased) and `CenterCrop`, except that a large photo is first reduced to at least
    twice that side, which moves its content by up to half a pixel.

    Returns:
        RGB (3, size, size), 0 to 255.

    Raises:
        UserError: it is not a picture, is damaged, or is too large to be opened safely.
    """
    shorter = round(size * 256 / 224)
    with picture_files.decoded(io.BytesIO(content), enough=2 * shorter) as image:
        if 0 in image.size:
            raise UserError("it has no pixels; remove it")
        factor = max(1, min(image.size) // (2 * shorter))
        rgba = pictures.reduced_rgba(image, factor, steps=[])
        orientation = pictures.exif_orientation(image)
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if orientation in pictures.TURNS:
        rgb = rgb.transpose(pictures.TURNS[orientation])
    # Only what the crop keeps is resized: the whole of a panorama might not fit in memory.
    spans = []
    for side in rgb.size:
        resized = int(shorter * side / min(rgb.size))
        first = round((resized - size) / 2)
        spans.append((first * side / resized, (first + size) * side / resized))
    (left, right), (upper, lower) = spans
    box = left, upper, right, lower
    crop = rgb.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))


def decode_new(folder: Path, root: Path, photos: Sequence[Photo], size: int) -> dict[str, str]:
    """Decodes into the cache what it does not hold yet; only one process at a time does so.

    Args:
        folder: the cache for photos of this size.
        root: the folder that the photos' paths begin from.

    Returns:
        The reason, by path, why a photo cannot be decoded.

    Raises:
        UserError: the cache cannot be written, a photo changed since it was hashed, or there is no
            memory for it.
    """
    if _missing(folder, photos, size):
        with _lock(folder):
            new = _missing(folder, photos, size)  # another process may have decoded some
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about oddities that do no harm
                for _ in in_parallel(partial(_decode, folder, root, size), new, "decoding photos"):
                    pass
    reasons = {path.stem: path.read_text("utf-8") for path in folder.glob("*.txt")}
    return {photo.path: reasons[photo.sha256] for photo in photos if photo.sha256 in reasons}


def _missing(folder: Path, photos: Sequence[Photo], size: int) -> list[Photo]:
    """Returns the photos, each content once, of which the cache has neither pixels nor reason."""
    num_bytes = 3 * size * size + np.prod(_THUMBNAIL) + hashlib.sha256().digest_size

    def is_there(photo: Photo) -> bool:
        path = folder / photo.sha256
        with contextlib.suppress(OSError):
            return path.stat().st_size == num_bytes
        return path.with_suffix(".txt").is_file()

    return [photo for photo in {p.sha256: p for p in photos}.values() if not is_there(photo)]


def _decode(folder: Path, root: Path, size: int, photo: Photo) -> None:
    path, name = root / photo.path, photo.sha256
    with finding.opened(path) as file:
        content = file.read(picture_files.MAX_BYTES + 1)
    is_whole = len(content) <= picture_files.MAX_BYTES
    if is_whole and hashlib.sha256(content).hexdigest() != photo.sha256:
        raise UserError(f"photo {path} was changed meanwhile; start again")
    try:
        picture_files.check_size(len(content))
        pixels = decode(content, size)
        height, width = _THUMBNAIL[1:]
        thumbnails = (
            Image.fromarray(channel).resize((width, height), Image.Resampling.BOX)
            for channel in pixels
        )
        entry = pixels.tobytes() + b"".join(each.tobytes() for each in thumbnails)
        entry += hashlib.sha256(entry).digest()
    except UserError as error:
        entry, name = str(error).encode(errors="backslashreplace"), f"{name}.txt"
    except MemoryError as error:
        raise UserError(f"no memory to open {path}; scale it down") from error
    # Not flushed to the disk: what a loss of power damages has another size or checksum.
    with atomic_write(folder / name, durable=False) as cached:
        cached.write(entry)


def read(folder: Path, photos: Sequence[Photo], size: int) -> Tensor:
    """Returns the pixels of photos, (N, 3, size, size) uint8, in their order.

    They lie in a file without a name that is mapped into memory: the system keeps in memory what
    is used and frees the space on the disk when nobody uses the tensor.

    Raises:
        UserError: a file of the cache is missing or damaged.
    """
    num_bytes = 3 * size * size
    try:
        with _unnamed_file(folder) as file:
            for path in (folder / photo.sha256 for photo in photos):
                content = path.read_bytes() if path.is_file() else b""
                if hashlib.sha256(content[:-32]).digest() != content[-32:]:
                    raise UserError(
                        f"the cached photo {path} is damaged; remove {folder} to decode all anew"
                    )
                file.write(memoryview(content)[:num_bytes])
            file.flush()
            shape = (len(photos), 3, size, size)
            return torch.from_numpy(np.asarray(np.memmap(file, np.uint8, "r+", shape=shape)))
    except OSError as error:
        name_file(error, folder)
        raise


def _unnamed_file(folder: Path) -> BinaryIO:
    with contextlib.suppress(OSError):  # a cache that is read-only
        return tempfile.TemporaryFile(dir=folder)
    return tempfile.TemporaryFile()


def alike(
    folder: Path, test: Sequence[Photo], train: Sequence[Photo], size: int
) -> list[tuple[str, str]]:
    """Returns the paths of the test photos that look like a training photo, and of the latter."""
    train_grays, train_bits = _looks(folder, train, size)
    found = []
    for photo, gray, bits in zip(test, *_looks(folder, test, size), strict=True):
        close = np.flatnonzero(np.bitwise_count(train_bits ^ bits) <= _ALIKE_BITS)
        levels = np.abs(train_grays[close] - gray).mean(axis=1)
        if len(close) and levels.min() <= _ALIKE_LEVELS:
            found.append((photo.path, train[close[levels.argmin()]].path))
    return found


def _looks(
    folder: Path, photos: Sequence[Photo], size: int
) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
    """Returns gray thumbnails, (N, 72), 0 to 255, and their difference hashes, (N,).

    A bit of the hash is 1 where the thumbnail gets brighter to the right.
    """
    num = int(np.prod(_THUMBNAIL))
    read = [np.fromfile(folder / p.sha256, np.uint8, num, offset=3 * size * size) for p in photos]
    grays = np.stack(read).reshape(-1, *_THUMBNAIL).mean(axis=1, dtype=np.float32)
    bits = np.packbits((np.diff(grays) > 0).reshape(len(grays), -1), axis=1)
    return grays.reshape(len(grays), -1), bits.view(np.uint64).ravel()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from decoding the same photos at the same time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"the cache of photos {folder} cannot be written ({error.strerror}); "
            "let FASHIONNET_DATA name a folder that you may use"
        ) from error
    waiting = f"Another process is decoding photos into {folder}; waiting for it"
    with locks.in_turn(folder, waiting) as is_alone:
        if is_alone:
            remove_temporary(folder)
        yield


def sha256(path: Path) -> str:
    """Returns the sha256 of a file's content."""
    with finding.opened(path) as file:
        return file_sha256(file)


def in_parallel(
    function: Callable[[Any], Any], items: Sequence[object], title: str
) -> Iterator[Any]:
    """Yields a function's results in order; Pillow and hashlib release the GIL for its threads.

    A terminal shows a progress bar.
    """
    from tqdm import tqdm

    threads = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS))
    try:
        with tqdm(total=len(items), desc=title, unit="photo", leave=False, disable=None) as bar:
            for start in range(0, len(items), _AT_A_TIME):
                for result in threads.map(function, items[start : start + _AT_A_TIME]):
                    yield result
                    bar.update()
    finally:
        threads.shutdown(cancel_futures=True)
