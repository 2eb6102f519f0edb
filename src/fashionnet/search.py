"""Hyper-parameter search with Optuna; every trial is an ordinary run, and the search can resume.

python -m fashionnet.search epochs=5 'optimizer.lr=tag(log,interval(1e-4,1e-2))' --num 20
python -m fashionnet.search 'model.hidden=choice(64,128,256)' 'model.dropout=interval(0,0.5)'

Overrides are those of fashionnet.train. A key with one of these values is searched over; all
other overrides apply to every trial:
  KEY=A,B or choice(A,B)        one of these; also of a group, model=mlp,mlp_no_dropout
  KEY=interval(LOW,HIGH)        a number between; whole numbers: int(interval(LOW,HIGH))
  KEY=range(LOW,STOP,STEP)      a number of Python's range
  KEY=tag(log,interval(...))    on a logarithmic scale, as suits a learning rate

The search minimizes the lowest validation loss and never uses the test set. DIR holds the trials
(trial-000, trial-001, ...) and search.db. The same command with the same --out continues to N
trials in all, also after it was killed, and ends where an uninterrupted search would. The
configuration's seed is also the seed of the search.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.config.search_space import parse
from fashionnet.errors import UserError, is_out_of_memory, one_line, visible
from fashionnet.runs import next_commands
from fashionnet.runs.study import claimed, propose, quiet
from fashionnet.system import extras, terminal
from fashionnet.system.command_line import Parser, reported
from fashionnet.system.files import as_typed

if TYPE_CHECKING:
    from optuna import Study

    from fashionnet.config.schema import Config
    from fashionnet.config.search_space import Space
    from fashionnet.data.examples import Dataset

_NUM_SHOWN = 5


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        params: the values that were tried, by override key.
        val_loss: the lowest validation loss of its run; None where the run failed.
        error: why it failed.
    """

    run_dir: Path
    params: dict[str, Any]
    val_loss: float | None
    error: str | None


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        folder: where its trials and its database lie.
        fixed: the overrides that all trials share.
        trials: all of them, in order.
    """

    folder: Path
    fixed: list[str]
    trials: list[Trial]

    @property
    def ranked(self) -> list[Trial]:
        """The trials that completed, best first; of equals the earlier."""
        completed = [trial for trial in self.trials if trial.val_loss is not None]
        return sorted(completed, key=lambda trial: trial.val_loss or 0.0)

    @property
    def command(self) -> str:
        """The command that trains the best trial's run anew."""
        best = _as_overrides(self.ranked[0].params)
        return next_commands.line("fashionnet.train", *self.fixed, *best)


def search(*overrides: str, num: int = 20, out: str | Path | None = None) -> Search:
    """Searches for the lowest validation loss, or continues the search in `out`.

    A trial's values depend only on the overrides, the seed and the results of earlier trials.

    Args:
        *overrides: as one would type them; at least one gives a key several values.
        num: number of trials in all, including earlier and failed ones.
        out: the search's folder; None takes a new one below `outputs/search/`.

    Raises:
        UserError: an override that Hydra refuses, nothing to search over, a folder that holds
            something else, Optuna is missing, or no trial completed.
        Interrupted: a signal; the same call with the same `out` continues.
    """
    extras.require("search needs optuna", "search", "optuna")
    from fashionnet.config import compose
    from fashionnet.system import signals

    if num < 1:
        raise UserError(f"num={num} must be at least 1")
    fixed, space = parse(overrides)
    compose.check_search(*overrides)
    config, data = _check(fixed, space)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{uuid.uuid4().hex[:6]}"  # as a sweep's
    folder = Path("outputs", "search", name) if out is None else Path(out)
    found = Search(folder, fixed, [])
    try:
        with signals.watched(), quiet(), claimed(folder, config, space, data) as study:
            _go_on(study, found, space, config.seed, num)
    except KeyboardInterrupt:
        print(
            f"stopped; the same command with --out {next_commands.quoted(as_typed(folder))} goes on"
        )
        raise
    if not found.ranked:
        raise UserError(f"none of {len(found.trials)} trials completed: {found.trials[0].error}")
    return found


def _check(fixed: Sequence[str], space: Space) -> tuple[Config, dict[str, Any]]:
    """Checks each choice and both ends of every range before the first trial.

    Returns:
        The configuration with the first choices and the lower ends, and what identifies the data
        that all trials share.

    Raises:
        UserError: a trial would be refused, or has no validation set, device or data.
    """
    from optuna.distributions import CategoricalDistribution

    from fashionnet import data as datasets, models
    from fashionnet.config import compose
    from fashionnet.runs import network, pretrained
    from fashionnet.system import devices

    ends = {
        key: d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high)
        for key, d in space.items()
    }
    checked = []
    for i in range(max(map(len, ends.values()))):  # the first of each, the second of each, ...
        params = {key: values[min(i, len(values) - 1)] for key, values in ends.items()}
        checked.append(compose.typed(compose.compose(*fixed, *_as_overrides(params))))
    first = checked[0]
    if first.validation_split == 0:
        raise UserError(
            "validation_split=0 leaves no validation set to compare trials by; give more"
        )
    devices.pick_device(first.device)
    dataset = datasets.load(first.data, network.photo_size(first.model, {}))
    for config in checked:
        classes = len(dataset.class_names)
        model = models.build(config.model, dataset.image_shape, classes, config.seed)
        pretrained.load_pretrained(model)
    return first, _shared(dataset)


def _shared(dataset: Dataset) -> dict[str, Any]:
    """Returns what identifies the data of all trials, apart from their number and size."""
    from fashionnet import data as datasets

    described = datasets.describe(dataset, 0, None)
    shared = ("name", "class_names", "sha256", "counts")
    return {key: value for key, value in described.items() if key in shared}


def _as_overrides(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]


def _go_on(study: Study, found: Search, space: Space, seed: int, num: int) -> None:
    """Fills `found` with `num` trials: those done before, then those missing or cut short."""
    done = sum(trial.state.is_finished() for trial in study.trials)
    missing = f"{num - done} of {num} trials to go" if done < num else "nothing is missing"
    print(f"search {visible(as_typed(found.folder))}: {missing}", flush=True)
    for number in range(max(num, len(study.trials))):
        if number == len(study.trials):
            propose(study, space, seed)
        trial, run_dir = study.trials[number], found.folder / f"trial-{number:03d}"
        was_done = trial.state.is_finished()
        if not was_done:
            _run(study, number, [*found.fixed, *_as_overrides(trial.params)], run_dir)
            trial = study.trials[number]
        params = {key: trial.params[key] for key in space}
        error = study.user_attrs.get(_error_of(number)) if trial.value is None else None
        found.trials.append(Trial(run_dir, params, trial.value, error))
        if not was_done:
            print(_line(found), flush=True)


def _run(study: Study, number: int, overrides: Sequence[str], run_dir: Path) -> None:
    """Runs a trial and adds its outcome to the study; a failure does not end the search."""
    from optuna.trial import TrialState

    from fashionnet import data as datasets

    try:
        study.tell(number, _trained(overrides, run_dir, study.user_attrs["plan"]["data"]))
    except Exception as error:
        # Anything else, e.g. a full disk, is not due to the trial's values: it is run again later.
        is_trials = isinstance(error, UserError) and not isinstance(error, datasets.OtherData)
        if not (is_trials or is_out_of_memory(error)):
            raise
        study.set_user_attr(_error_of(number), one_line(error))
        study.tell(number, state=TrialState.FAIL)


def _error_of(number: int) -> str:
    return f"error of trial {number}"


def _trained(overrides: Sequence[str], run_dir: Path, data: Mapping[str, Any]) -> float:
    """Returns the lowest validation loss of a run: a fresh one, continued, or as it ended.

    Args:
        data: identifies the data of the search; losses on other data cannot be compared.
    """
    from fashionnet import data as datasets
    from fashionnet.config import compose
    from fashionnet.runs import network, saved
    from fashionnet.runs.jobs import Result
    from fashionnet.train import train

    config = compose.typed(compose.compose(*overrides))
    if before := saved.completed(run_dir, config):  # the search was killed before it recorded this
        result = Result(run_dir, before.record, before.history)
    else:
        dataset = datasets.load(config.data, network.photo_size(config.model, {}))
        if changed := datasets.difference(data, _shared(dataset)):
            raise datasets.OtherData(
                f"the data changed during the search: {changed}; start a new one"
            )
        with contextlib.redirect_stdout(io.StringIO()):  # train.log keeps it
            sealed = (*overrides, "evaluate_test=false")
            result = train(*sealed, run_dir=run_dir, dataset=dataset)
    loss = result.best_val_loss
    if loss is None or not math.isfinite(loss):
        raise UserError(f"the lowest validation loss is {loss}")
    return loss


def _line(found: Search) -> str:
    """Returns the line of the trial that has just ended."""
    trial = found.trials[-1]
    values = "  ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
    if trial.val_loss is None:
        return f"{trial.run_dir.name}  {values}  failed: {visible(str(trial.error))}"
    best = found.ranked[0]
    figures = f"val_loss {trial.val_loss:.4f}  best {best.val_loss:.4f} ({best.run_dir.name})"
    return f"{trial.run_dir.name}  {values}  {figures}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))


def report(found: Search) -> str:
    """Returns the best trials as a table, the failed ones, and the command of the best."""
    ranked = found.ranked
    rows = [("trial", "val_loss", *ranked[0].params)]
    for trial in ranked[:_NUM_SHOWN]:
        values = map(_short, trial.params.values())
        rows.append((trial.run_dir.name, f"{trial.val_loss:.4f}", *values))
    lines = [f"{len(found.trials)} trials, {len(found.trials) - len(ranked)} failed; the best:"]
    lines.append(terminal.aligned(rows, num_left=0))
    failed = [trial for trial in found.trials if trial.val_loss is None]
    lines += [f"failed: {t.run_dir.name}: {visible(str(t.error))}" for t in failed]
    return "\n".join(
        [*lines, f"as in {visible(as_typed(ranked[0].run_dir))}:", f"  {found.command}"]
    )


def as_dict(found: Search) -> dict[str, Any]:
    """Returns a search as plain values and paths; a figure that does not exist is None."""
    return {**asdict(found), "best": asdict(found.ranked[0]), "command": found.command}


@reported()
def main() -> None:
    """The command: `python -m fashionnet.search`."""
    parser = Parser("search", __doc__, "--json")
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*")
    parser.add_argument(
        "--num", type=int, default=20, metavar="N", help="trials in all; default: 20"
    )
    parser.add_argument("--out", metavar="DIR", help="default: a new one in outputs/search")
    given = parser.parse_intermixed_args()
    # The search outlives its reader; what it prints is not for the machine that reads JSON.
    out = contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext()
    with terminal.surviving(), out:
        found = search(*given.overrides, num=given.num, out=given.out)
    print(json.dumps(as_dict(found), indent=2, default=str) if given.json else report(found))


if __name__ == "__main__":
    main()
