"""What the tests of data share."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Returns a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def forked(function: Callable[..., object], *arguments: object) -> Any:
    """Starts a function in a process of its own, which need not import anything."""

    def run() -> None:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@contextmanager
def without_root() -> Iterator[None]:
    """Takes off root's right to read and write everywhere, where the tests have it."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
