"""Reruns a recorded run in a new directory beside it and compares the two to the bit.

python -m fashionnet.reproduce RUN_DIR

Exit status: 0 identical, 3 within tolerance, 4 different.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.analysis import differences
from fashionnet.analysis.differences import Difference
from fashionnet.errors import UserError
from fashionnet.runs.saved import SavedRun
from fashionnet.system import terminal
from fashionnet.system.command_line import Parser, reported

if TYPE_CHECKING:
    from fashionnet.config.schema import Config

IDENTICAL, WITHIN_TOLERANCE, DIFFERENT = "identical", "within tolerance", "different"
EXIT_STATUS = {IDENTICAL: 0, WITHIN_TOLERANCE: 3, DIFFERENT: 4}


@dataclass(frozen=True)
class Reproduction:
    """What a rerun showed.

    Attributes:
        verdict: "identical", "within tolerance" or "different".
        run_dir: where the rerun lies.
        epochs: how many epochs were compared.
        differences: what differs in the run, in the order in which it comes about; [] if nothing.
        environment: what differs around it: packages, machine, threads, code.
    """

    verdict: str
    run_dir: Path
    epochs: int
    differences: list[Difference]
    environment: list[Difference]


def reproduce(
    run_dir: str | Path,
    out: str | Path | None = None,
    device: str | None = None,
    root: str | Path | None = None,
    pretrained: str | None = None,
) -> Reproduction:
    """Trains what a run's record says, anew, and compares the outcome with the record.

    Only the record's resolved configuration is read, and nothing of the directory is executed or
    written to. Of a run that ended early, the epochs that it did are compared.

    Args:
        run_dir: the run to reproduce.
        out: the rerun's directory; None takes RUN_DIR-reproduced, or the next free number.
        device: None takes the recorded one.
        root: the data folder; None takes the run's, if it is there, else the default.
        pretrained: for a run that began from pretrained weights, where they are now, as
            `model.pretrained` names them; None takes what the record names.

    Raises:
        UserError: no run, a damaged one, one that did no epoch, a device that is not here, data
            that changed since, or pretrained weights that cannot be had.
    """
    from fashionnet import data as datasets
    from fashionnet.runs import saved
    from fashionnet.runs.record import Record
    from fashionnet.train import lesson

    first = saved.read(run_dir)
    config = _rerun_config(first, device, pretrained)
    recorded = first.record["data"]
    dataset = datasets.load_recorded(config.data, recorded["image_shape"], root)
    now = datasets.describe(dataset, config.validation_split, config.data.limit)
    if changed := datasets.difference(recorded, now):
        raise datasets.OtherData(
            f"{run_dir} was trained on other data: {changed}; "
            "--data-root DIR names the folder where they are as they were"
        )
    config.data.root = str(root or datasets.recorded_place(config.data) or "") or None
    path = Path(out) if out else _beside(first.path)
    result = lesson(
        config,
        path,
        first.record.get("choices"),
        dataset=dataset,
        plan=first.record.get("budget"),
    )
    Record(result.run_dir, result.record).update(parents=_parents(first))
    return judged(first, saved.read(result.run_dir))


def _parents(first: SavedRun) -> list[dict[str, Any]]:
    """Returns what a rerun's record says of its original, after what that says of its own."""
    facts = {key: first.record.get(key) for key in ("config_hash", "weights_sha256")}
    known = {key: value for key, value in facts.items() if value is not None}
    before = [each for each in first.record.get("parents", []) if each.get("reproduced")]
    return [*before, {"path": str(first.path.resolve()), "reproduced": True, **known}]


def _rerun_config(first: SavedRun, device: str | None, pretrained: str | None) -> Config:
    """Returns the configuration of a rerun, but for its data; arguments as in `reproduce`."""
    from fashionnet.config import schema
    from fashionnet.runs.pretrained import pretrained_source
    from fashionnet.training import schedule
    from fashionnet.training.schedule import depends_on_length

    run_dir = first.path
    if not first.history:
        raise UserError(f"{run_dir} did no whole epoch ({first.record['status']}): none to compare")
    config = copy.deepcopy(first.config)
    config.device = device or first.record["device"]
    config.threads = first.record["threads"]
    config.precision = first.record.get("precision", config.precision)
    is_cut = first.record["status"] != "completed"
    spans_training = depends_on_length(schedule.build(config.schedule))
    if config.epochs is not None and is_cut and not spans_training:
        config.epochs = min(config.epochs, len(first.history))
    config.resume, config.overwrite = "never", False
    if pretrained is not None:
        if pretrained_source(config.model) is None:
            raise UserError(f"--pretrained is not for {run_dir}: it began from random weights")
        config.model = {**config.model, "pretrained": pretrained}
    schema.check(config)
    return config


def judged(first: SavedRun, second: SavedRun) -> Reproduction:
    """Compares a recorded run with its rerun, see `Reproduction`."""
    beginning = differences.of_beginning(first, second)
    epoch = differences.of_epochs(first, second)
    beyond = differences.beyond_tolerance(first, second)
    found = beginning + ([epoch] if epoch is not None else [])
    completed = first.record["status"] == second.record["status"] == "completed"
    if completed and not found:  # restored weights, final figures
        results = differences.of_results(first, second)
        found = [item for item in results if item.key != "test.evaluations"]
    if not found:
        verdict = IDENTICAL
    elif beginning or beyond is not None or epoch is None:  # equal epochs have equal ends
        verdict = DIFFERENT
        found += [beyond] if beyond is not None and beyond != epoch else []
    else:
        verdict = WITHIN_TOLERANCE
    return Reproduction(
        verdict,
        second.path,
        min(len(first.history), len(second.history)),
        found,
        differences.of_environment(first, second),
    )


def _beside(path: Path) -> Path:
    """Returns a free name beside a run directory."""
    whole = path.resolve()
    names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    beside = (whole.with_name(f"{whole.name}-reproduced{name}") for name in names)
    return next(candidate for candidate in beside if not os.path.lexists(candidate))


def report(outcome: Reproduction) -> str:
    """Returns the verdict of a reproduction and the differences, line by line."""
    lines = [f"{outcome.verdict}: {_what(outcome)}"]
    lines += [f"  {difference}" for difference in outcome.differences]
    if outcome.environment:
        lines.append("in the environment differs:")
        lines += [f"  {difference}" for difference in outcome.environment]
    else:
        lines.append("the environment is the same")
    return "\n".join(lines)


def _what(outcome: Reproduction) -> str:
    epochs = f"{outcome.epochs} epoch{'s' if outcome.epochs > 1 else ''}"
    if outcome.verdict == IDENTICAL:
        return f"data, split, initial weights, and figures and weights of {epochs}"
    if outcome.verdict == WITHIN_TOLERANCE:
        return f"{epochs} compared; bounds: {differences.BOUNDS}"
    return f"{epochs} compared; from the record to the rerun:"


@reported()
def main() -> None:
    """The command: `python -m fashionnet.reproduce`."""
    parser = Parser("reproduce", __doc__, "run_dir", "--device", "--data-root", "--json")
    parser.add_argument("--out", metavar="DIR", help="default: RUN_DIR-reproduced")
    parser.add_argument("--pretrained", metavar="SOURCE", help="where pretrained weights are now")
    given = parser.parse_args()
    # The rerun outlives its reader; its lines are not for the machine that reads JSON.
    stdout = contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext()
    with terminal.surviving(), stdout:
        outcome = reproduce(
            given.run_dir, given.out, given.device, given.data_root, given.pretrained
        )
    if given.json:
        values: dict[str, Any] = asdict(outcome) | {"run_dir": str(outcome.run_dir)}
        print(json.dumps(values))
    else:
        print(report(outcome))
    raise SystemExit(EXIT_STATUS[outcome.verdict])


if __name__ == "__main__":
    main()
