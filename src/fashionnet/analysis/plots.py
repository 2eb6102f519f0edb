"""What all plots share: checks of matplotlib and of the output path, safe labels, saving."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.errors import UserError, visible
from fashionnet.system import extras
from fashionnet.system.files import check_place, is_pipe_or_device, write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_DPI = 200  # for screens with fine dots


def check_matplotlib(instead: str = "") -> None:
    """Refuses to go on without matplotlib, before any work is done.

    Args:
        instead: what works without it, for the message.

    Raises:
        UserError: it is missing.
    """
    extras.require("plots need matplotlib", "plots", "matplotlib", instead=instead)


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


def write(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG or SVG, by the ending of `path`; without one as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    write_output(path, rendered(figure, _DPI, "svg" if path.suffix.lower() == ".svg" else "png"))


def rendered(figure: Figure, dpi: int, kind: str = "png") -> bytes:
    """Returns a figure as a file; a character that the font does not have is drawn as a box."""
    from matplotlib import rc_context

    file = io.BytesIO()
    # The same figure gives the same file: no date, no random names.
    fixed: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "fashionnet"}):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format=kind, dpi=dpi, **fixed)
    return file.getvalue()
