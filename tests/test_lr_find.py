"""The learning-rate range test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fashionnet import lr_find
from fashionnet.errors import UserError
from tests.conftest import Commands

SMALL = ("data.limit=640", "device=cpu")


def found(*losses: float) -> lr_find.RangeTest:
    return lr_find._found(losses, 1e-4, 1.0, 40)


def test_rates_grow_by_the_same_factor_and_a_flat_loss_suggests_nothing() -> None:
    result = found(*[2.0] * 40)
    factors = [b / a for a, b in zip(result.rates, result.rates[1:], strict=False)]
    assert factors == pytest.approx([10 ** (4 / 40)] * 39)
    assert result.smoothed == pytest.approx([2.0] * 40)


def test_the_suggestion_is_where_the_running_mean_falls_fastest() -> None:
    losses = [2.0] * 15 + [1.9, 1.5, 0.6, 0.5] + [0.5] * 5 + [9.0] * 3
    result = found(*losses)
    assert result.suggestion is not None
    assert 15 <= result.rates.index(result.suggestion) <= 18


@pytest.mark.parametrize("end", [math.nan, math.inf, 1e9])
def test_it_ends_where_the_loss_explodes(end: float) -> None:
    result = found(*[2.0] * 10, *[1.0] * 10, end, 0.0, 0.0)
    assert len(result.rates) == len(result.losses) == len(result.smoothed) == 20
    with pytest.raises(UserError, match="not finite from the start"):
        found(math.nan, 1.0, 1.0)


def test_it_is_seeded_and_spans_epochs() -> None:
    one, again = (lr_find.lr_find(*SMALL, "seed=3", steps=50) for _ in range(2))
    assert one == again and len(one.losses) > 40  # an epoch has 20 steps
    assert one.losses[0] != lr_find.lr_find(*SMALL, "seed=4", steps=50).losses[0]
    assert one.suggestion is not None and 1e-5 < one.suggestion < 1


def test_only_divergence_ends_it_early(monkeypatch: pytest.MonkeyPatch) -> None:
    diverged = lr_find.lr_find(*SMALL, "optimizer=sgd", high=1e30, steps=50)
    assert 2 <= len(diverged.rates) < 50

    def refuse(self: object, factors: object = None) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("fashionnet.training.optim.Adam.step", refuse)
    with pytest.raises(UserError, match="the disk is full"):
        lr_find.lr_find(*SMALL, steps=50)


def test_the_first_loss_is_that_of_the_run(commands: Commands, tmp_path: Path) -> None:
    result = lr_find.lr_find("data.limit=32", "device=cpu", "model=mlp_no_dropout", steps=20)
    overrides = ("data.limit=32", "device=cpu", "model=mlp_no_dropout", "epochs=1")
    commands.succeed("train", *overrides, "hydra.run.dir=run", cwd=tmp_path)
    (row,) = map(json.loads, (tmp_path / "run/history.jsonl").read_text().splitlines())
    assert result.losses[0] == pytest.approx(row["loss"], rel=1e-6)


@pytest.mark.slow
def test_the_command_draws_and_leaves_no_run(commands: Commands, tmp_path: Path) -> None:
    line = (*SMALL, "--steps", "60", "--plot", "rates.png")
    said = commands.succeed("lr_find", *line, cwd=tmp_path)
    assert "falls fastest at" in said and "optimizer.lr=" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rates.png"]
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads(
        commands.succeed("lr_find", *SMALL, "--steps", "60", "--json", cwd=tmp_path)
    )
    assert f"optimizer.lr={values['suggestion']:.1e}" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--low", "1", "--high", "0.1"), "the rate must grow"),
        (("--low", "0"), "the rate must grow"),
        (("--steps", "3"), "--steps 3 is too few"),
        (("--plot", "rates.jpg"), "must end its name in .png or .svg"),
        (("model=nope",), "model has no such option"),
        (("--low", "1e30", "--high", "1e35"), "not finite from the start"),
    ],
)
def test_wrong_input_is_one_line(
    commands: Commands, tmp_path: Path, line: tuple[str, ...], message: str
) -> None:
    done = commands.run("lr_find", *SMALL, *line, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
