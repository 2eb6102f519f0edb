"""Bits that may not change unnoticed: streams, order, masks, initial weights, trained weights.

A recorded run is rerun to the bit, so whoever changes one of these on purpose changes it here, too.
What only draws and permutes is the same on every machine. What multiplies is the same for one
version of torch on one kind of processor; `TRAINED` holds what was seen, and others are skipped.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fashionnet import models
from fashionnet.config import compose
from fashionnet.data.examples import Examples
from fashionnet.models import layers, mlp
from fashionnet.models.weights import weights_sha256
from fashionnet.system import devices, seeds
from fashionnet.training import gradients, loop, optim, state
from fashionnet.training.early_stopping import EarlyStopping

CPU = torch.device("cpu")

DERIVED = {
    (0,): 2033344993903900207,
    (0, "torch"): 8921981299929402760,
    (0, "order", 1): 4374215849138048446,
    (0, "order", 2): 3741227544468472050,
    (1, "order", 1): 7605079523363444036,
}
ORDERS = {
    (0, 1): [0, 11, 3, 7, 6, 9, 2, 10, 5, 8, 4, 1],
    (0, 2): [2, 1, 5, 7, 4, 3, 6, 8, 10, 9, 0, 11],
    (7, 1): [7, 1, 0, 3, 10, 5, 4, 6, 2, 8, 9, 11],
}
DROPPED = [3, 7, 19, 20, 28, 31]  # of the first 32 numbers that a dropout of 0.2 sees
INITIAL = {  # by model and seed: the hash of all, the first three
    ("mlp", 0): ("bd19d628d4687211", [-0.0129981898, 0.0348788276, -0.0283456743]),
    ("mlp", 1): ("1411b0893d55dad8", [0.0327742212, -0.0268373638, 0.0569984876]),
    ("mlp_no_dropout", 0): ("f16d7fe31e1330cf", [-0.0129981898, 0.0348788276, -0.0283456743]),
}

# Runs of two epochs, by name, and what they came to: by torch's version, the instructions that it
# chose, and the processor, whose caches decide how MKL and oneDNN cut a product.
RUNS: dict[str, tuple[str, ...]] = {
    "mlp by hand": ("gradients=by_hand",),
    "mlp autograd": ("gradients=autograd",),
    "mlp_no_dropout": ("model=mlp_no_dropout",),
    "mlp sgd": ("optimizer=sgd",),
    "resnet18 from scratch": ("model=resnet18", "model.trained=scratch", "model.size=32"),
}
TRAINED: dict[str, dict[str, str]] = {
    "2.13.0+cpu AVX512 AuthenticAMD 25 17 1 f946032d": {
        "mlp by hand": "0b61849b95466c3c",
        "mlp autograd": "265922e88e4f1958",
        "mlp_no_dropout": "9cfb05dbabeb34bd",
        "mlp sgd": "708557eb1f945a54",
        "resnet18 from scratch": "53472b3d5f53333b",
    },
    "2.13.0+cpu AVX2 AuthenticAMD 25 17 1 f946032d": {
        "mlp by hand": "ead659976cd98af9",
        "mlp autograd": "fa8f4b5ccb6103c2",
        "mlp_no_dropout": "f3177cc980328ea3",
        "mlp sgd": "318af55931abe1fd",
        "resnet18 from scratch": "5fb39959e5d035d9",
    },
}


def machine() -> str:
    """Returns what trained weights depend on, as text."""
    path = Path("/proc/cpuinfo")  # Linux's
    text = path.read_text() if path.exists() else ""
    lines = [line.partition(":") for line in text.splitlines()]
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    parts = [found.get(name, "?") for name in ("vendor_id", "cpu family", "model", "stepping")]
    vectors = [f for f in found.get("flags", "").split() if f.startswith(("avx", "amx", "fma"))]
    parts.append(hashlib.sha256(" ".join(sorted(vectors)).encode()).hexdigest()[:8])
    return " ".join([torch.__version__, torch.backends.cpu.get_cpu_capability(), *parts])


def short(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("names", "seed"), DERIVED.items())
def test_the_seeds_of_streams(names: tuple[int, str, int], seed: int) -> None:
    assert seeds.derive(*names) == seed


@pytest.mark.parametrize(("stream", "order"), ORDERS.items())
def test_the_order_of_an_epoch(stream: tuple[int, int], order: list[int]) -> None:
    assert seeds.epoch_order(*stream, 12).tolist() == order


def test_the_order_of_the_whole_set() -> None:
    assert short(seeds.epoch_order(0, 1, 54_000)) == "04aaa07b531bce0f"


def test_the_masks_of_dropout() -> None:
    model = mlp.MLP(8, 0.2, (2, 3), 4)
    layers.start_streams(model, 0, 32)
    ((_, layer),) = layers.dropouts(model)
    drawn = layer.masks.next(torch.ones(4, 8))
    assert drawn.flatten().eq(0).nonzero().flatten().tolist() == DROPPED
    layer.masks.at(2, 70)
    assert short(layer.masks.next(torch.ones(32, 8))) == "60e253d33de9d371"


@pytest.mark.parametrize(("which", "expected"), INITIAL.items())
def test_the_initial_weights(which: tuple[str, int], expected: tuple[str, list[float]]) -> None:
    name, seed = which
    config = compose.typed(compose.compose(f"model={name}"))
    weights = models.build(config.model, (28, 28), 10, seed).state_dict()
    # The same draws everywhere; without FMA, on old processors, the last bit is another one.
    first = next(iter(weights.values())).flatten()[:3].tolist()
    assert first == pytest.approx(expected[1], rel=1e-6)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert weights_sha256(weights)[:16] == expected[0]


def trained(*overrides: str) -> str:
    """Returns the hash of the weights after two epochs of pictures made of noise."""
    config = compose.typed(compose.compose(*overrides))
    noise = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (96, 28, 28), dtype=torch.uint8, generator=noise)
    examples = Examples(pictures, torch.randint(0, 10, (96,), generator=noise))
    with devices.started("cpu", 1, False):
        model = models.build(config.model, (28, 28), 10, 0)
        optimizer = optim.build(config.optimizer, model)
        step_gradients = gradients.choose(config.gradients, model)
        fit = state.TrainState(model, optimizer, step_gradients, EarlyStopping(), 0, 32, 255.0)
        loop.fit(fit, examples, examples, 2, loop.Watcher())
    return weights_sha256(model.state_dict())[:16]


@pytest.mark.parametrize("name", RUNS)
def test_the_trained_weights(name: str) -> None:
    known = TRAINED.get(machine())
    if known is None:
        pytest.skip(f"no weights are recorded for {machine()}")
    assert trained(*RUNS[name]) == known[name]
