"""Loss and accuracy against the plain formula, however the examples are split into batches."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from fashionnet.training.metrics import ExampleMetrics, Metrics

WEIGHTS = torch.empty(0)


pytestmark = pytest.mark.usefixtures("one_thread")


def batch(num: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns logits (num, 4) and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, 4, generator=generator, dtype=dtype) * 3
    return logits, torch.randint(0, 4, (num,), generator=generator)


def figures(logits: Tensor, labels: Tensor, *cuts: int) -> ExampleMetrics:
    """Returns the figures of examples that are entered in parts, cut at these positions."""
    found = ExampleMetrics(len(labels), logits)
    for start, stop in pairwise(sorted({0, len(labels), *cuts})):
        found.put(slice(start, stop), logits[start:stop], labels[start:stop])
    return found


def naive(logits: Tensor, labels: Tensor) -> Metrics:
    """Cross-entropy and accuracy, one example at a time, in Python's float64."""
    loss, correct = 0.0, 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        highest = max(row)
        loss += highest + math.log(sum(math.exp(z - highest) for z in row)) - row[label]
        correct += row.index(highest) == label
    return Metrics(loss / len(labels), correct / len(labels))


def test_means_are_those_of_the_plain_formula() -> None:
    logits, labels = batch(101, dtype=torch.float64)
    found, expected = figures(logits, labels).mean(), naive(logits, labels)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.accuracy == expected.accuracy


def test_a_short_batch_counts_less() -> None:
    logits = torch.tensor([[0.0, 9.0]] * 3 + [[9.0, 0.0]])
    found = figures(logits, torch.ones(4, dtype=torch.int64), 3).mean()
    assert found.accuracy == 0.75
    assert found.loss == pytest.approx(9 / 4, rel=1e-3)


@settings(deadline=None)
@given(
    num=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_batches_change_no_more_than_the_losses_themselves(
    num: int, cuts: list[int], dtype: torch.dtype
) -> None:
    logits, labels = batch(num, dtype=dtype)
    whole, parts = figures(logits, labels), figures(logits, labels, *[c for c in cuts if c < num])
    torch.testing.assert_close(parts.losses(0, num), whole.losses(0, num))
    assert parts.mean().accuracy == whole.mean().accuracy
    if torch.equal(parts.losses(0, num), whole.losses(0, num)):
        assert parts.mean() == whole.mean()


def test_the_mean_is_summed_in_float64() -> None:
    # Losses from 1e-8 to 1e8: a float32 sum would drop most of them.
    losses = torch.logspace(-8, 8, 20_000)
    found = ExampleMetrics(20_000, WEIGHTS)
    found.put(slice(None), torch.zeros(20_000, 2), torch.zeros(20_000, dtype=torch.int64), losses)
    exact = float(sum(map(Fraction, losses.tolist())) / 20_000)
    assert found.mean().loss == pytest.approx(exact, rel=1e-15)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_mean_does_not_depend_on_the_threads(threads: int) -> None:
    logits, labels = batch(60_000)
    before = torch.get_num_threads()
    found = figures(logits, labels)
    expected = found.mean()
    torch.set_num_threads(threads)
    try:
        assert found.mean() == expected
    finally:
        torch.set_num_threads(before)


def test_an_infinite_loss_is_read_as_such() -> None:
    logits = torch.tensor([[0.0, math.inf], [0.0, 1.0]]).neg()
    assert figures(logits, torch.tensor([1, 0])).mean().loss == math.inf


def test_losses_of_a_models_own_are_kept_in_their_place() -> None:
    logits, labels = batch(4)
    found = ExampleMetrics(4, WEIGHTS)
    found.put(torch.tensor([2, 0]), logits[[2, 0]], labels[[2, 0]], torch.tensor([7.0, 5.0]))
    assert found.losses(0, 4).tolist() == [5, 0, 7, 0]


def test_the_first_positions_alone_are_read_and_restored() -> None:
    logits, labels = batch(10)
    whole = figures(logits, labels)
    resumed = ExampleMetrics(10, WEIGHTS)
    resumed.restore(whole.first(6))
    assert resumed.mean(6) == whole.mean(6) != whole.mean()
    resumed.put(slice(6, 10), logits[6:], labels[6:])
    assert resumed.mean() == figures(logits, labels, 6).mean()


def test_a_copy_for_a_checkpoint_does_not_change_later() -> None:
    logits, labels = batch(4)
    found = figures(logits, labels)
    copy = found.first(2)
    found.put(slice(0, 4), logits * 2, labels)
    assert torch.equal(copy, figures(logits, labels).first(2))
    assert copy.untyped_storage().nbytes() == 16  # and the file holds no more than that


def test_a_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no examples"):
        ExampleMetrics(0, WEIGHTS).mean()
