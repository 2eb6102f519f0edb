"""Packages that not every command needs: the extras of pyproject.toml, and how to install one."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

from fashionnet.errors import UserError

_TOP = Path(__file__).resolve().parents[3]  # of the repository, if this is a checkout


def require(needs: str, extra: str, *packages: str, instead: str = "") -> None:
    """Refuses to go on without packages, before any work is done.

    Args:
        needs, extra, instead: as for `missing`.

    Raises:
        UserError: one of the packages is not installed.
    """
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError:
        raise missing(needs, extra, instead) from None


def missing(needs: str, extra: str, instead: str = "") -> UserError:
    """Returns the error for a package that is not installed, with the command that installs it.

    Args:
        needs: what needs which package, e.g. "plots need matplotlib".
        extra: the extra of pyproject.toml that holds the package.
        instead: what does without it.
    """
    way_out = f"; or use {instead}" if instead else ""
    return UserError(f"{needs}: {install_command(extra)}{way_out}")


def install_command(extra: str) -> str:
    """Returns the command, ready to paste, that installs an extra for the running interpreter.

    In a checkout it installs the pinned versions. A wheel says itself what its extra requires, so
    that nothing depends on where the wheel came from.
    """
    pip = [_short(sys.executable), "-m", "pip", "install"]
    constraints = _TOP / "constraints.txt"
    if constraints.is_file() and (_TOP / "pyproject.toml").is_file():
        return shlex.join([*pip, "-c", _short(constraints), "-e", f"{_short(_TOP)}[{extra}]"])
    return shlex.join([*pip, *_requirements(extra)])


def _requirements(extra: str) -> list[str]:
    """Returns what the installed package requires for an extra, without markers."""
    try:
        every = metadata.requires("fashionnet") or []
    except metadata.PackageNotFoundError:
        every = []
    split = [line.partition(";")[::2] for line in every]
    own = re.compile(rf"""extra\s*==\s*['"]{extra}['"]""")
    wanted = [name.strip() for name, marker in split if own.search(marker)]
    return wanted or [f"fashionnet[{extra}]"]


def _short(path: str | Path) -> str:
    """Returns an absolute path as one would type it: relative where it lies below this folder."""
    try:
        return os.fspath(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return os.fspath(path)
