"""The loop itself: every step, every example, the figures it tells, and going on from anywhere."""

from __future__ import annotations

import contextlib
import io
import math
import random
import signal
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from fashionnet.data.examples import Examples
from fashionnet.errors import Interrupted, UserError
from fashionnet.models import layers
from fashionnet.models.mlp import MLP
from fashionnet.models.weights import weights_sha256
from fashionnet.system import devices, seeds
from fashionnet.training import evaluation, gradients, loop, optim
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.gradients import Autograd
from fashionnet.training.metrics import Metrics
from fashionnet.training.optim import Adam
from fashionnet.training.schedule import Constant, Cosine, OneCycle, Plateau, Schedule, Step
from fashionnet.training.state import Row, TrainState

WAYS = ("autograd", "by_hand")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def _small_chunks() -> Iterator[None]:
    """Makes epochs of a few steps have several chunks and looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_CHUNK_BATCHES", 2)
        patch.setattr("fashionnet.training.steps._SECONDS_BETWEEN_LOOKS", 0.0)
        patch.setattr(evaluation, "_EVALUATION_BATCH", 7)
        yield


Silent = loop.Watcher  # its events do nothing


def some_examples(num: int, seed: int = 0) -> Examples:
    """Returns pictures (2, 3) of four classes that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 2, 3), dtype=torch.uint8, generator=generator)
    return Examples(images, images.flatten(1)[:, :4].long().argmax(1))


def numbered_examples(num: int) -> Examples:
    """Returns pictures (1, 2) that hold their own number."""
    numbers = torch.arange(num)
    images = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8).view(num, 1, 2)
    return Examples(images, numbers % 4)


def a_fit(
    way: str = "autograd",
    hidden: int | list[int] = 6,
    dropout: float = 0.3,
    seed: int = 5,
    weights: int = 5,
    batch_size: int = 4,
    lr: float = 0.02,
    stopping: EarlyStopping | None = None,
    device: str = "cpu",
    schedule: Schedule | None = None,
) -> TrainState:
    seeds.seed_everything(weights)
    model = MLP(hidden, dropout, (2, 3), 4).to(device)
    compiled = gradients.choose(way, model)
    optimizer = Adam(model.parameters(), lr=lr)
    return TrainState(
        model,
        optimizer,
        compiled,
        stopping or EarlyStopping(),
        seed,
        batch_size,
        255.0,
        schedule or Constant(),
    )


def weights_of(fit: TrainState) -> dict[str, Tensor]:
    return {name: weights.clone() for name, weights in fit.model.state_dict().items()}


def figures_of(fit: TrainState) -> list[Row]:
    """Returns the history without the one column that is a clock's."""
    return [{key: row[key] for key in row if key != "epoch_seconds"} for row in fit.history]


def assert_same(fit: TrainState, other: TrainState) -> None:
    """Asserts that two fits ended alike to the bit."""
    for name, weights in other.model.state_dict().items():
        assert torch.equal(fit.model.state_dict()[name], weights), name
    assert figures_of(fit) == figures_of(other)
    assert (fit.best_epoch, fit.best_loss) == (other.best_epoch, other.best_loss)
    assert fit.best_weights is not None and other.best_weights is not None
    for name, weights in other.best_weights.items():
        assert torch.equal(fit.best_weights[name], weights), name


class Recorder:
    """Stands for the gradients: notes the pictures' numbers, batch by batch."""

    mode = contextlib.nullcontext
    losses = None

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, x: Tensor, labels: Tensor, mix: object = None) -> Tensor:
        numbers = (x.flatten(1) @ torch.tensor([256.0, 1.0])).round().long()
        assert torch.equal(labels, numbers % 4)
        self.batches.append(numbers.tolist())
        return torch.zeros(len(labels), 4)


class CountingOptimizer:
    """Stands for the optimizer: counts its steps, and may do something at one of them."""

    def __init__(self, at: int = 0, action: Callable[[], object] = lambda: None) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 1.0}]
        self.steps = 0
        self._at, self._action = at, action

    def step(self) -> None:
        self.steps += 1
        if self.steps == self._at:
            self._action()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


def recorded(
    num: int, batch_size: int, seed: int = 5, epochs: int = 1, start: int = 0
) -> tuple[Recorder, CountingOptimizer]:
    """Fits `num` numbered examples, and returns what was recorded."""
    recorder, optimizer = Recorder(), CountingOptimizer()
    model = MLP(1, 0, (1, 2), 4)
    fit = TrainState(model, optimizer, recorder, EarlyStopping(), seed, batch_size, 1.0)  # type: ignore[arg-type]
    fit.step = start
    loop.fit(fit, numbered_examples(num), numbered_examples(0), epochs, Silent())
    return recorder, optimizer


# --------------------------------------------------------------------------- steps and order


@settings(deadline=None, max_examples=25)
@given(num=st.integers(1, 60), batch_size=st.integers(1, 30), epochs=st.integers(1, 2))
def test_every_step_is_taken(num: int, batch_size: int, epochs: int) -> None:
    recorder, optimizer = recorded(num, batch_size, epochs=epochs)
    steps = -(-num // batch_size)
    assert optimizer.steps == len(recorder.batches) == steps * epochs
    for epoch in range(epochs):
        batches = recorder.batches[epoch * steps : (epoch + 1) * steps]
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (steps - 1)
        assert len(batches[-1]) == num - batch_size * (steps - 1)
        assert sorted(chain(*batches)) == list(range(num))


def test_the_order_is_that_of_seed_and_epoch() -> None:
    for seed in (0, 5):
        recorder, _ = recorded(600, 7, seed=seed, epochs=2)
        expected = [seeds.epoch_order(seed, epoch, 600).tolist() for epoch in (1, 2)]
        assert list(chain(*recorder.batches)) == expected[0] + expected[1]


def test_the_lesson_has_1688_steps_an_epoch() -> None:
    told = []

    class Watcher(Silent):
        def epoch_started(self, fit: TrainState, num_steps: int) -> None:
            told.append(num_steps)
            raise KeyboardInterrupt

    fit = a_fit(batch_size=32)
    images = torch.zeros(1, 2, 3, dtype=torch.uint8).expand(54_000, 2, 3)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(
            fit,
            Examples(images, torch.zeros(54_000, dtype=torch.int64)),
            some_examples(0),
            1,
            Watcher(),
        )
    assert told == [1688]


@settings(deadline=None, max_examples=40)
@given(
    num=st.integers(1, 80),
    batch_size=st.integers(1, 20),
    per_chunk=st.integers(1, 5),
    room=st.integers(1, 2000),
    data=st.data(),
)
def test_chunks_cover_each_example_once(
    num: int, batch_size: int, per_chunk: int, room: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_CHUNK_BATCHES", per_chunk)
        patch.setattr(loop, "_CHUNK_BYTES", room)
        batches = max(1, min(per_chunk, room // (batch_size * 2 * 4)))
        starts = range(0, -(-num // batch_size), batches)  # where a chunk may have ended
        start = data.draw(st.sampled_from(starts))
        order = torch.randperm(num, generator=torch.Generator().manual_seed(num))
        fit = a_fit(batch_size=batch_size)
        fit.step, fit.scale = start, 1.0
        # Copied, since the next chunk is written over the one before it.
        found = loop.chunks(fit, numbered_examples(num), order, 0, 10**6)
        taken = [(chunk.x.clone(), chunk.labels) for chunk in found]
    numbers = [(images.flatten(1).long() @ torch.tensor([256, 1])).tolist() for images, _ in taken]
    assert list(chain(*numbers)) == order[start * batch_size :].tolist()
    assert all(len(part) == batches * batch_size for part in numbers[:-1])
    for images, labels in taken:
        assert images.dtype == torch.float32
        assert torch.equal(labels, images.flatten(1).long() @ torch.tensor([256, 1]) % 4)


def test_an_epoch_under_way_goes_on_with_its_next_batch() -> None:
    whole, _ = recorded(30, 4)
    rest, _ = recorded(30, 4, start=4)
    assert rest.batches == whole.batches[4:]


def test_a_watcher_is_told_of_every_event() -> None:
    events: list[Any] = []

    class Watcher(Silent):
        def epoch_started(self, fit: TrainState, num_steps: int) -> None:
            events.append(("started", fit.epoch, fit.step, num_steps))

        def steps_taken(self, fit: TrainState, num_steps: int) -> None:
            events.append(("steps", fit.epoch, fit.step, num_steps))

        def epoch_ended(self, fit: TrainState, row: Row) -> None:
            assert fit.history[-1] is row
            events.append(("ended", row["epoch"], fit.epoch, fit.step))

    loop.fit(a_fit(), some_examples(18), some_examples(3), 2, Watcher())
    assert events == [
        ("started", 1, 0, 5),
        ("steps", 1, 2, 5),
        ("steps", 1, 4, 5),
        ("steps", 1, 5, 5),
        ("ended", 1, 2, 0),
        ("started", 2, 0, 5),
        ("steps", 2, 2, 5),
        ("steps", 2, 4, 5),
        ("steps", 2, 5, 5),
        ("ended", 2, 3, 0),
    ]


# ------------------------------------------------------------------------------------ figures


def mean_figures(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    return losses.mean().item(), (logits.argmax(1) == labels).double().mean().item()


class KeepingLogits(Autograd):
    """Autograd that keeps the logits and labels of every batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def __call__(self, x: Tensor, labels: Tensor, mix: object = None) -> Tensor:
        logits = super().__call__(x, labels)
        self.logits.append(logits.clone())
        self.labels.append(labels.clone())
        return logits


def test_training_figures_are_means_over_the_epoch_with_dropout_on() -> None:
    fit = a_fit(dropout=0.5)
    kept = fit.gradients = KeepingLogits(fit.model)
    train = some_examples(21)  # five batches of four and one of one
    loop.fit(fit, train, some_examples(0), 2, Silent())
    assert [len(part) for part in kept.labels] == [4, 4, 4, 4, 4, 1] * 2
    for row, part in zip(fit.history, (slice(6), slice(6, None)), strict=True):
        logits, labels = kept.logits[part], kept.labels[part]
        loss, accuracy = mean_figures(torch.cat(logits), torch.cat(labels))
        assert row["loss"] == pytest.approx(loss, rel=1e-6)
        assert row["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        # Not the mean of the batches' means, in which the last example would count four times.
        means = [mean_figures(*pair)[0] for pair in zip(logits, labels, strict=True)]
        assert abs(row["loss"] - float(np.mean(means))) > 1e-4


def test_training_figures_have_dropout_on_and_validation_figures_off() -> None:
    fit = a_fit(dropout=0.9, lr=1e-30)  # weights that do not move
    train = some_examples(40)
    loop.fit(fit, train, train, 1, Silent())
    (row,) = fit.history
    fit.model.eval()
    x = train.images.float() / 255
    loss, accuracy = mean_figures(fit.model(x).detach(), train.labels)
    assert row["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert row["val_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert abs(row["loss"] - row["val_loss"]) > 0.01  # the same pictures and weights


def test_a_model_in_evaluation_mode_is_trained_with_dropout_all_the_same() -> None:
    first, second = a_fit(dropout=0.5), a_fit(dropout=0.5)
    second.model.eval()
    for fit in (first, second):
        loop.fit(fit, some_examples(21), some_examples(5), 2, Silent())
    assert figures_of(first) == figures_of(second)


def test_the_history_has_keras_words() -> None:
    fit = a_fit(lr=0.02)
    loop.fit(fit, some_examples(8), some_examples(5), 2, Silent())
    assert list(fit.history[0]) == [
        "epoch",
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "lr",
        "epoch_seconds",
    ]
    assert [row["epoch"] for row in fit.history] == [1, 2]
    assert {row["lr"] for row in fit.history} == {0.02}
    assert all(row["epoch_seconds"] > 0 for row in fit.history)


def test_an_empty_validation_set() -> None:
    fit = a_fit()
    loop.fit(fit, some_examples(8), some_examples(0), 3, Silent())
    assert list(fit.history[0]) == ["epoch", "loss", "accuracy", "lr", "epoch_seconds"]
    assert (fit.best_epoch, fit.best_loss) == (3, None)
    assert fit.best_weights is not None
    assert all(torch.equal(fit.best_weights[n], w) for n, w in weights_of(fit).items())


def with_losses(patch: pytest.MonkeyPatch, *losses: float) -> None:
    """Lets the epochs end with these validation losses."""
    scripted = iter(losses)
    patch.setattr(loop, "evaluate", lambda *_: Metrics(next(scripted), 0.5))


@pytest.mark.parametrize("losses", [(3, 1, 2, 1), (3, 1), (math.nan, 1, math.nan, 2)])
def test_the_best_epoch_is_that_of_the_lowest_validation_loss(
    monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...]
) -> None:
    second, fit = a_fit(), a_fit()
    loop.fit(second, some_examples(30), some_examples(9), 2, Silent())
    with_losses(monkeypatch, *losses)
    loop.fit(fit, some_examples(30), some_examples(9), len(losses), Silent())
    assert (fit.best_epoch, fit.best_loss) == (2, 1)
    assert fit.best_weights is not None
    for name, weights in second.model.state_dict().items():
        assert torch.equal(fit.best_weights[name], weights)


def test_a_fit_learns() -> None:
    fit = a_fit("by_hand", hidden=16, dropout=0.0)
    loop.fit(fit, some_examples(200), some_examples(50, seed=1), 15, Silent())
    assert fit.history[-1]["val_accuracy"] > 0.8
    assert fit.history[-1]["loss"] < fit.history[0]["loss"] / 2


@pytest.mark.parametrize("restore", [True, False])
def test_early_stopping_stops_the_fit_and_restores(
    monkeypatch: pytest.MonkeyPatch, restore: bool
) -> None:
    second = a_fit()
    loop.fit(second, some_examples(30), some_examples(9), 2, Silent())
    with_losses(monkeypatch, 3, 1, 2, 0)
    fit = a_fit(stopping=EarlyStopping(patience=1, restore_best_weights=restore))
    for _ in range(2):  # a stopped fit stays stopped
        loop.fit(fit, some_examples(30), some_examples(9), 50, Silent())
        assert fit.stopped
        assert [row["val_loss"] for row in fit.history] == [3, 1, 2]
    read = a_fit(stopping=EarlyStopping(patience=1, restore_best_weights=restore))
    read.load_state_dict(fit.state_dict())
    loop.fit(read, some_examples(30), some_examples(9), 50, Silent())  # also when read back
    assert_same(read, fit)
    restored = [
        torch.equal(fit.model.state_dict()[name], weights)
        for name, weights in second.model.state_dict().items()
    ]
    assert all(restored) if restore else not any(restored)


# ---------------------------------------------------------------------------------- evaluation


def test_evaluate_is_the_mean_over_the_examples() -> None:
    fit = a_fit(dropout=0.9)
    examples = some_examples(23)
    got = evaluation.evaluate(fit.model, examples, 255.0)
    fit.model.eval()
    loss, accuracy = mean_figures(
        fit.model(examples.images.float() / 255).detach(), examples.labels
    )
    assert got.loss == pytest.approx(loss, rel=1e-6)
    assert got.accuracy == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_training_mode_as_it_was(training: bool) -> None:
    model = a_fit().model.train(training)
    evaluation.evaluate(model, some_examples(9), 255.0)
    evaluation.probabilities(model, some_examples(9).images, 255.0)
    assert all(module.training is training for module in model.modules())


def test_evaluate_needs_examples() -> None:
    with pytest.raises(ValueError, match="no examples"):
        evaluation.evaluate(a_fit().model, some_examples(0), 255.0)


def test_probabilities_add_up_to_1() -> None:
    fit = a_fit(dropout=0.9)
    examples = some_examples(9)
    probs = evaluation.probabilities(fit.model, examples.images, 255.0)
    assert probs.shape == (9, 4) and probs.device.type == "cpu"
    torch.testing.assert_close(probs.sum(1), torch.ones(9))
    fit.model.eval()
    expected = torch.softmax(fit.model(examples.images.float() / 255), 1)
    torch.testing.assert_close(probs, expected.detach())


def test_scaled_is_the_lessons_quotient_for_every_byte() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    x = evaluation.scaled(images, 255.0, torch.empty(1, 16, 16))
    expected = (np.arange(256, dtype=np.uint8) / 255.0).astype(np.float32)
    assert x.dtype == torch.float32
    assert np.array_equal(x.flatten().numpy(), expected)
    assert torch.equal(evaluation.scaled(images, 1, torch.empty(1, 16, 16)), images.float())
    assert images.flatten()[-1] == 255  # the bytes stay


def test_pictures_have_the_models_dtype_and_stay_as_they_are() -> None:
    fit = a_fit()
    fit.model.double()
    images = torch.rand(3, 2, 3)  # floats, which dividing in place would change
    before, examples = images.clone(), Examples(images, torch.zeros(3, dtype=torch.int64))
    for chunk in loop.chunks(fit, examples, torch.arange(3), 0, 1):
        assert chunk.x.dtype == torch.float64
    assert evaluation.evaluate(fit.model, examples, 255.0).loss > 0
    assert torch.equal(images, before)


# -------------------------------------------------------------------------- nan and infinity


def broken_fit(at: int, bias: list[float], num: int, batch_size: int, epochs: int) -> str:
    """Returns what a fit says whose optimizer sets the logits' bias at its step `at`."""
    seeds.seed_everything(0)
    model = MLP(3, 0, (1, 2), 4)

    def spoil() -> None:
        with torch.no_grad():
            model[-1].bias.copy_(torch.tensor(bias))

    optimizer = CountingOptimizer(at, spoil)
    fit = TrainState(model, optimizer, Autograd(model), EarlyStopping(), 0, batch_size, 1.0)
    with pytest.raises(UserError, match=r"a smaller optimizer\.lr") as caught:
        loop.fit(fit, numbered_examples(num), numbered_examples(0), epochs, Silent())
    return str(caught.value)


HUGE = [3e38, -3e38, -3e38, -3e38]  # finite weights; the loss of classes 1 to 3 is infinite
BAD = {"nan": [float("nan")] * 4, "inf": [float("inf"), 0.0, 0.0, 0.0]}


@settings(deadline=None, max_examples=25)
@given(
    num=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    bias=st.sampled_from(["nan", "inf"]),
    data=st.data(),
)
def test_the_first_bad_step_is_named(
    num: int, batch_size: int, bias: str, data: st.DataObject
) -> None:
    steps = -(-num // batch_size)
    at = data.draw(st.integers(1, 2 * steps))
    said = broken_fit(at, BAD[bias], num, batch_size, epochs=2)
    step = (at - 1) % steps + 1  # of its epoch
    if step == steps or step % 2 == 0:  # the end of a chunk: seen in the weights, at once
        assert f"a weight became nan or infinite by step {at} (epoch {1 + (at > steps)})" in said
    else:
        assert f"the loss became nan or infinite at step {at + 1} (epoch" in said
        assert f"(epoch {1 + (at > steps)})" in said


def test_an_infinite_loss_of_finite_weights_is_named() -> None:
    # After step 5 the loss of the examples of class 1 to 3 is infinite, of class 0 it is 0.
    said = broken_fit(5, HUGE, 40, 4, epochs=1)
    order = seeds.epoch_order(0, 1, 40)
    later = [step for step in range(6, 11) if (order[(step - 1) * 4 : step * 4] % 4).any()]
    assert f"the loss became nan or infinite at step {later[0]} (epoch 1)" in said


def test_the_step_within_a_chunk_is_named_by_its_batch() -> None:
    # One infinite loss, of one example in the middle of a later batch.
    order = seeds.epoch_order(0, 1, 40)
    step = next(s for s in range(1, 11) if order[(s - 1) * 4 : s * 4].eq(17).any())

    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits + torch.where(x.flatten(1)[:, 1:] == 17, torch.nan, 0.0)

    model = Model(3, 0, (1, 2), 4)
    fit = TrainState(model, CountingOptimizer(), Autograd(model), EarlyStopping(), 0, 4, 1.0)
    with pytest.raises(UserError) as caught:
        loop.fit(fit, numbered_examples(40), numbered_examples(0), 1, Silent())
    assert f"at step {step} (epoch 1)" in str(caught.value)


def test_a_fit_that_goes_wrong_tells_its_watcher_nothing_of_it() -> None:
    told = []

    class Watcher(Silent):
        def steps_taken(self, fit: TrainState, num_steps: int) -> None:
            told.append(fit.step)

    model = MLP(3, 0, (1, 2), 4)
    optimizer = CountingOptimizer(5, lambda: nn.init.constant_(model[-1].bias, torch.nan))
    fit = TrainState(model, optimizer, Autograd(model), EarlyStopping(), 0, 4, 1.0)
    with pytest.raises(UserError):
        loop.fit(fit, numbered_examples(40), numbered_examples(0), 1, Watcher())
    assert told == [2, 4]


# ---------------------------------------------------------------------------------- going on

EPOCHS = 4
TRAIN, HELD_OUT = some_examples(40), some_examples(9, seed=1)


class Keeper(Silent):
    """Keeps what a checkpoint would hold at every moment at which one may be written."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[bytes] = []
        self.stands: list[tuple[int, int]] = []

    def keep(self, fit: TrainState) -> None:
        file = io.BytesIO()
        torch.save(fit.state_dict(), file)
        self.files.append(file.getvalue())
        self.stands.append((fit.epoch, fit.step))

    def steps_taken(self, fit: TrainState, num_steps: int) -> None:
        self.keep(fit)

    def epoch_ended(self, fit: TrainState, row: Row) -> None:
        self.keep(fit)


STOPPINGS = {
    "off": EarlyStopping,
    "stops": lambda: EarlyStopping(patience=1),
    "restores": lambda: EarlyStopping(patience=2, restore_best_weights=True),
}


@pytest.fixture(scope="module", params=[(w, s) for w in WAYS for s in STOPPINGS], ids=str)
def whole_fit(
    request: pytest.FixtureRequest,
) -> tuple[Callable[..., TrainState], TrainState, Keeper]:
    """Returns how to make a fit, one that was never interrupted, and its checkpoints."""
    way, stopping = request.param

    def make(weights: int = 5) -> TrainState:
        return a_fit(way, [6, 5], lr=0.1, weights=weights, stopping=STOPPINGS[stopping]())

    fit, keeper = make(), Keeper()
    loop.fit(fit, TRAIN, HELD_OUT, EPOCHS, keeper)
    assert len(set(keeper.stands)) == len(keeper.files) >= 10
    return make, fit, keeper


def resumed(make: Callable[..., TrainState], file: bytes) -> TrainState:
    fit = make(weights=99)
    fit.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    loop.fit(fit, TRAIN, HELD_OUT, EPOCHS, Silent())
    return fit


def test_a_fit_goes_on_from_every_checkpoint_to_the_same_end(
    whole_fit: tuple[Callable[..., TrainState], TrainState, Keeper],
) -> None:
    make, fit, keeper = whole_fit
    for file in keeper.files:
        assert_same(resumed(make, file), fit)


@settings(deadline=None, max_examples=12)
@given(
    num=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.5]),
    way=st.sampled_from(WAYS),
    data=st.data(),
)
def test_fits_of_any_size_go_on_to_the_same_end(
    num: int, batch_size: int, dropout: float, way: str, data: st.DataObject
) -> None:
    def make(weights: int = 5) -> TrainState:
        return a_fit(way, 3, dropout, batch_size=batch_size, weights=weights)

    fit, keeper = make(), Keeper()
    loop.fit(fit, TRAIN[:num], HELD_OUT, 2, keeper)
    again = make(weights=99)
    file = keeper.files[data.draw(st.integers(0, len(keeper.files) - 1))]
    again.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    loop.fit(again, TRAIN[:num], HELD_OUT, 2, Silent())
    assert_same(again, fit)


def test_a_fit_may_be_interrupted_again_and_again(
    whole_fit: tuple[Callable[..., TrainState], TrainState, Keeper],
) -> None:
    make, fit, _ = whole_fit

    class Interrupting(Keeper):
        def keep(self, fit: TrainState) -> None:
            super().keep(fit)
            if len(self.files) == 2:
                raise KeyboardInterrupt

    part, legs = make(), 1
    while True:
        keeper = Interrupting()
        try:
            loop.fit(part, TRAIN, HELD_OUT, EPOCHS, keeper)
            break
        except KeyboardInterrupt:
            legs += 1
            part = make(weights=99)
            part.load_state_dict(torch.load(io.BytesIO(keeper.files[-1]), weights_only=True))
    assert legs > 3
    assert_same(part, fit)


class Signalled(Silent):
    """Asks for an end at a step, as a signal does, and keeps what a checkpoint would hold then."""

    def __init__(self, fit: TrainState, at: int) -> None:
        super().__init__()
        self.file: bytes | None = None
        step, steps = fit.optimizer.step, iter(range(1, 10_000))

        def counted() -> None:
            step()
            if next(steps) == at:
                self.stop.signal = signal.SIGTERM

        fit.optimizer.step = counted  # type: ignore[method-assign]

    def interrupted(self, fit: TrainState) -> None:
        file = io.BytesIO()
        torch.save(fit.state_dict(), file)
        self.file = file.getvalue()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(WAYS), st.integers(1, 29))
def test_a_signal_ends_the_fit_at_its_step_and_it_goes_on_to_the_same_bits(
    way: str, at: int
) -> None:
    whole, part = a_fit(way), a_fit(way)
    loop.fit(whole, TRAIN, HELD_OUT, 3, Silent())
    watcher = Signalled(part, at)
    with pytest.raises(Interrupted):
        loop.fit(part, TRAIN, HELD_OUT, 3, watcher)
    assert watcher.file is not None
    epoch, step = divmod(at, 10)
    if step == 0:  # the last of its epoch: noticed at the next
        step = 1
    assert (part.epoch, part.step) == (epoch + 1, step)
    rest = a_fit(way, weights=99)
    rest.load_state_dict(torch.load(io.BytesIO(watcher.file), weights_only=True))
    loop.fit(rest, TRAIN, HELD_OUT, 3, Silent())
    assert_same(rest, whole)
    assert rest.weight_hashes == whole.weight_hashes


class OwnLoss(MLP):
    """A network with a loss of its own, of each example or the mean of a batch; notes its means."""

    def __init__(self, reduction: str) -> None:
        super().__init__(6, 0.3, (2, 3), 4)
        self.reduction = reduction
        self.minimized: list[tuple[float, int]] = []

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, label_smoothing=0.5, reduction=self.reduction)
        self.minimized.append((loss.detach().mean().item(), len(labels)))
        return loss


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("at", [1, 3, 11, 25])
def test_what_a_model_minimizes_is_its_training_loss_however_it_is_interrupted(
    reduction: str, at: int
) -> None:
    def make() -> TrainState:
        seeds.seed_everything(5)
        model = OwnLoss(reduction)
        optimizer = Adam(model.parameters(), lr=0.02)
        return TrainState(model, optimizer, Autograd(model), EarlyStopping(), 5, 4, 255.0)

    whole, part = make(), make()
    loop.fit(whole, TRAIN[:38], HELD_OUT, 3, Silent())
    assert isinstance(whole.model, OwnLoss)
    for row in whole.history:
        batches = whole.model.minimized[(row["epoch"] - 1) * 10 :][:10]
        assert row["loss"] == pytest.approx(sum(loss * num for loss, num in batches) / 38)
    watcher = Signalled(part, at)
    with pytest.raises(Interrupted):
        loop.fit(part, TRAIN[:38], HELD_OUT, 3, watcher)
    assert watcher.file is not None
    rest = make()
    rest.load_state_dict(torch.load(io.BytesIO(watcher.file), weights_only=True))
    loop.fit(rest, TRAIN[:38], HELD_OUT, 3, Silent())
    assert_same(rest, whole)


def test_the_history_has_the_learning_rate_of_each_epochs_last_step() -> None:
    fit = a_fit(schedule=Step(at=[0.25, 0.5], factor=0.1))
    lr = fit.learning_rate.current
    loop.fit(fit, TRAIN, HELD_OUT, 4, Silent())
    expected = [lr, 0.1 * lr, 0.01 * lr, 0.01 * lr]
    assert [row["lr"] for row in fit.history] == pytest.approx(expected)


def test_a_signal_at_the_last_step_lets_the_fit_end() -> None:
    fit = a_fit()
    watcher = Signalled(fit, 20)
    loop.fit(fit, TRAIN, HELD_OUT, 2, watcher)
    assert len(fit.history) == 2


def test_modules_that_draw_from_torchs_own_generator_go_on_too() -> None:
    def make() -> TrainState:
        seeds.seed_everything(3)
        layers = nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)
        model = nn.Sequential(*layers)
        return TrainState(
            model, Adam(model.parameters()), Autograd(model), EarlyStopping(), 0, 4, 255.0
        )

    whole, part = make(), make()
    torch.manual_seed(7)
    loop.fit(whole, TRAIN, HELD_OUT, 2, Silent())
    torch.manual_seed(7)
    watcher = Signalled(part, 7)
    with pytest.raises(Interrupted):
        loop.fit(part, TRAIN, HELD_OUT, 2, watcher)
    assert watcher.file is not None
    rest = make()
    torch.manual_seed(99)
    rest.load_state_dict(torch.load(io.BytesIO(watcher.file), weights_only=True))
    loop.fit(rest, TRAIN, HELD_OUT, 2, Silent())
    assert_same(rest, whole)


def test_weight_hashes_are_those_of_each_epochs_end() -> None:
    hashes = []

    class Watcher(Silent):
        def epoch_ended(self, fit: TrainState, row: Row) -> None:
            hashes.append(weights_sha256(fit.model.state_dict()))

    fit = a_fit()
    loop.fit(fit, TRAIN, HELD_OUT, 3, Watcher())
    assert fit.weight_hashes == hashes
    assert len(set(hashes)) == 3


@pytest.mark.parametrize("through_file", [False, True])
def test_more_epochs_go_on_from_the_last_weights_not_the_restored_ones(through_file: bool) -> None:
    def make() -> TrainState:
        return a_fit(lr=0.3, stopping=EarlyStopping(restore_best_weights=True))

    whole, part = make(), make()
    loop.fit(whole, TRAIN, HELD_OUT, 6, Silent())
    loop.fit(part, TRAIN, HELD_OUT, 4, Silent())
    assert part.weight_hashes[-1] != weights_sha256(part.model.state_dict())  # it did restore
    if through_file:
        file = io.BytesIO()
        torch.save(part.state_dict(), file)
        file.seek(0)
        part = make()
        part.load_state_dict(torch.load(file, weights_only=True))
    loop.fit(part, TRAIN, HELD_OUT, 6, Silent())
    assert_same(part, whole)
    assert part.weight_hashes == whole.weight_hashes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        {"_target_": "torch.optim.AdamW", "lr": 0.01},
    ],
    ids=lambda node: node["_target_"],
)
def test_a_fit_with_one_of_torchs_optimizers_goes_on_too(node: dict[str, Any], way: str) -> None:
    def make(weights: int = 5) -> TrainState:
        fit = a_fit(way, weights=weights)
        fit.optimizer = optim.build(node, fit.model)
        return fit

    fit, keeper = make(), Keeper()
    loop.fit(fit, TRAIN, HELD_OUT, EPOCHS, keeper)
    for file in keeper.files[2::5]:
        assert_same(resumed(make, file), fit)


@pytest.mark.parametrize("way", WAYS)
def test_more_epochs_go_on_with_the_same_fit(way: str) -> None:
    whole, parts = a_fit(way), a_fit(way)
    loop.fit(whole, TRAIN, HELD_OUT, 3, Silent())
    for epochs in (1, 3, 3):
        loop.fit(parts, TRAIN, HELD_OUT, epochs, Silent())
    assert_same(parts, whole)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_the_same_fit_to_the_bit(way: str) -> None:
    first, second, other = a_fit(way), a_fit(way), a_fit(way, seed=6)
    for fit in (first, second, other):
        loop.fit(fit, TRAIN, HELD_OUT, 2, Silent())
        torch.manual_seed(random.randrange(2**32))
    assert_same(first, second)
    assert figures_of(other) != figures_of(first)


def test_dropout_follows_the_fits_seed_in_every_layer() -> None:
    # Same weights, order and data; only the masks can tell the layers and the seeds apart.
    fit, other = a_fit(hidden=[6, 6]), a_fit(hidden=[6, 6], seed=6)
    drawn = [
        layer.masks.next(torch.empty(99)).clone()
        for f in (fit, other)
        for _, layer in layers.dropouts(f.model)
    ]
    assert len({tuple(mask.tolist()) for mask in drawn}) == 4


@pytest.mark.parametrize("way", WAYS)
def test_a_watcher_cannot_change_the_fit(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Busy(Silent):
        def look(self, fit: TrainState) -> None:
            print(evaluation.evaluate(fit.model, HELD_OUT, 255.0), fit.figures and fit.progress())
            random.random(), np.random.rand(), torch.rand(3)
            torch.manual_seed(0)
            fit.state_dict()

        def epoch_started(self, fit: TrainState, num_steps: int) -> None:
            if fit.step:
                self.look(fit)
            evaluation.probabilities(fit.model, HELD_OUT.images, 255.0)

        def steps_taken(self, fit: TrainState, num_steps: int) -> None:
            self.look(fit)

        def epoch_ended(self, fit: TrainState, row: Row) -> None:
            random.seed(0)
            evaluation.evaluate(fit.model, TRAIN, 255.0)

    watched, unwatched = a_fit(way), a_fit(way)
    loop.fit(watched, TRAIN, HELD_OUT, 3, Busy())
    loop.fit(unwatched, TRAIN, HELD_OUT, 3, Silent())
    assert "Metrics(" in capsys.readouterr().out
    assert_same(watched, unwatched)


def test_the_state_is_plain_and_complete() -> None:
    fit = a_fit("by_hand", stopping=EarlyStopping(patience=3, restore_best_weights=True))
    loop.fit(fit, TRAIN, HELD_OUT, 2, Silent())
    state = fit.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)  # tensors and plain values only
    assert read.keys() == state.keys()
    other = a_fit("by_hand", weights=99, stopping=EarlyStopping(restore_best_weights=True))
    other.load_state_dict(read)
    again = other.state_dict()
    assert again["fit_seconds"] >= read["fit_seconds"]
    assert str({**again, "fit_seconds": 0}) == str({**state, "fit_seconds": 0})


def test_fit_seconds_add_up_over_the_parts() -> None:
    first, second = a_fit(), a_fit()
    loop.fit(first, TRAIN, HELD_OUT, 1, Silent())
    state = {**first.state_dict(), "fit_seconds": 1000.0}
    second.began -= 5000  # what came before a fit, or before it was restored, is no part of it
    second.load_state_dict(state)
    assert 1000 <= second.fit_seconds() < 1100
    second.began -= 5000
    loop.fit(second, TRAIN, HELD_OUT, 2, Silent())
    assert 1000 < second.fit_seconds() < 1100


@pytest.mark.parametrize(("seconds", "looks"), [(0.0, 3), (math.inf, 1)])
def test_losses_of_slow_steps_are_looked_at_by_time(
    seconds: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fashionnet.training.steps._SECONDS_BETWEEN_LOOKS", seconds)
    seen: list[int] = []

    class Looks(loop.Watcher):
        def steps_taken(self, fit: TrainState, num_steps: int) -> None:
            seen.append(fit.step)

    fit = a_fit()
    loop.fit(fit, some_examples(6 * fit.batch_size), HELD_OUT, 1, Looks())
    assert seen == [6] if looks == 1 else seen == [2, 4, 6]


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_during_an_evaluation_ends_the_fit_there_and_it_continues_to_the_same_bits(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Saver(Silent):
        def interrupted(self, fit: TrainState) -> None:
            torch.save(fit.state_dict(), saved)

    whole, saver, saved = a_fit(way), Saver(), io.BytesIO()
    loop.fit(whole, TRAIN, HELD_OUT, 3, Silent())
    cut, evaluations = a_fit(way), []

    def struck(*arguments: Any) -> Metrics:
        evaluations.append(1)
        if len(evaluations) == 2:
            saver.stop.handle(signal.SIGTERM, None)
        return evaluate(*arguments)

    evaluate = evaluation.evaluate
    with monkeypatch.context() as patch, saver.stop.deferred():
        patch.setattr(loop, "evaluate", struck)
        with pytest.raises(Interrupted):
            loop.fit(cut, TRAIN, HELD_OUT, 3, saver)
        saver.stop.signal = None  # acted on
    saved.seek(0)
    again = a_fit(way, weights=99)
    again.load_state_dict(torch.load(saved, weights_only=True))
    assert (again.epoch, len(again.history)) == (2, 1)
    loop.fit(again, TRAIN, HELD_OUT, 3, Silent())
    assert again.weight_hashes == whole.weight_hashes
    figures = [
        [{k: v for k, v in row.items() if k != "epoch_seconds"} for row in fit.history]
        for fit in (again, whole)
    ]
    assert figures[0] == figures[1]


# ---------------------------------------------------------------------------------------- GPU

CUDA = "cuda"
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no CUDA device"
)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("way", WAYS)
def test_on_a_gpu_a_fit_starts_and_goes_as_on_the_cpu(way: str) -> None:
    gpu = torch.device(CUDA)
    there, here = a_fit(way, dropout=0.0, device=CUDA), a_fit(way, dropout=0.0)
    loop.fit(there, TRAIN.to(gpu), HELD_OUT.to(gpu), 3, Silent())
    loop.fit(here, TRAIN, HELD_OUT, 3, Silent())
    for row, other in zip(there.history, here.history, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
    again = a_fit(way, dropout=0.0, device=CUDA)
    loop.fit(again, TRAIN.to(gpu), HELD_OUT.to(gpu), 3, Silent())
    assert again.weight_hashes == there.weight_hashes


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("way", WAYS)
def test_on_a_gpu_a_fit_goes_on_from_every_checkpoint(way: str) -> None:
    gpu = torch.device(CUDA)
    train, held_out = TRAIN.to(gpu), HELD_OUT.to(gpu)
    fit, keeper = a_fit(way, device=CUDA), Keeper()
    loop.fit(fit, train, held_out, 2, keeper)
    for file in keeper.files:
        again = a_fit(way, weights=99, device=CUDA)
        read = torch.load(io.BytesIO(file), weights_only=True, map_location="cpu")
        again.load_state_dict(read)
        loop.fit(again, train, held_out, 2, Silent())
        for name, weights in fit.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], weights)


def test_pictures_that_take_most_of_a_device_stay_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere, held = torch.device("meta"), TRAIN.images.nbytes
    for free, stays in ((2 * held, False), (2 * held - 1, True)):
        monkeypatch.setattr(devices, "free_memory_bytes", lambda device, free=free: free)
        moved = TRAIN.to(elsewhere)
        assert moved.labels.device == elsewhere
        assert moved.images.device == torch.device("cpu" if stays else "meta")
        assert TRAIN.to(torch.device("cpu")).images is TRAIN.images


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("way", WAYS)
def test_pictures_on_the_host_give_the_bits_of_pictures_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    gpu, fits = torch.device(CUDA), []
    for free in (2**40, 0):
        monkeypatch.setattr(devices, "free_memory_bytes", lambda device, free=free: free)
        fits.append(a_fit(way, device=CUDA))
        loop.fit(fits[-1], TRAIN.to(gpu), HELD_OUT.to(gpu), 2, Silent())
    assert_same(*fits)


# ------------------------------------------------------------------------------ schedules, steps

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "constant": lambda: Constant(warmup=0.5),
    "cosine": lambda: Cosine(warmup=0.1),
    "one_cycle": OneCycle,
    "step": Step,
    "plateau": lambda: Plateau("loss", patience=1, factor=0.5, min_delta=10.0, cooldown=1),
    "own": lambda: lambda fraction: 1 - fraction,
}


@pytest.mark.parametrize("at", [1, 10, 15, 29])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_fit_with_a_schedule_goes_on_to_the_same_end(name: str, at: int) -> None:
    def make() -> TrainState:
        return a_fit(schedule=SCHEDULES[name]())

    whole, part, rest = make(), make(), make()
    loop.fit(whole, TRAIN, HELD_OUT, 3, Silent())
    watcher = Signalled(part, at)
    with contextlib.suppress(Interrupted):
        loop.fit(part, TRAIN, HELD_OUT, 3, watcher)
    assert watcher.file is not None
    rest.load_state_dict(torch.load(io.BytesIO(watcher.file), weights_only=True))
    loop.fit(rest, TRAIN, HELD_OUT, 3, Silent())
    assert_same(rest, whole)
    assert len({row["lr"] for row in whole.history}) > 1


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 25])
def test_steps_end_in_a_part_of_an_epoch(steps: int) -> None:
    per_epoch = -(-len(TRAIN) // 4)
    fit = a_fit(schedule=Cosine())
    loop.fit(fit, TRAIN, HELD_OUT, None, Silent(), steps)
    assert [row["epoch"] for row in fit.history] == list(range(1, -(-steps // per_epoch) + 1))
    assert all("val_loss" in row for row in fit.history)
    last = 0.02 * 0.5 * (1 + math.cos(math.pi * (steps - 1) / steps))
    assert fit.history[-1]["lr"] == pytest.approx(last)


def test_steps_of_whole_epochs_are_these_epochs() -> None:
    per_epoch = -(-len(TRAIN) // 4)
    by_epochs, by_steps = a_fit(), a_fit()
    loop.fit(by_epochs, TRAIN, HELD_OUT, 2, Silent())
    loop.fit(by_steps, TRAIN, HELD_OUT, None, Silent(), 2 * per_epoch)
    assert_same(by_steps, by_epochs)


def test_an_interrupted_part_of_an_epoch_goes_on_to_the_same_end() -> None:
    whole, part, rest = a_fit(), a_fit(), a_fit()
    loop.fit(whole, TRAIN, HELD_OUT, None, Silent(), 13)
    watcher = Signalled(part, 11)
    with pytest.raises(Interrupted):
        loop.fit(part, TRAIN, HELD_OUT, None, watcher, 13)
    assert watcher.file is not None
    rest.load_state_dict(torch.load(io.BytesIO(watcher.file), weights_only=True))
    loop.fit(rest, TRAIN, HELD_OUT, None, Silent(), 13)
    assert_same(rest, whole)
