"""The mistakes of a run: its most confident wrong answers, confusions and calibration.

python -m fashionnet.mistakes RUN_DIR
python -m fashionnet.mistakes RUN_DIR --num 100 --out somewhere
python -m fashionnet.mistakes RUN_DIR --split test

It writes three pictures and four tables to RUN_DIR/mistakes/SPLIT and shows the pictures in
TensorBoard. Examples are numbered from 0; with validation_split=0.1, example i of the validation
set is example 54000 + i of the training file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.errors import UserError, visible
from fashionnet.runs.splits import SPLITS
from fashionnet.system import terminal
from fashionnet.system.command_line import Parser, reported
from fashionnet.system.files import atomic_write, refuse_strange_below

if TYPE_CHECKING:
    from fashionnet.analysis.diagnosis import Diagnosis, Mistake
    from fashionnet.runs.saved import SavedRun

_MOST_DRAWN = 100
_DPI = 120
_MOST_LISTED = 40  # classes; of more, those with the lowest F1


@dataclass(frozen=True, eq=False)
class Report:
    """What `mistakes` found, and where it lies.

    Attributes:
        shown: the mistakes that are reported, the most confident first.
        folder: the folder of the pictures and tables.
        other_data: how the data differ from those of the run, in words; None for the run's own.
    """

    diagnosis: Diagnosis
    shown: list[Mistake]
    folder: Path
    other_data: str | None = None


def mistakes(
    run_dir: str | Path,
    split: str = "validation",
    num: int = 16,
    out: str | Path | None = None,
    device: str | None = None,
    root: str | None = None,
) -> Report:
    """Reports the mistakes of a run's final weights and writes pictures and tables of them.

    Args:
        run_dir: a run directory.
        split: "validation", or "test", whose every use is counted in the run's record.
        num: how many of the most confident mistakes to report; the gallery draws 100 at most.
        out: the folder to write to; None takes `mistakes/SPLIT` of the run, and puts the pictures
            into the run's TensorBoard folder as well.
        device: as in a run's configuration; None takes the run's own if this machine has it.
        root: the data folder, which may hold other photos of the same classes; `out` is needed
            then. None takes the run's own, if it is there, else the default.

    Raises:
        UserError: no run, a damaged one, no such split, data that changed since the run, a test use
            that cannot be counted, `num` below 1, no matplotlib, or a folder that cannot be
            written to.
    """
    # What can be refused is refused before the test set is used.
    from fashionnet.analysis import diagrams, plots
    from fashionnet.runs import directory, saved, tensorboard
    from fashionnet.system import locks

    if num < 1:
        raise UserError(f"num={num} must be at least 1")
    plots.check_matplotlib()
    run = saved.read(run_dir)
    if out is None:
        refuse_strange_below(run.path)  # the run will be written to, through any link in it
    folder = run.path / directory.MISTAKES / split if out is None else Path(out)
    with locks.writing(folder):
        is_apart = not folder.resolve().is_relative_to(run.path.resolve())
        only_own = "" if is_apart else "--out DIR keeps their mistakes apart from the run's own"
        diagnosis, images, other_data = _diagnose(run, split, device, root, only_own)
        shown = diagnosis.mistakes(num)
        looks = images[diagnosis.wrong[:num][:_MOST_DRAWN]]
        drawn = replace(diagnosis, class_names=tuple(map(plots.label, diagnosis.class_names)))
        figures = {
            "mistakes": diagrams.gallery(drawn, drawn.mistakes(len(looks)), looks),
            "confusion": diagrams.confusion(drawn),
            "calibration": diagrams.calibration(drawn),
        }
        pictures = {name: plots.rendered(figure, _DPI) for name, figure in figures.items()}
        files = {f"{name}.png": content for name, content in pictures.items()}
        for name, content in (files | _tables(diagnosis, shown)).items():
            with atomic_write(folder / name) as file:
                file.write(content)
        if out is None:
            board = run.path / "tensorboard" / directory.MISTAKES
            tensorboard.replace_pictures(board, split, pictures)
    return Report(diagnosis, shown, folder, other_data)


def _diagnose(
    run: SavedRun, split: str, device: str | None, root: str | None, only_own: str
) -> tuple[Diagnosis, Any, str | None]:
    """Returns a diagnosis of a split, its pictures (uint8), and how its data are other data."""
    import torch

    from fashionnet.analysis.diagnosis import Diagnosis
    from fashionnet.runs import splits
    from fashionnet.training import evaluation, features

    with run.on_device(device) as (chosen, model):
        scale = run.config.data.scale
        found = splits.examples_of(run, split, root, only_own)
        examples = found.examples
        inputs = features.inputs(model, examples.to(chosen), scale).images
        # In single precision many probabilities round to 1 and could not be sorted.
        logits = evaluation.logits_of(model, inputs, scale).cpu().double()
    if not torch.isfinite(logits).all():
        raise UserError(f"the network of {run.path} gives nan or infinite figures; train it anew")
    rows = torch.softmax(logits, 1).numpy()
    names = tuple(run.record["data"]["class_names"])
    diagnosis = Diagnosis(split, names, examples.labels.numpy(), rows)
    return diagnosis, examples.images.numpy(), found.other_data


def _tables(diagnosis: Diagnosis, shown: Sequence[Mistake]) -> dict[str, bytes]:
    """Returns the CSV files by name, in full precision; a figure that does not exist is empty."""
    from fashionnet.analysis.diagnosis import Bin, ClassFigures

    names = diagnosis.class_names
    wrong = ((m.index, m.true, m.predicted, m.probability, *m.probabilities) for m in shown)
    confusion = zip(names, diagnosis.confusion.tolist(), strict=True)
    tables: dict[str, tuple[Any, Any]] = {
        "mistakes": (("index", "true", "predicted", "probability", *names), wrong),
        "confusion": (("true", *names), ((name, *row) for name, row in confusion)),
        "classes": (ClassFigures.__match_args__, map(astuple, diagnosis.classes)),
        "calibration": (Bin.__match_args__, map(astuple, diagnosis.bins)),
    }
    return {f"{name}.csv": terminal.as_csv(*table) for name, table in tables.items()}


def as_dict(report: Report) -> dict[str, Any]:
    """Returns a report as plain values, in full precision; a figure that does not exist is None."""
    diagnosis = report.diagnosis
    return {
        "split": diagnosis.split,
        "num_examples": len(diagnosis.labels),
        "num_mistakes": len(diagnosis.wrong),
        "accuracy": diagnosis.accuracy,
        "expected_calibration_error": diagnosis.calibration_error,
        "class_names": diagnosis.class_names,
        "confusion": diagnosis.confusion.tolist(),
        "classes": [asdict(figures) for figures in diagnosis.classes],
        "calibration": [asdict(part) for part in diagnosis.bins],
        "worst_confusions": [asdict(confusion) for confusion in diagnosis.worst_confusions()],
        "mistakes": [asdict(mistake) for mistake in report.shown],
        "folder": str(report.folder),
        **({"other_data": report.other_data} if report.other_data else {}),
    }


def describe(report: Report) -> str:
    """Returns a report in words: accuracy, the figures of each class, the worst confusions."""
    diagnosis = report.diagnosis
    shown = diagnosis.classes
    if len(shown) > _MOST_LISTED:
        shown = sorted(shown, key=lambda each: (each.f1 is None, each.f1))[:_MOST_LISTED]
    rows = [["class", "precision", "recall", "f1", "support"]]
    for each in shown:
        name, figures = visible(each.name), (each.precision, each.recall, each.f1)
        cells = ("-" if figure is None else f"{figure:.4f}" for figure in figures)
        rows.append([name if len(name) <= 30 else f"{name[:29]}…", *cells, f"{each.support:,}"])
    lines = [
        f"{diagnosis.split}  accuracy {diagnosis.accuracy:.4f}  "
        f"expected calibration error {diagnosis.calibration_error:.4f}",
        "",
        terminal.aligned(rows, num_left=1),
    ]
    if len(shown) < len(diagnosis.classes):
        lines.append(f"the lowest f1 of {len(diagnosis.classes):,} classes; all in classes.csv")
    lines.append("")
    lines += [str(confusion) for confusion in diagnosis.worst_confusions()]
    lines.append(f"{diagnosis.count_mistakes(len(report.shown))}: {visible(str(report.folder))}")
    if report.other_data:
        lines.append(f"on other data than the run's: {visible(str(report.other_data))}")
    return "\n".join(lines)


@reported()
def main() -> None:
    """The command: `python -m fashionnet.mistakes`."""
    parser = Parser("mistakes", __doc__, "run_dir", "--device", "--data-root", "--json")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="default: validation")
    parser.add_argument("--num", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--out", metavar="DIR", help="default: RUN_DIR/mistakes/SPLIT")
    given = parser.parse_args()
    report = mistakes(
        given.run_dir, given.split, given.num, given.out, given.device, given.data_root
    )
    print(json.dumps(as_dict(report)) if given.json else describe(report))


if __name__ == "__main__":
    main()
