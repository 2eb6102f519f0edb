"""Loss and accuracy of a saved run.

python -m fashionnet.evaluate RUN_DIR
python -m fashionnet.evaluate RUN_DIR --split test
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fashionnet.runs.splits import SPLITS
from fashionnet.system.command_line import Parser, reported

if TYPE_CHECKING:
    from fashionnet.training.metrics import Evaluation


def evaluate(
    run_dir: str | Path,
    split: str = "validation",
    device: str | None = None,
    root: str | None = None,
) -> Evaluation:
    """Evaluates the final weights of a run, as `model.evaluate` does.

    Args:
        run_dir: a run directory.
        split: "validation", or "test", whose every use is counted in the run's record.
        device: as in a run's configuration; None takes the run's own if this machine has it.
        root: the data folder; the figures say so if it holds other photos of the same classes.
            None takes the run's own folder if it is there, else the default.

    Raises:
        UserError: no run, a damaged one, no such split, data that changed since the run, or a test
            use that cannot be counted.
    """
    from fashionnet.runs import saved, splits
    from fashionnet.training import evaluation, features
    from fashionnet.training.metrics import Evaluation

    run = saved.read(run_dir)
    with run.on_device(device) as (chosen, model):
        scale = run.config.data.scale
        found = splits.examples_of(run, split, root)
        inputs = features.inputs(model, found.examples.to(chosen), scale)
        metrics = evaluation.evaluate(model, inputs, scale)
    if split == "test" and found.other_data is None and "loss" not in (run.record["test"] or {}):
        saved.note_test(run.path, asdict(metrics))
    return Evaluation(**asdict(metrics), other_data=found.other_data)


@reported()
def main() -> None:
    """The command: `python -m fashionnet.evaluate`."""
    parser = Parser("evaluate", __doc__, "run_dir", "--device", "--data-root", "--json")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="default: validation")
    given = parser.parse_args()
    metrics = evaluate(given.run_dir, given.split, given.device, given.data_root)
    if given.json:
        figures = {key: value for key, value in asdict(metrics).items() if value is not None}
        print(json.dumps({"split": given.split, **figures}))
    else:
        print(f"{given.split}  loss {metrics.loss:.4f}  accuracy {metrics.accuracy:.4f}")
        if metrics.other_data:
            print(f"on other data than the run's: {metrics.other_data}")


if __name__ == "__main__":
    main()
