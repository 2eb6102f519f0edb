"""Times this package and its peers, in turn, on this machine.

    .venv/bin/python -m pip install -c constraints.txt -e '.[peers]'
    python scripts/benchmark.py lesson --rounds 5
    python scripts/benchmark.py seeds --first 300 --seeds 300 --keras 100
    python scripts/benchmark.py sweep --runs 10
    python scripts/benchmark.py startup
    python scripts/benchmark.py growth
    python scripts/benchmark.py transfer --weights FILE
    python scripts/benchmark.py frontier --seeds 5
    python scripts/benchmark.py gpu
    python scripts/benchmark.py checkpoints --epochs 5 100
    python scripts/benchmark.py processes
    python scripts/benchmark.py features

Every suite writes docs/results/SUITE.json, or DIR/SUITE.json with --out DIR: all single figures,
the machine, versions, commit and command. `python scripts/tables.py` makes the tables and plots of
README and docs from these files.

`lesson` runs each contestant once a round as a process of its own. `seeds` runs the lesson with
several seeds, with `--keras` also in Keras on JAX. `sweep` runs it through several launchers; with
`--launchers slurm joblib` it needs a Slurm, which `python -m tests.slurm python
scripts/benchmark.py …` brings. `growth` measures time and memory against images, epochs, batch
size, width and seeds. `transfer` times fine-tuning from the weights of a ResNet-18 and from
scratch. `frontier` trains within several budgets of time, beside the lesson and others' models.
`checkpoints` measures which fraction of a fit goes into checkpoints, `processes` epochs of
two processes under torchrun beside one process with two threads, and `features` a head on features
that are computed once beside the backbone in each epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import frontier, lesson, parts, results, sweeps


def main() -> None:
    """The command: `python scripts/benchmark.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")

    def suite(name: str, rounds: int | None = 3) -> argparse.ArgumentParser:
        added = suites.add_parser(name)
        added.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR")
        if rounds is not None:
            added.add_argument("--rounds", type=int, default=rounds)
        return added

    suite("lesson", 5).add_argument("--only", nargs="+", choices=list(lesson.CONTESTANTS))
    seeds = suite("seeds", None)
    seeds.add_argument("--first", type=int, default=0, help="the first seed")
    seeds.add_argument("--seeds", type=int, default=10, help="at least 2")
    seeds.add_argument("--keras", type=int, default=0, help="seeds of Keras on JAX, beside it")
    sweep = suite("sweep")
    sweep.add_argument("--launchers", nargs="+", default=["vectorized", "joblib"])
    sweep.add_argument("--runs", type=int, default=10)
    suite("startup", 5)
    suite("growth")
    suite("transfer").add_argument("--weights", required=True, metavar="FILE")
    frontier_suite = suite("frontier", None)
    frontier_suite.add_argument("--seeds", type=int, default=5)
    frontier_suite.add_argument("--peers", type=int, default=1, help="seeds of the others' models")
    suite("gpu")
    suite("checkpoints", None).add_argument("--epochs", type=int, nargs="+", default=[5])
    suite("processes")
    suite("features")
    given = parser.parse_args()
    path = results.keep(given.suite, figures_of(given), given.out)
    print(f"figures: {path}")


def figures_of(given: argparse.Namespace) -> dict[str, Any]:
    """Runs a suite and returns its figures."""
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "lesson": lambda: lesson.lesson(given.rounds, given.only),
        "seeds": lambda: sweeps.seeds(given.first, given.seeds, given.keras),
        "sweep": lambda: sweeps.sweep(given.launchers, given.runs, given.rounds),
        "growth": lambda: sweeps.growth(given.rounds),
        "startup": lambda: parts.startup(given.rounds),
        "transfer": lambda: parts.transfer(str(Path(given.weights).resolve()), given.rounds),
        "frontier": lambda: frontier.frontier(given.seeds, given.peers),
        "gpu": lambda: parts.gpu(given.rounds),
        "checkpoints": lambda: parts.checkpoints(given.epochs),
        "processes": lambda: parts.processes(given.rounds),
        "features": lambda: parts.features(given.rounds),
    }
    return run[given.suite]()


if __name__ == "__main__":
    main()
