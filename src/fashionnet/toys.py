"""The lesson's two toys in NumPy alone: one neuron, and a network that learns XOR.

Shapes: N points, two inputs each, H hidden neurons. All arrays are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fashionnet.errors import UserError

Floats = npt.NDArray[np.float64]

# All of XOR: every pair of bits (4, 2), and whether exactly one of the two is set (4,).
POINTS: Floats = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
TARGETS: Floats = np.array([0.0, 1.0, 1.0, 0.0])

MAX_HIDDEN = 10_000  # a typo beyond these would fill the memory or take hours
MAX_EPOCHS = 1_000_000

_NUDGE = 1e-6  # of a weight, for numerical gradients: about the cube root of float64's precision
_TINY = 1e-4  # gradients below this are compared absolutely: differences cannot resolve them


def relu(x: Floats) -> Floats:
    """Returns `x` with negatives clipped to zero."""
    return np.maximum(x, 0.0)


def softplus(x: Floats) -> Floats:
    """Returns log(1 + exp(x)), a smooth ReLU, without overflow."""
    return np.logaddexp(0.0, x)


def sigmoid(x: Floats) -> Floats:
    """Returns 1 / (1 + exp(-x)), between 0 and 1, without overflow."""
    return np.exp(-softplus(-x))


class Activation(NamedTuple):
    """An activation function, and its formula as people write it."""

    function: Callable[[Floats], Floats]
    formula: str


ACTIVATIONS = {
    "relu": Activation(relu, "max(0, x)"),
    "sigmoid": Activation(sigmoid, "1 / (1 + exp(-x))"),
    "tanh": Activation(np.tanh, "tanh(x)"),
    "softplus": Activation(softplus, "log(1 + exp(x))"),
    "linear": Activation(lambda x: x, "x"),
    "step": Activation(lambda x: np.heaviside(x, 0.0), "1 if x > 0 else 0"),
}


class Neuron(NamedTuple):
    """What a neuron computes on its way: raw is the weighted sum plus bias.

    `products` has the shape (inputs,), the others are numbers.
    """

    products: Floats
    weighted_sum: float
    raw: float
    activated: float


def neuron(
    inputs: Sequence[float] | Floats,
    weights: Sequence[float] | Floats,
    bias: float = 0.0,
    activation: str = "relu",
) -> Neuron:
    """Computes one neuron: `activation(inputs · weights + bias)`.

    Args:
        inputs: (inputs,) finite numbers.
        weights: (inputs,) finite numbers.
        bias: what is added to the weighted sum.
        activation: a name in `ACTIVATIONS`.

    Raises:
        UserError: the numbers of inputs and weights differ, the activation is unknown, or a number
            is not finite.
    """
    x, w = np.asarray(inputs, np.float64), np.asarray(weights, np.float64)
    if x.ndim != 1 or w.ndim != 1:
        raise UserError("inputs and weights must each be a row of numbers")
    if len(x) != len(w):
        raise UserError(f"inputs ({len(x)}) and weights ({len(w)}) must be equal in number")
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation} is not known; choose {', '.join(ACTIVATIONS)}")
    if not np.isfinite([*x, *w, bias]).all():
        raise UserError("inputs, weights and bias must be finite numbers")
    with np.errstate(all="ignore"):  # huge numbers may overflow, and inf says so by itself
        products = x * w
        weighted_sum = products.sum()
        raw = weighted_sum + bias
        activated = ACTIVATIONS[activation].function(raw)
    return Neuron(products, float(weighted_sum), float(raw), float(activated))


class Weights(NamedTuple):
    """What the network learns; also the shape of its gradients.

    Attributes:
        hidden: (2, H)
        hidden_bias: (H,)
        output: (H,)
        output_bias: (1,)
    """

    hidden: Floats
    hidden_bias: Floats
    output: Floats
    output_bias: Floats


@dataclass(frozen=True)
class XorResult:
    """A trained XOR network and how it got there.

    Attributes:
        losses: (epochs + 1,) before training and after each epoch; shorter if the loss stops
            being finite, which ends training.
        initial: weights before training.
        weights: weights at the end.
        predictions: (4,) probabilities of a 1 at `POINTS`.
    """

    losses: Floats
    initial: Weights
    weights: Weights
    predictions: Floats

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Which predictions are on the correct side of one half, by more than rounding: (4,)."""
        lead = np.where(TARGETS == 1, self.predictions - 0.5, 0.5 - self.predictions)
        return lead > 1e-6  # nan is not

    @property
    def solved(self) -> bool:
        """Whether all four predictions are correct."""
        return bool(self.correct.all())

    @property
    def exploded(self) -> bool:
        """Whether the loss stopped being a number or once was twice what it was untrained."""
        return not np.isfinite(self.losses[-1]) or bool(self.losses.max() > 2 * self.losses[0])

    @property
    def num_dead(self) -> int:
        """How many hidden neurons give 0 for every point: no gradient reaches them any more."""
        return int((_hidden_raw(self.weights, POINTS) <= 0).all(axis=0).sum())


@np.errstate(all="ignore")  # an exploding run is an experiment; its loss shows it
def train_xor(
    hidden: int = 8, learning_rate: float = 0.5, epochs: int = 1000, seed: int = 0
) -> XorResult:
    """Trains two inputs → `hidden` ReLU → one sigmoid on XOR by full-batch gradient descent.

    The loss is binary cross-entropy, averaged over the four points. With the defaults 99 of the
    seeds 0 to 99 end with all four correct, with `hidden=4` only 63.

    Raises:
        UserError: an argument is out of its range.
    """
    if not 1 <= hidden <= MAX_HIDDEN:
        raise UserError(f"hidden={hidden} is out of range; choose 1 to {MAX_HIDDEN} neurons")
    if not 0 < learning_rate < float("inf"):
        raise UserError(f"learning_rate={learning_rate} must be a finite number above 0")
    if not 1 <= epochs <= MAX_EPOCHS:
        raise UserError(f"epochs={epochs} is out of range; choose 1 to {MAX_EPOCHS}")
    if seed < 0:
        raise UserError(f"seed={seed} is negative; choose 0 or more")
    weights = initial = initial_weights(hidden, seed)
    losses = [loss(weights, POINTS, TARGETS)]
    while len(losses) <= epochs and np.isfinite(losses[-1]):
        slopes = gradients(weights, POINTS, TARGETS)
        weights = Weights(*(w - learning_rate * s for w, s in zip(weights, slopes, strict=True)))
        losses.append(loss(weights, POINTS, TARGETS))
    return XorResult(np.array(losses), initial, weights, predict(weights, POINTS))


def initial_weights(hidden: int, seed: int) -> Weights:
    """Draws weights and biases uniformly from -1 to 1.

    Biases of zero would put the point (0, 0) on the corner of every ReLU, which has no slope.
    """
    random = np.random.default_rng(seed)
    shapes = ((2, hidden), (hidden,), (hidden,), (1,))
    return Weights(*(random.uniform(-1.0, 1.0, shape) for shape in shapes))


@np.errstate(all="ignore")
def predict(weights: Weights, points: Floats) -> Floats:
    """Returns the probability of a 1 at each of `points`: (N, 2) → (N,)."""
    return sigmoid(_logits(weights, points))


def loss(weights: Weights, points: Floats, targets: Floats) -> float:
    """Returns the mean binary cross-entropy, in nats.

    From logits z it is log(1 + exp(-z)) where the target is 1 and log(1 + exp(z)) where it is 0,
    which stays exact where a probability would round to 0 or 1.
    """
    return float(softplus((1 - 2 * targets) * _logits(weights, points)).mean())


def gradients(weights: Weights, points: Floats, targets: Floats) -> Weights:
    """Returns the slope of the loss along every weight, by backpropagation."""
    raw = _hidden_raw(weights, points)  # (N, H)
    # Sigmoid and cross-entropy together have the slope (probability - target).
    d_logits = (predict(weights, points) - targets) / len(points)  # (N,)
    d_raw = np.outer(d_logits, weights.output) * (raw > 0)  # (N, H)
    return Weights(
        hidden=points.T @ d_raw,
        hidden_bias=d_raw.sum(axis=0),
        output=relu(raw).T @ d_logits,
        output_bias=d_logits.sum(keepdims=True),
    )


def numerical_gradients(weights: Weights, points: Floats, targets: Floats) -> Weights:
    """Returns the same slopes by central differences of the loss."""
    slopes = Weights(*(np.zeros_like(part) for part in weights))
    nudged = Weights(*(part.copy() for part in weights))
    for part, slope in zip(nudged, slopes, strict=True):
        for i in np.ndindex(part.shape):
            middle = part[i]
            part[i] = middle + _NUDGE
            above = loss(nudged, points, targets)
            part[i] = middle - _NUDGE
            below = loss(nudged, points, targets)
            part[i] = middle
            slope[i] = (above - below) / (2 * _NUDGE)
    return slopes


def gradient_error(weights: Weights) -> float:
    """Returns the largest relative error of `gradients` on XOR against `numerical_gradients`."""
    pairs = zip(
        gradients(weights, POINTS, TARGETS),
        numerical_gradients(weights, POINTS, TARGETS),
        strict=True,
    )
    return max(
        float((abs(a - b) / np.maximum(np.maximum(abs(a), abs(b)), _TINY)).max()) for a, b in pairs
    )


def _hidden_raw(weights: Weights, points: Floats) -> Floats:
    """Returns the hidden neurons' values before their ReLU: (N, 2) → (N, H)."""
    return points @ weights.hidden + weights.hidden_bias


def _logits(weights: Weights, points: Floats) -> Floats:
    """Returns the forward pass up to the sigmoid: (N, 2) → (N,)."""
    return relu(_hidden_raw(weights, points)) @ weights.output + weights.output_bias
