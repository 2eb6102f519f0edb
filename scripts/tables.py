"""Makes the tables and plots of README, docs and experiments from docs/results/*.json.

    python scripts/tables.py            # writes them
    python scripts/tables.py --check    # status 1 where a table and its file differ

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `TABLES`. So does
what the head of an experiment's file claims, of which NAME is one of `CLAIMS`. Where the file of
results does not exist yet, what stands there stays.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import frontier, parts
from benchmarks.frontier import LESSON
from benchmarks.lesson import FLOOR, OURS
from benchmarks.results import FOLDER, ROOT
from benchmarks.runs import spread
from benchmarks.sweeps import FIGURES, exponent, ratio_of_sd

# In a page, or in the comments of a YAML file.
_PLACE = re.compile(r"((?:# )?<!-- table: ([\w ]+) -->\n)(.*?)((?:# )?<!-- end -->)", re.DOTALL)
PLOT, FRONTIER = ROOT / "docs" / "benchmark.png", ROOT / "docs" / "frontier.png"
Results = dict[str, Any]


def main() -> None:
    """The command: `python scripts/tables.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    stale = [path for path in pages() if filled(path.read_text()) != path.read_text()]
    if given.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from docs/results; run scripts/tables.py")
        raise SystemExit(bool(stale))
    for path in stale:
        path.write_text(filled(path.read_text()))
        print(f"written: {path.relative_to(ROOT)}")
    for suite, plot, path in (("lesson", draw, PLOT), ("frontier", draw_frontier, FRONTIER)):
        if (results := read(suite)) is not None:
            plot(results, path)
            print(f"written: {path.relative_to(ROOT)}")


def pages() -> list[Path]:
    """Returns the files in which tables may stand."""
    experiments = (ROOT / "conf" / "experiment").glob("*.yaml")
    return sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *experiments])


def read(suite: str, folder: Path = FOLDER) -> Results | None:
    """Returns what a suite left; None if it has not run."""
    path = folder / f"{suite}.json"
    values: Results | None = json.loads(path.read_text()) if path.exists() else None
    return values


def filled(text: str, folder: Path = FOLDER) -> str:
    """Returns a page with its tables made anew."""

    def made(place: re.Match[str]) -> str:
        name = place[2]
        results = read(name.split()[0], folder)
        if results is None:
            return place[0]
        if name in CLAIMS:
            lines = textwrap.wrap(CLAIMS[name](results), 96)
            return "".join([place[1], *(f"# {line}\n" for line in lines), place[4]])
        return f"{place[1]}{TABLES[name](results)}\n{origin(results)}\n{place[4]}"

    return _PLACE.sub(made, text)


def origin(results: Results) -> str:
    """Returns on what the figures were measured, how and when."""
    machine, versions = results["machine"], results["versions"]
    where = machine["gpu"] if results["suite"] == "gpu" else article(machine["processor"])
    shown = ("python", "torch", "keras", "jax", "tensorflow")
    packages = ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)
    return (
        f"\nMeasured on {where}, on {results['date']} at commit {results['commit']} by\n"
        f"`{results['command']}`\n({packages})."
    )


def article(name: str) -> str:
    return f"an {name}" if name[:1] in "AEIOU" else f"a {name}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Returns the median of the ratios within a round."""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"


def lesson_table(results: Results) -> str:
    """Median (least–most) of each contestant, and the ratios of ours to it, round by round."""
    contestants = results["figures"]["contestants"]
    ours = columns(contestants[OURS])
    rows = []
    for name, found in contestants.items():
        own = columns(found)
        row = [name, *(spread(own[key]) if key in own else "" for key in ("fit", "process"))]
        row.append(f"{statistics.median(own['memory']):.0f}" if "memory" in own else "")
        compared = [] if name == OURS else ["fit", "process"]
        ratios = [ratio(ours[key], own[key]) for key in compared if key in own]
        rows.append([*row, *ratios, *[""] * (2 - len(ratios))])
    head = ["", "fit, s", "whole process, s", "peak memory, MB"]
    return table([*head, "ratio of fits", "ratio of processes"], rows)


def short_lesson_table(results: Results) -> str:
    rows = []
    for name, found in results["figures"]["contestants"].items():
        if name != FLOOR and not name.startswith(f"{OURS},"):
            own = columns(found)
            memory = f"{statistics.median(own['memory']):.0f}"
            rows.append([name, spread(own["fit"]), spread(own["process"]), memory])
    return table(["", "fit, s", "whole process, s", "peak memory, MB"], rows)


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}


def seeds_table(results: Results) -> str:
    """Means, deviations and what is known of their difference.

    The difference of the means has its 95 % interval by Welch, the ratio of the standard deviations
    one by the bootstrap.
    """
    here, keras = (columns(results["figures"][name]) for name in ("here", "keras"))
    first = f"{len(here['seed'])} seeds here"
    if not keras:
        rows = [[name, mean_sd(here[key])] for name, key in FIGURES.items()]
        return table(["mean ± sd", first], rows)
    rows = []
    for name, key in FIGURES.items():
        own, other = here[key], keras[key]
        low, high = welch(own, other)
        difference = statistics.mean(own) - statistics.mean(other)
        row = [name, mean_sd(own), mean_sd(other), f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"]
        rows.append([*row, "{:.2f} ({:.2f} to {:.2f})".format(*ratio_of_sd(own, other))])
    second = f"{len(keras['seed'])} of Keras"
    return table(["mean ± sd", first, second, "difference of means", "ratio of sd"], rows)


def mean_sd(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the difference of two means, by Welch's t-test."""
    from scipy import stats

    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    return float(interval.low), float(interval.high)


def sweep_table(results: Results) -> str:
    figures = results["figures"]
    first = next(iter(figures["seconds"]))
    rows = [[name, spread(found), ""] for name, found in figures["seconds"].items()]
    for row in rows[1:]:
        row[2] = ratio(figures["seconds"][first], figures["seconds"][row[0]])
    bits = "the same bits" if figures["same_bits"] else "OTHER bits"
    return table([f"{figures['runs']} lessons, {bits}", "s", f"{first}, as a ratio"], rows)


def startup_table(results: Results) -> str:
    seconds = results["figures"]["seconds"]
    return table(["", "s"], [[name, spread(found, 2)] for name, found in seconds.items()])


def growth_table(results: Results) -> str:
    """Smallest and largest fit and memory of each axis, and the exponent of both."""
    rows = []
    for key, samples in results["figures"]["axes"].items():
        values = sorted({sample["x"] for sample in samples})
        cells = [f"`{key}`" if " " not in key else key, ", ".join(f"{x:,}" for x in values)]
        for figure, digits in (("fit", 2), ("memory", 0)):
            middle = [statistics.median(s[figure] for s in samples if s["x"] == x) for x in values]
            cells.append(", ".join(f"{each:.{digits}f}" for each in middle))
            cells.append(f"{exponent(samples, figure):.2f}")
        rows.append(cells)
    return table(["grows", "values", "fit, s", "exponent", "memory, MB", "exponent"], rows)


def runs_table(results: Results) -> str:
    rows = []
    for name, found in results["figures"]["runs"].items():
        own = columns(found)
        accuracy = own["test_accuracy"]
        mean = mean_sd(accuracy) if len(accuracy) > 1 else f"{accuracy[0]:.4f}"
        rows.append([name, mean, spread(own["fit"]), spread(own["process"])])
    return table(["", "test accuracy", "fit, s", "whole process, s"], rows)


def checkpoints_table(results: Results) -> str:
    """The median of a checkpoint's time, and which part of the fit all of them take."""
    rows = []
    for run in results["figures"]["runs"]:
        each = f"{1000 * statistics.median(run['seconds']):.1f}"
        part = f"{sum(run['seconds']) / run['fit']:.1%}"
        rows.append([str(run["epochs"]), f"{run['fit']:.1f}", str(len(run["seconds"])), each, part])
    return table(["epochs", "fit, s", "checkpoints", "ms each", "of the fit"], rows)


def processes_table(results: Results) -> str:
    rows = []
    for name, found in results["figures"]["epoch_seconds"].items():
        one, two = found.values()
        rows.append([parts.SHARED_NAMES[name], spread(one, 2), spread(two, 2), ratio(two, one)])
    head = ["an epoch, s", "one process, two threads", "two processes", "ratio"]
    return table(head, rows)


def features_table(results: Results) -> str:
    own = columns(results["figures"]["seconds"])
    rows = [
        ["features computed once", spread(own["features"]), ""],
        ["the backbone in each epoch", spread(own["backbone"])],
    ]
    rows[1].append(ratio(own["backbone"], own["features"]))
    return table(["20 epochs of a head", "s", "times as long"], rows)


def near_duplicates_table(results: Results) -> str:
    """From each correlation on: test pictures, those of the class with most, and other labels."""
    figures = results["figures"]
    rule = next(each for each in figures["levels"] if each["correlation"] == figures["threshold"])
    most = rule["by_class"].index(max(rule["by_class"]))
    rows = []
    for level in figures["levels"]:
        num = sum(level["by_class"])
        rows.append(
            [
                f"{level['correlation']}{' (the rule)' if level is rule else ''}",
                f"{num:,} ({num / figures['test_pictures']:.2%})",
                f"{level['by_class'][most]:,}",
                f"{level['other_label']:,}",
            ]
        )
    head = ["correlation at least", "test pictures", f"of them {figures['class_names'][most]}"]
    num, total = sum(rule["by_class"]), figures["test_pictures"]
    without = (0.94 * total - num) / (total - num)
    return (
        f"{table([*head, 'whose pair has another label'], rows)}\n\n"
        "If a network with a test accuracy of 0.9400 is right on all "
        f"{num} that the rule counts,\nits accuracy without them is {without:.4f}."
    )


def frontier_table(results: Results) -> str:
    """Test accuracy of each contestant, with and without near-duplicates, and its seconds."""
    rows = []
    for name, found in results["figures"]["runs"].items():
        own = columns(found)
        accuracies = [
            mean_sd(own[key]) if len(own.get(key, ())) > 1 else f"{own[key][0]:.4f}"
            for key in ("test_accuracy", "without_near_duplicates")
            if key in own
        ]
        budget = f"`{frontier.command(name)}`" if frontier.command(name) else name
        rows.append([budget, *accuracies, *[""] * (2 - len(accuracies)), spread(own["process"], 0)])
    head = ["", "test accuracy", "without near-duplicates", "whole process, s"]
    return table(head, rows)


def claim(experiment: str) -> Callable[[Results], str]:
    """Returns what writes the claim of an experiment with a budget."""

    def written(results: Results) -> str:
        seconds = max(s for s, name in frontier.BUDGETS.items() if name == experiment)
        own = columns(results["figures"]["runs"][frontier.budget_name(seconds)])
        machine, versions = results["machine"], results["versions"]
        num = len(own["seed"])
        return (
            f"Expect test accuracy {mean_sd(own['test_accuracy'])} over {num} seeds, and without "
            f"near-duplicates of training pictures {mean_sd(own['without_near_duplicates'])}, at "
            f"{max(own['process']):.0f} s a run: the longest process, from its start to its end. "
            f"Measured on {article(machine['processor'])}, torch {versions['torch']}, on "
            f"{results['date']} at commit {results['commit']} by: {results['command']}"
        )

    return written


CLAIMS: dict[str, Callable[[Results], str]] = {
    f"frontier {experiment}": claim(experiment) for experiment in ("ten_seconds", "two_minutes")
}
TABLES: dict[str, Callable[[Results], str]] = {
    **CLAIMS,
    "frontier": frontier_table,
    "lesson": lesson_table,
    "lesson short": short_lesson_table,
    "seeds": seeds_table,
    "sweep": sweep_table,
    "startup": startup_table,
    "growth": growth_table,
    "transfer": runs_table,
    "checkpoints": checkpoints_table,
    "processes": processes_table,
    "features": features_table,
    "gpu": runs_table,
    "near_duplicates": near_duplicates_table,
}


def draw(results: Results, path: Path) -> None:
    """Draws medians as bars, the fit within the process, with each round as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contestants = results["figures"]["contestants"]
    timings = {name: columns(found) for name, found in contestants.items() if name != FLOOR}
    names = list(timings)[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(names) + 1.3), layout="constrained")
    for row, name in enumerate(names):
        own = timings[name]
        fit, process = statistics.median(own["fit"]), statistics.median(own["process"])
        color = "tab:red" if name.startswith(OURS) else "tab:gray"
        axes.barh(row, process, color=color, alpha=0.35, label="" if row else "whole process")
        axes.barh(row, fit, color=color, height=0.5, label="" if row else "fit")
        axes.plot(own["process"], [row] * len(own["process"]), "k.", ms=4)
        axes.annotate(
            f"fit {fit:.1f} s, process {process:.1f} s",
            (max(own["process"]), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    if FLOOR in contestants:
        least = statistics.median(columns(contestants[FLOOR])["fit"])
        axes.axvline(least, color="black", ls=":", lw=1, label=f"{FLOOR} ({least:.1f} s)")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("seconds, median of the rounds; dots: each round's process")
    axes.set_title("The lesson: 5 epochs of the MLP on Fashion-MNIST, batch 32")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_frontier(results: Results, path: Path) -> None:
    """Draws test accuracy against the seconds of the whole process, each run as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {name: columns(rows) for name, rows in results["figures"]["runs"].items()}
    middle = {
        name: (statistics.median(own["process"]), statistics.mean(own["test_accuracy"]))
        for name, own in found.items()
    }
    budgets = [frontier.budget_name(seconds) for seconds in results["figures"]["budgets"]]
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    axes.plot(*zip(*(middle[name] for name in budgets), strict=True), color="tab:red", lw=1.5)
    for name, own in found.items():
        color = "tab:red" if name in budgets else "tab:blue" if name == LESSON else "tab:gray"
        axes.plot(own["process"], own["test_accuracy"], ".", color=color, alpha=0.5)
        axes.plot(*middle[name], "o", color=color)
        label = f"budget_seconds={name.split()[0]}" if name in budgets else name
        is_last = middle[name] == max(middle.values())
        axes.annotate(
            f"{label}: {middle[name][1]:.3f}",
            middle[name],
            xytext=(0, -16) if is_last else (6, -12),
            ha="center" if is_last else "left",
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    ticks = [3, 5, 10, 30, 60, 120, 300, 600]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.margins(y=0.08)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.5)
    axes.set_xlabel("seconds of the whole process; dots: single runs")
    axes.set_ylabel("test accuracy")
    axes.set_title("Fashion-MNIST on two CPU cores")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
