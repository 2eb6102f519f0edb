"""precision=bfloat16: a network's forward and backward pass, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashionnet.errors import UserError
from fashionnet.evaluate import evaluate
from fashionnet.mistakes import mistakes
from fashionnet.models.mlp import MLP
from fashionnet.system import devices
from fashionnet.train import train
from fashionnet.training import evaluation, gradients
from tests.conftest import Commands, FinishedRun

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Linear):
    """A linear layer that notes what it computes in."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.found: list[object] = []

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.found.append(logits.dtype)
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.found += [logits.dtype, torch.is_autocast_enabled("cpu")]
        return F.cross_entropy(logits, labels, reduction="none")


def test_a_network_computes_in_bfloat16_and_its_loss_in_float32() -> None:
    model, x, labels = Net(), torch.randn(5, 6), torch.arange(5) % 4
    exact = gradients.Autograd(model)(x, labels)
    exact_gradient = model.weight.grad
    assert model.found == [torch.float32, torch.float32, False]
    model.found.clear()
    with devices.started("cpu", 1, False, precision="bfloat16"):
        logits = gradients.choose("auto", model)(x, labels)
        held_out = evaluation.logits_of(model, x, 1.0)
        assert isinstance(gradients.choose("auto", MLP()), gradients.Autograd)
    assert model.found == [torch.bfloat16, torch.float32, False, torch.bfloat16]
    assert logits.dtype == held_out.dtype == torch.float32
    assert torch.equal(logits, held_out) and not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, atol=0.05, rtol=0)
    assert model.weight.grad is not None and model.weight.grad.dtype == torch.float32
    torch.testing.assert_close(model.weight.grad, exact_gradient, atol=0.05, rtol=0)


def test_double_precision_stays() -> None:
    model, x = nn.Linear(6, 4).double(), torch.randn(5, 6).double()
    exact = evaluation.logits_of(model, x, 1.0)
    with devices.started("cpu", 1, False, precision="bfloat16"):
        assert torch.equal(evaluation.logits_of(model, x, 1.0), exact)


def test_every_command_computes_in_the_precision_of_the_run(tmp_path: Path) -> None:
    options = ("data.limit=64", "epochs=1", "validation_split=0.002", "device=cpu")
    run = train("precision=bfloat16", *options, run_dir=tmp_path / "run")
    exact = train(*options, run_dir=tmp_path / "exact")
    assert run.record["test"]["loss"] != exact.record["test"]["loss"]
    assert run.record["test"]["loss"] == pytest.approx(exact.record["test"]["loss"], abs=0.02)
    held_out = run.record["validation"]
    found = evaluate(run.run_dir)
    assert (found.loss, found.accuracy) == (held_out["loss"], held_out["accuracy"])
    diagnosis = mistakes(run.run_dir).diagnosis
    likelihoods = diagnosis.probabilities[range(len(diagnosis.labels)), diagnosis.labels]
    assert -np.log(likelihoods).mean() == pytest.approx(held_out["loss"], rel=1e-6)


def test_gradients_by_hand_are_float32(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision=bfloat16 needs autograd"):
        train("precision=bfloat16", "gradients=by_hand", run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="precision=float16 is not known"):
        train("precision=float16", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_bfloat16_takes_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(devices, "restart_peak_memory", lambda _: None)
    monkeypatch.setattr(devices, "describe", lambda _: "cuda (Tesla P100)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with devices.started("cuda", 1, False, precision="bfloat16"):
        assert devices.precision() == "float32"
    assert "cuda (Tesla P100) does not compute in bfloat16: precision=float32" in caplog.text


def test_a_processor_without_bfloat16_takes_float32_and_the_record_says_so(
    commands: Commands, tmp_path: Path
) -> None:
    options = ("data.limit=64", "epochs=1", "device=cpu", "precision=bfloat16")
    # What oneDNN sees of the processor; it looks once, so this needs a process of its own.
    said = commands.call(
        commands.line("train", *options, "hydra.run.dir=run"),
        tmp_path,
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    ).stdout
    assert "cpu (1 thread) does not compute in bfloat16: precision=float32" in said
    run = FinishedRun(tmp_path / "run")
    assert run.record["precision"] == "float32"
    assert run.record["config"]["precision"] == "bfloat16"
    said = commands.succeed("reproduce", "run", cwd=tmp_path)  # here bfloat16 may be had
    assert "identical: " in said
