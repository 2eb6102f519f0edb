"""The tables of README and docs are those of docs/results, and the benchmarks' own arithmetic."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Commands

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("tables")


def some_results(suite: str, **figures: Any) -> dict[str, Any]:
    return {
        "suite": suite,
        "command": f"python scripts/benchmark.py {suite}",
        "date": "2026-01-01",
        "commit": "abc",
        "machine": {"processor": "AMD EPYC, 2 cores", "cores": 2, "memory_gb": 8, "gpu": None},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "figures": figures,
    }


def test_tables_are_those_of_the_results(tables: ModuleType) -> None:
    for path in tables.pages():
        text = path.read_text()
        assert tables.filled(text) == text, f"{path}: run python scripts/tables.py"


def test_every_place_has_a_table_and_an_end(tables: ModuleType) -> None:
    names = []
    for path in tables.pages():
        text = path.read_text()
        found = [place[2] for place in tables._PLACE.finditer(text)]
        assert len(found) == text.count("<!-- table: ") == text.count("<!-- end -->"), path
        names += found
    assert names and set(names) <= tables.TABLES.keys()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path: Path) -> None:
    values = json.loads(path.read_text())
    assert values.keys() == some_results("x").keys()
    assert values["suite"] == path.stem
    scripts = f"python scripts/benchmark.py {path.stem}", f"python scripts/{path.stem}.py"
    assert values["command"].startswith(scripts)
    assert values["machine"].keys() == {"processor", "cores", "memory_gb", "gpu"}
    assert {"python", "torch"} <= values["versions"].keys()
    assert values["commit"] not in ("", "unknown")


def test_a_table_is_made_of_its_file_and_nothing_else_changes(
    tables: ModuleType, tmp_path: Path
) -> None:
    page = "before\n<!-- table: startup -->\nold\n<!-- end -->\nafter\n"
    assert tables.filled(page, tmp_path) == page  # no file yet
    results = some_results("startup", seconds={"list": [0.3, 0.1, 0.2]})
    (tmp_path / "startup.json").write_text(json.dumps(results))
    made = tables.filled(page, tmp_path)
    assert "| list | 0.20 (0.10–0.30) |" in made and "old" not in made
    assert "an AMD EPYC, 2 cores, on 2026-01-01" in made and "torch 2.13.0" in made
    assert made.startswith("before\n") and made.endswith("\nafter\n")
    assert tables.filled(made, tmp_path) == made


def test_ratios_are_medians_within_rounds(tables: ModuleType) -> None:
    def rounds(*seconds: float) -> list[dict[str, float]]:
        return [{"fit": s, "process": 2 * s, "memory": 100} for s in seconds]

    contestants = {"fashionnet": rounds(1, 2, 6), "peer": rounds(2, 8, 12)}
    contestants["its arithmetic alone"] = [{"fit": 0.5}, {"fit": 1.0}, {"fit": 2.0}]
    made = tables.lesson_table(some_results("lesson", contestants=contestants))
    assert "| peer | 8.0 (2.0–12.0) | 16.0 (4.0–24.0) | 100 | 0.50 | 0.50 |" in made
    assert "| its arithmetic alone | 1.0 (0.5–2.0) |  |  | 2.00 |  |" in made


def test_the_exponent_is_that_of_a_power(tables: ModuleType) -> None:
    samples = [{"x": x, "fit": 3 * x**1.5} for x in (1.0, 2.0, 4.0, 8.0)]
    assert tables.exponent(samples, "fit") == pytest.approx(1.5)


def test_a_larger_spread_is_shown_only_by_its_interval(tables: ModuleType) -> None:
    import numpy as np

    draw = np.random.default_rng(2)
    narrow, wide = draw.normal(0, 1, 300), draw.normal(0, 2, 300)
    ratio, low, high = tables.ratio_of_sd(list(wide), list(narrow))
    assert 1.5 < low < ratio < high < 2.5
    _, low, high = tables.ratio_of_sd(list(narrow), list(draw.normal(0, 1, 300)))
    assert low < 1 < high


def test_claims_stand_in_the_comments_of_experiments(tables: ModuleType, tmp_path: Path) -> None:
    def run(seed: int, accuracy: float, process: float) -> dict[str, float]:
        figures = {"test_accuracy": accuracy, "without_near_duplicates": accuracy - 0.01}
        return {"seed": seed, "process": process, **figures}

    rows = {"120 s": [run(0, 0.93, 117.0), run(1, 0.94, 119.2)], "10 s": [run(0, 0.9, 9.0)] * 2}
    peer = {"forest": [{"process": 50.0, "test_accuracy": 0.88}]}
    results = some_results("frontier", budgets=[10, 120], runs={**rows, **peer})
    (tmp_path / "frontier.json").write_text(json.dumps(results))
    head = "# <!-- table: frontier two_minutes -->\n# <!-- end -->\nseed: 0\n"
    made = tables.filled(head, tmp_path)
    assert all(line.startswith("#") and len(line) <= 100 for line in made.splitlines()[:-1])
    words = " ".join(line.removeprefix("# ") for line in made.splitlines())
    assert "test accuracy 0.9350 ± 0.0071 over 2 seeds" in words
    assert "near-duplicates of training pictures 0.9250 ± 0.0071, at 119 s a run" in words
    assert "on an AMD EPYC, 2 cores, torch 2.13.0" in words
    assert tables.filled(made, tmp_path) == made and made.endswith("seed: 0\n")
    table = tables.frontier_table(results)
    assert "| `experiment=two_minutes budget_seconds=120` | 0.9350 ± 0.0071 |" in table
    assert "| forest | 0.8800 |  | 50 (50–50) |" in table
    tables.draw_frontier(results, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_parts_of_the_package_have_tables(tables: ModuleType) -> None:
    run = {"epochs": 5, "fit": 4.0, "seconds": [0.01, 0.02, 0.03]}
    assert "| 5 | 4.0 | 3 | 20.0 | 1.5% |" in tables.checkpoints_table(
        some_results("checkpoints", runs=[run])
    )
    seconds = {"one process": [1.0, 2.0, 3.0], "two processes": [2.0, 5.0, 3.0]}
    row = "| 2.00 (1.00–3.00) | 3.00 (2.00–5.00) | 2.00 |"
    assert row in tables.processes_table(some_results("processes", epoch_seconds={"mlp": seconds}))
    rows = [{"features": 2.0, "backbone": 20.0}, {"features": 3.0, "backbone": 36.0}]
    found = tables.features_table(some_results("features", seconds=rows))
    assert "| the backbone in each epoch | 28.0 (20.0–36.0) | 11.00 |" in found


@pytest.mark.slow
def test_a_gpu_s_steps_are_taken_one_by_one_for_comparison(
    commands: Commands, tables: ModuleType, tmp_path: Path
) -> None:
    line = [sys.executable, "-c", tables.parts._EAGER, "epochs=1", "data.limit=64", "device=cpu"]
    done = commands.call([*line, "hydra.run.dir=run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_a_suite_leaves_its_figures(commands: Commands, tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPTS / "benchmark.py"), "startup", "--rounds", "1"]
    done = commands.call([*line, "--out", str(tmp_path / "results")], tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "results/startup.json").read_text())
    assert values["figures"]["seconds"]["train, one epoch of 64 pictures"][0] > 0
    assert values["command"].startswith("python scripts/benchmark.py startup --rounds 1")
