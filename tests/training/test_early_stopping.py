"""Early stopping by scripted figures: when it stops, and whose weights are left."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from fashionnet.errors import UserError
from fashionnet.models.weights import all_finite, snapshot
from fashionnet.training.early_stopping import EarlyStopping, is_better


def a_model() -> nn.Module:
    return nn.Linear(1, 1)


def stopped_at(
    stopping: EarlyStopping, figures: Sequence[float], model: nn.Module | None = None
) -> int | None:
    """Returns the epoch after which training stops; epoch e leaves weights that are all e."""
    model = model or a_model()
    for epoch, figure in enumerate(figures, start=1):
        for parameter in model.parameters():
            nn.init.constant_(parameter, epoch)
        if stopping.stops_after(epoch, {stopping.monitor: figure}, model):
            return epoch
    return None


def weight_of(model: nn.Module) -> float:
    return next(model.parameters()).item()


@pytest.mark.parametrize(
    ("patience", "losses", "epoch"),
    [
        (1, [3, 2, 1, 1.5], 4),
        (2, [3, 2, 2.5, 2.4, 2.3], 4),
        (2, [3, 4, 2, 4, 4, 0], 5),  # an improvement starts the count anew
        (3, [1, 2, 3], None),
        (3, [1, 2, 3, 4], 4),
        (0, [3, 2, 1, 1], 4),
        (1, [2, 2, 2], 2),  # as good is no better
        (0, [5], None),  # never at the first epoch
        (1, [1, float("nan"), 0], 2),
        (2, [1, float("nan"), 0.5, 2, 2], 5),
    ],
)
def test_patience(patience: int, losses: list[float], epoch: int | None) -> None:
    assert stopped_at(EarlyStopping(patience=patience), losses) == epoch


def test_an_improvement_must_be_more_than_min_delta() -> None:
    losses = [1.0, 0.95, 0.9, 0.85, 0.8]
    assert stopped_at(EarlyStopping(patience=2, min_delta=0.0), losses) is None
    # Smaller steps count once they add up to more than min_delta below the best.
    assert stopped_at(EarlyStopping(patience=2, min_delta=0.125), losses) == 3
    assert stopped_at(EarlyStopping(patience=3, min_delta=0.125), losses) is None
    assert stopped_at(EarlyStopping(patience=1, min_delta=0.5), [1.0, 0.5]) == 2


def test_min_delta_may_be_given_with_either_sign() -> None:
    losses = [1.0, 0.95, 0.9]
    assert stopped_at(EarlyStopping(patience=2, min_delta=-0.125), losses) == 3


@pytest.mark.parametrize("monitor", ["accuracy", "val_accuracy"])
def test_accuracies_improve_upwards(monitor: str) -> None:
    assert stopped_at(EarlyStopping(monitor, patience=1), [0.5, 0.6, 0.7]) is None
    assert stopped_at(EarlyStopping(monitor, patience=1), [0.7, 0.6]) == 2
    stopping = EarlyStopping(monitor, patience=1, min_delta=0.25)
    assert stopped_at(stopping, [0.25, 0.375]) == 2


@pytest.mark.parametrize("monitor", ["loss", "val_loss"])
def test_losses_improve_downwards(monitor: str) -> None:
    assert stopped_at(EarlyStopping(monitor, patience=1), [0.7, 0.6, 0.5]) is None
    assert stopped_at(EarlyStopping(monitor, patience=1), [0.5, 0.6]) == 2


@given(
    losses=st.lists(st.integers(0, 6).map(float), min_size=1, max_size=15),
    patience=st.integers(0, 4),
    min_delta=st.integers(0, 2).map(float),
)
def test_stops_at_the_first_epoch_that_patience_does_not_cover(
    losses: list[float], patience: int, min_delta: float
) -> None:
    best, best_epoch, expected = losses[0], 1, None
    for epoch, loss in enumerate(losses[1:], start=2):
        if loss < best - min_delta:
            best, best_epoch = loss, epoch
        elif epoch - best_epoch >= patience:
            expected = epoch
            break
    assert stopped_at(EarlyStopping(patience=patience, min_delta=min_delta), losses) == expected


def test_mode_overrules_the_monitors_name() -> None:
    assert stopped_at(EarlyStopping("val_loss", patience=1, mode="max"), [1, 2, 3]) is None
    assert stopped_at(EarlyStopping("val_accuracy", patience=1, mode="min"), [0.5, 0.6]) == 2


def test_what_does_not_beat_the_baseline_counts_against_patience() -> None:
    losses = [5, 4, 3, 2, 1]
    assert stopped_at(EarlyStopping(patience=2, baseline=1.5), [*losses, 1, 1]) == 7
    # Keras stops at an epoch that does not improve; the count has grown before it all the same.
    assert stopped_at(EarlyStopping(patience=2, baseline=0.5), [5, 4, 4]) == 3
    assert stopped_at(EarlyStopping(patience=2), [5, 4, 4]) is None


def test_epochs_before_the_start_are_not_looked_at() -> None:
    stopping, model = (
        EarlyStopping(patience=1, start_from_epoch=3, restore_best_weights=True),
        a_model(),
    )
    assert stopped_at(stopping, [1, 2, 3, 9, 8, 8], model) == 6
    assert stopping.restore(model)
    assert weight_of(model) == 5  # not epoch 1, which came before the start


def test_off_by_default() -> None:
    stopping, model = EarlyStopping(), a_model()
    assert stopped_at(stopping, [1, 2, 3, 4, 5, 6], model) is None
    assert not stopping.restore(model)
    assert weight_of(model) == 6
    assert stopping.stops_after(7, {}, model) is False  # off, it monitors nothing


def test_restore_puts_the_best_epoch_back_after_a_stop() -> None:
    stopping, model = EarlyStopping(patience=2, restore_best_weights=True), a_model()
    assert stopped_at(stopping, [3, 1, 2, 2], model) == 4
    assert stopping.restore(model)
    assert weight_of(model) == 2


def test_restore_puts_the_best_epoch_back_where_training_ran_to_its_end() -> None:
    stopping, model = EarlyStopping(patience=9, restore_best_weights=True), a_model()
    assert stopped_at(stopping, [3, 1, 2], model) is None
    assert stopping.restore(model)
    assert weight_of(model) == 2


def test_restore_works_without_stopping() -> None:
    stopping, model = EarlyStopping(restore_best_weights=True), a_model()
    assert stopped_at(stopping, [3, 1, 2, 2, 2, 2], model) is None
    assert stopping.restore(model)
    assert weight_of(model) == 2


def test_weights_stay_as_they_are_unless_restoring_is_asked_for() -> None:
    stopping, model = EarlyStopping(patience=1), a_model()
    assert stopped_at(stopping, [1, 2], model) == 2
    assert not stopping.restore(model)
    assert weight_of(model) == 2


@pytest.mark.parametrize("how", [{"patience": 3}, {"restore_best_weights": True}])
def test_a_monitor_that_is_not_measured_is_an_error(how: dict[str, int]) -> None:
    stopping = EarlyStopping("val_loss", **how)
    with pytest.raises(UserError, match=r"early_stopping\.monitor=val_loss .* loss, accuracy"):
        stopping.stops_after(1, {"loss": 1.0, "accuracy": 0.5}, a_model())


@given(losses=st.lists(st.integers(0, 4).map(float), min_size=2, max_size=10), data=st.data())
def test_state_goes_on_where_it_was(losses: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(losses) - 1))
    whole = EarlyStopping(patience=2, restore_best_weights=True)
    expected = stopped_at(whole, losses)
    first = EarlyStopping(patience=2, restore_best_weights=True)
    early = stopped_at(first, losses[:cut])
    if early is not None:
        assert early == expected
        return
    second = EarlyStopping(patience=2, restore_best_weights=True)
    second.load_state_dict(first.state_dict())
    model, stopped = a_model(), None
    for epoch, loss in enumerate(losses[cut:], start=cut + 1):
        for parameter in model.parameters():
            nn.init.constant_(parameter, epoch)
        if second.stops_after(epoch, {"val_loss": loss}, model):
            stopped = epoch
            break
    assert stopped == expected
    best = a_model()
    assert second.restore(model) and whole.restore(best)
    assert weight_of(model) == weight_of(best)


def test_snapshot_does_not_follow_later_steps() -> None:
    model = a_model()
    nn.init.constant_(model.weight, 1)
    taken = snapshot(model)
    nn.init.constant_(model.weight, 2)
    assert taken["weight"].item() == 1
    assert not taken["weight"].requires_grad


def test_is_better() -> None:
    assert is_better(1.0, None) and is_better(1.0, 2.0)
    assert not is_better(2.0, 2.0) and not is_better(3.0, 2.0)
    assert not is_better(float("nan"), None) and not is_better(float("nan"), 2.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_all_finite(value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert all_finite(model)
    with torch.no_grad():
        model[1].bias[1] = value
    assert not all_finite(model)
