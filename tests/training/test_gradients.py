"""Gradients by hand against autograd, and the models that each way takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fashionnet.data.examples import Examples
from fashionnet.errors import UserError
from fashionnet.models.layers import Dropout, start_streams
from fashionnet.models.mlp import MLP
from fashionnet.models.transfer import Transfer
from fashionnet.system import seeds
from fashionnet.training import gradients, loop, state
from fashionnet.training.by_hand import ByHand
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.gradients import Autograd
from fashionnet.training.optim import Adam

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def an_mlp(
    hidden: int | list[int], dropout: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> MLP:
    """Returns a small MLP whose every ReLU cuts something; pictures (2, 3), four classes."""
    seeds.seed_everything(seed)
    model = MLP(hidden, dropout, (2, 3), 4)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, std=0.3)
    start_streams(model, seed, 32)
    return model.to(dtype)


def a_batch(num: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num)
    pictures = torch.randn(num, 2, 3, generator=generator, dtype=torch.float64)
    return pictures.to(dtype), torch.randint(0, 4, (num,), generator=generator)


def by(way: type[Autograd] | type[ByHand], model: nn.Module, *sizes: int) -> list[list[Tensor]]:
    """Returns logits and gradients of a batch of each of `sizes`, taken one after the other."""
    dtype = next(model.parameters()).dtype
    compute = way(model)
    taken = []
    for size in sizes:
        with compute.mode():
            logits = compute(*a_batch(size, dtype)).clone()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        taken.append([logits, *grads])
    return taken


# ------------------------------------------------------------------------ by hand = autograd


@settings(deadline=None, max_examples=25)
@given(
    hidden=st.integers(1, 9) | st.lists(st.integers(1, 9), max_size=4),
    dropout=st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.9]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_by_hand_equals_autograd(hidden: int | list[int], dropout: float, sizes: list[int]) -> None:
    expected = by(Autograd, an_mlp(hidden, dropout), *sizes)
    taken = by(ByHand, an_mlp(hidden, dropout), *sizes)
    for mine, theirs in zip(taken, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("error")  # of buffers that do not fit their batch
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("hidden", [16, [16, 8]])
def test_by_hand_equals_autograd_in_float32(hidden: int | list[int], dropout: float) -> None:
    sizes = (32, 32, 13, 32)
    expected = by(Autograd, an_mlp(hidden, dropout, torch.float32), *sizes)
    taken = by(ByHand, an_mlp(hidden, dropout, torch.float32), *sizes)
    for mine, theirs in zip(taken, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_by_hand_without_a_seed_drops_out_at_all() -> None:
    # The comparisons above would also hold if neither way dropped anything out.
    for way in (Autograd, ByHand):
        first, second = by(way, an_mlp(16, 0.5), 8, 8)  # type: ignore[arg-type]
        assert not torch.equal(first[0], second[0])


def test_gradients_are_those_of_the_mean_over_the_batch() -> None:
    model = an_mlp(5, 0.0)
    x, labels = a_batch(3)
    F.cross_entropy(model(x), labels, reduction="sum").div(3).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for way in (Autograd, ByHand):
        _, *grads = by(way, an_mlp(5, 0.0), 3)[0]  # type: ignore[arg-type]
        torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def test_gradients_do_not_add_up() -> None:
    for way in (Autograd, ByHand):
        first, second = by(way, an_mlp(5, 0.0), 3, 3)  # type: ignore[arg-type]
        assert all(map(torch.equal, first, second))


def test_a_dropout_that_drops_nothing_is_the_same_by_hand() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), Dropout(0.0), nn.Linear(5, 4)
    ).double()
    expected = by(Autograd, copy.deepcopy(model), 4)[0]
    for mine, theirs in zip(by(ByHand, model, 4)[0], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_autograd_gives_unused_parameters_no_gradient() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.used(x.flatten(1)))

    model = Half().double()
    logits = Autograd(model)(*a_batch(3))
    assert not logits.requires_grad
    assert model.used.weight.grad is not None
    assert model.unused.weight.grad is None
    assert model.frozen.weight.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("hidden", [7, [7, 5]])
def test_a_whole_fit_ends_with_the_same_weights(hidden: int | list[int], dropout: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (130, 2, 3), dtype=torch.uint8, generator=generator)
    examples = Examples(pictures, torch.randint(0, 4, (130,), generator=generator))
    ended = []
    for choice in ("autograd", "by_hand"):
        model = an_mlp(hidden, dropout)
        compute = gradients.choose(choice, model)
        optimizer = Adam(model.parameters(), lr=0.01)
        fit = state.TrainState(model, optimizer, compute, EarlyStopping(), 0, 8, 255.0)
        loop.fit(fit, examples[:100], examples[100:], 5, loop.Watcher())
        ended.append((model.state_dict(), fit.history))
    (autograd, rows), (by_hand, rows_by_hand) = ended
    start = an_mlp(hidden, dropout).state_dict()
    for name, weights in autograd.items():
        torch.testing.assert_close(by_hand[name], weights, rtol=0, atol=1e-10)
        assert (weights - start[name]).abs().max() > 0.01
    for row, row_by_hand in zip(rows, rows_by_hand, strict=True):
        assert row_by_hand["val_loss"] == pytest.approx(row["val_loss"], abs=1e-10)
        assert row_by_hand["loss"] == pytest.approx(row["loss"], abs=1e-10)


# ------------------------------------------------------------------------- which model, which way


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Twice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _stack(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


def _lesson() -> MLP:
    return MLP(5, 0.2, (2, 3), 4)


def _altered(change: Callable[[MLP], Any]) -> nn.Module:
    model = _lesson()
    change(model)
    return model


def _shared(kind: str) -> nn.Module:
    a, b, relu, drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(), Dropout(0.5)
    if kind == "linear":
        return _stack(a, relu, b, nn.ReLU(), a)
    if kind == "linear twice in a row":
        return _stack(a, relu, a)
    b.weight = a.weight
    return _stack(a, relu, drop, b)


def _own_forward(model: MLP) -> None:
    model.forward = lambda x: nn.Sequential.forward(model, x) * 2  # type: ignore[method-assign]


UNSUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "a frozen weight": lambda: _altered(lambda m: m[1].weight.requires_grad_(False)),
    "a forward hook": lambda: _altered(lambda m: m[1].register_forward_hook(lambda *_: None)),
    "a forward pre-hook": lambda: _altered(
        lambda m: m[1].register_forward_pre_hook(lambda *_: None)
    ),
    "a backward hook": lambda: _altered(
        lambda m: m[1].register_full_backward_hook(lambda *_: None)
    ),
    "a backward pre-hook": lambda: _altered(
        lambda m: m[1].register_full_backward_pre_hook(lambda *_: None)
    ),
    "a hook on the whole": lambda: _altered(lambda m: m.register_forward_hook(lambda *_: None)),
    "a hook on a weight": lambda: _altered(lambda m: m[1].weight.register_hook(lambda g: g * 2)),
    "a parametrised weight": lambda: _altered(lambda m: parametrizations.weight_norm(m[1])),
    "a forward of its own": _Twice,
    "a forward set on it": lambda: _altered(_own_forward),
    "a subclass of Linear": lambda: _stack(_Linear(6, 4)),
    "no bias": lambda: _stack(nn.Linear(6, 4, bias=False)),
    "a trailing ReLU": lambda: _stack(nn.Linear(6, 4), nn.ReLU()),
    "a trailing Dropout": lambda: _stack(nn.Linear(6, 4), nn.ReLU(), Dropout(0.2)),
    "no ReLU between": lambda: _stack(nn.Linear(6, 5), nn.Linear(5, 4)),
    "another activation": lambda: _stack(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
    "torch's Dropout": lambda: _stack(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 4)),
    "Dropout before ReLU": lambda: _stack(
        nn.Linear(6, 5), Dropout(0.2), nn.ReLU(), nn.Linear(5, 4)
    ),
    "two Dropouts": lambda: _stack(
        nn.Linear(6, 5), nn.ReLU(), Dropout(0.2), Dropout(0.2), nn.Linear(5, 4)
    ),
    "a layer used twice": lambda: _shared("linear"),
    "a layer used twice in a row": lambda: _shared("linear twice in a row"),
    "a weight used twice": lambda: _shared("weight"),
    "no Flatten": lambda: nn.Sequential(nn.Linear(6, 4)),
    "another Flatten": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(6, 4)),
    "Flatten alone": lambda: nn.Sequential(nn.Flatten()),
    "nothing": nn.Sequential,
    "no Sequential": lambda: nn.Linear(6, 4),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_by_hand_refuses_other_models(name: str) -> None:
    model = UNSUPPORTED[name]()
    assert not ByHand.supports(model)
    with pytest.raises(UserError, match=r"gradients=by_hand .* gradients=autograd"):
        gradients.choose("by_hand", model)
    assert type(gradients.choose("auto", model)) is Autograd
    assert type(gradients.choose("autograd", model)) is Autograd


SUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "the lesson's": _lesson,
    "no dropout": lambda: MLP(5, 0.0, (2, 3), 4),
    "several layers": lambda: MLP([5, 6, 7], 0.2, (2, 3), 4),
    "no hidden layer": lambda: _stack(nn.Linear(6, 4)),
    "a ReLU used twice": lambda: _stack(
        nn.Linear(6, 6), relu := nn.ReLU(), nn.Linear(6, 6), relu, nn.Linear(6, 4)
    ),
    "a Dropout used twice": lambda: _stack(
        nn.Linear(6, 6),
        nn.ReLU(),
        drop := Dropout(0.5),
        nn.Linear(6, 6),
        nn.ReLU(),
        drop,
        nn.Linear(6, 4),
    ),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_by_hand_takes_plain_stacks(name: str) -> None:
    model = SUPPORTED[name]().double()
    assert type(gradients.choose("auto", model)) is ByHand
    assert type(gradients.choose("by_hand", model)) is ByHand
    assert type(gradients.choose("autograd", model)) is Autograd
    start_streams(model, 0, 32)
    expected = by(Autograd, model, 4)[0]
    start_streams(model, 0, 32)
    for mine, theirs in zip(by(ByHand, model, 4)[0], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_models_own_loss_is_minimized_and_noted(reduction: str) -> None:
    class Own(nn.Linear):
        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            loss = F.cross_entropy(logits, labels, label_smoothing=0.5, reduction=reduction)
            return loss

    model, x, labels = Own(6, 4), torch.randn(5, 6), torch.arange(5) % 4
    compute = Autograd(model)
    logits = compute(x, labels)
    losses = F.cross_entropy(model(x), labels, label_smoothing=0.5, reduction="none")
    assert compute.losses is not None and compute.losses.shape == (5,)
    torch.testing.assert_close(
        compute.losses,
        losses.detach() if reduction == "none" else losses.detach().mean().expand(5),
    )
    expected = torch.autograd.grad(losses.mean(), [model.weight])[0]
    torch.testing.assert_close(model.weight.grad, expected)
    assert logits.shape == (5, 4)


def test_buffers_are_sent_only_where_training_changes_them() -> None:
    def network(**keys: Any) -> nn.Module:
        return Transfer(input_shape=(3, 32, 32), num_classes=4, **keys)

    changes = gradients._changes_buffers
    assert changes(network(trained="scratch"))
    assert not changes(network(trained="all", batch_norm="frozen"))
    assert not changes(an_mlp(3, 0.5))
    model = an_mlp(3, 0.5)
    model.register_buffer("seen", torch.zeros(1))  # of a user's own model
    assert changes(model)
