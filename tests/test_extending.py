"""Somebody's own network and optimizer, plugged in without touching the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun

MODULE = """\
from pathlib import Path

import torch
from torch import nn

Path("imported").touch()  # tells on whoever imports this


class ConvNet(nn.Module):
    def __init__(self, channels: int, num_classes: int, pool: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.pool = nn.MaxPool2d(pool)
        self.dropout = nn.Dropout(0.5)  # torch's own
        self.head = nn.LazyLinear(num_classes)
        self.head.initialize_parameters(torch.zeros(1, channels * (28 // pool) ** 2))
        self.head.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.conv(x.unsqueeze(1)).relu())
        return self.head(self.dropout(x.flatten(1)))
"""
CONF = {
    "model/conv.yaml": "_target_: mynets.ConvNet\nchannels: 4\npool: 4\n",
    "optimizer/adamax.yaml": "_target_: torch.optim.Adamax\nlr: 0.01\n",
    "experiment/mine.yaml": """\
# @package _global_
defaults:
  - override /model: conv
  - override /optimizer: adamax

epochs: 2
data:
  limit: 640
""",
}
ALLOW = "mynets.ConvNet,torch.optim.Adamax"
TRAIN = ("train", "--config-dir", "conf", "experiment=mine", "device=cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a module, and configurations that name what is in it."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "mynets.py").write_text(MODULE)
    for name, text in CONF.items():
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(commands: Commands, folder: Path) -> FinishedRun:
    """A run of the user's network and optimizer, both allowed."""
    path = commands.importing(folder)
    commands.succeed(*TRAIN, "hydra.run.dir=run", cwd=folder, FASHIONNET_ALLOW=ALLOW, **path)
    (folder / "imported").unlink()
    return commands.opened(folder / "run")


def test_own_network_and_optimizer_are_trained(run: FinishedRun) -> None:
    record = run.record
    assert record["status"] == "completed"
    assert record["config"]["model"]["_target_"] == "mynets.ConvNet"
    assert record["config"]["optimizer"]["_target_"] == "torch.optim.Adamax"
    assert record["parameters"] == (9 * 4 + 4) + (4 * 7 * 7 * 10 + 10)
    first, second = run.history
    assert second["val_loss"] < first["val_loss"] < 2.3  # 2.3 is guessing
    state = torch.load(run.path / "checkpoints/last.pt", weights_only=True)
    assert set(state["model"]) == {"conv.weight", "conv.bias", "head.weight", "head.bias"}


def test_own_network_gives_the_same_bits_again(
    commands: Commands, folder: Path, run: FinishedRun
) -> None:
    path = commands.importing(folder)
    commands.succeed(*TRAIN, "hydra.run.dir=again", cwd=folder, FASHIONNET_ALLOW=ALLOW, **path)
    (folder / "imported").unlink()
    assert commands.opened(folder / "again").bits == run.bits


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        ("", "model._target_=mynets.ConvNet"),
        ("mynets,mynets.Other", "model._target_=mynets.ConvNet"),
        ("torch.optim.Adamax", "model._target_=mynets.ConvNet"),
        ("mynets.ConvNet", "optimizer._target_=torch.optim.Adamax"),
    ],
)
def test_target_that_is_not_allowed_is_refused(
    allowed: str, refused: str, commands: Commands, folder: Path
) -> None:
    told = commands.fail(
        *(*TRAIN, "hydra.run.dir=refused"),
        cwd=folder,
        FASHIONNET_ALLOW=allowed,
        **commands.importing(folder),
    )
    assert refused in told and "FASHIONNET_ALLOW" in told
    assert not (folder / "refused").exists()
    was_imported = (folder / "imported").exists()
    (folder / "imported").unlink(missing_ok=True)
    assert was_imported is ("mynets.ConvNet" in allowed.split(","))


def test_key_that_the_class_does_not_have_is_told(commands: Commands, folder: Path) -> None:
    path = commands.importing(folder)
    told = commands.fail(*TRAIN, "+model.depth=3", cwd=folder, FASHIONNET_ALLOW=ALLOW, **path)
    (folder / "imported").unlink()
    assert "model.depth" in told and "channels" in told


def test_run_is_evaluated_and_predicts_where_it_is_allowed_only(
    commands: Commands, folder: Path, run: FinishedRun
) -> None:
    Image.new("L", (28, 28)).save(folder / "black.png")
    path = commands.importing(folder)
    evaluate, predict = ("evaluate", "run", "--json"), ("predict", "run", "black.png", "--json")
    for command in (evaluate, predict):
        told = commands.fail(*command, cwd=folder, **path)
        assert "mynets.ConvNet" in told and "FASHIONNET_ALLOW" in told
        assert not (folder / "imported").exists()

    told = commands.succeed(*evaluate, cwd=folder, FASHIONNET_ALLOW="mynets.ConvNet", **path)
    assert json.loads(told) == {"split": "validation", **run.record["validation"]}
    told = commands.succeed(*predict, cwd=folder, FASHIONNET_ALLOW="mynets.ConvNet", **path)
    assert sum(json.loads(told)[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    (folder / "imported").unlink()
