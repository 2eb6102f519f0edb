"""What all plots share: checks of matplotlib and of the output path, safe labels, saving."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fashionnet.errors import UserError, visible
from fashionnet.system import extras
from fashionnet.system.files import check_place, is_pipe_or_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_matplotlib(instead: str = "") -> None:
    """Refuses to go on without matplotlib, before any work is done.

    Args:
        instead: what works without it, for the message.

    Raises:
        UserError: it is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise extras.missing("plots need matplotlib", "plots", instead) from None


def check(path: str | Path, *endings: str, instead: str = "") -> None:
    """Refuses a path that a plot cannot be written to, before any work is done.

    Args:
        endings: of the formats, e.g. ".png".
        instead: what works without matplotlib, for the message.

    Raises:
        UserError: the name has another ending, its folder cannot be used, or matplotlib is
            missing.
    """
    path = Path(path)
    if path.suffix.lower() not in endings and not is_pipe_or_device(path):
        raise UserError(f"the plot {path} must end its name in {' or '.join(endings)}")
    check_place(path, "the plot")
    check_matplotlib(instead)


def label(text: str) -> str:
    """Returns `text` escaped for matplotlib: unprintable characters visible, `$` literal."""
    return visible(text).replace("$", r"\$")


def save(figure: Figure, file: IO[bytes], **options: Any) -> None:
    """Writes a figure; a character that the font does not have is drawn as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, **options)
