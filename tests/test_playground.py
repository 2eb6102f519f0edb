"""`python -m fashionnet.playground`: one neuron and the XOR network, in NumPy alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fashionnet import playground, toys
from fashionnet.errors import UserError
from fashionnet.toys import POINTS, TARGETS, Weights, XorResult, neuron, train_xor

if TYPE_CHECKING:
    from tests.conftest import Commands

LESSON = ([0.5, 0.8, 0.2], [0.9, -0.4, 0.3], 0.1)
EXPLODES = 50.0
OVERFLOWS = 1e300
STUCK = 61  # the one seed below 100 that the defaults do not solve


@pytest.fixture(scope="module")
def solved() -> XorResult:
    """The network that the defaults train."""
    return train_xor()


@pytest.fixture(scope="module")
def stuck() -> XorResult:
    """A network that the defaults leave at guessing."""
    return train_xor(seed=STUCK)


# --- one neuron


def test_the_lessons_neuron() -> None:
    """Its products, sum and output are the lesson's."""
    products, weighted_sum, raw, activated = neuron(*LESSON)
    np.testing.assert_allclose(products, [0.45, -0.32, 0.06])
    assert (weighted_sum, raw, activated) == pytest.approx((0.19, 0.29, 0.29))


@pytest.mark.parametrize(
    ("activation", "negative", "positive"),
    [
        ("relu", 0.0, 2.0),
        ("sigmoid", 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))),
        ("tanh", math.tanh(-2), math.tanh(2)),
        ("softplus", math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))),
        ("linear", -2.0, 2.0),
        ("step", 0.0, 1.0),
    ],
)
def test_activations(activation: str, negative: float, positive: float) -> None:
    """Each gives what its formula says, below zero and above, and does not overflow."""
    assert neuron([1.0], [-3.0], 1.0, activation).activated == pytest.approx(negative)
    assert neuron([1.0], [3.0], -1.0, activation).activated == pytest.approx(positive)
    for extreme in (-1e4, 1e4):
        assert math.isfinite(neuron([extreme], [1.0], 0.0, activation).activated)


def test_every_activation_is_tested() -> None:
    """A new activation needs a line above."""
    marks = test_activations.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(toys.ACTIVATIONS)


def test_a_step_needs_more_than_zero() -> None:
    """At zero itself it is off, as ReLU is."""
    assert neuron([1.0], [0.0], 0.0, "step").activated == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1.0, 2.0], [1.0]), r"inputs \(2\) and weights \(1\)"),
        (([1.0], [1.0], 0.0, "rleu"), "activation=rleu .* choose relu, sigmoid"),
        (([math.nan], [1.0]), "finite"),
        (([1.0], [1.0], math.inf), "finite"),
        (([[1.0]], [[1.0]]), "row of numbers"),
    ],
)
def test_what_a_neuron_refuses(arguments: tuple, named: str) -> None:
    """Wrong numbers are user errors that name what is wrong."""
    with pytest.raises(UserError, match=named):
        neuron(*arguments)


def test_the_neuron_command(commands: Commands, tmp_path: Path) -> None:
    """It prints every step of the lesson's neuron, then the lesson's line."""
    lines = commands.succeed("playground", "neuron", cwd=tmp_path).splitlines()
    figures = ["0.450", "-0.320", "0.060", "0.190", "0.100"]
    assert [line.split()[-1] for line in lines[:5]] == figures
    assert lines[-2:] == ["relu(x) = max(0, x)", "raw 0.290 -> activated 0.290"]


def test_a_neuron_of_ones_own(commands: Commands, tmp_path: Path) -> None:
    """Inputs, weights, bias and activation are taken from the command line."""
    given = "neuron --inputs 1 2 --weights 0.5 -0.25 --bias -1 --activation sigmoid"
    stdout = commands.succeed("playground", *given.split(), cwd=tmp_path)
    assert stdout.splitlines()[-1] == "raw -1.000 -> activated 0.269"


def test_figures_keep_small_and_large_numbers() -> None:
    """Three decimals would show 0.000 or hundreds of digits; an overflow is told as it is."""
    assert "raw 1.000e-06 -> activated 1.000e-06" in playground.neuron_steps([1e-6], [1], 0, "relu")
    huge = playground.neuron_steps([1e308, 1e308], [10, -10], 0, "relu")
    assert "raw nan" in huge


# --- XOR


def test_the_defaults_solve_xor(solved: XorResult) -> None:
    """All four are right, and the loss fell from each line that is printed to the next."""
    assert solved.solved
    assert not solved.exploded
    np.testing.assert_allclose(solved.predictions, TARGETS, atol=0.01)
    assert len(solved.losses) == 1001
    assert (np.diff(solved.losses[[0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]]) < 0).all()
    assert solved.losses[-1] == toys.loss(solved.weights, POINTS, TARGETS)
    assert playground.verdict(solved) == "solved: 4 of 4 right"


@pytest.mark.slow
def test_how_many_seeds_solve_xor() -> None:
    """The help names 99 of 100."""
    assert "99 of the seeds 0 to 99" in playground._XOR
    assert [seed for seed in range(100) if not train_xor(seed=seed).solved] == [STUCK]


def test_the_same_seed_gives_the_same_bits(solved: XorResult) -> None:
    """Training draws from its seed alone, and another seed starts elsewhere."""
    np.random.seed(7)
    again = train_xor()
    np.testing.assert_array_equal(again.losses, solved.losses)
    for ours, theirs in zip(again.weights, solved.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert train_xor(epochs=1, seed=1).losses[0] != solved.losses[0]


def test_the_same_network_in_torch(solved: XorResult) -> None:
    """From the same weights torch's autograd and SGD give the same losses, epoch for epoch."""
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    first, _, second = network
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(solved.initial.hidden.T))
        first.bias.copy_(torch.from_numpy(solved.initial.hidden_bias))
        second.weight.copy_(torch.from_numpy(solved.initial.output))
        second.bias.copy_(torch.from_numpy(solved.initial.output_bias))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    points, targets = torch.from_numpy(POINTS), torch.from_numpy(TARGETS)
    losses = []
    for _ in solved.losses:
        loss = F.binary_cross_entropy_with_logits(network(points).squeeze(1), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(losses, solved.losses, rtol=0, atol=1e-10)


@pytest.mark.parametrize("hidden", [1, 2, 8, 32])
def test_backpropagation_agrees_with_differences(hidden: int) -> None:
    """Its slopes are the measured ones, whatever the width."""
    for seed in range(5):
        assert toys.gradient_error(toys.initial_weights(hidden, seed)) < playground._AGREE


@pytest.mark.parametrize("part", Weights._fields)
def test_a_wrong_gradient_is_caught(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slope that is off by a thousandth in one part is far above rounding, and is told."""
    right = toys.gradients

    def wrong(*arguments: object) -> Weights:
        slopes = right(*arguments)
        return slopes._replace(**{part: getattr(slopes, part) * 1.001})

    monkeypatch.setattr(toys, "gradients", wrong)
    assert toys.gradient_error(toys.initial_weights(8, 0)) > 5e-4
    monkeypatch.setattr(sys, "argv", ["playground", "xor", "--check-gradients", "--epochs", "1"])
    playground.main()
    assert "DIFFER, largest relative error 1.0e-03" in capsys.readouterr().out


def test_a_stuck_network_is_told(stuck: XorResult) -> None:
    """Seed and width are suggested, and predictions of one half do not count as right."""
    np.testing.assert_allclose(stuck.predictions, 0.5, atol=1e-9)
    assert not stuck.solved
    raw = POINTS @ stuck.weights.hidden + stuck.weights.hidden_bias
    assert stuck.num_dead == sum(bool((raw[:, neuron] <= 0).all()) for neuron in range(8)) > 0
    assert playground.verdict(stuck) == (
        f"stuck: 0 of 4 right, {stuck.num_dead} of 8 hidden neurons are dead; "
        "try another --seed or a larger --hidden"
    )


def test_a_network_that_large_steps_killed_is_told() -> None:
    """Where the loss rose, if not to an explosion, smaller steps are advised as well."""
    killed = train_xor(learning_rate=5.0)
    assert (killed.exploded, killed.num_dead) == (False, 8)
    assert playground.verdict(killed).startswith("stuck: 0 of 4 right, 8 of 8")
    assert "a smaller --learning-rate" in playground.verdict(killed)


def test_training_that_ended_early_is_told() -> None:
    """While the loss still falls, more epochs are the advice."""
    assert playground.verdict(train_xor(epochs=5)).startswith("not solved yet: 3 of 4 right")


def test_an_explosion_is_told() -> None:
    """A step too large makes the loss many times what it was, or no number at all."""
    grown, overflown = train_xor(learning_rate=EXPLODES), train_xor(learning_rate=OVERFLOWS)
    assert grown.exploded
    assert len(grown.losses) == 1001
    assert playground.verdict(grown).startswith("exploded: the loss rose from 0.7170 to 27.7289")
    assert overflown.exploded
    assert not np.isfinite(overflown.losses[-1])
    assert np.isfinite(overflown.losses[:-1]).all()  # ends where there is nothing left to learn
    assert playground.verdict(overflown).startswith("exploded: the loss is inf after epoch 1")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"hidden": toys.MAX_HIDDEN + 1}, "hidden=10001"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": -0.5}, "learning_rate=-0.5"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": toys.MAX_EPOCHS + 1}, "epochs=1000001"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_xor_refuses(wrong: dict, named: str) -> None:
    """Numbers out of range are user errors that name them."""
    with pytest.raises(UserError, match=named):
        train_xor(**wrong)


# --- XOR on the command line


def test_the_xor_command(commands: Commands, tmp_path: Path, solved: XorResult) -> None:
    """It prints the gradients' agreement, the falling loss, the truth table and the end."""
    stdout = commands.succeed("playground", "xor", "--check-gradients", cwd=tmp_path)
    check, *lines = stdout.splitlines()
    assert "agree, largest relative error" in check
    assert float(check.split()[-1]) < playground._AGREE
    epochs = {int(line.split()[1]): line.split()[3] for line in lines if "loss" in line}
    assert list(epochs) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert all(f"{solved.losses[n]:.4f}" == printed for n, printed in epochs.items())
    table = [line.split() for line in lines[-5:-1]]
    assert [row[:3] for row in table] == [list("000"), list("011"), list("101"), list("110")]
    assert [row[4] for row in table] == ["right"] * 4
    assert lines[-1] == "solved: 4 of 4 right"


def test_options_reach_training(commands: Commands, tmp_path: Path) -> None:
    """Width, rate, epochs and seed are those of the command line."""
    given = "xor --hidden 3 --learning-rate 0.25 --epochs 7 --seed 5"
    stdout = commands.succeed("playground", *given.split(), cwd=tmp_path)
    expected = train_xor(hidden=3, learning_rate=0.25, epochs=7, seed=5)
    assert f"epoch 7  loss {expected.losses[-1]:.4f}" in stdout


@pytest.mark.parametrize("rate", [EXPLODES, OVERFLOWS])
def test_an_explosion_is_no_error(commands: Commands, tmp_path: Path, rate: float) -> None:
    """It is an experiment: status 0, said in words, and NumPy warns of nothing."""
    given = ("--learning-rate", str(rate), "--ascii")
    stdout = commands.succeed("playground", "xor", *given, cwd=tmp_path, PYTHONWARNINGS="error")
    assert stdout.splitlines()[-1].startswith("exploded: the loss ")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("", "required: toy"),
        ("nand", "invalid choice: 'nand'"),
        ("neuron --inputs 1 2", r"inputs (2) and weights (3)"),
        ("neuron --activation rleu", "activation=rleu"),
        ("xor --hidden 0", "hidden=0"),
        ("xor --learning-rate nan", "learning_rate=nan"),
        ("xor --epochs 0", "epochs=0"),
        ("xor --plot boundary.jpg", "must end its name in .png"),
        ("xor --plot nowhere/boundary.png", "nowhere/boundary.png cannot be written"),
        ("xor --plot folder.png", "folder.png cannot be written"),
    ],
)
def test_wrong_input_is_one_line(
    commands: Commands, tmp_path: Path, given: str, named: str
) -> None:
    """Status 2, one line that names the mistake, and nothing left behind."""
    (tmp_path / "folder.png").mkdir()
    assert named in commands.fail("playground", *given.split(), cwd=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.png"]


@pytest.mark.parametrize("given", [["neuron"], ["xor", "--epochs", "2", "--ascii"]])
def test_it_starts_with_numpy_alone(commands: Commands, tmp_path: Path, given: list[str]) -> None:
    """No torch, no matplotlib and no other heavy package is imported: it starts at once."""
    script = (
        "import json, runpy, sys; sys.argv[0] = 'playground'; "
        "runpy.run_module('fashionnet.playground', run_name='__main__'); "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = commands.call([sys.executable, "-c", script, *given], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    packages = json.loads(done.stdout.splitlines()[-1])
    assert "numpy" in packages
    foreign = {"torch", "torchvision", "matplotlib", "hydra", "omegaconf", "PIL", "tensorboard"}
    assert not foreign & set(packages)


# --- pictures


def test_the_boundary_as_text(solved: XorResult) -> None:
    """Points stand where they are, and around each the network says what XOR wants."""
    *lines, legend = playground.ascii_boundary(solved.weights).splitlines()
    assert {len(line) for line in lines} == {41}
    assert len(lines) == 21
    for line, column, target in ((15, 10, "0"), (5, 10, "1"), (15, 30, "1"), (5, 30, "0")):
        around = lines[line][column - 1] + lines[line][column + 1]
        assert (lines[line][column], around) == (target, "##" if target == "1" else "..")
    assert all(f"[{shade}]" in legend for shade in ".:+#")


def test_text_has_the_first_input_to_the_right_and_the_second_up() -> None:
    """Seen on networks that look at one input alone."""
    output, bias = np.array([50.0]), np.array([-70.0])
    across = Weights(np.array([[1.0], [0.0]]), np.array([1.0]), output, bias)
    upwards = Weights(np.array([[0.0], [1.0]]), np.array([1.0]), output, bias)
    assert all(
        line[0] == "." and line[-1] == "#"
        for line in playground.ascii_boundary(across).splitlines()[:21]
    )
    lines = playground.ascii_boundary(upwards).splitlines()
    assert (lines[0], lines[20]) == ("#" * 41, "." * 41)


def test_no_boundary_where_there_are_no_numbers() -> None:
    """A network of nan is drawn as what it is."""
    nothing = Weights(*(np.full_like(part, np.nan) for part in toys.initial_weights(2, 0)))
    assert playground.ascii_boundary(nothing).splitlines()[0] == "?" * 41


@pytest.mark.parametrize(
    "given",
    ["", f"--seed {STUCK}", "--epochs 1", f"--learning-rate {OVERFLOWS}"],
)
def test_the_plot(commands: Commands, tmp_path: Path, given: str) -> None:
    """However training ends there is a picture with something in both halves."""
    from PIL import Image

    target = tmp_path / "boundary.png"
    commands.succeed("playground", "xor", "--plot", target, *given.split(), cwd=tmp_path)
    assert list(tmp_path.iterdir()) == [target]
    with Image.open(target) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (540, 1320, 3)
    left, right = np.split(pixels, 2, axis=1)
    for half in (left, right):
        assert len(np.unique(half.reshape(-1, 3), axis=0)) > 20
    if not given:  # both classes are seen, and between them a black line
        red, green, blue = np.moveaxis(left[:, 60:420], 2, 0)
        assert (red - blue > 50).mean() > 0.2
        assert (blue - red > 50).mean() > 0.2
        assert (red + green + blue == 0).any()


def test_a_plot_needs_matplotlib(commands: Commands, tmp_path: Path) -> None:
    """Without it one line says what to install, and that text works."""
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "matplotlib.py").write_text("raise ImportError\n")
    line = commands.fail(
        *("playground", "xor", "--plot", "boundary.png"),
        cwd=tmp_path,
        **commands.importing(missing),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert "[plots]" in line and "-m pip install" in line
    assert "--ascii" in line
    assert list(tmp_path.iterdir()) == [missing]
