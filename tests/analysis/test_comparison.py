"""A comparison in words: what the table, Markdown, JSON and the notes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fashionnet.analysis import comparison
from fashionnet.analysis.comparison import Comparison
from fashionnet.analysis.groups import METRICS
from fashionnet.compare import compare
from fashionnet.errors import UserError

if TYPE_CHECKING:
    from tests.conftest import WriteRun


@pytest.fixture
def found(write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """Two groups of two seeds; by hand: 0.70 and 0.72 are 0.71 ± 0.1271 (12.7062 * 0.01)."""
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in enumerate((0.70, 0.72)):
        test = {"loss": 0.5, "accuracy": accuracy, "evaluations": 1}
        write_run(Path(f"runs/a{seed}"), seed, test=test)
        test = test | {"accuracy": accuracy + 0.1}
        write_run(Path(f"runs/b{seed}"), seed, model="mlp_no_dropout", test=test)
    write_run(Path("runs/c"), 5, status="failed")
    return compare("runs")


def test_text(found: Comparison) -> None:
    shown = comparison.text(found)
    assert "seeds                      2                2\n" in shown
    assert "test accuracy              0.7100 ± 0.1271  0.8100 ± 0.1271\n" in shown
    assert "generalization gap         0.0500 ± 0.0000  0.0500 ± 0.0000\n" in shown
    assert "best epoch                 1.0 ± 0.0        1.0 ± 0.0\n" in shown
    assert "model=mlp_no_dropout minus model=mlp, paired by seed\n" in shown
    assert (
        "  test accuracy              +0.1000 ± 0.0000  2 pairs  "
        "higher test accuracy in model=mlp_no_dropout than in model=mlp\n"
    ) in shown
    assert (
        "  final validation loss      +0.0000 ± 0.0000  2 pairs  "
        "no difference shown at this number of seeds\n"
    ) in shown
    assert shown.endswith("left out: runs/c: it is not completed but failed")
    assert all(metric.label in shown for metric in METRICS.values())


def test_groups_that_do_not_fit_side_by_side_come_below(found: Comparison) -> None:
    narrow = comparison.text(found, width=50).split("\n\n")
    heads = [block.splitlines()[0].split() for block in narrow[:2]]
    assert heads == [["model=mlp"], ["model=mlp_no_dropout"]]
    assert all(len(block.splitlines()) == 2 + len(METRICS) for block in narrow[:2])
    assert comparison.text(found, width=1).count("seeds                      2\n") == 2
    exact = len("generalization gap         0.0500 ± 0.0000  model=mlp_no_dropout")
    assert len(comparison.text(found, exact).split("\n\n")[0].splitlines()[0].split()) == 2
    assert len(comparison.text(found, exact - 1).split("\n\n")[0].splitlines()[0].split()) == 1


def test_markdown(found: Comparison) -> None:
    shown = comparison.markdown(found)
    assert "|  | model=mlp | model=mlp_no_dropout |\n| --- | --- | --- |\n" in shown
    assert "| test accuracy | 0.7100 ± 0.1271 | 0.8100 ± 0.1271 |\n" in shown
    assert "| model=mlp_no_dropout minus model=mlp | mean" in shown
    assert "* left out: runs/c: " in shown


def test_plain_values_are_all_that_json_needs(found: Comparison) -> None:
    plain = json.loads(json.dumps(comparison.plain(found), allow_nan=False))
    first, second = plain["groups"]
    assert (first["name"], first["seeds"]) == ("model=mlp", [0, 1])
    assert first["runs"] == ["runs/a0", "runs/a1"]
    assert list(second["figures"]) == list(METRICS)
    assert second["figures"]["test_accuracy"]["mean"] == pytest.approx(0.81)
    assert second["figures"]["test_accuracy"]["high"] == pytest.approx(0.81 + 0.127062)
    assert [row["metric"] for row in plain["differences"]] == [
        *("test_accuracy", "val_loss", "val_accuracy", "gap")
    ]
    assert plain["left_out"] == [{"run": "runs/c", "reason": "it is not completed but failed"}]
    assert plain["notes"] == found.notes


def test_one_seed_has_no_interval_and_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    found = compare(tmp_path)
    shown = comparison.text(found)
    assert "One seed only, so no interval: model=mlp." in shown
    assert "±" not in shown
    assert "several comparisons" not in shown
    (group,) = comparison.plain(found)["groups"]
    assert group["figures"]["test_loss"] == {
        **{"num_seeds": 1, "mean": 0.45, "sd": None, "low": None, "high": None}
    }


def test_a_figure_that_no_run_has_is_a_dash(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run.path / "history.jsonl").write_text('{"epoch": 1, "loss": 0.5, "accuracy": 0.8}\n')
    assert "generalization gap         -\n" in comparison.text(compare(tmp_path))


def test_the_metric_decides_what_differences_are_about(found: Comparison) -> None:
    chosen = compare("runs", metric="fit_seconds")
    assert chosen.differences["metric"].tolist() == ["fit_seconds"]
    assert not any("several comparisons" in note for note in chosen.notes)
    assert any("4 intervals" in note and "not corrected" in note for note in found.notes)
    with pytest.raises(UserError, match=r"test_acc is not known; choose loss, .*mean test_acc"):
        compare("runs", metric="test_acc")


def test_notes_tell_of_lengths_data_and_machines(write_run: WriteRun, tmp_path: Path) -> None:
    data = {"sha256": {"images": "c" * 64}, "split_sha256": "b" * 64, "validation": 6000}
    own = data | {"sha256": {"images": "a" * 64}, "validation": 12000}
    write_run(tmp_path / "a", 0, [{}] * 2, config={"epochs": 9})
    write_run(tmp_path / "b", 1, [{}] * 7, config={"epochs": 9})
    write_run(tmp_path / "c", 0, config={"epochs": 9}, data=data)
    write_run(tmp_path / "d", 0, config={"epochs": 9, "validation_split": 0.2}, data=own)
    write_run(tmp_path / "e", 2, config={"epochs": 9}, processor="another")
    notes = "\n".join(compare(tmp_path).notes)
    assert ": runs of 1 to 7 epochs; the plot's mean and band" in notes
    assert "sha256.images=cccccccc validation_split=null ran on other data than" in notes
    assert "has another validation set than" in notes
    assert "Fit seconds come from different processors" in notes
