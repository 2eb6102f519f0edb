"""Weights as values: hashed, checked and copied to the host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fashionnet.models.weights import all_finite, joined_copies, on_host, weights_sha256

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tensors_that_are_moved_as_one_come_out_as_they_were() -> None:
    tensors = [
        torch.arange(6.0).view(2, 3).t(),  # of other strides
        torch.tensor(7.0),
        torch.empty(0, 4),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]
    copies = joined_copies(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert copy.untyped_storage().nbytes() == copy.numel() * 4  # a file of its own size
    copies[0].zero_()
    assert tensors[0].any()


def test_a_state_of_another_device_is_copied_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # The device "meta" stands for a GPU: its values are those that the copy is given.
    moved: list[list[Tensor]] = []

    def copied(tensors: list[Tensor]) -> list[Tensor]:
        moved.append(tensors)
        return [torch.ones(tensor.shape, dtype=tensor.dtype) for tensor in tensors]

    monkeypatch.setattr("fashionnet.models.weights.joined_copies", copied)
    shared = torch.empty(2, device="meta")
    own = torch.zeros(3)
    state: dict[str, Any] = {
        "model": {"w": shared, "n": torch.empty((), dtype=torch.int64, device="meta")},
        "means": [torch.empty(4, device="meta"), own],
        "again": shared,
        "epoch": 3,
        "none": None,
    }
    found = on_host(state)
    assert [len(tensors) for tensors in moved] == [2, 1]  # one move a dtype, shared ones once
    assert found["model"]["w"] is found["again"] and torch.equal(found["again"], torch.ones(2))
    assert found["model"]["n"].dtype == torch.int64
    assert torch.equal(found["means"][0], torch.ones(4)) and found["means"][1] is own
    assert (found["epoch"], found["none"]) == (3, None)
    assert state["again"] is shared


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_one_number_that_is_not_finite_is_found(value: float, at: int) -> None:
    model = nn.Linear(3, 2)
    assert all_finite(model)
    with torch.no_grad():
        list(model.parameters())[at].view(-1)[-1] = value
    assert not all_finite(model)


def test_the_hash_knows_names_shapes_dtypes_and_bytes() -> None:
    first = torch.arange(6.0)
    states = [
        {"a": first},
        {"b": first},
        {"a": first.view(2, 3)},
        {"a": first.double()},
        {"a": first + 1},
        {"a": first, "b": first},
        {"a": first.bfloat16()},
        {"a": torch.zeros(2)},
        {"a": -torch.zeros(2)},
        {},
    ]
    assert len({weights_sha256(state) for state in states}) == len(states)
    turned = first.view(2, 3).t().contiguous().t()
    assert weights_sha256({"a": turned}) == weights_sha256({"a": first.view(2, 3)})
    assert weights_sha256({"b": first, "a": turned}) == weights_sha256({"a": turned, "b": first})
