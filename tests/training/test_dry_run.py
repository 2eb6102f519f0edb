"""What a network refuses is reported before the first step, and the check changes nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fashionnet.data.examples import Examples
from fashionnet.errors import UserError
from fashionnet.models.layers import Dropout
from fashionnet.models.mlp import MLP
from fashionnet.system import processes, seeds
from fashionnet.system.torchvision_import import import_torchvision
from fashionnet.train import train
from fashionnet.training import dry_run, gradients, loop
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.optim import Adam
from fashionnet.training.state import TrainState

NAME = "shufflenet_v2_x0_5"

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(num: int, *shape: int) -> Examples:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=generator)
    return Examples(images, torch.arange(num) % 4)


def fit_of(model: nn.Module, batch_size: int = 4) -> TrainState:
    return TrainState(
        model,
        Adam(model.parameters()),
        gradients.choose("autograd", model),
        EarlyStopping(),
        0,
        batch_size,
        255.0,
    )


def normalizing() -> nn.Sequential:
    """A network with everything that a pass could move."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        Dropout(0.5),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize("num", [8, 9, 1])
def test_a_last_batch_of_one_is_refused_with_ways_out_that_work(num: int) -> None:
    fit, examples = fit_of(normalizing()), pictures(num, 3, 4)
    if num == 8:
        dry_run.check(fit, examples, 4)
        return
    with pytest.raises(UserError) as caught:
        dry_run.check(fit, examples, 4)
    said = str(caught.value)
    if num == 1:
        assert "batch_size=4 and 1 training pictures make batches" in said
        return
    assert said.startswith("the last batch of an epoch has 1 of the 9 training pictures, and the")
    assert said.endswith("use data.limit=8, a batch_size other than 4")
    dry_run.check(fit_of(normalizing(), 3), examples, 4)
    dry_run.check(fit, examples[:8], 4)


def test_batches_of_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size=1 and 9 .* use batch_size=2 or more"):
        dry_run.check(fit_of(normalizing(), 1), pictures(9, 3, 4), 4)
    dry_run.check(fit_of(MLP(4, 0.5, (3, 4), 4), 1), pictures(9, 3, 4), 4)


def test_the_rows_of_a_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fit_of(normalizing())
    dry_run.check(fit, pictures(10, 3, 4), 4)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    dry_run.check(fit, pictures(8, 3, 4), 4)
    with pytest.raises(UserError, match=r"has 2 of the 10 .* use data\.limit=8, a batch_size"):
        dry_run.check(fit, pictures(10, 3, 4), 4)


def test_a_pass_changes_nothing() -> None:
    def generators() -> list[Any]:
        return [random.random(), float(np.random.rand()), torch.rand(3).tolist()]

    def fitted(checked: bool) -> tuple[dict[str, Tensor], list[Any]]:
        seeds.seed_everything(3)
        fit, examples = fit_of(normalizing()), pictures(10, 3, 4)
        fit.model[3].eval()  # a mode of one's own
        if checked:
            before = {key: value.clone() for key, value in fit.model.state_dict().items()}
            modes = [module.training for module in fit.model.modules()]
            dry_run.check(fit, examples, 4)
            assert [module.training for module in fit.model.modules()] == modes
            assert all(p.grad is None for p in fit.model.parameters())
            for key, value in fit.model.state_dict().items():
                assert torch.equal(value, before[key]), key
        loop.fit(fit, examples, pictures(3, 3, 4), 2, loop.Watcher())
        return fit.model.state_dict(), generators()

    (state, drawn), (expected, expected_drawn) = fitted(True), fitted(False)
    assert drawn == expected_drawn
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


class Returning(nn.Module):
    """A network that returns something of one's own."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(12, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x.flatten(1)))


class OwnLoss(Returning):
    """A network with a loss of one's own."""

    def __init__(self, make: Any) -> None:
        super().__init__(lambda logits: logits)
        self.loss = make


def _refusing(logits: Tensor) -> Tensor:
    raise AssertionError


MISFITS: dict[str, tuple[nn.Module, str]] = {
    "another shape": (nn.Sequential(nn.Flatten(), nn.Linear(99, 4)), r"batch of the shape \(1, 3"),
    "colors": (nn.Sequential(nn.Conv2d(3, 4, 1)), r"cannot take a batch of the shape \(1, 3, 4\)"),
    "silent": (Returning(_refusing), "cannot take a batch .*: AssertionError$"),
    "no forward": (nn.ModuleList([nn.Linear(2, 2)]), 'missing the required "forward" function'),
    "too few": (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
        r"returns float32 \(1, 3\) for 1 pi",
    ),
    "too many": (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), "float logits of 4 classes are ne"),
    "maps": (Returning(lambda y: y[..., None, None]), r"returns float32 \(1, 4, 1, 1\)"),
    "a tuple": (Returning(lambda y: (y, y)), "returns a tuple, and logits are needed"),
    "a dictionary": (Returning(lambda y: {"logits": y}), "returns a dict, and logits are needed"),
    "labels": (Returning(lambda y: y.long()), r"returns int64 \(1, 4\)"),
    "nan": (Returning(lambda y: y * float("nan")), "gives nan or infinite logits before the first"),
    "infinite": (Returning(lambda y: y / 0), "gives nan or infinite logits before the first step"),
    "detached": (Returning(lambda y: y.detach()), "does not require grad"),
    "infinite loss": (
        OwnLoss(lambda y, _: y.sum() / 0),
        "loss of the model .*OwnLoss is nan or in",
    ),
    "loss of pairs": (
        OwnLoss(lambda y, _: y.sum(1, keepdim=True)),
        r"loss must .* returned \(4, 1\)",
    ),
    "no loss": (OwnLoss(lambda *_: None), "OwnLoss.loss must return .* it returned NoneType"),
    "loss of ints": (OwnLoss(lambda y, _: y.long().sum()), "OwnLoss.loss must return a float tens"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_a_network_of_ones_own_cannot_take_is_said(name: str) -> None:
    model, said = MISFITS[name]
    with pytest.raises(UserError, match=said):
        dry_run.check(fit_of(model), pictures(9, 3, 4), 4)


def test_a_fault_in_a_network_keeps_its_traceback() -> None:
    with pytest.raises(NameError):
        dry_run.check(fit_of(Returning(lambda y: nonsense)), pictures(9, 3, 4), 4)  # type: ignore[name-defined] # noqa: F821
    with pytest.raises(AttributeError):
        dry_run.check(fit_of(Returning(lambda y: y.nonsense)), pictures(9, 3, 4), 4)


@pytest.mark.parametrize("head_stages", [1, 2])
def test_a_transformer_for_pictures_of_another_size_is_refused_with_its_own(
    head_stages: int, tmp_path: Path
) -> None:
    import_torchvision()  # which timm imports
    pytest.importorskip("timm")
    keys = ("model=timm", "model.name=vit_tiny_patch16_224", "model.trained=scratch")
    with pytest.raises(
        UserError, match=r"name=vit_tiny_\w+ cannot take pictures of 160 pixels .*model\.size=224"
    ):
        train(
            *(*keys, "model.size=160", f"model.head_stages={head_stages}"),
            *("data.limit=20", "device=cpu"),
            run_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_the_lessons_last_batch_is_known_before_anything_is_written(tmp_path: Path) -> None:
    keys = ("model=transfer", f"model.name={NAME}", "model.trained=scratch", "data.limit=33")
    with pytest.raises(UserError, match=r"the last batch .*use data\.limit=32, a batch_size other"):
        train(*keys, "device=cpu", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
