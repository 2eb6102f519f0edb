"""The lesson's network: shapes, initial weights, and dropout's own stream of random bits."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from fashionnet import models
from fashionnet.errors import UserError
from fashionnet.models import layers
from fashionnet.models.layers import Dropout
from fashionnet.models.mlp import MLP
from fashionnet.models.weights import num_parameters
from fashionnet.system import seeds
from fashionnet.training.by_hand import ByHand

CPU = torch.device("cpu")
BATCH = 10
NODE = {"_target_": "fashionnet.models.mlp.MLP", "hidden": 4, "dropout": 0.5}


pytestmark = pytest.mark.usefixtures("one_thread")


def started(rate: float, seed: int = 0, name: str = "a") -> Dropout:
    """Returns a Dropout with a stream of its own."""
    layer = Dropout(rate)
    layer.masks.start(seed, name, BATCH)
    return layer


def mask(layer: Dropout, epoch: int, step: int, num: int = BATCH, width: int = 5) -> Tensor:
    """Returns a copy of the mask that a fit draws at this step."""
    layer.masks.at(epoch, step)
    return layer.masks.next(torch.empty(num, width)).clone()


def masks(layer: Dropout, num: int = 3) -> Tensor:
    """Returns the masks of the first epoch's first steps."""
    return torch.stack([mask(layer, 1, step) for step in range(num)])


# --------------------------------------------------------------------------------- network


def test_the_lessons_network() -> None:
    model = MLP()
    assert num_parameters(model) == 101_770
    assert [type(layer) for layer in model] == [
        nn.Flatten,
        nn.Linear,
        nn.ReLU,
        Dropout,
        nn.Linear,
    ]
    assert model[3].rate == 0.2


def test_models_return_logits() -> None:
    logits = MLP(dropout=0.0)(torch.randn(7, 28, 28) * 9)
    assert logits.shape == (7, 10)
    assert not torch.allclose(logits.sum(1), torch.ones(7), atol=1e-3)
    assert (logits < 0).any()


def test_a_list_of_widths() -> None:
    model = MLP([6, 5], 0.5, input_shape=(2, 3), num_classes=4)
    widths = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert widths == [(6, 6), (6, 5), (5, 4)]
    assert [name for name, _ in layers.dropouts(model)] == ["3", "6"]
    assert model(torch.zeros(1, 2, 3)).shape == (1, 4)


def test_no_dropout_leaves_the_layer_out() -> None:
    assert not list(layers.dropouts(MLP(dropout=0)))
    assert num_parameters(MLP(dropout=0)) == 101_770


@pytest.mark.parametrize("hidden", [0, -1, [128, 0], [128, "64"], "128", [12.5], 12.5, True, None])
def test_widths_are_checked(hidden: Any) -> None:
    with pytest.raises(UserError, match=r"model\.hidden=.* must be a width of 1 or more"):
        MLP(hidden)


@pytest.mark.parametrize(
    "hidden", [10**6, 10**12, 10**400, [20_000, 20_000], [1] * 300, 2**63, [4, 10**5000]]
)
def test_a_network_too_large_to_train_is_refused_before_it_is_made(hidden: Any) -> None:
    # On the meta device nothing is allocated where the check is missing.
    with torch.device("meta"), pytest.raises(UserError, match=r"^model\.hidden=.* parameters"):
        MLP(hidden)


@pytest.mark.parametrize("dropout", [-0.1, 1, 2, math.nan, "0.2", True, None])
def test_dropout_is_checked(dropout: Any) -> None:
    with pytest.raises(UserError, match=r"model\.dropout="):
        MLP(dropout=dropout)


def test_initial_weights_are_those_of_keras() -> None:
    seeds.seed_everything(0)
    layer = layers.dense(300, 200)
    limit = math.sqrt(6 / 500)
    weights = layer.weight.detach()
    assert weights.shape == (200, 300)
    assert not layer.bias.any()
    assert weights.abs().max() <= limit
    # Uniform: the share below any threshold is the threshold's (60,000 draws, five sigma).
    for share in (0.1, 0.5, 0.9):
        below = (weights < limit * (2 * share - 1)).double().mean().item()
        assert below == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 60_000))


# ----------------------------------------------------------------------------------- build


def test_build_depends_on_the_seed_alone() -> None:
    first = models.build(NODE, (2, 3), 4, seed=3)
    random.random(), np.random.rand(), torch.rand(5)
    torch.manual_seed(99)
    again = models.build(NODE, (2, 3), 4, seed=3)
    assert again(torch.zeros(5, 2, 3)).shape == (5, 4)
    other = models.build(NODE, (2, 3), 4, seed=4)
    for name, weights in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], weights)
    assert not torch.equal(other.state_dict()["1.weight"], first.state_dict()["1.weight"])


def test_build_refuses_what_is_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "fashionnet.training.metrics.Metrics"
    monkeypatch.setenv("FASHIONNET_ALLOW", target)
    with pytest.raises(
        UserError, match=r"model\._target_=fashionnet\.training\.metrics\.Metrics built a"
    ):
        models.build({"_target_": target, "loss": 1.0, "accuracy": 1.0}, (2, 3), 4, seed=0)


# --------------------------------------------------------------------------------- dropout


@settings(deadline=None, max_examples=50)
@given(
    rate=st.floats(0, 0.999),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_masks_hold_zero_or_the_scale(rate: float, dtype: torch.dtype, shape: list[int]) -> None:
    mask = started(rate).masks.next(torch.empty(shape, dtype=dtype))
    scale = torch.tensor(1 / (1 - rate), dtype=torch.float64).to(dtype)
    assert mask.shape == tuple(shape)
    assert mask.dtype == dtype
    assert ((mask == 0) | (mask == scale)).all()


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.9])
def test_the_share_of_zeros_is_the_rate(rate: float) -> None:
    mask = started(rate).masks.next(torch.empty(200_000))
    sigma = math.sqrt(rate * (1 - rate) / len(mask))
    assert (mask == 0).double().mean().item() == pytest.approx(rate, abs=5 * sigma)


@pytest.mark.parametrize("rate", [0, 0.0, 1e-12, 2**-33])
def test_a_rate_of_nothing_keeps_everything(rate: float) -> None:
    layer, x = started(rate), torch.randn(1000)
    assert torch.equal(layer(x), x)
    assert torch.equal(layer.masks.next(x), torch.ones(1000))


def test_a_rate_of_almost_everything_keeps_almost_nothing() -> None:
    assert not started(1 - 1e-12).masks.next(torch.empty(1000)).any()


def test_off_in_evaluation() -> None:
    layer, x = started(0.5), torch.randn(100)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(masks(layer), masks(started(0.5)))  # and it drew nothing
    assert not torch.equal(layer.train()(x), x)


def test_gradients_go_through_the_mask() -> None:
    layer, x = started(0.5), torch.ones(100, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())


def test_every_batch_has_a_fresh_mask() -> None:
    drawn = masks(started(0.5), num=200)
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == 200


def test_where_integers_cannot_be_drawn_masks_come_from_floats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object, **__: object) -> Tensor:
        raise RuntimeError("random_ from the lowest int64 is not supported")  # MPS, to torch 2.11

    monkeypatch.setattr(torch.Tensor, "random_", refused)
    monkeypatch.setitem(layers._DRAWS, "cpu", layers._DRAWS["mps"])
    for rate in (0.0, 0.2, 0.9):
        mask = started(rate).masks.next(torch.empty(100_000))
        assert mask.unique().tolist() in ([0, torch.tensor(1 / (1 - rate)).item()], [1])
        assert mask.ne(0).float().mean().item() == pytest.approx(1 - rate, abs=0.005)
    layer, again = started(0.5), started(0.5)
    first = masks(layer)
    assert torch.equal(masks(again), first)
    layer.masks.start(0, "another", BATCH)
    assert not torch.equal(masks(layer), first)


def test_masks_depend_on_the_seed_and_the_layer_alone() -> None:
    expected = masks(started(0.5))
    layer = started(0.5)
    drawn = []
    for step in range(3):
        random.random(), np.random.rand(), torch.rand(5)
        torch.manual_seed(99)
        mask(started(0.5), 1, step, 7)
        drawn.append(mask(layer, 1, step))
    assert torch.equal(torch.stack(drawn), expected)
    assert not torch.equal(masks(started(0.5, seed=1)), expected)
    assert not torch.equal(masks(started(0.5, name="b")), expected)


def test_two_layers_have_their_own_masks() -> None:
    model = MLP([50, 50], 0.5, (2, 3), 4)
    layers.start_streams(model, 0, BATCH)
    first, second = (masks(layer) for _, layer in layers.dropouts(model))
    assert not torch.equal(first, second)
    layers.start_streams(model, 0, BATCH)
    again, _ = (masks(layer) for _, layer in layers.dropouts(model))
    assert torch.equal(again, first)


def test_masks_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    masks(started(0.5))
    assert torch.equal(torch.rand(3), expected)


def test_outside_a_run_masks_follow_torchs_seed() -> None:
    def drawn(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        first, second = Dropout(0.5), Dropout(0.5)
        return masks(first), masks(second)

    first, second = drawn(1)
    assert not torch.equal(first, second)
    assert torch.equal(drawn(1)[0], first)
    assert torch.equal(drawn(1)[1], second)
    assert not torch.equal(drawn(2)[0], first)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_mask_is_a_function_of_its_epoch_and_step(data: st.DataObject) -> None:
    """Steps in any order, of full and short batches, give what a fit from the start gives."""
    num_steps, short = data.draw(st.integers(1, 150)), data.draw(st.integers(1, BATCH))
    steps = [(epoch, step) for epoch in (1, 2, 3) for step in range(num_steps)]

    def size(step: int) -> int:
        return short if step == num_steps - 1 else BATCH

    layer = started(0.5)
    expected = {at: mask(layer, *at, size(at[1])) for at in steps}
    jumping = started(0.5)
    for at in data.draw(st.lists(st.sampled_from(steps), max_size=10)):
        assert torch.equal(mask(jumping, *at, size(at[1])), expected[at])
    # A short batch takes the first rows of the full one's mask.
    last = (3, num_steps - 1)
    assert torch.equal(mask(started(0.5), *last)[:short], expected[last])


def test_steps_epochs_and_calls_within_a_step_have_different_masks() -> None:
    layer, x = started(0.5), torch.empty(BATCH, 30)
    drawn = []
    for epoch in (1, 2):
        for step in (0, 1, 63, 64, 65):
            layer.masks.at(epoch, step)
            drawn += [layer.masks.next(x).clone() for _ in range(3)]  # a layer used three times
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == len(drawn) == 30


def test_a_layer_used_twice_or_on_more_rows_than_a_batch_gets_the_same_again() -> None:
    drawn = []
    for _ in range(2):
        layer = started(0.5)
        layer.masks.at(2, 7)
        drawn.append([layer.masks.next(torch.empty(n, 3)).clone() for n in (2 * BATCH, 4, BATCH)])
    for first, second in zip(*drawn, strict=True):
        assert torch.equal(first, second)


def test_masks_that_autograd_still_needs_are_not_written_over() -> None:
    # Outside a fit no step is announced, so every call has memory of its own.
    for layer in (started(0.5), Dropout(0.5)):
        x = torch.ones(BATCH, 3, requires_grad=True)
        outputs = [layer(x) for _ in range(130)]
        torch.stack(outputs).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.stack(outputs).sum(0).detach())


def test_masks_in_inference_mode_are_the_same() -> None:
    expected = masks(started(0.5), num=200)
    with torch.inference_mode():
        taken = masks(started(0.5), num=200)
    assert torch.equal(taken, expected)


def test_after_gradients_by_hand_autograd_still_works() -> None:
    # By hand runs in inference mode; masks drawn there must not be inference tensors.
    model = MLP(5, 0.5, (2, 3), 4)
    layers.start_streams(model, 0, BATCH)
    by_hand = ByHand(model)
    with by_hand.mode():
        by_hand(torch.randn(2, 2, 3), torch.tensor([0, 1]))
    model(torch.randn(2, 2, 3)).sum().backward()
