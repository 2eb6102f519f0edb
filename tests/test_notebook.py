"""The functions behind the commands, called from the cells of a notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

if TYPE_CHECKING:
    from tests.conftest import Commands

CELLS = [
    "import logging; logging.basicConfig()",
    "from fashionnet.train import train",
    "run = train('epochs=1', 'data.limit=1000', 'device=cpu')",
    "again = train('epochs=1', 'data.limit=1000', 'device=cpu')",
    "from fashionnet.evaluate import evaluate",
    "metrics = evaluate(run.run_dir)",
    "from fashionnet.predict import predict",
    "(guess,) = predict(run.run_dir, ['black.png'])",
    "from fashionnet.list import list_runs",
    "rows = list_runs()",
    "train('epoch=3')",
    "train('optimizer.lr=0')",
    "train('model.hidden=0', run_dir='refused')",
    "train('epochs=1', run_dir=run.run_dir)",
    "evaluate('nowhere')",
    "other = train('epochs=1', 'data.limit=320', 'model=mlp_no_dropout', run_dir='other')",
]

# A kernel: cells share their names, an event loop runs, stdout is no file, the arguments are the
# kernel's own, and what a cell raises ends the cell alone.
KERNEL = """\
import asyncio, contextlib, io, json, sys

async def kernel(cells):
    names, raised, shown = {"__name__": "__main__"}, [], io.StringIO()
    with contextlib.redirect_stdout(shown):
        for cell in cells:
            try:
                exec(cell, names)
            except BaseException as error:
                raised.append([cell, type(error).__name__, str(error)])
    return names, raised, shown.getvalue()

cells = json.loads(sys.argv[1])
sys.argv = ["ipykernel_launcher.py", "-f", "kernel.json"]
names, raised, shown = asyncio.run(kernel(cells))
runs = {name: names[name] for name in ("run", "again", "other") if name in names}
metrics, guess = names.get("metrics"), names.get("guess")
print(json.dumps({
    "raised": raised,
    "shown": shown,
    "runs": {
        name: [str(run.run_dir), run.record, run.history, run.best_val_loss]
        for name, run in runs.items()
    },
    "metrics": metrics and [metrics.loss, metrics.accuracy],
    "guess": guess and [guess.best_guess, guess.probabilities],
    "rows": names.get("rows"),
}))
"""


@pytest.fixture(scope="module")
def notebook(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the cells left behind, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    Image.new("L", (28, 28)).save(folder / "black.png")
    done = commands.execute(KERNEL, json.dumps(CELLS), cwd=folder)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr, "folder": folder}


@pytest.mark.slow
def test_training_twice_in_a_row_gives_the_same_bits(notebook: dict[str, Any]) -> None:
    (first, record, history, best), (second, again, _, _) = (
        notebook["runs"][name] for name in ("run", "again")
    )
    assert first != second
    assert record["weights_sha256"] == again["weights_sha256"]
    assert best == history[0]["val_loss"] == record["validation"]["loss"]
    assert Path(first, "run.json").is_file()
    assert Path(first).relative_to(notebook["folder"]).parts[:2] == ("outputs", "mlp")


@pytest.mark.slow
def test_notebook_and_command_give_the_same_bits(
    commands: Commands, notebook: dict[str, Any], tmp_path: Path
) -> None:
    arguments = ("epochs=1", "data.limit=1000", "device=cpu", "hydra.run.dir=run")
    commands.succeed("train", *arguments, cwd=tmp_path)
    run = commands.opened(tmp_path / "run")
    _, record, _, _ = notebook["runs"]["run"]
    assert run.record["weights_sha256"] == record["weights_sha256"]
    assert run.record["config_hash"] == record["config_hash"]


@pytest.mark.slow
def test_run_is_evaluated_predicts_and_is_listed(notebook: dict[str, Any]) -> None:
    _, record, _, _ = notebook["runs"]["run"]
    assert notebook["metrics"] == [record["validation"]["loss"], record["validation"]["accuracy"]]
    best, probabilities = notebook["guess"]
    assert len(probabilities) == 10 and best == max(probabilities, key=probabilities.__getitem__)
    rows = notebook["rows"]
    assert [row["started"] for row in rows] == [
        notebook["runs"][name][1]["started"] for name in ("run", "again")
    ]
    assert {row["status"] for row in rows} == {"completed"}


@pytest.mark.slow
def test_mistakes_are_raised_and_end_nothing_but_their_cell(notebook: dict[str, Any]) -> None:
    raised = {cell: (kind, text) for cell, kind, text in notebook["raised"]}
    words = {
        "train('epoch=3')": "epochs",
        "train('optimizer.lr=0')": "optimizer.lr=0",
        "train('model.hidden=0', run_dir='refused')": "model.hidden=0",
        "train('epochs=1', run_dir=run.run_dir)": "completed run",
        "evaluate('nowhere')": "nowhere",
    }
    assert raised.keys() == words.keys()
    for cell, word in words.items():
        kind, text = raised[cell]
        assert kind == "UserError"
        assert word in text
    assert notebook["runs"]["other"][1]["status"] == "completed"  # the cell after them
    folder = notebook["folder"]
    assert {path.name for path in folder.iterdir()} == {"black.png", "outputs", "other"}


@pytest.mark.slow
def test_cells_show_each_line_once(notebook: dict[str, Any]) -> None:
    lines = notebook["shown"].splitlines()
    assert sum(line.startswith("epoch 1/1 ") for line in lines) == 3
    assert sum(line.startswith("test accuracy: ") for line in lines) == 3
    assert notebook["stderr"] == ""  # nor once more by the root logger
