"""What the tests of data share."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fashionnet.data import fetching

Network = Callable[..., None]


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


NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Takes away apt, Debian's package and the network; called with an address, gives a proxy."""

    def reach(address: str = NOWHERE) -> None:
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setenv("https_proxy", NOWHERE)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies it has met

    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(fetching, "DEBIAN", Path("/nonexistent"))
    reach()
    return reach


class Mirror(SimpleHTTPRequestHandler):
    """Stands in for a mirror, reached as a proxy: serves files by their last name."""

    def translate_path(self, path: str) -> str:
        return str(Path(self.directory, path.rpartition("/")[2]))

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def mirror(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Mirror, directory=folder)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
