"""The files of published data sets, and how they are checked.

No content is used whose sha256 is not the published one. Most files are known by the sha256 of
their *unpacked* content: mirrors and Debian's packages put the same bytes under different gzip
headers. The unpacked file is also the cache of the tensor: a header, then the values as they are
used. It is hashed on every read.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fashionnet.system.files import file_sha256

Content = NDArray[np.uint8]  # the bytes of one unpacked file


@dataclass(frozen=True)
class Source:
    """One file of a published data set.

    Attributes:
        name: of the unpacked file.
        shape: of the tensor in it, one byte a value.
        header: bytes before the tensor.
        packed: name of the published file that holds it, `NAME.gz` or a `.tar.gz`.
        sha256: of the unpacked file; "" if only that of the packed one is known, which is then kept
            as it is and unpacked on every read.
        packed_sha256: of the packed file; "" if the unpacked content is verified instead.
    """

    name: str
    shape: tuple[int, ...]
    header: int
    packed: str
    sha256: str = ""
    packed_sha256: str = ""

    @property
    def size(self) -> int:
        """Bytes of the unpacked file."""
        return self.header + math.prod(self.shape)

    @property
    def kept(self) -> tuple[str, str]:
        """The name and the sha256 of the file that is kept, unpacked if possible."""
        return (self.name, self.sha256) if self.sha256 else (self.packed, self.packed_sha256)

    def values(self, content: Content) -> Content:
        """Returns the tensor in the file's content, as a view; the checksum covers the header."""
        return content[self.header :].reshape(self.shape)


@dataclass(frozen=True)
class Published:
    """A data set that is published under a name.

    Attributes:
        title: its name for people.
        class_names: one for each label.
        image_shape: of one picture, (height, width) or (3, height, width).
        folder: where its files lie below a data folder.
        train, test: the files of its two parts.
        read: makes pictures and labels, both uint8, of the tensors in the files of a part.
        mirrors: addresses of folders with the packed files, in the order in which they are tried.
        megabytes: of the packed files.
        debian: Debian's package is called dataset-DEBIAN; "" if there is none.
    """

    title: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    folder: Path
    train: tuple[Source, ...]
    test: tuple[Source, ...]
    read: Callable[[Sequence[Content]], tuple[Tensor, Tensor]]
    mirrors: tuple[str, ...]
    megabytes: int
    debian: str = ""

    @property
    def num_test(self) -> int:
        """The number of test pictures, all of which lie in one file."""
        return self.test[0].shape[0]

    @property
    def files(self) -> tuple[Source, ...]:
        """The files of both parts."""
        return self.train + self.test


class SourceError(Exception):
    """A file that is not what it should be, or a way to fetch the files that does not work."""


def read_checked(path: Path, source: Source) -> Content:
    """Reads one file, packed or not, into one writable buffer.

    Raises:
        SourceError: it is not the published file; the message names it.
    """
    expected = f"expected {source.size} bytes with sha256 {source.sha256}"
    is_packed = path.name == source.packed
    try:
        if is_packed and source.packed_sha256:
            expected = f"expected sha256 {source.packed_sha256}"
            with open(path, "rb") as file:
                _compare(path, "", file_sha256(file), source.packed_sha256, expected)
        if is_packed:
            content = _unpack(path, source)
        elif (size := path.stat().st_size) != source.size:
            raise SourceError(f"{path} is damaged: {size} bytes, {expected}")
        else:
            content = np.fromfile(path, np.uint8)
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        raise SourceError(f"{path} is damaged: {error}; {expected}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}; {expected}") from error
    if source.sha256:
        sha256 = hashlib.sha256(content.data).hexdigest()
        _compare(path, "unpacked: " if is_packed else "", sha256, source.sha256, expected)
    return content


def _compare(path: Path, what: str, found: str, published: str, expected: str) -> None:
    if found != published:
        raise SourceError(f"{path} is damaged or another file: {what}sha256 {found}, {expected}")


def _unpack(path: Path, source: Source) -> Content:
    """Unpacks into the bytes of `source` and never more, however much there would be."""
    size, content = source.size, np.empty(source.size, np.uint8)
    with _unpacked(path, source.name) as stream:
        filled = stream.readinto(content.data)
        if filled < size or stream.read(1):  # reading past the end also checks gzip's own sum
            raise EOFError(f"unpacks to {'fewer' if filled < size else 'more'} than {size} bytes")
    return content


@contextmanager
def _unpacked(path: Path, name: str) -> Iterator[Any]:
    """Opens the file in a `.gz`, or the one called `name` in a `.tar.gz`, in whichever folder."""
    if not path.name.endswith(".tar.gz"):
        with gzip.open(path) as stream:
            yield stream
        return
    with tarfile.open(path, "r:gz") as archive:
        members = (each for each in archive if each.isfile() and Path(each.name).name == name)
        member = next(members, None)
        found = archive.extractfile(member) if member else None
        if found is None:
            raise EOFError(f"it holds no {name}")
        yield found
