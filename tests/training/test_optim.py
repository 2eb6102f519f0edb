"""Keras' Adam against its formula, and what an optimizer is built from."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from fashionnet.errors import UserError
from fashionnet.training import optim
from fashionnet.training.optim import Adam

NODE = {"_target_": "fashionnet.training.optim.Adam", "lr": 0.01}


pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(*shapes: Sequence[int], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]


def gradients(num: int, like: Tensor, seed: int = 1) -> list[Tensor]:
    """Returns gradients of many sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(like.shape, generator=generator, dtype=like.dtype) * 10.0 ** (-t % 9)
        for t in range(num)
    ]


def keras_adam(
    weights: Tensor,
    gradients: Sequence[Tensor],
    lr: float = 1e-3,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
) -> Tensor:
    """The update of keras.optimizers.Adam, written out."""
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    for t, gradient in enumerate(gradients, start=1):
        alpha = lr * math.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        mean = beta_1 * mean + (1 - beta_1) * gradient
        square = beta_2 * square + (1 - beta_2) * gradient**2
        weights = weights - mean * alpha / (square.sqrt() + epsilon)
    return weights


def take_steps(optimizer: Adam, parameter: nn.Parameter, steps: Sequence[Tensor]) -> None:
    for gradient in steps:
        parameter.grad = gradient
        optimizer.step()


@settings(deadline=None, max_examples=25)
@given(
    lr=st.floats(1e-5, 1),
    beta_1=st.floats(0, 0.99),
    beta_2=st.floats(0, 0.9999),
    epsilon=st.floats(1e-10, 1e-1),
    num=st.integers(1, 20),
)
def test_steps_are_those_of_keras(
    lr: float, beta_1: float, beta_2: float, epsilon: float, num: int
) -> None:
    (parameter,) = parameters((3, 5))
    steps = gradients(num, parameter)
    expected = keras_adam(parameter.detach(), steps, lr, beta_1, beta_2, epsilon)
    take_steps(Adam([parameter], lr, beta_1, beta_2, epsilon), parameter, steps)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-11, atol=1e-11)


def test_defaults_are_those_of_keras() -> None:
    (parameter,) = parameters((4,))
    steps = [gradient * 1e-7 for gradient in gradients(5, parameter)]  # where epsilon counts
    expected = keras_adam(parameter.detach(), steps, 1e-3, 0.9, 0.999, 1e-7)
    take_steps(Adam([parameter]), parameter, steps)
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-13)


def test_epsilon_is_not_bias_corrected() -> None:
    # One step along a gradient as small as epsilon: epsilon hat divides by (√(1-β₂)·g + ε).
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    take_steps(Adam([parameter]), parameter, [torch.full((1,), 1e-7, dtype=torch.float64)])
    root = math.sqrt(1 - 0.999)
    assert parameter.item() == pytest.approx(-1e-3 * root * 1e-7 / (root * 1e-7 + 1e-7), rel=1e-9)


def test_float32_follows_the_same_path() -> None:
    parameter = nn.Parameter(torch.randn(6, generator=torch.Generator().manual_seed(0)))
    steps = gradients(30, parameter)
    expected = keras_adam(parameter.detach().double(), [g.double() for g in steps])
    take_steps(Adam([parameter]), parameter, steps)
    assert parameter.dtype == torch.float32
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_other_strides_than_their_parameter() -> None:
    (parameter,) = parameters((3, 5))
    steps = gradients(3, parameter)
    expected = keras_adam(parameter.detach(), steps)
    turned = [gradient.t().contiguous().t() for gradient in steps]
    assert turned[0].stride() != parameter.stride()
    take_steps(Adam([parameter]), parameter, turned)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradients_too", [False, True])
def test_parameters_that_lie_otherwise_in_memory(gradients_too: bool) -> None:
    layout = torch.channels_last
    weights = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    parameter = nn.Parameter(weights.to(memory_format=layout))
    steps = gradients(3, weights)
    expected = keras_adam(weights, steps)
    if gradients_too:
        steps = [gradient.to(memory_format=layout) for gradient in steps]
    take_steps(Adam([parameter]), parameter, steps)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


def test_a_parameter_without_a_gradient_stays() -> None:
    used, unused = parameters((3,), (4,))
    before = unused.detach().clone()
    optimizer = Adam([unused, used])
    steps = gradients(2, used)
    expected = keras_adam(used.detach(), steps)
    take_steps(optimizer, used, steps)
    assert torch.equal(unused, before)
    torch.testing.assert_close(used.detach(), expected, rtol=1e-12, atol=1e-12)


def test_a_step_needs_no_no_grad_and_leaves_the_gradient() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Adam([parameter])
    (parameter**2).sum().backward()
    assert parameter.grad is not None
    before = parameter.grad.clone()
    optimizer.step()
    assert torch.equal(parameter.grad, before)
    assert parameter.requires_grad and parameter.is_leaf


def test_the_learning_rate_may_be_changed_between_steps() -> None:
    (parameter,) = parameters((3,))
    optimizer = Adam([parameter], lr=0.1)
    first, second = gradients(2, parameter)
    take_steps(optimizer, parameter, [first])
    between = parameter.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    take_steps(optimizer, parameter, [second])
    assert torch.equal(parameter, between)


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 8))
def test_state_goes_on_where_it_was(cut: int) -> None:
    whole, part = parameters((3, 2)), parameters((3, 2))
    steps = gradients(8, whole[0])
    take_steps(Adam(whole, lr=0.1), whole[0], steps)

    first = Adam(part, lr=0.1)
    take_steps(first, part[0], steps[:cut])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = nn.Parameter(part[0].detach().clone())
    second = Adam([resumed], lr=0.5)
    take_steps(second, resumed, gradients(3, resumed, seed=9))  # has a state of its own
    with torch.no_grad():
        resumed.copy_(part[0])
    second.load_state_dict(torch.load(file, weights_only=True))
    take_steps(second, resumed, steps[cut:])
    assert torch.equal(resumed, whole[0])


@pytest.mark.parametrize("key", ["beta_1", "beta_2"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan])
def test_betas_are_checked(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"optimizer\.{key}="):
        Adam(parameters((2,)), **{key: value})


@pytest.mark.parametrize("epsilon", [0, -1e-7, math.nan])
def test_epsilon_is_checked(epsilon: float) -> None:
    with pytest.raises(UserError, match=r"optimizer\.epsilon="):
        Adam(parameters((2,)), epsilon=epsilon)


def test_build_passes_the_nodes_keys_on() -> None:
    built = optim.build(
        {**NODE, "beta_1": 0.5, "epsilon": 1e-3}, nn.ParameterList(parameters((2,)))
    )
    group = built.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.5, 0.999), 1e-3)


def test_build_leaves_frozen_parameters_out() -> None:
    frozen, trained = parameters((2,), (3,))
    frozen.requires_grad = False
    built = optim.build(NODE, nn.ParameterList([frozen, trained]))
    assert [p.shape for p in built.param_groups[0]["params"]] == [trained.shape]


def test_build_needs_something_to_train() -> None:
    (frozen,) = parameters((2,))
    frozen.requires_grad = False
    with pytest.raises(UserError, match="no parameter to train"):
        optim.build(NODE, nn.ParameterList([frozen]))


def test_build_refuses_keys_the_optimizer_does_not_have() -> None:
    with pytest.raises(
        UserError,
        match=r"optimizer\.momentum: .* lr, beta_1, beta_2, epsilon, weight_decay$",
    ):
        optim.build({**NODE, "momentum": 0.9}, nn.ParameterList(parameters((2,))))


def test_groups_have_learning_rates_of_their_own_and_are_restored() -> None:
    (fast, slow), (alone,) = parameters((3,), (3,)), parameters((3,))
    groups = [{"params": [fast], "lr": 0.1}, {"params": [slow]}]
    adam, single = Adam(groups, lr=0.001), Adam([alone], lr=0.1)
    for optimizer, weights in ((adam, (fast, slow)), (single, (alone,))):
        for weight in weights:
            weight.grad = torch.full_like(weight, 2)
        optimizer.step()
    assert torch.equal(fast, alone)
    again = Adam([{"params": [p.detach().clone()]} for p in (fast, slow)], lr=7.0)
    again.load_state_dict(adam.state_dict())
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.001]
    assert all(
        torch.equal(a, b)
        for key in ("means", "squares")
        for a, b in zip(again.state_dict()[key], adam.state_dict()[key], strict=True)
    )


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_what_cannot_step_from_gradients_alone_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHIONNET_ALLOW", f"torch.optim.{name}")
    node = {"_target_": f"torch.optim.{name}", "lr": 0.1}
    with pytest.raises(UserError, match=f"optimizer {name} cannot be used: .*optimizer=adam"):
        optim.build(node, nn.ParameterList(parameters((2,))))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Rprop"])
def test_other_optimizers_of_torch_can_be_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHIONNET_ALLOW", f"torch.optim.{name}")
    (weight,) = parameters((2,))
    before = weight.detach().clone()
    node = {"_target_": f"torch.optim.{name}", "lr": 0.1}
    optimizer = optim.build(node, nn.ParameterList([weight]))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(weight, before)


def test_weight_decay_is_not_for_biases_and_norms() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    for target in ("fashionnet.training.optim.Adam", "torch.optim.SGD"):
        node = {"_target_": target, "lr": 0.1, "weight_decay": 0.5}
        optimizer = optim.build(node, model)
        decays = {
            name: group["weight_decay"]
            for group in optimizer.param_groups
            for name, parameter in model.named_parameters()
            if any(parameter is each for each in group["params"])
        }
        assert decays == {
            **{"0.weight": 0.5, "0.bias": 0, "1.weight": 0, "1.bias": 0},
            **{"3.weight": 0.5, "3.bias": 0},
        }
    assert len(optim.build({**node, "weight_decay": 0.0}, model).param_groups) == 1


def test_decoupled_weight_decay() -> None:
    (plain,), (decayed,) = parameters((3,)), parameters((3,))
    before = decayed.detach().clone()
    for weight, optimizer in (
        (plain, Adam([plain], lr=0.1)),
        (decayed, Adam([decayed], lr=0.1, weight_decay=0.5)),
    ):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.allclose(decayed, plain - 0.05 * before, rtol=0, atol=1e-7)


def test_a_negative_weight_decay_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.weight_decay=-1 must be 0 or more"):
        Adam(parameters((2,)), weight_decay=-1)
