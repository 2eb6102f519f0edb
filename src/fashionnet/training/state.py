"""The state of a fit: all that its steps change, and so all that a checkpoint holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fashionnet.models import layers
from fashionnet.system import seeds
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.metrics import ExampleMetrics, Metrics
from fashionnet.training.schedule import Constant, LearningRate, Schedule
from fashionnet.training.steps import Eager

if TYPE_CHECKING:
    from fashionnet.training.augmentation import Augmentation
    from fashionnet.training.budget import Budget
    from fashionnet.training.by_hand import ByHand
    from fashionnet.training.captured import Captured
    from fashionnet.training.gradients import Autograd, Distributed
    from fashionnet.training.optim import Optimizer

Row = dict[str, Any]  # one epoch's line of the history


@dataclass
class TrainState:
    """A fit under way: everything that its steps change and a checkpoint holds.

    Attributes:
        schedule: of the learning rate, see `schedule`.
        gradients: how a batch becomes `parameter.grad`, see `gradients`.
        scale: pixels are divided by this; 255 brings them to 0..1.
        augment: what changes training pictures at random; None leaves them as they are.
        budget: of a training that is to fit into a time.
        epoch: the 1-based epoch under way, or about to start.
        last_epoch: the epoch to end with; 0 before a fit, and while a budget is not measured.
        step: batches of that epoch already taken.
        figures: loss and correctness of the epoch's examples, in the order of its steps; None
            between two epochs.
        history: a row for each epoch done, in Keras' words.
        weight_hashes: the hash of the weights at the end of each epoch done.
        unrestored: the weights at the end of the fit, where those of the best epoch took their
            place; more epochs go on from here.
        seconds: time spent fitting before `began`.
        group: of a fit that took steps together with others: how many fits these were, `jobs`, and
            the seconds that all of them took, `fit_seconds`.
    """

    model: nn.Module
    optimizer: Optimizer
    gradients: Autograd | ByHand | Distributed
    early_stopping: EarlyStopping
    seed: int
    batch_size: int
    scale: float
    schedule: Schedule = field(default_factory=Constant)
    augment: Augmentation | None = None
    budget: Budget | None = None
    epoch: int = 1
    last_epoch: int = 0
    step: int = 0
    stopped: bool = False
    history: list[Row] = field(default_factory=list)
    weight_hashes: list[str] = field(default_factory=list)
    unrestored: dict[str, Tensor] | None = field(default=None, repr=False)
    best_epoch: int | None = None
    best_loss: float | None = None
    best_weights: dict[str, Tensor] | None = field(default=None, repr=False)
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    group: dict[str, float] | None = None

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.learning_rate = LearningRate(self.optimizer, self.schedule)
        self.masks = layers.start_streams(self.model, self.seed, self.batch_size)
        self.steps: Eager | Captured = Eager()
        self.figures: ExampleMetrics | None = None
        self._restored: Tensor | None = None  # the figures of the epoch's steps before a resume

    def fit_seconds(self) -> float:
        """Returns the seconds spent fitting so far, those before a resume included."""
        return self.seconds + time.perf_counter() - self.began

    def fraction(self, step: int, total_steps: int) -> float:
        """Returns how much of the training is done before a step, counted from 0, in 0..1."""
        return self.budget.fraction(step) if self.budget else step / total_steps

    def start_figures(self, num_examples: int) -> ExampleMetrics:
        """Returns the figures of the epoch under way, those before a resume included."""
        self.figures = ExampleMetrics(num_examples, next(self.model.parameters()))
        if self._restored is not None:
            self.figures.restore(self._restored)
            self._restored = None
        return self.figures

    def _figures_done(self) -> Tensor | None:
        if self.figures is None:
            return self._restored
        return self.figures.first(self.step * self.batch_size)

    def progress(self) -> Metrics:
        """Returns the means over the steps that the epoch has taken; there must be some."""
        assert self.figures is not None
        return self.figures.mean(self.step * self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Returns the fit's whole state; tensors, numbers, strings, lists and dicts only."""
        return {
            "device": self.device.type,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "budget": self.budget.state_dict() if self.budget else {},
            "generators": seeds.global_state(self.device),
            "figures": self._figures_done(),
            "epoch": self.epoch,
            "step": self.step,
            "stopped": self.stopped,
            "history": self.history,
            "weight_hashes": self.weight_hashes,
            "unrestored": self.unrestored,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "best_weights": self.best_weights,
            "fit_seconds": self.fit_seconds(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the fit back where `state_dict` found it."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])
        seeds.load_global_state(state["generators"], self.device)
        self._restored = state["figures"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.stopped = state["stopped"]
        self.history = list(state["history"])
        self.weight_hashes = list(state["weight_hashes"])
        self.unrestored = state["unrestored"]
        self.best_epoch, self.best_loss = state["best_epoch"], state["best_loss"]
        self.best_weights = state["best_weights"]
        self.seconds, self.began = state["fit_seconds"], time.perf_counter()
