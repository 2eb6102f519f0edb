"""Data folders on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from fashionnet.errors import UserError


def default_root() -> Path:
    """Returns the data folder: `$FASHIONNET_DATA`, or a folder in the user's cache."""
    if chosen := os.environ.get("FASHIONNET_DATA"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("fashionnet", appauthor=False) / "data"


def data_folder(root: str | Path | None) -> Path:
    """Returns the absolute folder: the test set may be opened after a change of directory."""
    try:
        folder = Path(root or default_root()).expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"data.root={root}: {error}") from error
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f"data.root={folder}: {path} is a file; choose a folder")
            break
    return folder
