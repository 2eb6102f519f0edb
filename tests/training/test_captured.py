"""Steps taken by a graph have the bits of steps taken one by one.

Without a GPU a stand-in records the same operations (tests/graph_stand_in.py).
"""

from __future__ import annotations

import copy
import io
import logging
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fashionnet.config.schema import AugmentationConfig
from fashionnet.data.examples import Examples
from fashionnet.errors import Interrupted
from fashionnet.models.layers import Dropout
from fashionnet.models.mlp import MLP
from fashionnet.system import devices, seeds
from fashionnet.training import captured, gradients, loop
from fashionnet.training.augmentation import Augmentation
from fashionnet.training.captured import Captured, CudaGraph
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.objective import Objective
from fashionnet.training.optim import Adam, build
from fashionnet.training.schedule import Constant, OneCycle, Plateau
from fashionnet.training.state import TrainState
from fashionnet.training.steps import Eager
from tests.graph_stand_in import RecordedGraph

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="this machine has no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
RECORDS: dict[str, Any] = {"cpu": RecordedGraph, "cuda": CudaGraph}


def examples(num: int = 171, side: int = 6) -> Examples:
    """Returns pictures that make 21 batches of 8 and one of 3."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num, side, side), dtype=torch.uint8, generator=generator)
    return Examples(images, images.flatten(1)[:, :4].long().argmax(1))


class Convolutional(nn.Sequential):
    """A small network with batch normalization and two dropout layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 6)),
            nn.Conv2d(1, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            Dropout(0.2),
            nn.Flatten(),
            Dropout(0.5),
            nn.Linear(80, 4),
        )


class Torch(nn.Sequential):
    """Draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(7, 0.3, (6, 6), 4),
    "deep": lambda: MLP([7, 5], 0.2, (6, 6), 4),
    "plain": lambda: MLP(7, 0.0, (6, 6), 4),
    "convolutional": Convolutional,
}


def a_fit(
    network: Callable[[], nn.Module],
    device: str,
    is_captured: bool,
    way: str = "auto",
    augment: AugmentationConfig | None = None,
    schedule: Any = None,
    weight_decay: float = 0.0,
) -> TrainState:
    seeds.seed_everything(3)
    model = network().to(device)
    objective = Objective(model, mixes=augment is not None and augment.cutmix > 0)
    node = {"_target_": "fashionnet.training.optim.Adam", "lr": 0.02, "weight_decay": weight_decay}
    fit = TrainState(
        model,
        build(node, model),
        gradients.choose(way, model, objective),
        EarlyStopping(),
        3,
        8,
        255.0,
        schedule or Constant(),
        Augmentation(augment, 3) if augment else None,
    )
    fit.steps = Captured(RECORDS[device]) if is_captured else Eager()
    return fit


def run(fit: TrainState, epochs: int, watcher: loop.Watcher | None = None) -> TrainState:
    train = examples().to(fit.device)
    loop.fit(fit, train, train, epochs, watcher or loop.Watcher())
    return fit


def bits(fit: TrainState) -> tuple[Any, ...]:
    history = [{k: v for k, v in row.items() if k != "epoch_seconds"} for row in fit.history]
    return history, fit.weight_hashes, fit.optimizer.state_dict()["steps"]


def graph_of(fit: TrainState) -> Any:
    assert isinstance(fit.steps, Captured)
    return fit.steps._graph


@pytest.fixture(autouse=True)
def _short_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "_MOST_STEPS", 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["auto", "autograd"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_fit_by_graphs_has_the_bits_of_an_eager_one(network: str, way: str, device: str) -> None:
    eager = run(a_fit(NETWORKS[network], device, False, way), 2)
    fit = run(a_fit(NETWORKS[network], device, True, way), 2)
    assert bits(fit) == bits(eager)
    assert fit.steps._is_checked  # type: ignore[union-attr]
    if device == "cpu":  # ten groups of four; the first two are eager, the others are not
        assert graph_of(fit).replays == 8


CHANGES: dict[str, dict[str, Any]] = {
    "schedule": {"schedule": OneCycle()},
    "plateau": {"schedule": Plateau(patience=0, factor=0.5)},
    "weight decay": {"weight_decay": 0.1, "schedule": OneCycle()},
    "augmentation": {"augment": AugmentationConfig(flip=0.5, shift=0.2, erase=0.5)},
    "mixed pictures": {"augment": AugmentationConfig(cutmix=0.5, mixup=0.5)},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_from_step_to_step_reaches_the_graph(change: str, device: str) -> None:
    network = NETWORKS["convolutional"]
    way = "autograd"
    eager, fit = (
        run(a_fit(network, device, is_captured, way, **copy.deepcopy(CHANGES[change])), 3)
        for is_captured in (False, True)
    )
    assert bits(fit) == bits(eager)
    assert fit.steps._is_checked  # type: ignore[union-attr]


@pytest.mark.parametrize("device", DEVICES)
def test_reduced_precision_gives_the_same_bits(device: str) -> None:
    with devices.started(device, 1, deterministic=False, precision="bfloat16"):
        eager, fit = (run(a_fit(Convolutional, device, each), 2) for each in (False, True))
    assert bits(fit) == bits(eager)
    assert fit.steps._is_checked  # type: ignore[union-attr]


class Counting(nn.Sequential):
    """Takes another branch after many calls."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.calls += 1
        return super().forward(x) * (1 + self.calls // 30)


class Waiting(nn.Sequential):
    """Decides by a number that the device has to report."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if float(x.mean()) > 0.5 else 1)


class Drawing(nn.Sequential):
    """Takes another branch now and then, by Python's generator."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if random.random() < 0.01 and self.training else 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("network", "why"),
    [(Waiting, "captur"), (Drawing, "on the host"), (Counting, "on the host")],
)
def test_a_network_that_cannot_be_captured_runs_eager_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture, network: type[nn.Module], why: str, device: str
) -> None:
    eager = run(a_fit(network, device, False), 2)
    with caplog.at_level(logging.INFO, "fashionnet"):
        fit = run(a_fit(network, device, True), 2)
    assert bits(fit) == bits(eager)
    assert graph_of(fit) is None
    said = [message for message in caplog.messages if "CUDA graph" in message]
    assert len(said) == 1 and network.__name__ in said[0] and why in said[0]


def test_a_graph_that_differs_in_one_bit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(RecordedGraph):
        def replay(self) -> None:
            super().replay()
            weights = fit.model[1].bias.data  # type: ignore[index, union-attr]
            weights[0] = torch.nextafter(weights[0], torch.tensor(9.0))

    fit = a_fit(NETWORKS["mlp"], "cpu", False)
    fit.steps = Captured(Wrong)
    assert bits(run(fit, 2)) == bits(run(a_fit(NETWORKS["mlp"], "cpu", False), 2))
    assert graph_of(fit) is None


class Interrupter(loop.Watcher):
    """Is signaled after some looks at the losses, and saves the fit then."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after, self.saved = after, io.BytesIO()

    def steps_taken(self, fit: TrainState, num_steps: int) -> None:
        self._after -= 1
        if self._after == 0:
            self.stop.signal = signal.SIGTERM

    def interrupted(self, fit: TrainState) -> None:
        torch.save(fit.state_dict(), self.saved)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("after", [1, 2, 4])
def test_interrupted_between_graphs_a_fit_goes_on_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, after: int, device: str
) -> None:
    monkeypatch.setattr(loop, "_CHUNK_BATCHES", 8)
    monkeypatch.setattr("fashionnet.training.steps._SECONDS_BETWEEN_LOOKS", 0.0)
    network = NETWORKS["mlp"]
    whole = run(a_fit(network, device, False), 3)
    watcher = Interrupter(after)
    with pytest.raises(Interrupted), watcher.stop.deferred():
        run(a_fit(network, device, True), 3, watcher)
    watcher.saved.seek(0)
    again = a_fit(network, device, True)
    again.load_state_dict(torch.load(watcher.saved, weights_only=True))
    assert 0 < again.step < 22
    run(again, 3)
    assert bits(again) == bits(whole)


def test_a_signal_is_noticed_between_two_graphs() -> None:
    fit, watcher = a_fit(NETWORKS["mlp"], "cpu", True), loop.Watcher()
    run(fit, 1)

    class Signaling(RecordedGraph):
        def replay(self) -> None:
            super().replay()
            watcher.stop.signal = signal.SIGINT

    fit = a_fit(NETWORKS["mlp"], "cpu", False)
    fit.steps = Captured(Signaling)
    with pytest.raises(Interrupted), watcher.stop.deferred():
        run(fit, 1, watcher)
    assert fit.step == 9  # two groups, and the first eager step of the third


def test_networks_on_the_cpu_and_other_optimizers_take_steps_one_by_one() -> None:
    fit = a_fit(NETWORKS["mlp"], "cpu", False)
    assert isinstance(captured.choose(fit), Eager)


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_the_lesson_is_captured_unless_the_optimizer_forbids_it() -> None:
    fit = a_fit(NETWORKS["mlp"], "cuda", False)
    assert isinstance(captured.choose(fit), Captured)
    assert isinstance(fit.optimizer, Adam)
    fit.optimizer = torch.optim.SGD(fit.model.parameters(), lr=0.1)
    assert isinstance(captured.choose(fit), Eager)
