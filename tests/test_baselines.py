"""`python -m fashionnet.baselines`: scikit-learn's classifiers and the MLP on one split."""

from __future__ import annotations

import csv
import json
import pickle
import re
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fashionnet import baselines as module
from fashionnet.baselines import NAMES, Baseline, baselines, main, measure, wilson
from fashionnet.data import examples, fetching, published, sources
from fashionnet.data.examples import Dataset, Examples
from fashionnet.errors import UserError
from fashionnet.system import extras
from fashionnet.train import train

if TYPE_CHECKING:
    from tests.conftest import Commands

SECONDS = ("fit_seconds", "predict_seconds")


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> examples.Examples:
    """Puts 600 pictures (5, 5) of four classes in the data's place; nobody can open its test set.

    The class is the brightest of four pixels; one label in five is wrong.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (600, 5, 5), dtype=torch.uint8, generator=generator)
    labels = images.flatten(1)[:, 7:11].long().argmax(1)
    labels[::5] = torch.randint(0, 4, (120,), generator=generator)
    examples = Examples(images, labels)
    dataset = Dataset(
        name="synthetic",
        class_names=("a", "b", "c", "d"),
        image_shape=(5, 5),
        train=examples,
        num_test=0,
        sources={},
        read_test=lambda: pytest.fail("the test set was opened"),
    )
    monkeypatch.setattr(published, "load", lambda name, root=None: dataset)
    return examples


def figures(rows: list[Baseline]) -> list[dict[str, Any]]:
    """Returns what does not depend on how busy the machine is."""
    return [{k: v for k, v in asdict(row).items() if k not in SECONDS} for row in rows]


def call_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["baselines", *arguments])
    main()


# -------------------------------------------------------------------------------- the figures


def test_all_four_learn_and_the_same_seed_gives_the_same_figures(
    synthetic: examples.Examples,
) -> None:
    rows = baselines()
    assert [row.name for row in rows] == list(NAMES)
    for row in rows:
        assert (row.num_train, row.num_validation) == (540, 60)
        assert (row.seed, row.threads) == (0, 1)
        assert min(row.fit_seconds, row.predict_seconds, row.size_bytes) > 0
        assert row.train_accuracy > 0.4  # of four classes
        assert 0 < row.val_low < row.val_accuracy < row.val_high < 1
    assert figures(baselines()) == figures(rows)
    others = {row.name: row for row in baselines(("random_forest", "mlp"), seed=7)}
    for row in rows:
        if row.name in others:
            other = others[row.name]
            assert (other.size_bytes, other.train_accuracy) != (row.size_bytes, row.train_accuracy)


def test_sklearn_sees_the_scaled_pixels_of_the_lessons_split(synthetic: examples.Examples) -> None:
    from sklearn.linear_model import LogisticRegression

    x = synthetic.images.flatten(1).numpy() / np.float32(255)
    y = synthetic.labels.numpy()
    for limit, num_train in ((None, 540), (100, 100)):
        expected = LogisticRegression().fit(x[:num_train], y[:num_train])
        (row,) = baselines(("logistic_regression",), limit=limit)
        assert row.num_train == num_train
        assert row.train_accuracy == expected.score(x[:num_train], y[:num_train])
        assert row.val_accuracy == expected.score(x[540:], y[540:])
        assert (row.val_low, row.val_high) == wilson(round(row.val_accuracy * 60), 60)
        assert row.size_bytes == len(pickle.dumps(expected))


def test_mlp_is_the_lessons_own_run(commands: Commands, tmp_path: Path) -> None:
    run = train("seed=3", "data.limit=640", "device=cpu", run_dir=tmp_path / "run")
    (row,) = baselines(("mlp",), seed=3, limit=640)
    assert row.val_accuracy == run.record["validation"]["accuracy"]
    assert row.num_validation == run.record["data"]["validation"] == 6000
    assert row.size_bytes == 4 * run.record["parameters"]
    assert "hidden=128" in row.settings and "epochs=5" in row.settings


def test_settings_are_the_calls_of_the_estimators(synthetic: examples.Examples) -> None:
    logistic, forest = baselines(NAMES[:2], seed=5, limit=50, threads=2)
    assert logistic.settings == "LogisticRegression()"
    assert forest.settings == "RandomForestClassifier(n_jobs=2, random_state=5)"
    (boosting,) = baselines(("gradient_boosting",), limit=50)
    options = "early_stopping=False, max_iter=50, random_state=0"
    assert boosting.settings == f"HistGradientBoostingClassifier({options})"


def test_every_library_uses_the_threads_of_the_argument(
    synthetic: examples.Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_info

    fit = LogisticRegression.fit
    seen: set[int] = set()

    def watched(*arguments: Any) -> Any:
        seen.update(pool["num_threads"] for pool in threadpool_info())
        seen.add(torch.get_num_threads())
        return fit(*arguments)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    before = torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()]
    for threads in (1, 2):
        (row,) = baselines(("logistic_regression",), limit=50, threads=threads)
        assert (row.threads, seen) == (threads, {threads})
        seen.clear()
    after = torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()]
    assert after == before


def test_prediction_time_is_the_quickest_pass_over_1000_pictures(
    synthetic: examples.Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 0.0, 5.0, 10.0, 13.0, 20.0, 29.0])  # the fit, then three passes
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    (row,) = baselines(("logistic_regression",))
    assert (row.fit_seconds, row.predict_seconds) == (1.0, 3.0 * 1000 / 60)


def test_no_convergence_is_a_note_and_no_warning(
    synthetic: examples.Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (converged,) = baselines(("logistic_regression",))
        monkeypatch.setattr(
            module, "_estimator", lambda *_: LogisticRegression(max_iter=2, random_state=0)
        )
        (stopped,) = baselines(("logistic_regression",))
    assert converged.note == ""
    assert "failed to converge" in stopped.note and "\n" not in stopped.note


def test_test_set_stays_sealed(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    read, opened = published._read_examples, []

    def noted(root: Path, data: sources.Published, part: Any, *rest: Any) -> examples.Examples:
        opened.append(part)
        return read(root, data, part, *rest)

    monkeypatch.setattr(published, "_read_examples", noted)
    assert len(baselines(("logistic_regression", "random_forest", "mlp"), limit=100)) == 3
    assert opened == [published.SETS["fashion_mnist"].train]


@pytest.mark.parametrize(
    ("num_correct", "num", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(
    num_correct: int, num: int, low: float, high: float
) -> None:
    assert wilson(num_correct, num) == pytest.approx((low, high), abs=5e-5)
    assert wilson(num - num_correct, num) == pytest.approx((1 - high, 1 - low), abs=5e-5)


# -------------------------------------------------------------------------------- the command


def test_command_prints_a_line_for_each_model_and_writes_the_table(
    commands: Commands, tmp_path: Path
) -> None:
    words = commands.succeed(
        *("baselines", "--only", "logistic_regression,mlp", "--limit", "300", "--csv", "table.csv"),
        cwd=tmp_path,
    ).splitlines()
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["logistic_regression", "mlp"]
    for told, row in zip(words[1:3], rows, strict=True):
        name, training, validation, interval, *_, size = told.split()
        low, high = re.fullmatch(r"\((.*)–(.*)\)", interval).groups()
        assert name == row["name"]
        for text, key in zip(
            (training, validation, low, high),
            ("train_accuracy", "val_accuracy", "val_low", "val_high"),
            strict=True,
        ):
            assert text == f"{float(row[key]):.4f}"
        assert size == f"{int(row['size_bytes']) / 1000:.0f}"
    assert len(words[0]) == len(words[1]) == len(words[2])  # aligned
    notes = "\n".join(words[3:])
    assert "300 training and 6,000 validation pictures, seed 0; threads for each model: 1" in notes
    assert "logistic_regression: LogisticRegression(); lbfgs failed to converge" in notes


def test_json_is_what_the_function_returns(
    synthetic: examples.Examples,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call_main(monkeypatch, "--json", "--seed", "2", "--limit", "40", "--only", "mlp,random_forest")
    printed = [Baseline(**row) for row in json.loads(capsys.readouterr().out)]
    assert figures(printed) == figures(baselines(("mlp", "random_forest"), seed=2, limit=40))


def test_lines_come_as_models_are_done_and_a_terminal_shows_what_is_fitted(
    synthetic: examples.Examples,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []

    def watched(name: str, task: module.Task) -> Baseline:
        seen.append(capsys.readouterr())
        return measure(name, task)

    monkeypatch.setattr(module, "measure", watched)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    call_main(monkeypatch, "--only", "logistic_regression,mlp", "--limit", "40")
    first, second = seen
    assert first.out.strip() == module.HEAD.strip()
    assert first.err == "fitting logistic_regression …\r"
    assert second.out.startswith("logistic_regression ") and len(second.out.splitlines()) == 1
    blank = " " * len("fitting logistic_regression …")
    assert second.err == f"\r{blank}\rfitting mlp …\r"
    assert capsys.readouterr().err == f"\r{' ' * len('fitting mlp …')}\r"


# -------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"names": ("mlp", "random_forrest")}, r"'random_forrest' .*did you mean random_forest\?"),
        ({"names": ("",)}, "choose logistic_regression"),
        ({"limit": 0}, "data.limit=0 must be 1 or more"),
        ({"limit": 541}, "data.limit=541 must be between 1 and the 540 images"),
        ({"limit": 1}, "limit=1 leaves one class"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"seed": 2**32}, "seed=4294967296 must be at most 4,294,967,295"),
        ({"threads": 0}, "threads=0 must be 1"),
    ],
)
def test_wrong_input_is_refused_before_any_work(
    arguments: dict[str, Any],
    said: str,
    synthetic: examples.Examples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("a model was fitted"))
    with pytest.raises(UserError, match=said):
        baselines(**arguments)


def test_largest_seed_and_two_pictures_are_fine(synthetic: examples.Examples) -> None:
    assert len(synthetic.labels[:2].unique()) == 2
    assert len(baselines(seed=2**32 - 1, limit=2)) == len(NAMES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "forest"), "baseline 'forest' is not known"),
        (("--data-root", "file"), "is a file; choose a folder"),
        (("--data-root", "missing"), "point data.root at a folder that has them"),
        (("--csv", "file/table.csv"), "the table file/table.csv cannot be written"),
        (("--limit", "many"), "invalid int value: 'many'"),
    ],
)
def test_wrong_arguments_end_the_command_with_one_line(
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(*_: object) -> None:
        raise sources.SourceError("unreachable")

    for way in ("_from_installed_package", "_from_mirror", "_from_apt"):
        monkeypatch.setattr(fetching, way, unreachable)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("a model was fitted"))
    with pytest.raises(SystemExit) as ended:
        call_main(monkeypatch, *arguments)
    told = capsys.readouterr()
    assert (ended.value.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert told.err.startswith("error: ") and said in told.err


def test_missing_scikit_learn_is_reported_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(published, "load", lambda name, root=None: pytest.fail("data was read"))
    with pytest.raises(SystemExit) as ended:
        call_main(monkeypatch, "--only", "mlp")
    assert ended.value.code == 2
    told = f"error: baselines need scikit-learn: {extras.install_command('sklearn')}\n"
    assert capsys.readouterr() == ("", told)
