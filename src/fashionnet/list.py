"""The runs below a folder: status, model, seed, epochs, validation and test figures.

python -m fashionnet.list
python -m fashionnet.list outputs/sweeps --json
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fashionnet.errors import UserError, visible
from fashionnet.system import terminal
from fashionnet.system.command_line import Parser, reported

_HEADS = ("run", "status", "model", "seed", "epochs", "val_loss", "val_accuracy", "test_accuracy")


def list_runs(folder: str | Path = "outputs") -> list[dict[str, Any]]:
    """Returns a row for each run below `folder`, oldest first.

    A run whose record is damaged is listed with the status "damaged" and what is wrong.

    Returns:
        Rows with the keys run, status, model, seed, epochs, val_loss, val_accuracy, test_accuracy,
        started, error; a figure that a run does not have is None.

    Raises:
        UserError: the folder does not exist.
    """
    from fashionnet.runs import record, saved

    rows = []
    for path in saved.find(Path(folder)):
        try:
            rows.append(_row(path, record.read(path)))
        except UserError as error:
            rows.append({**dict.fromkeys(_HEADS), "run": os.path.relpath(path)})
            rows[-1] |= {"status": "damaged", "error": str(error), "started": None}
    return sorted(rows, key=lambda row: str(row["started"] or ""))


def _row(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    config = values["config"]
    validation, test = values.get("validation") or {}, values.get("test") or {}
    class_name = str(config["model"]["_target_"]).rpartition(".")[2]
    return {
        "run": os.path.relpath(path),
        "status": values["status"],
        "model": (values.get("choices") or {}).get("model") or class_name,
        "seed": config["seed"],
        "epochs": config["epochs"] or values.get("epochs_done"),
        "val_loss": validation.get("loss"),
        "val_accuracy": validation.get("accuracy"),
        "test_accuracy": test.get("accuracy"),
        "started": values["started"],
        "error": values.get("error"),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as an aligned table with a head."""
    cells = [[_cell(row[head]) for head in _HEADS] for row in rows]
    return terminal.aligned([_HEADS, *cells], num_left=3)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else visible(str(value))


@reported()
def main() -> None:
    """The command: `python -m fashionnet.list`."""
    parser = Parser("list", __doc__, "--json")
    parser.add_argument("folder", metavar="DIR", nargs="?", default="outputs")
    given = parser.parse_args()
    rows = list_runs(given.folder)
    if given.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(table(rows))
    else:
        print(f"no runs below {visible(given.folder)}")


if __name__ == "__main__":
    main()
