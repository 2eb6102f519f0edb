"""Groups of runs compared over their seeds: a table, paired differences, a plot.

python -m fashionnet.compare outputs/sweeps/SWEEP --plot overfitting.png
python -m fashionnet.compare RUN_OR_SWEEP_DIR... --metric val_loss --markdown
python -m fashionnet.compare outputs/sweeps/SWEEP --plot curve.png --against data.limit
python -m fashionnet.compare --config RUN_A RUN_B

Runs that differ only in the seed make a group; the others are compared with the first. --config
prints what differs between the configurations, environments and results of two runs.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fashionnet.analysis import comparison, curves, differences, intervals, plots
from fashionnet.analysis.comparison import Comparison
from fashionnet.analysis.differences import Difference
from fashionnet.analysis.groups import METRICS, gather
from fashionnet.errors import UserError
from fashionnet.runs import saved
from fashionnet.system import spelling
from fashionnet.system.command_line import Parser, reported
from fashionnet.system.files import check_place, write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRED = ("test_accuracy", "val_loss", "val_accuracy", "gap")


def compare(*folders: str | Path, metric: str | None = None) -> Comparison:
    """Compares the completed runs in and below folders, in groups that differ only in the seed.

    `curves.draw_history(comparison.groups)` is its overfitting plot.

    Args:
        metric: one of `METRICS`, to have paired differences of it alone rather than of `PAIRED`.

    Raises:
        UserError: an unknown metric, no such folder, no run in it, no completed run is left, or
            pandas or scipy is missing.
    """
    if metric is not None and metric not in METRICS:
        near = spelling.closest(metric, METRICS)
        raise UserError(f"--metric {metric} is not known; choose {', '.join(METRICS)}{near}")
    intervals.check_installed()
    return comparison.between(gather(folders), PAIRED if metric is None else (metric,))


def compare_configs(run_a: str | Path, run_b: str | Path) -> dict[str, list[Difference]]:
    """Returns what differs between two runs, by part: config, environment, results.

    Of the epochs, the first that differs and the first quantity in it are named.

    Raises:
        UserError: one of them is not a run, or is damaged.
    """
    first, second = saved.read(run_a), saved.read(run_b)
    return {
        "config": differences.of_config(first, second),
        "environment": differences.of_environment(first, second),
        "results": differences.of_results(first, second),
    }


def describe(found: dict[str, list[Difference]]) -> str:
    """Returns the differences in words, part by part."""
    lines = []
    for part, parts in found.items():
        lines.append(f"{part}: {'the same' if not parts else ''}".rstrip())
        lines += [f"  {difference}" for difference in parts]
    return "\n".join(lines)


@reported()
def main() -> None:
    """The command: `python -m fashionnet.compare`."""
    given = _arguments()
    print(_of_configs(given) if given.config else _of_groups(given))


def _arguments() -> Namespace:
    parser = Parser("compare", __doc__)
    parser.add_argument("folders", metavar="RUN_OR_SWEEP_DIR", nargs="*")
    parser.add_argument(
        "--metric", metavar="NAME", help=f"compare this by seed, one of {', '.join(METRICS)}"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves: .png or .svg")
    parser.add_argument(
        "--against", metavar="KEY", help="draw --metric against a key, e.g. data.limit"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table of the groups")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    form.add_argument("--json", action="store_true", help="print JSON, full precision")
    parser.add_argument("--config", nargs=2, metavar=("RUN_A", "RUN_B"), help="two runs")
    given = parser.parse_args()
    others = (given.folders, given.metric, given.plot, given.csv, given.markdown, given.against)
    if given.config and any(others):
        parser.error("--config compares two runs by itself; leave out all but --json")
    if not given.config and not given.folders:
        parser.error("give run directories, folders that contain them, or --config RUN_A RUN_B")
    if given.against and not given.plot:
        parser.error("--against needs --plot FILE")
    return given


def _of_configs(given: Namespace) -> str:
    found = compare_configs(*given.config)
    if given.json:
        return json.dumps({part: [asdict(d) for d in parts] for part, parts in found.items()})
    return describe(found)


def _of_groups(given: Namespace) -> str:
    if given.plot is not None:
        plots.check(given.plot, *plots.FORMATS)
    if given.csv is not None:
        check_place(given.csv, "the table")
    found = compare(*given.folders, metric=given.metric)
    if given.plot is not None:
        plots.write(_drawn(found, given), given.plot)
    if given.csv is not None:
        write_output(given.csv, found.table.to_csv(index=False).encode())
    if given.json:
        return json.dumps(comparison.plain(found), indent=2)
    if given.markdown:
        return comparison.markdown(found)
    return comparison.text(found, shutil.get_terminal_size().columns)


def _drawn(found: Comparison, given: Namespace) -> Figure:
    if given.against is None:
        return curves.draw_history(found.groups)
    metric = given.metric or PAIRED[0]
    drawn = curves.against(found.groups, given.against, metric)
    return curves.draw_against(drawn, given.against, metric)


if __name__ == "__main__":
    main()
