"""A training that fits into a time: measured, fixed, cut short, repeated and continued."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fashionnet.config import compose
from fashionnet.data.examples import Examples
from fashionnet.errors import Interrupted, UserError
from fashionnet.models.mlp import MLP
from fashionnet.models.weights import weights_sha256
from fashionnet.system import command_line, seeds
from fashionnet.system.signals import Stop
from fashionnet.training import gradients, loop
from fashionnet.training.budget import Budget
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.optim import Adam
from fashionnet.training.schedule import OneCycle
from fashionnet.training.state import Row, TrainState
from tests.conftest import Commands, FinishedRun

pytestmark = pytest.mark.usefixtures("one_thread")

_STEPS = 50  # of an epoch


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CHUNK_BATCHES", 5)


@pytest.fixture(scope="module")
def parts() -> tuple[Examples, Examples]:
    images = torch.randint(0, 256, (8 * _STEPS + 16, 2, 3), dtype=torch.uint8)
    every = Examples(images, images.flatten(1)[:, :4].long().argmax(1))
    return every[: 8 * _STEPS], every[8 * _STEPS :]


def a_fit(budget: Budget | None) -> TrainState:
    seeds.seed_everything(0)
    model = MLP(6, 0.3, (2, 3), 4)
    optimizer = Adam(model.parameters(), lr=0.02)
    step_gradients = gradients.choose("autograd", model)
    schedule = OneCycle()
    return TrainState(
        *(model, optimizer, step_gradients, EarlyStopping(), 5, 8, 255.0), schedule, budget=budget
    )


def a_budget(left: float, num_test: int = 0) -> Budget:
    """Returns a budget of which about so many seconds are left for steps."""
    return Budget(1.2 + left, time.perf_counter(), num_test)


def outcome(fit: TrainState) -> tuple[str, list[Row]]:
    rows = [{k: v for k, v in row.items() if k != "epoch_seconds"} for row in fit.history]
    return weights_sha256(fit.model.state_dict()), rows


class After(loop.Watcher):
    """Does something once, as soon as the number of steps is fixed and so many are taken."""

    def __init__(self, steps: int, action: Callable[[], object]) -> None:
        super().__init__(Stop())
        self._steps, self._action = steps, action

    def steps_taken(self, fit: TrainState, num_steps: int) -> None:
        assert fit.budget is not None
        done = (fit.epoch - 1) * _STEPS + fit.step
        if fit.budget.steps and done >= fit.budget.measured + self._steps and self._steps:
            self._steps = 0
            self._action()


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fashionnet.training.steps._SECONDS_BETWEEN_LOOKS", 0.0)


def test_takes_as_many_steps_as_fit(parts: tuple[Examples, Examples]) -> None:
    fits = []
    for left in (0.4, 1.2):
        fit = a_fit(a_budget(left))
        began = time.perf_counter()
        loop.fit(fit, *parts, None, loop.Watcher())
        assert fit.budget is not None
        fits.append((fit.budget.steps, time.perf_counter() - began))
        assert fit.budget.end == 0
        assert fit.last_epoch == len(fit.history) == -(-fit.budget.steps // _STEPS)
    (short, seconds), (long, more_seconds) = fits
    assert _STEPS <= short < long
    assert seconds < more_seconds


def test_measured_steps_have_the_first_rate_and_the_last_step_the_last(
    parts: tuple[Examples, Examples],
) -> None:
    fit = a_fit(a_budget(0.3))
    loop.fit(fit, *parts, None, loop.Watcher())
    assert fit.budget is not None
    steps, measured = fit.budget.steps, fit.budget.measured
    assert 0 < measured < steps
    fractions = [fit.fraction(step, 0) for step in range(steps)]
    assert fractions[:measured] == [0.0] * measured
    assert fractions[measured:] == [step / steps for step in range(measured, steps)]
    assert fit.learning_rate.current == 0.02 * OneCycle()((steps - 1) / steps)


def test_a_repetition_by_its_plan_has_the_same_bits(parts: tuple[Examples, Examples]) -> None:
    first = a_fit(a_budget(0.3))
    loop.fit(first, *parts, None, loop.Watcher())
    assert first.budget is not None
    again = a_fit(Budget(1.0, time.perf_counter() - 1e6, plan=first.budget.plan()))
    loop.fit(again, *parts, None, loop.Watcher())
    assert outcome(again) == outcome(first)


@pytest.mark.usefixtures("looks_often")
def test_a_slower_machine_ends_it_in_time_and_that_is_repeated_too(
    parts: tuple[Examples, Examples], caplog: pytest.LogCaptureFixture
) -> None:
    first = a_fit(a_budget(0.3))
    loop.fit(first, *parts, None, After(7, lambda: time.sleep(4)))
    budget = first.budget
    assert budget is not None
    # It sleeps after a chunk of five steps, and the next chunk is the last.
    assert budget.measured + 7 <= budget.end <= budget.measured + 16
    assert budget.end < budget.steps
    assert first.last_epoch == len(first.history)
    assert f"after step {budget.end} of {budget.steps}" in caplog.text
    again = a_fit(Budget(1.0, time.perf_counter() - 1e6, plan=budget.plan()))
    loop.fit(again, *parts, None, loop.Watcher())
    assert outcome(again) == outcome(first)


@pytest.mark.usefixtures("looks_often")
def test_an_interrupted_one_goes_on_to_the_same_bits(parts: tuple[Examples, Examples]) -> None:
    cut = a_fit(a_budget(0.5))
    watcher = After(12, lambda: setattr(watcher.stop, "signal", signal.SIGTERM))
    with pytest.raises(Interrupted):
        loop.fit(cut, *parts, None, watcher)
    assert cut.budget is not None
    kept = cut.state_dict()
    began = time.perf_counter()
    resumed = a_fit(Budget(1e6, began))
    resumed.load_state_dict(kept)
    assert resumed.budget is not None
    assert began - resumed.budget._began == pytest.approx(kept["budget"]["spent"])
    loop.fit(resumed, *parts, None, loop.Watcher())
    whole = a_fit(Budget(1.0, time.perf_counter() - 1e6, plan=cut.budget.plan()))
    loop.fit(whole, *parts, None, loop.Watcher())
    assert resumed.budget.end == 0
    assert outcome(resumed) == outcome(whole)


def test_evaluation_is_part_of_it(parts: tuple[Examples, Examples]) -> None:
    steps = []
    for num_test in (0, 50_000):
        fit = a_fit(a_budget(1.0, num_test))
        loop.fit(fit, *parts, None, loop.Watcher())
        assert fit.budget is not None
        steps.append(fit.budget.steps)
    assert steps[1] < steps[0]


def test_too_little_for_an_epoch_is_refused(parts: tuple[Examples, Examples]) -> None:
    for left, num_test in ((-0.9, 0), (0.5, 10**9)):
        fit = a_fit(a_budget(left, num_test))
        with pytest.raises(UserError, match=r"budget_seconds=\S+ is too small: an epoch takes"):
            loop.fit(fit, *parts, None, loop.Watcher())


@dataclass
class Clock:
    """A clock that stands still until it is set."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("fashionnet.training.budget.time", clock)
    return clock


def looked(clock: Clock, budget: Budget, looks: Iterable[tuple[int, float]]) -> list[int]:
    """Lets a budget look at the clock at steps and times; returns the steps that ended it."""
    state: Any = SimpleNamespace(step=0, progress=lambda: None)
    train: Any = None
    ended = []
    for state.step, clock.now in looks:
        if budget.ends_after(state, train, 0):
            ended.append(state.step)
    return ended


@pytest.mark.parametrize(
    ("first", "steps", "end"), [(0, 1000, 900), (0, 950, None), (800, 1000, 900)]
)
def test_it_ends_before_the_steps_that_no_longer_fit(
    first: int, steps: int, end: int | None, clock: Clock, parts: tuple[Examples, Examples]
) -> None:
    budget = Budget(100.0, 0.0)
    clock.now = first / 10
    budget.start(*parts, first)  # after a resume it begins later
    budget.steps, budget.measured, budget._reserve = steps, 50, 1.0
    # Of 100 seconds about 1 is left for what comes after; 100 steps take 10.
    ended = looked(clock, budget, [(step, step / 10) for step in range(first + 100, steps, 100)])
    assert ended == ([] if end is None else [end])
    assert budget.last_step == (end or steps)


def test_a_moment_in_which_the_machine_does_something_else_is_not_measured(
    clock: Clock, parts: tuple[Examples, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(100.0, 0.0)
    paces = []
    monkeypatch.setattr(budget, "_fix", lambda state, train, step, pace: paces.append(pace))
    budget.start(*parts, 0)
    times = [2.0, 3.0, 4.0, 7.0]  # of looks every ten steps; the first prepares
    looked(clock, budget, [(10 * i, at) for i, at in enumerate(times, 1)])
    assert paces == [0.1]


def test_two_lengths_are_refused() -> None:
    for others in (["steps=3"], ["epochs=5"], ["steps=3", "epochs=null"]):
        composed = compose.compose("budget_seconds=9", *others)
        with pytest.raises(UserError, match=r"\w+=\d and \w+=\d are two lengths of one training"):
            compose.typed(composed, ["budget_seconds=9", *others])
    for value in ("0", "-1", "nan"):
        with pytest.raises(UserError, match="budget_seconds"):
            compose.typed(compose.compose(f"budget_seconds={value}"))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="budget_seconds=9 is for one process"):
        compose.typed(compose.compose("budget_seconds=9"))


def test_a_job_begins_with_its_commands_process_or_now() -> None:
    before = time.perf_counter()
    assert before <= command_line.job_began() <= time.perf_counter()


def test_a_commands_first_job_began_with_its_process(commands: Commands, tmp_path: Path) -> None:
    program = (
        "import time; time.sleep(0.3)\n"
        "from fashionnet.system import command_line\n"
        "with command_line.reported():\n"
        "    print(*(time.perf_counter() - command_line.job_began() for _ in range(2)))\n"
    )
    done = commands.call([sys.executable, "-c", program], tmp_path)
    first, second = map(float, done.stdout.split())
    assert first > 0.3 and second < 0.3


@pytest.fixture(scope="module")
def run(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    folder = tmp_path_factory.mktemp("budget")
    stdout = commands.succeed(
        *("train", "budget_seconds=8", "schedule=cosine", "data.limit=400", "hydra.run.dir=run"),
        cwd=folder,
    )
    yield FinishedRun(folder / "run", stdout)


def test_the_command_records_it_and_reproduces_it(commands: Commands, run: FinishedRun) -> None:
    plan = run.record["budget"]
    assert 0 < plan["measured"] < plan["steps"]
    assert len(run.history) == -(-plan.get("end", plan["steps"]) // 13)
    assert "fit into budget_seconds=8" in run.stdout
    said = commands.succeed("reproduce", "run", cwd=run.path.parent)
    assert "identical: " in said
    assert FinishedRun(run.path.parent / "run-reproduced").record["budget"] == plan


def test_the_command_refuses_too_little(commands: Commands, tmp_path: Path) -> None:
    line = commands.fail("train", "budget_seconds=0.1", "hydra.run.dir=run", cwd=tmp_path)
    assert line.startswith("budget_seconds=0.1 is too small: an epoch takes about")


def test_the_vectorized_launcher_trains_it_alone(commands: Commands, tmp_path: Path) -> None:
    said = commands.succeed(
        *("train", "-m", "budget_seconds=6", "seed=0,1", "data.limit=200"),
        *("hydra/launcher=vectorized", "hydra.sweep.dir=sweep"),
        cwd=tmp_path,
    )
    assert "its speed decides how long it is trained" in said
    assert "2 completed" in said
