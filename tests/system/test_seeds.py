"""Random streams: pure functions of seed and name."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fashionnet.system import seeds


def test_derive_keeps_its_values() -> None:
    # Recorded runs are rerun to the bit, so these numbers may never change.
    assert seeds.derive(0, "torch") == 8_921_981_299_929_402_760
    assert seeds.derive(0, "order", 1) == 4_374_215_849_138_048_446


@given(seed=st.integers(0, 2**70), names=st.lists(st.text(max_size=5) | st.integers(), max_size=3))
def test_derive_gives_63_bits(seed: int, names: list[str | int]) -> None:
    assert 0 <= seeds.derive(seed, *names) < 2**63
    assert seeds.derive(seed, *names) == seeds.derive(seed, *names)


def test_streams_of_other_seeds_and_names_differ() -> None:
    streams = [(0,), (1,), (0, "order"), (0, "order", 1), (0, "order", 2), (10, "order", 1)]
    drawn = {tuple(torch.rand(4, generator=seeds.generator(*s)).tolist()) for s in streams}
    assert len(drawn) == len(streams)


def test_generator_starts_at_the_beginning_of_its_stream() -> None:
    first = torch.rand(5, generator=seeds.generator(3, "masks"))
    assert torch.equal(torch.rand(5, generator=seeds.generator(3, "masks")), first)


@settings(deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(1, 99), num_examples=st.integers(0, 500))
def test_epoch_order_is_a_permutation(seed: int, epoch: int, num_examples: int) -> None:
    order = seeds.epoch_order(seed, epoch, num_examples)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(num_examples))


def test_epoch_order_depends_on_seed_and_epoch_alone() -> None:
    first = seeds.epoch_order(0, 2, 100)
    seeds.epoch_order(0, 1, 100)
    torch.manual_seed(99)
    torch.rand(7)
    expected = torch.get_rng_state()
    assert torch.equal(seeds.epoch_order(0, 2, 100), first)
    assert torch.equal(torch.get_rng_state(), expected)
    assert not torch.equal(seeds.epoch_order(0, 3, 100), first)
    assert not torch.equal(seeds.epoch_order(1, 2, 100), first)
    assert not torch.equal(seeds.epoch_order(2, 0, 100), first)


def _global_draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_seed_everything_seeds_every_global_generator(seed: int) -> None:
    seeds.seed_everything(seed)
    first = _global_draws()
    second = _global_draws()
    seeds.seed_everything(seed)
    assert _global_draws() == first
    seeds.seed_everything(seed + 1)
    other = _global_draws()
    for a, b, c in zip(first, second, other, strict=True):
        assert len({a, b, c}) == 3


def test_of_several_devices_only_the_runs_own_generator_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Eight devices whose generators are plain tensors; the second job has other ones.
    states = {torch.device("cuda", i): torch.tensor([i], dtype=torch.uint8) for i in range(8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: states.update({device: state})
    )
    own = torch.device("cuda:3")
    kept = seeds.global_state(own)
    states[own] = torch.tensor([99], dtype=torch.uint8)
    seeds.load_global_state(kept, torch.device("cuda:0"))  # a machine with one
    assert states[torch.device("cuda:0")].item() == 3
    assert [states[torch.device("cuda", i)].item() for i in range(1, 8)] == [1, 2, 99, 4, 5, 6, 7]


def test_on_the_cpu_no_other_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(torch.cuda, "get_rng_state")
    monkeypatch.delattr(torch.cuda, "set_rng_state")
    cpu = torch.device("cpu")
    torch.manual_seed(5)
    kept = seeds.global_state(cpu)
    expected = torch.rand(3)
    seeds.load_global_state(kept, cpu)
    assert torch.equal(torch.rand(3), expected)
