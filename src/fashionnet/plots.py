"""What a plot needs before it is drawn: matplotlib, and a place to be written to."""

from __future__ import annotations

from pathlib import Path

from fashionnet import extras
from fashionnet.errors import UserError
from fashionnet.files import check_place, is_pipe_or_device


def check_matplotlib(instead: str = "") -> None:
    """Refuses to go on without matplotlib, before any work is done.

    Args:
        instead: what does without it, for the message.

    Raises:
        UserError: it is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise extras.missing("plots need matplotlib", "plots", instead) from None


def check(path: str | Path, *endings: str, instead: str = "") -> None:
    """Refuses what would keep a plot from being written to `path`, before any work is done.

    Args:
        endings: of the formats that there are, e.g. ".png".
        instead: what does without matplotlib, for the message.

    Raises:
        UserError: it is no name of such a file, its folder cannot be used, or matplotlib is
            missing.
    """
    path = Path(path)
    if path.suffix.lower() not in endings and not is_pipe_or_device(path):
        raise UserError(f"the plot {path} must end its name in {' or '.join(endings)}")
    check_place(path, "the plot")
    check_matplotlib(instead)
