"""Networks trained together by torch.func agree with each trained alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fashionnet.data.examples import Examples
from fashionnet.models import layers
from fashionnet.models.layers import Dropout
from fashionnet.system import seeds
from fashionnet.training import loop, stacked, together
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.gradients import Autograd
from fashionnet.training.optim import Adam
from fashionnet.training.stacked import Stacked
from fashionnet.training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Sequential):
    """A convolutional network with dropout after a convolution and before the last layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 8)),
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            Dropout(0.2),
            nn.Flatten(),
            Dropout(0.5),
            nn.Linear(36, 4),
        )


def examples(num: int = 171) -> Examples:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num, 8, 8), dtype=torch.uint8, generator=generator)
    return Examples(images, images.flatten(1)[:, :4].long().argmax(1))


def a_fit(seed: int, network: Callable[[], nn.Module] = Small) -> TrainState:
    seeds.seed_everything(seed)
    model = network()
    optimizer = Adam(model.parameters(), lr=1e-3)
    return TrainState(model, optimizer, Autograd(model), EarlyStopping(), seed, 8, 255.0)


def networks(num: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for seed in range(num):
        seeds.seed_everything(seed)
        model = Small()
        layers.start_streams(model, seed, 8)
        found.append(model)
    return found


@pytest.mark.parametrize("num", [8, 3])
def test_gradients_and_logits_are_those_of_each_network(num: int) -> None:
    x, labels = torch.rand(3, num, 8, 8), torch.randint(0, 4, (3, num))
    logits = Stacked(*(own := networks(3)))(x.flatten(0, 1), labels.flatten())
    for i, model in enumerate(networks(3)):
        expected = Autograd(model)(x[i], labels[i])
        torch.testing.assert_close(logits.view(3, num, 4)[i], expected, rtol=1e-5, atol=1e-6)
        for one, other in zip(own[i].parameters(), model.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_frozen_parameter_has_no_gradient() -> None:
    own = networks(2)
    for model in own:
        model[1].weight.requires_grad_(False)  # type: ignore[index]
    Stacked(*own)(torch.rand(16, 8, 8), torch.randint(0, 4, (16,)))
    assert all(model[1].weight.grad is None for model in own)  # type: ignore[index]
    assert all(model[1].bias.grad is not None for model in own)  # type: ignore[index]


class Losses(loop.Watcher):
    """Keeps the losses of an epoch's first steps."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def steps_taken(self, fit: TrainState, num_steps: int) -> None:
        assert fit.figures is not None
        self.found = list(fit.figures.losses(0, 20 * 8).clone().view(20, 8).mean(1))


def fitted(seeds_: range, is_together: bool) -> list[tuple[list[Tensor], TrainState]]:
    """Trains a network for each seed."""
    train = examples()

    def job(seed: int) -> tuple[list[Tensor], TrainState]:
        fit, watcher = a_fit(seed), Losses()
        loop.fit(fit, train, train, 2, watcher)
        return watcher.found, fit

    if not is_together:
        return [job(seed) for seed in seeds_]
    jobs = together.Jobs()
    found = jobs.run([partial(job, seed) for seed in seeds_])
    assert not jobs.alone
    return found


def test_losses_of_the_first_twenty_steps_agree_over_ten_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(together, "STACKING_DEVICES", ["cpu"])
    alone, joint = fitted(range(10), False), fitted(range(10), True)
    for (one, fit), (other, shared) in zip(alone, joint, strict=True):
        torch.testing.assert_close(torch.stack(other), torch.stack(one), rtol=1e-5, atol=0)
        assert shared.group is not None and shared.group["jobs"] == 10
        assert [row["epoch"] for row in shared.history] == [1, 2]
        assert shared.history[1]["val_loss"] == pytest.approx(fit.history[1]["val_loss"], rel=1e-3)


def test_on_the_cpu_they_are_trained_one_after_another() -> None:
    reason = together.why_alone(a_fit(0), examples())
    assert reason == "the gradients of Small are not computed by hand"


def named(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *modules, nn.Linear(64, 4))


class Choosy(nn.Module):
    """Decides by a number in its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if x.mean() > 0 else 1)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.BatchNorm1d(64), "BatchNorm1d keeps statistics of its batches"),
        (nn.Dropout(0.5), "torch's own Dropout draws the same masks for all"),
        (Choosy(), "torch.func refuses it"),
    ],
)
def test_what_cannot_be_trained_together_is_named(module: nn.Module, why: str) -> None:
    found = stacked.refusal(named(module), torch.rand(2, 8, 8), torch.tensor([0, 1]))
    assert found is not None and found.startswith(why)
    assert stacked.refusal(named(nn.Tanh()), torch.rand(2, 8, 8), torch.tensor([0, 1])) is None
