"""Command lines that a run gives its user, ready to paste into a shell in the current folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.system import launchers
from fashionnet.system.files import as_typed

if TYPE_CHECKING:
    from fashionnet.config.schema import Config

_BARE = re.compile(r"[\w.-]*/[\w./-]*", re.ASCII)  # what Hydra's grammar takes for a word


def line(module: str, *words: str | Path) -> str:
    """Returns the command line that runs a module in the environment of this process."""
    return " ".join(map(quoted, (_interpreter(), "-m", module, *map(str, words))))


def quoted(word: str) -> str:
    """Returns a word as a shell takes it; one with unprintable characters as bash and zsh do."""
    if word.isprintable():
        return shlex.quote(word)
    shown = (chr(b) if chr(b).isalnum() and b < 128 else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{''.join(shown)}'"


def _interpreter() -> str:
    """Returns `python` where a shell takes that for this interpreter, else the path of it."""
    found, this = shutil.which("python"), sys.executable
    if not this or (found and os.path.samefile(os.path.dirname(found), os.path.dirname(this))):
        return "python"
    typed = as_typed(Path(this))
    return typed if os.sep in typed else os.path.join(".", typed)  # else sought on the PATH


def _path(path: Path) -> str:
    """Returns a path as one types it, never like an option."""
    typed = as_typed(path)
    return os.path.join(".", typed) if typed.startswith("-") else typed


def after(run_dir: Path, record: Mapping[str, Any]) -> list[str]:
    """Returns what one may want to run after a run has completed."""
    run = _path(run_dir)
    is_in_outputs = run.startswith(os.path.join("outputs", ""))
    lines = []
    if record["validation"] is not None and importlib.util.find_spec("matplotlib") is not None:
        lines.append(line("fashionnet.mistakes", run))
    lines.append(line("tensorboard.main", "--logdir", "outputs" if is_in_outputs else run))
    below = () if is_in_outputs else (_path(run_dir.parent),)
    return [*lines, line("fashionnet.list", *below)]


def continuing(run_dir: Path, config: Config) -> str:
    """Returns the command line that continues this process' unfinished run.

    Args:
        config: the run's, which may hold what starts a run anew or refuses to continue it.
    """
    here = f"hydra.run.dir={_in_hydras_grammar(_path(run_dir))}"
    if launchers.world_size() > 1:
        return f"the same command with {quoted(here)}"
    decided = ("hydra.run.dir", "overwrite", "resume")
    words = [w for w in sys.argv[1:] if w.partition("=")[0].lstrip("+") not in decided]
    overrides = [i for i, w in enumerate(words) if "=" in w and not w.startswith("-")]
    end = overrides[-1] + 1 if overrides else len(words)  # Hydra takes them in one row only
    words[end:end] = ["overwrite=false"] * config.overwrite  # a file may say so
    words[end:end] = ["resume=auto"] * (config.resume != "auto")
    words.insert(end, here)
    return line("fashionnet.train", *words)


def _in_hydras_grammar(value: str) -> str:
    if _BARE.fullmatch(value):
        return value
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.single).with_quotes()
