"""Loss and accuracy against the plain formula, however the examples are split into batches."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from fashionnet.training.metrics import Metrics, RunningMetrics, _addends

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def batch(num: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns logits (num, 4) and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, 4, generator=generator, dtype=dtype) * 3
    return logits, torch.randint(0, 4, (num,), generator=generator)


def naive(logits: Tensor, labels: Tensor) -> Metrics:
    """Cross-entropy and accuracy, one example at a time, in Python's float64."""
    loss, right = 0.0, 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        highest = max(row)
        loss += highest + math.log(sum(math.exp(z - highest) for z in row)) - row[label]
        right += row.index(highest) == label
    return Metrics(loss / len(labels), right / len(labels))


def test_means_are_those_of_the_plain_formula() -> None:
    logits, labels = batch(101, dtype=torch.float64)
    running = RunningMetrics(CPU)
    running.add(logits, labels)
    assert running.read().loss == pytest.approx(naive(logits, labels).loss, rel=1e-12)
    assert running.read().accuracy == naive(logits, labels).accuracy


def test_a_short_batch_counts_less() -> None:
    wrong, right = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    running = RunningMetrics(CPU)
    running.add(right.repeat(3, 1), torch.ones(3, dtype=torch.int64))
    running.add(wrong, torch.ones(1, dtype=torch.int64))
    assert running.read().accuracy == 0.75
    assert running.read().loss == pytest.approx(9 / 4, rel=1e-3)


@settings(deadline=None)
@given(
    num=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    seed=st.integers(0, 100),
)
def test_splitting_into_batches_changes_nothing(num: int, cuts: list[int], seed: int) -> None:
    logits, labels = batch(num, seed)
    whole, parts = RunningMetrics(CPU), RunningMetrics(CPU)
    whole.add(logits, labels)
    bounds = sorted({0, num, *(cut for cut in cuts if cut <= num)})
    for start, end in pairwise(bounds):
        parts.add(logits[start:end], labels[start:end])
    assert parts.read().accuracy == whole.read().accuracy
    assert parts.read().loss == pytest.approx(whole.read().loss, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resume_that_splits_an_epoch_elsewhere_changes_no_bit_of_the_loss(
    dtype: torch.dtype,
) -> None:
    # From 2e-7 to 300: a sum of 6,000 float64 numbers would be rounded, here or there.
    logits, labels = batch(6000)
    logits = logits.to(dtype) * torch.linspace(0.1, 30, 6000, dtype=dtype)[:, None]
    whole = RunningMetrics(CPU)
    for part in zip(logits.split(512), labels.split(512), strict=True):
        whole.add(*part)
    for cut in range(8, 512, 40):
        parts = RunningMetrics(CPU)
        parts.add(logits[:cut], labels[:cut])
        for part in zip(logits[cut:].split(512), labels[cut:].split(512), strict=True):
            parts.add(*part)
        assert parts.read() == whole.read()
        assert torch.equal(parts._loss_sums, whole._loss_sums)  # what a checkpoint holds


def test_sums_of_losses_are_exact_in_any_order() -> None:
    """Both parts of a loss lie on a grid on which float64 adds up a million of them exactly."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(20_000, generator=generator, dtype=torch.float64).exp2() * 10
    losses *= torch.logspace(-8, 2, 20_000, dtype=torch.float64)
    coarse, fine = _addends(losses)
    assert torch.equal((coarse * 2**16).round(), coarse * 2**16)
    assert torch.equal((fine * 2**50).round(), fine * 2**50)
    assert float(fine.abs().max()) <= 2**-17
    assert float((coarse + fine - losses).abs().max()) <= 2**-46
    for part in (coarse, fine):
        exact = float(sum(map(Fraction, part.tolist())))
        for order in (torch.arange(20_000), torch.randperm(20_000, generator=generator)):
            assert float(part[order].sum()) == float(part[order].cumsum(0)[-1]) == exact


def test_an_infinite_loss_is_read_as_such() -> None:
    running = RunningMetrics(CPU)
    running.add(torch.tensor([[0.0, math.inf], [0.0, 1.0]]).neg(), torch.tensor([1, 0]))
    assert running.read().loss == math.inf


def test_sums_are_float64() -> None:
    # 1e8 and many small ones: a float32 sum would drop every one of them.
    running = RunningMetrics(CPU)
    running.add(torch.tensor([[0.0, 1e8]]), torch.tensor([0]))
    for _ in range(100):
        running.add(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    total = 1e8 + 100 * (1 + math.log1p(math.exp(-1)))
    assert running.read().loss * 101 == pytest.approx(total, rel=1e-12)


def test_add_returns_the_loss_of_each_example() -> None:
    logits, labels = batch(7)
    losses = RunningMetrics(CPU).add(logits, labels)
    assert losses.dtype == torch.float32
    for i in range(7):
        assert losses[i].item() == pytest.approx(naive(logits[[i]], labels[[i]]).loss, rel=1e-5)


def test_state_goes_on_where_it_was() -> None:
    logits, labels = batch(10)
    whole, first = RunningMetrics(CPU), RunningMetrics(CPU)
    whole.add(logits[:6], labels[:6])
    first.add(logits[:6], labels[:6])
    second = RunningMetrics(CPU)
    second.load_state_dict(first.state_dict())
    first.add(logits[:2], labels[:2])  # what is added later stays out of the copy
    for running in (whole, second):
        running.add(logits[6:], labels[6:])
    assert second.read() == whole.read()


def test_reading_nothing_is_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        RunningMetrics(CPU).read()
