"""Schedules of the learning rate."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from fashionnet.errors import UserError
from fashionnet.training import schedule
from fashionnet.training.schedule import (
    Constant,
    Cosine,
    LearningRate,
    OneCycle,
    Plateau,
    Schedule,
    Step,
)


def factors(of: Schedule, steps: int = 100) -> list[float]:
    return [of(step / steps) for step in range(steps)]


def test_constant_is_one() -> None:
    assert set(factors(Constant())) == {1.0}


@pytest.mark.parametrize(
    "of", [Constant(0.2), Cosine(0.2), Step((0.5,), warmup=0.2), OneCycle(0.2)]
)
def test_a_warmup_grows_from_a_small_rate_to_the_full_one(of: Schedule) -> None:
    found = factors(of)
    assert 0 < found[0] < 0.1
    assert found[:21] == sorted(found[:21])
    assert found[20] == pytest.approx(1.0)
    assert max(found) <= 1.0


def test_a_linear_warmup() -> None:
    assert factors(Constant(0.5), 10)[:5] == pytest.approx([0.01 + 0.99 * f / 5 for f in range(5)])


@pytest.mark.parametrize("of", [Cosine(), Cosine(0.1), OneCycle()])
def test_the_last_step_still_moves_the_weights(of: Schedule) -> None:
    assert 0 < factors(of)[-1] < 0.01


@pytest.mark.parametrize(("anneal", "name"), [("cosine", "cos"), ("linear", "linear")])
def test_one_cycle_has_the_shape_of_torchs(anneal: str, name: Literal["cos", "linear"]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = 10_000  # torch counts to the last step, which no longer matters here
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, anneal_strategy=name
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert factors(OneCycle(anneal=anneal), steps) == pytest.approx(rates, abs=5e-4)


def test_another_curve_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.anneal=cos must be cosine or linear"):
        OneCycle(anneal="cos")


def test_steps_multiply_at_their_fractions() -> None:
    found = factors(Step([0.25, 0.5], factor=0.5), 8)
    assert found == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_a_plateau_forgets_nothing_over_a_checkpoint() -> None:
    figures = [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    whole, part, rest = (Plateau("loss", 0.5, 2, cooldown=1) for _ in range(3))
    for figure in figures:
        whole.after_epoch({"loss": figure}, 0.1)
    for figure in figures[:4]:
        part.after_epoch({"loss": figure}, 0.1)
    rest.load_state_dict(part.state_dict())
    for figure in figures[4:]:
        rest.after_epoch({"loss": figure}, 0.1)
    assert rest.state_dict() == whole.state_dict()
    assert whole(0.9) < 1


def test_a_plateau_of_what_is_not_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.monitor=val_loss is not measured.*loss"):
        Plateau().after_epoch({"loss": 1.0}, 0.1)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_every_group_of_every_optimizer_follows(name: str) -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": weights[:1], "lr": 0.2}, {"params": weights[1:]}]
    optimizer = getattr(torch.optim, name)(groups, lr=0.1)
    rate = LearningRate(optimizer, Cosine())
    rate.set(0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.05])
    assert rate.current == pytest.approx(0.1)


def test_a_constant_rate_is_left_to_the_optimizer() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    rate = LearningRate(optimizer, Constant())
    optimizer.param_groups[0]["lr"] = 0.7
    rate.set(0.5)
    assert rate.current == 0.7


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("Cosine", {"warmup": 1.0}, r"schedule\.warmup=1\.0 must be below 1"),
        ("Cosine", {"warmup": -0.1}, r"schedule\.warmup=-0\.1 must be 0 or more"),
        ("Cosine", {"warmup": "x"}, r"schedule\.warmup=x must be a finite number"),
        ("Constant", {"warmup": math.nan}, r"schedule\.warmup=nan must be a finite number"),
        ("OneCycle", {"start": 0}, r"schedule\.start=0 must be above 0"),
        ("Step", {"at": [0.7, 0.5]}, r"schedule\.at=\[0\.7, 0\.5\] must be in ascending order"),
        ("Step", {"at": [2]}, r"schedule\.at=2 must be at most 1"),
        ("Step", {"factor": True}, r"schedule\.factor=True must be a finite number"),
        ("Plateau", {"patience": -1}, r"schedule\.patience=-1 must be 0 or more epochs"),
        ("Plateau", {"patience": 1.5}, r"schedule\.patience=1\.5 must be 0 or more epochs"),
        ("Plateau", {"monitor": "f1"}, r"schedule\.monitor=f1 is not known; choose loss"),
        ("Cosine", {"steps": 3}, r"schedule\.steps: .* has no such argument; it has warmup"),
    ],
)
def test_bad_arguments_are_refused(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        schedule.build({"_target_": f"fashionnet.training.schedule.{name}", **arguments})


@pytest.mark.parametrize(
    ("of", "depends"),
    [
        *((Constant(), False), (Constant(0.1), True), (Cosine(), True), (OneCycle(), True)),
        *((Step(), True), (Plateau(), False), (lambda fraction: 1.0, True)),
    ],
)
def test_which_schedules_depend_on_the_length(of: Schedule, depends: bool) -> None:
    assert schedule.depends_on_length(of) is depends
