"""The table of layers, as Keras prints it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fashionnet.models.mlp import MLP
from fashionnet.models.summary import summary

LESSON = """\
Model: "mlp"
┏━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ Layer (type)      ┃ Output Shape ┃ Param # ┃
┡━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━┩
│ flatten (Flatten) │ (None, 784)  │       0 │
├───────────────────┼──────────────┼─────────┤
│ linear (Linear)   │ (None, 128)  │ 100,480 │
├───────────────────┼──────────────┼─────────┤
│ relu (ReLU)       │ (None, 128)  │       0 │
├───────────────────┼──────────────┼─────────┤
│ dropout (Dropout) │ (None, 128)  │       0 │
├───────────────────┼──────────────┼─────────┤
│ linear_1 (Linear) │ (None, 10)   │   1,290 │
└───────────────────┴──────────────┴─────────┘
 Total params: 101,770 (397.54 KB)
 Trainable params: 101,770 (397.54 KB)
 Non-trainable params: 0 (0.00 B)"""


def test_the_lessons_network() -> None:
    assert summary(MLP(), (28, 28)) == LESSON


def test_shapes_of_pictures_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    model[0].requires_grad_(False)
    text = summary(model, (1, 5, 5))
    assert "conv2d (Conv2d) " in text
    assert "(None, 4, 3, 3)" in text
    assert "(None, 36)" in text
    assert " Total params: 122 (488.00 B)" in text
    assert " Trainable params: 82 (328.00 B)" in text
    assert " Non-trainable params: 40 (160.00 B)" in text


def test_sizes_follow_the_dtype() -> None:
    assert " Total params: 101,770 (795.08 KB)" in summary(MLP().double(), (28, 28))


def test_layers_that_give_something_else_than_a_tensor() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0][:, -1])

    assert "lstm (LSTM)" in summary(Model(), (4, 3))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary(model, (2, 2))
    for module in model.modules():
        assert not module._forward_hooks
        assert module.training is training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model(torch.randn(5, 2, 2)).sum().backward()  # no inference tensors were left in it
    with pytest.raises(RuntimeError):
        summary(model, (3, 3))
    assert all(not module._forward_hooks for module in model.modules())
    assert model.training is training


def test_the_summary_draws_no_random_numbers() -> None:
    model = MLP(dropout=0.5)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    summary(model, (28, 28))
    assert torch.equal(torch.rand(3), expected)
