"""Parity: what the lesson takes from Keras, against Keras itself.

Keras runs beside the package on its JAX backend; no number is stored and nothing stands in for
it. Comparisons over many steps are made in float64: in float32 the trajectories of any two
frameworks part after some tens of steps by rounding alone.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from torch import Tensor, nn

from fashionnet import models
from fashionnet.config import compose
from fashionnet.data import published
from fashionnet.data.examples import Examples, split_ranges
from fashionnet.errors import UserError
from fashionnet.models import layers, mlp, weights
from fashionnet.models.summary import summary
from fashionnet.system import seeds
from fashionnet.training import by_hand, evaluation, gradients, loop, optim, schedule, state
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.objective import Objective, balanced_weights

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is imported
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax", reason="needs the extra `parity`")
keras = pytest.importorskip("keras", reason="needs the extra `parity`")

# Keras' own, each time it hands out a variable's value.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (28, 28)
WAYS = {"autograd": gradients.Autograd, "by_hand": by_hand.ByHand}
MLP = "model=mlp"
PLAIN_MLP = "model=mlp_no_dropout"

Way = Callable[[nn.Module], Any]
Arrays = list[np.ndarray]


# ------------------------------------------------------------------------------- both sides


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Keras computes in `dtype`, "float32" or "float64", inside the block."""
    assert keras.backend.backend() == "jax"
    before = keras.config.floatx(), bool(jax.config.jax_enable_x64)

    def switch(floatx: str, x64: bool) -> None:
        jax.config.update("jax_enable_x64", x64)
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(floatx)

    switch(dtype, dtype == "float64")
    try:
        yield
    finally:
        switch(*before)


def split(examples: Examples, validation_split: float) -> tuple[Examples, Examples]:
    train, validation = split_ranges(len(examples), validation_split)
    return examples[: train.stop], examples[validation.start :]


@functools.cache
def real_examples() -> Examples:
    return published.load("fashion_mnist").train


class StepLosses:
    """A way to gradients that notes the mean loss of each batch as it passes on."""

    losses = None  # the model has none of its own

    def __init__(self, way: Any) -> None:
        self.way, self.mode = way, way.mode
        self.recorded: list[float] = []

    def __call__(self, x: Tensor, labels: Tensor, mix: object = None) -> Tensor:
        logits: Tensor = self.way(x, labels, mix)
        self.recorded.append(F.cross_entropy(logits, labels).item())
        return logits


def new_fit(way: Way, dtype: str, *overrides: str) -> state.TrainState:
    """Returns a fit built from `conf/` as the train command builds it, in `dtype`, on the CPU."""
    config = compose.typed(compose.compose(*overrides))
    model = models.build(config.model, SHAPE, 10, config.seed).to(getattr(torch, dtype))
    return state.TrainState(
        model,
        optim.build(config.optimizer, model),
        way(model),
        EarlyStopping(**asdict(config.early_stopping)),
        config.seed,
        config.batch_size,
        config.data.scale,
    )


def weights_of(model: nn.Module) -> Arrays:
    """Returns copies of a stack's weights in Keras' order and layout, each kernel before its bias.

    Kernels are (in, out) or (height, width, in, out). Keras flattens maps channels last.
    """
    found, channels = [], 1
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
            found += [layer.weight.permute(2, 3, 1, 0), layer.bias]
        elif isinstance(layer, nn.Linear):
            kernel = layer.weight.view(layer.out_features, channels, -1).mT.flatten(1).T
            found, channels = [*found, kernel, layer.bias], 1
    return [weight.detach().numpy().copy() for weight in found]


def keras_mlp(masked: bool = False) -> Any:
    """Returns the lesson's network in Keras, giving logits and without dropout.

    With `masked`, it takes a second input that the hidden layer's activations are multiplied by.
    """
    pictures = keras.Input(SHAPE)
    h = keras.layers.Flatten()(pictures)
    h = keras.layers.Dense(128, activation="relu")(h)
    if not masked:
        return keras.Model(pictures, keras.layers.Dense(10)(h))
    mask = keras.Input((128,))
    h = keras.layers.Multiply()([h, mask])
    return keras.Model([pictures, mask], keras.layers.Dense(10)(h))


def keras_cnn() -> Any:
    """Returns the twin of `model=cnn` in Keras, giving logits and without dropout."""
    return keras.Sequential(
        [
            keras.Input((*SHAPE, 1)),
            keras.layers.Conv2D(32, kernel_size=(3, 3), activation="relu"),
            keras.layers.MaxPooling2D(pool_size=(2, 2)),
            keras.layers.Conv2D(64, kernel_size=(3, 3), activation="relu"),
            keras.layers.MaxPooling2D(pool_size=(2, 2)),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def keras_lesson() -> Any:
    """Returns the lesson's network in Keras as the lesson has it, with dropout and softmax."""
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def keras_twin(
    fit: state.TrainState, masked: bool = False, network: Any = None, **adam: float
) -> Any:
    """Returns `keras_mlp`, compiled as in the lesson but on logits, with the weights of `fit`."""
    twin = network or keras_mlp(masked)
    twin.compile(
        optimizer=keras.optimizers.Adam(**adam),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    twin.set_weights(weights_of(fit.model))
    dtype = str(next(fit.model.parameters()).dtype).removeprefix("torch.")
    assert {weight.dtype for weight in twin.get_weights()} == {np.dtype(dtype)}
    return twin


def as_keras_takes(examples: Examples, order: Tensor | slice = slice(None)) -> Any:
    """Returns `X / 255.0` and `y` of the lesson as arrays, in `order`."""
    return examples.images[order].numpy() / 255.0, examples.labels[order].numpy()


def close(rel: float, ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=rel, atol=0)


def close_weights(absolute: float, ours: Arrays, theirs: Arrays) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=absolute)


# ------------------------------------------------------------------------------- steps


NUM_STEPS = {"float64": 100, "float32": 20}  # of an epoch; its last batch is short
NUM_EPOCHS = {"float64": 3, "float32": 1}


def step_examples(dtype: str) -> Examples:
    return real_examples()[: 32 * NUM_STEPS[dtype] - 25]


@functools.cache
def keras_steps(network: str, dtype: str) -> tuple[list[float], Arrays]:
    """Returns the loss of each step that Keras takes, and the weights after the last."""
    fit, examples = new_fit(gradients.Autograd, dtype, network), step_examples(dtype)
    masks = [layer for _, layer in layers.dropouts(fit.model)]
    losses = []
    with precision(dtype):
        twin = keras_twin(fit, masked=bool(masks))
        for epoch in range(1, NUM_EPOCHS[dtype] + 1):
            order = seeds.epoch_order(fit.seed, epoch, len(examples))
            for step, batch in enumerate(order.split(fit.batch_size)):
                x, y = as_keras_takes(examples, batch)
                if masks:  # those that the fit will draw
                    masks[0].masks.at(epoch, step)
                    like = torch.empty((len(batch), 128), dtype=getattr(torch, dtype))
                    x = [x, masks[0].masks.next(like).numpy().copy()]
                twin.reset_metrics()  # what comes back is a mean since the last reset
                losses.append(float(twin.train_on_batch(x, y)[0]))
        return losses, twin.get_weights()


def our_steps(way: Way, network: str, dtype: str) -> tuple[list[float], Arrays]:
    fit = new_fit(way, dtype, network)
    recorder: Any = StepLosses(fit.gradients)
    fit.gradients = recorder
    nothing = real_examples()[:0]
    loop.fit(fit, step_examples(dtype), nothing, NUM_EPOCHS[dtype], loop.Watcher())
    return recorder.recorded, weights_of(fit.model)


@pytest.mark.slow
@pytest.mark.parametrize("network", [PLAIN_MLP, MLP])
@pytest.mark.parametrize("way", WAYS)
def test_three_hundred_steps_are_keras_steps(way: str, network: str) -> None:
    losses, weights = our_steps(WAYS[way], network, "float64")
    keras_losses, keras_weights = keras_steps(network, "float64")
    assert len(losses) == 300
    assert min(losses) < losses[0] / 4  # it did learn
    close(1e-9, losses, keras_losses)
    close_weights(1e-8, weights, keras_weights)


@pytest.mark.slow
def test_forty_steps_of_the_convolutional_network_are_keras_steps() -> None:
    fit = new_fit(gradients.Autograd, "float64", "model=cnn", "model.dropout=0")
    recorder: Any = StepLosses(fit.gradients)
    fit.gradients = recorder
    examples = real_examples()[: 32 * 40 - 25]
    with precision("float64"):
        twin, losses = keras_twin(fit, network=keras_cnn()), []
        for batch in seeds.epoch_order(fit.seed, 1, len(examples)).split(fit.batch_size):
            x, y = as_keras_takes(examples, batch)
            twin.reset_metrics()
            losses.append(float(twin.train_on_batch(x[..., None], y)[0]))
        keras_weights = twin.get_weights()
    loop.fit(fit, examples, examples[:0], 1, loop.Watcher())
    assert len(losses) == 40 and min(losses) < losses[0] / 2
    close(1e-9, recorder.recorded, losses)
    close_weights(1e-8, weights_of(fit.model), keras_weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_and_weighted_losses_are_keras_losses(smoothing: float) -> None:
    fit, examples = new_fit(gradients.Autograd, "float64", PLAIN_MLP), real_examples()[:200]
    weights = balanced_weights(examples.labels, 10)
    minimized = Objective(fit.model, smoothing, weights)
    with precision("float64"):
        twin = keras_mlp()
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
        twin.compile(optimizer=keras.optimizers.SGD(0.5), loss=loss)
        twin.set_weights(weights_of(fit.model))
        x, y = as_keras_takes(examples, torch.arange(200))
        class_weight = dict(enumerate(weights.tolist()))
        expected = twin.train_on_batch(x, np.eye(10)[y], class_weight=class_weight)
        after = twin.get_weights()
    gradients.Autograd(fit.model, minimized)(torch.from_numpy(x), examples.labels)
    logits = fit.model(torch.from_numpy(x))
    close(1e-7, minimized(logits, examples.labels)[0].item(), expected)
    torch.optim.SGD(fit.model.parameters(), lr=0.5).step()
    close_weights(1e-7, weights_of(fit.model), after)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_twenty_steps_in_float32_are_keras_steps(way: str) -> None:
    """What gap there is comes from Keras' 1 - β2^t, in float32 off by 1e-5 at first."""
    losses, _ = our_steps(WAYS[way], PLAIN_MLP, "float32")
    keras_losses, _ = keras_steps(PLAIN_MLP, "float32")
    assert len(losses) == 20
    close(1e-5, losses, keras_losses)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"lr": 0.05},
        {"epsilon": 1e-3},
        {"epsilon": 1e-12},
        {"lr": 0.01, "beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-4},
        {"beta_1": 0.0, "beta_2": 0.99},
        {"lr": 0.1, "weight_decay": 0.3},
    ],
    ids=str,
)
def test_adam_is_keras_adam(arguments: dict[str, float]) -> None:
    """Gradients from 1e-10 to 1 make epsilon count in some places and vanish in others."""
    draw = np.random.default_rng(0)
    shapes = [(7, 5), (5,)]
    start = [draw.normal(size=shape) for shape in shapes]
    parameters = [nn.Parameter(torch.tensor(weight)) for weight in start]
    scales = [10.0 ** draw.uniform(-10, 0, size=shape) for shape in shapes]
    adam = optim.Adam(parameters, **arguments)
    keras_names = {"learning_rate" if key == "lr" else key: arguments[key] for key in arguments}
    with precision("float64"):
        variables = [keras.Variable(weight) for weight in start]
        kind = keras.optimizers.AdamW if "weight_decay" in arguments else keras.optimizers.Adam
        keras_adam = kind(**keras_names)
        for _ in range(50):
            step = [scale * draw.normal(size=scale.shape) for scale in scales]
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = torch.tensor(gradient)
            adam.step()
            keras_adam.apply([keras.ops.convert_to_tensor(g) for g in step], variables)
        theirs = [np.asarray(variable) for variable in variables]
    for parameter, other, first in zip(parameters, theirs, start, strict=True):
        assert other.dtype == np.float64
        assert np.abs(other - first).min() > 0
        np.testing.assert_allclose(parameter.detach().numpy(), other, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------- history


def history_columns(rows: list[state.Row]) -> dict[str, list[float]]:
    keys = ("loss", "accuracy", "val_loss", "val_accuracy")
    return {key: [row[key] for row in rows] for key in keys}


def same_history(ours: list[state.Row], theirs: dict[str, list[float]]) -> None:
    for key, column in history_columns(ours).items():
        if key.endswith("accuracy"):
            assert column == theirs[key], key
        else:
            close(1e-9, column, theirs[key])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_of_model_fit_has_the_same_history(way: str) -> None:
    """4,005 pictures leave a short last batch in the training part (20) and validation (17)."""
    examples = real_examples()[:4005]
    fit = new_fit(WAYS[way], "float64", PLAIN_MLP)
    train, validation = split(examples, 0.1)
    assert (len(train) % 32, len(validation) % 32) == (20, 17)
    order = torch.cat(
        [seeds.epoch_order(fit.seed, 1, len(train)), torch.arange(len(train), len(examples))]
    )
    with precision("float64"):
        twin = keras_twin(fit)
        x, y = as_keras_takes(examples, order)
        kept = twin.fit(x, y, batch_size=32, validation_split=0.1, shuffle=False, verbose=0)
    loop.fit(fit, train, validation, 1, loop.Watcher())
    same_history(fit.history, kept.history)


@pytest.mark.slow
def test_a_fit_that_stops_early_ends_where_keras_ends() -> None:
    """The whole of it: epochs, history, early stopping and the best epoch's weights."""
    from keras.utils import PyDataset

    overrides = (
        PLAIN_MLP,
        "optimizer.lr=0.01",
        "early_stopping.patience=2",
        "early_stopping.min_delta=0.001",
        "early_stopping.restore_best_weights=true",
    )
    fit = new_fit(by_hand.ByHand, "float64", *overrides)
    train, validation = split(real_examples()[:700], 0.3)
    stopping = asdict(compose.typed(compose.compose(*overrides)).early_stopping)

    class InOrder(PyDataset):
        """The batches of each epoch in the order of the package."""

        epoch = 1

        def __len__(self) -> int:
            return math.ceil(len(train) / fit.batch_size)

        def __getitem__(self, step: int) -> Any:
            order = seeds.epoch_order(fit.seed, self.epoch, len(train))
            return as_keras_takes(train, order.split(fit.batch_size)[step])

    batches = InOrder()
    turn = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: setattr(batches, "epoch", epoch + 1)
    )
    with precision("float64"):
        twin = keras_twin(fit, learning_rate=0.01)
        kept = twin.fit(
            batches,
            shuffle=False,
            validation_data=as_keras_takes(validation),
            validation_batch_size=32,
            epochs=40,
            callbacks=[turn, keras.callbacks.EarlyStopping(**stopping)],
            verbose=0,
        )
        keras_weights = twin.get_weights()
    loop.fit(fit, train, validation, 40, loop.Watcher())
    assert 4 <= len(fit.history) < 40
    same_history(fit.history, kept.history)
    close_weights(1e-8, weights_of(fit.model), keras_weights)


# ------------------------------------------------------------------------------- early stopping


@functools.cache
def keras_scripted() -> Any:
    """Returns a compiled Keras model of one weight, which the callback takes its metrics from."""
    with precision("float64"):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        model.evaluate(np.zeros((1, 1)), np.zeros(1), verbose=0)
    return model


def keras_stops(figures: list[float], monitor: str, **arguments: Any) -> tuple[int, float]:
    """Returns the epochs that Keras' callback lets pass, and the weight after the last.

    The weight after epoch e is e, unless an earlier one is restored.
    """
    with precision("float64"):
        model, callback = keras_scripted(), keras.callbacks.EarlyStopping(monitor, **arguments)
        model.stop_training = False
        callback.set_model(model)
        callback.on_train_begin()
        for epoch, figure in enumerate(figures):
            model.set_weights([np.full((1, 1), epoch + 1.0)])
            callback.on_epoch_end(epoch, {monitor: figure})
            if model.stop_training:
                break
        callback.on_train_end()
        return epoch + 1, model.get_weights()[0].item()


def our_stops(figures: list[float], monitor: str, **arguments: Any) -> tuple[int, float]:
    model, stopping = nn.Linear(1, 1, bias=False), EarlyStopping(monitor, **arguments)
    for epoch, figure in enumerate(figures, 1):
        nn.init.constant_(model.weight, epoch)
        if stopping.stops_after(epoch, {monitor: figure}, model):
            break
    stopping.restore(model)
    return epoch, model.weight.item()


QUARTERS = st.integers(0, 8).map(lambda n: n / 4)  # ties, and gains of exactly min_delta
FIGURES = QUARTERS | st.floats(0, 4, allow_subnormal=False) | st.sampled_from([math.nan, math.inf])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(FIGURES, min_size=1, max_size=12),
    st.sampled_from(["loss", "accuracy", "val_loss", "val_accuracy"]),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.25, 0.5, 0.1, -0.25]),
    st.booleans(),
    st.sampled_from(["auto", "min", "max"]),
    st.none() | QUARTERS,
    st.integers(0, 5),
)
@example([1.0, 0.75, 0.75, 0.5, 0.5], "val_loss", 1, 0.25, True, "auto", None, 0)
@example([0.25, 0.5, 0.75, 0.75], "val_accuracy", 1, 0.25, True, "auto", None, 0)
@example([1.0, 2.0, 3.0], "val_loss", 0, 0.0, True, "auto", None, 0)
@example([1.0, 0.75, 0.5, 0.25], "val_loss", 2, 0.0, True, "auto", 0.25, 1)
@example([1.0], "val_loss", 0, 0.0, True, "auto", 0.5, 0)
def test_early_stopping_stops_and_restores_as_keras(
    figures: list[float],
    monitor: str,
    patience: int,
    min_delta: float,
    restore: bool,
    mode: str,
    baseline: float | None,
    start: int,
) -> None:
    arguments = {
        "patience": patience,
        "min_delta": min_delta,
        "restore_best_weights": restore,
        "mode": mode,
        "baseline": baseline,
        "start_from_epoch": start,
    }
    assert our_stops(figures, monitor, **arguments) == keras_stops(figures, monitor, **arguments)


# ------------------------------------------------------------------------------- data


SPLITS = st.floats(1e-20, 1, exclude_max=True) | st.builds(
    lambda part, whole: part / (part + whole), st.integers(1, 100), st.integers(1, 100)
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2000) | st.sampled_from([54_000, 60_000]), SPLITS)
@example(60_000, 0.1)
@example(60_000, 1 / 3)
@example(10, 0.9)
@example(100, 0.29)  # 100 · 0.29 is below 29 in floats, 100 · (1 - 0.29) is 71
@example(100, 0.57)
@example(1000, 0.001)
@example(3, 1e-17)
@example(1, 0.5)
def test_validation_split_takes_the_rows_that_keras_takes(size: int, share: float) -> None:
    from keras.src.trainers.data_adapters import array_slicing

    rows = np.arange(size)
    examples = Examples(torch.from_numpy(rows), torch.from_numpy(rows))
    try:
        (keras_train,), (keras_validation,) = array_slicing.train_validation_split((rows,), share)
    except ValueError:  # it leaves a part empty
        with pytest.raises(UserError, match=r"leaves no (training|validation) image"):
            split(examples, share)
        return
    train, validation = split(examples, share)
    np.testing.assert_array_equal(train.labels, keras_train)
    np.testing.assert_array_equal(validation.labels, keras_validation)
    np.testing.assert_array_equal(validation.images, keras_validation)


def test_pixels_reach_the_model_as_in_keras() -> None:
    """Each of the 256 bytes to the bit: NumPy's float64 quotient, which Keras makes a float32."""
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    ours = evaluation.scaled(torch.from_numpy(pixels), 255.0, torch.empty(1, 16, 16)).numpy()
    assert ours.dtype == np.float32
    assert ours.tobytes() == (pixels / 255.0).astype(np.float32).tobytes()
    with precision("float32"):
        flatten = keras.Sequential([keras.Input((16, 16)), keras.layers.Flatten()])
        theirs = flatten.predict(pixels / 255.0, verbose=0)
    assert ours.tobytes() == theirs.tobytes()


# ------------------------------------------------------------------------------- schedules


def test_a_cosine_is_that_of_keras() -> None:
    with precision("float64"):
        theirs = keras.optimizers.schedules.CosineDecay(1.0, decay_steps=37)
        for step in range(37):
            assert schedule.Cosine()(step / 37) == pytest.approx(float(theirs(step)), abs=1e-7)


PLATEAUS = st.fixed_dictionaries(
    {
        "monitor": st.sampled_from(["loss", "accuracy", "val_loss", "val_accuracy"]),
        "factor": st.sampled_from([0.1, 0.5]),
        "patience": st.integers(1, 3),
        "min_delta": st.sampled_from([0.0, 0.25, 0.1]),
        "cooldown": st.integers(0, 2),
        "min_lr": st.sampled_from([0.0, 0.001, 0.02]),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.lists(QUARTERS, min_size=1, max_size=12), PLATEAUS)
def test_a_plateau_is_that_of_keras(figures: list[float], arguments: dict[str, Any]) -> None:
    with precision("float64"):
        model, callback = keras_scripted(), keras.callbacks.ReduceLROnPlateau(**arguments)
        model.optimizer.learning_rate = 0.04
        callback.set_model(model)
        callback.on_train_begin()
        plateau, theirs, ours = schedule.Plateau(**arguments), [], []
        for epoch, figure in enumerate(figures):
            callback.on_epoch_end(epoch, {arguments["monitor"]: figure})
            theirs.append(float(np.asarray(model.optimizer.learning_rate)))
            plateau.after_epoch({arguments["monitor"]: figure}, 0.04)
            ours.append(0.04 * plateau(0.5))
    assert ours == pytest.approx(theirs, rel=1e-6)


# ------------------------------------------------------------------------------- layers


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest gap between two samples' distribution functions."""
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    below_a = np.searchsorted(a, both, side="right") / len(a)
    below_b = np.searchsorted(b, both, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())


@pytest.mark.parametrize(("network", "keras_network"), [(MLP, keras_mlp), ("model=cnn", keras_cnn)])
def test_initial_weights_are_distributed_as_in_keras(
    network: str, keras_network: Callable[[], Any]
) -> None:
    """Kolmogorov and Smirnov's test at a level of 1e-6, on five networks."""
    config = compose.typed(compose.compose(network))
    networks = [models.build(config.model, SHAPE, 10, seed) for seed in range(5)]
    ours = zip(*map(weights_of, networks), strict=True)
    with precision("float32"):
        keras.utils.set_random_seed(0)
        theirs = zip(*(keras_network().get_weights() for _ in range(5)), strict=True)
        for mine, other in zip(ours, theirs, strict=True):
            a, b = np.stack(mine), np.stack(other)  # (networks, ..., in, out), or (networks, out)
            assert a.shape == b.shape
            if a.ndim == 2:
                assert not a.any() and not b.any()
                continue
            limit = math.sqrt(6 / (math.prod(a.shape[1:-2]) * sum(a.shape[-2:])))
            for sample in (a, b):
                assert limit * (1 - 20 / a.size) < np.abs(sample).max() <= limit * (1 + 1e-6)
            critical = math.sqrt(-math.log(1e-6 / 2) / 2) * math.sqrt(2 / a.size)
            assert ks_distance(a.ravel(), b.ravel()) < critical
            assert not np.array_equal(a[0], a[1])


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3, 0.5, 0.75])
def test_dropout_scales_and_keeps_as_keras(rate: float) -> None:
    num = 400_000
    x = np.linspace(0.5, 2, num, dtype=np.float32).reshape(4, -1)
    layer = layers.Dropout(rate)
    layer.masks.start(0, "dropout", len(x))
    with precision("float32"):
        keras_layer = keras.layers.Dropout(rate, seed=0)
        theirs = np.asarray(keras_layer(x, training=True))
        assert np.asarray(keras_layer(x, training=False)).tobytes() == x.tobytes()
    ours = layer.train()(torch.from_numpy(x)).numpy()
    assert layer.eval()(torch.from_numpy(x)).numpy().tobytes() == x.tobytes()
    deviation = math.sqrt(num * rate * (1 - rate))
    for y in (ours, theirs):
        kept = y != 0
        assert abs(kept.sum() - num * (1 - rate)) < 5 * deviation
        np.testing.assert_allclose(y[kept], x[kept] / (1 - rate), rtol=3e-7)
    assert ours.dtype == theirs.dtype


def test_probabilities_are_keras_predictions() -> None:
    fit = new_fit(gradients.Autograd, "float64", MLP)
    for parameter in fit.model.parameters():
        nn.init.normal_(parameter, std=0.2)  # biases too, and answers that are sure
    examples = real_examples()[:200]
    with precision("float64"):
        lesson = keras_lesson()
        lesson.set_weights(weights_of(fit.model))
        theirs = lesson.predict(as_keras_takes(examples)[0], verbose=0)
    assert theirs.max() > 0.999
    ours = evaluation.probabilities(fit.model, examples.images, 255.0).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=0)


# ------------------------------------------------------------------------------- summary


def keras_summary(model: Any) -> str:
    lines: list[str] = []
    model.summary(print_fn=lambda text, **_: lines.append(text))
    return "\n".join(lines)


def totals(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if "params:" in line]


def test_summary_counts_as_keras() -> None:
    config = compose.typed(compose.compose(MLP))
    model = models.build(config.model, SHAPE, 10, config.seed)
    with precision("float32"):
        lesson = keras_lesson()
        theirs = totals(keras_summary(lesson))
    dropped = [layer.rate for layer in lesson.layers if isinstance(layer, keras.layers.Dropout)]
    assert [layer.rate for _, layer in layers.dropouts(model)] == dropped
    assert weights.num_parameters(model) == lesson.count_params() == 101_770
    assert totals(summary(model, SHAPE)) == theirs
    assert theirs[0] == "Total params: 101,770 (397.54 KB)"


@pytest.mark.parametrize("hidden", [1, 4096])
def test_summary_writes_sizes_as_keras(hidden: int) -> None:
    with precision("float32"):
        layers = [keras.layers.Dense(hidden), keras.layers.Dense(10)]
        wide = keras.Sequential([keras.Input((3,)), *layers])
        theirs = totals(keras_summary(wide))
    assert totals(summary(mlp.MLP(hidden, 0.0, (3,)), (3,))) == theirs
