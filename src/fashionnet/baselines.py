"""scikit-learn's classifiers beside the lesson's MLP: accuracy, seconds, size.

python -m fashionnet.baselines
python -m fashionnet.baselines --only random_forest,mlp --limit 5000

All train on the same pictures, pixels scaled to 0..1, on the CPU with the same number of threads,
and are evaluated on the lesson's validation part; the test set stays sealed. The MLP is set as in
conf/, the others by scikit-learn's defaults. Gradient boosting takes 50 rounds, half of its
default, and no early stopping, which would hold out pictures of its own.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from fashionnet.errors import UserError
from fashionnet.system import extras, terminal
from fashionnet.system.command_line import Parser, reported
from fashionnet.system.files import check_place, write_output

if TYPE_CHECKING:
    from torch import Tensor

    from fashionnet.config.schema import Config
    from fashionnet.data.examples import Dataset, Examples

NAMES = ("logistic_regression", "random_forest", "gradient_boosting", "mlp")

HEAD = (
    f"{'':19}  {'train':6}  {'validation (95 %)':22}  {'fit, s':>6}  "
    f"{'ms per 1,000':>13}  {'size, kB':>9}"
)

_LEVEL = 0.95
_MAX_SEED = 2**32 - 1  # of NumPy, and so of scikit-learn
_PASSES = 3


@dataclass(frozen=True)
class Baseline:
    """The figures of one model.

    Attributes:
        settings: the call that builds the model.
        train_accuracy: on its training pictures, after the fit, dropout off.
        val_low, val_high: the 95 % interval of `val_accuracy`, see `wilson`.
        fit_seconds: from bytes to a fitted model; the MLP's validation after each epoch included.
        predict_seconds: for 1,000 pictures, from bytes to classes.
        size_bytes: size of the pickled model, or of the MLP's weights.
        threads: number of CPU threads.
        note: its warnings, or "".
    """

    name: str
    settings: str
    num_train: int
    num_validation: int
    train_accuracy: float
    val_accuracy: float
    val_low: float
    val_high: float
    fit_seconds: float
    predict_seconds: float
    size_bytes: int
    seed: int
    threads: int
    note: str


@dataclass(frozen=True)
class Task:
    """The lesson's configuration, its data, and their split."""

    config: Config
    dataset: Dataset
    train: Examples
    validation: Examples


@dataclass(frozen=True)
class _Fitted:
    """A fitted model; `predict` takes uint8 pictures (N, 28, 28) and returns classes (N,)."""

    settings: str
    predict: Callable[[Tensor], Tensor]
    fit_seconds: float
    size_bytes: int
    note: str = ""


def baselines(
    names: Sequence[str] = NAMES,
    seed: int = 0,
    limit: int | None = None,
    threads: int | None = None,
    root: str | Path | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> list[Baseline]:
    """Trains each of the named models and returns its figures, in that order.

    Args:
        names: some of `NAMES`.
        seed: seed of the forest's trees, and of the MLP's weights and batches.
        limit: number of training pictures, the first ones; validation stays the same.
        threads: CPU threads for each model; None takes the configuration's.
        root: the data folder; None takes the default.
        report: function that receives the head of a table, then a line for each model.

    Raises:
        UserError: scikit-learn is missing, a name, a number or the data folder is wrong, or the
            training part has one class only.
    """
    extras.require("baselines need scikit-learn", "sklearn", "sklearn")
    from fashionnet.config import compose
    from fashionnet.data import published
    from fashionnet.system import spelling

    for name in names:
        if name not in NAMES:
            near = spelling.closest(name, NAMES)
            raise UserError(f"baseline {name!r} is not known; choose {', '.join(NAMES)}{near}")
    if seed > _MAX_SEED:
        raise UserError(
            f"seed={seed} must be at most {_MAX_SEED:,}, the most that scikit-learn takes"
        )
    chosen = {"seed": seed, "data.limit": limit, "threads": threads}
    overrides = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    config = compose.typed(compose.compose("device=cpu", *overrides))
    dataset = published.load("fashion_mnist", root or config.data.root)
    train, validation = dataset.split(config.validation_split, config.data.limit)
    if len(train.labels.unique()) < 2:
        raise UserError(f"limit={limit} leaves one class to train on; choose a larger one")
    report(HEAD)
    rows = []
    for name in names:
        with _notice(f"fitting {name} …"):
            rows.append(measure(name, Task(config, dataset, train, validation)))
        report(line(rows[-1]))
    return rows


def measure(name: str, task: Task) -> Baseline:
    """Fits one of `NAMES` to the training part and measures it on the validation part."""
    import torch
    from threadpoolctl import threadpool_limits

    from fashionnet.system import devices

    config = task.config
    with devices.started(config.device, config.threads, config.deterministic):
        threads = torch.get_num_threads()
        estimator = None if name == "mlp" else _estimator(name, config.seed, threads)
        with threadpool_limits(threads):  # BLAS and OpenMP, which are imported by now
            fitted = _fit_mlp(task) if estimator is None else _fit_sklearn(estimator, task)
            train_correct = _num_correct(fitted.predict(task.train.images), task.train)
            classes, seconds = _timed(fitted.predict, task.validation.images)
    correct, num = _num_correct(classes, task.validation), len(task.validation)
    low, high = wilson(correct, num)
    return Baseline(
        name=name,
        settings=fitted.settings,
        num_train=len(task.train),
        num_validation=num,
        train_accuracy=train_correct / len(task.train),
        val_accuracy=correct / num,
        val_low=low,
        val_high=high,
        fit_seconds=fitted.fit_seconds,
        predict_seconds=seconds * 1000 / num,
        size_bytes=fitted.size_bytes,
        seed=config.seed,
        threads=threads,
        note=fitted.note,
    )


def _estimator(name: str, seed: int, threads: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    if name == "logistic_regression":
        return LogisticRegression()
    if name == "random_forest":
        return RandomForestClassifier(n_jobs=threads, random_state=seed)
    return HistGradientBoostingClassifier(max_iter=50, early_stopping=False, random_state=seed)


def _fit_sklearn(estimator: Any, task: Task) -> _Fitted:
    """Fits an estimator; its warnings become a note."""
    import pickle

    import torch
    from sklearn.exceptions import ConvergenceWarning

    from fashionnet.training import evaluation

    def pixels(images: Tensor) -> Any:
        x = torch.empty_like(images, dtype=torch.float32)
        return evaluation.scaled(images, task.config.data.scale, x).flatten(1).numpy()

    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.fit(pixels(task.train.images), task.train.labels.numpy())
    seconds = time.perf_counter() - began
    lines = dict.fromkeys(str(each.message).strip().partition("\n")[0] for each in warned)
    return _Fitted(
        settings=" ".join(repr(estimator).split()),
        predict=lambda images: torch.from_numpy(estimator.predict(pixels(images))),
        fit_seconds=seconds,
        size_bytes=len(pickle.dumps(estimator)),
        note="; ".join(line.rstrip(":.") for line in lines),
    )


def _fit_mlp(task: Task) -> _Fitted:
    """Fits the lesson's network as `fashionnet.train` does, without a run directory."""
    from fashionnet import models
    from fashionnet.training import evaluation, gradients, loop, optim, state
    from fashionnet.training.early_stopping import EarlyStopping

    config, dataset = task.config, task.dataset
    num_classes, scale = len(dataset.class_names), config.data.scale
    model = models.build(config.model, dataset.image_shape, num_classes, config.seed)
    optimizer = optim.build(config.optimizer, model)
    chosen = gradients.choose(config.gradients, model)
    stopping = EarlyStopping(**asdict(config.early_stopping))
    fit = state.TrainState(
        model, optimizer, chosen, stopping, config.seed, config.batch_size, scale
    )
    loop.fit(fit, task.train, task.validation, config.epochs, loop.Watcher())
    return _Fitted(
        fit_seconds=fit.fit_seconds(),
        settings=f"{_call(config.model)}, {_call(config.optimizer)}, "
        f"epochs={config.epochs}, batch_size={config.batch_size}",
        predict=lambda images: evaluation.logits_of(model, images, scale).argmax(1),
        size_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
    )


def _call(node: Mapping[str, Any]) -> str:
    """Returns a node of the configuration as a call."""
    values = ", ".join(f"{key}={value}" for key, value in node.items() if key != "_target_")
    return f"{node['_target_'].rpartition('.')[2]}({values})"


def _num_correct(classes: Tensor, examples: Examples) -> int:
    return int((classes == examples.labels).sum())


def _timed(predict: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, float]:
    """Returns the classes of pictures, and the seconds of the fastest of a few passes."""
    seconds = []
    for _ in range(_PASSES):
        began = time.perf_counter()
        classes = predict(images)
        seconds.append(time.perf_counter() - began)
    return classes, min(seconds)


def wilson(num_correct: int, num: int) -> tuple[float, float]:
    """Returns the bounds of the 95 % interval of the fraction `num_correct / num`.

    It covers the choice of the pictures, not that of the seed.

    Source: Wilson 1927, the score interval; unlike p ± 1.96 sd it stays within 0..1.
    """
    z2 = NormalDist().inv_cdf((1 + _LEVEL) / 2) ** 2
    fraction = num_correct / num
    middle = fraction + z2 / (2 * num)
    half = math.sqrt(z2 * (fraction * (1 - fraction) / num + z2 / (4 * num**2)))
    return (middle - half) / (1 + z2 / num), (middle + half) / (1 + z2 / num)


def line(row: Baseline) -> str:
    """Returns a model's line of the table, which stands under `HEAD`."""
    validation = f"{row.val_accuracy:.4f} ({row.val_low:.4f}–{row.val_high:.4f})"
    return (
        f"{row.name:19}  {row.train_accuracy:6.4f}  {validation:22}  {row.fit_seconds:6.1f}  "
        f"{1000 * row.predict_seconds:13.1f}  {row.size_bytes / 1000:9,.0f}"
    )


def notes(rows: Sequence[Baseline]) -> list[str]:
    """Returns the lines below the table of models that share a task."""
    from fashionnet.system import devices

    first = rows[0]
    return [
        f"{first.num_train:,} training and {first.num_validation:,} validation pictures, seed "
        f"{first.seed}; threads for each model: {first.threads}, on {devices.processor_name()}.",
        "Training accuracy is taken after the fit, dropout off.",
        "95 %: Wilson's interval for the choice of the pictures; another seed moves figures too.",
        f"Prediction: from the pictures' bytes to their classes, the fastest of {_PASSES} passes.",
        *(f"{row.name}: {row.settings}{row.note and f'; {row.note}'}" for row in rows),
    ]


@reported()
def main() -> None:
    """The command: `python -m fashionnet.baselines`."""
    given = _arguments()
    if given.csv is not None:
        check_place(given.csv, "the table")
    report: Callable[[str], object] = len if given.json else partial(print, flush=True)
    arguments = (given.only, given.seed, given.limit, given.threads, given.data_root)
    rows = baselines(*arguments, report)
    if given.csv is not None:
        write_output(given.csv, terminal.as_csv(Baseline.__match_args__, map(astuple, rows)))
    print(
        json.dumps([asdict(row) for row in rows], indent=2)
        if given.json
        else "\n".join(["", *notes(rows)])
    )


def _arguments() -> Namespace:
    parser = Parser("baselines", __doc__, "--data-root", "--json")
    parser.add_argument(
        "--only",
        type=lambda names: names.split(","),
        default=NAMES,
        metavar="NAMES",
        help=f"some of {','.join(NAMES)}",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N pictures")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--threads", type=int, metavar="N", help="for each model; default: 1")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    return parser.parse_args()


@contextmanager
def _notice(text: str) -> Iterator[None]:
    """Shows a text on a terminal while the body runs."""
    on_terminal = sys.stderr.isatty()
    if on_terminal:
        print(text, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if on_terminal:
            print("\r" + " " * len(text), end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
