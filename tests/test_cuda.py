"""No command touches another device than the chosen one; a GPU gives the same bits again."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import Commands, FinishedRun

HAS_CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="this machine has no CUDA device")
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="here the real one is used instead")

# What a user does with one run, every time on the CPU. Ends with what CUDA was asked for.
ON_THE_CPU = """\
import sys
import torch
sys.path.insert(0, {tests!r})
if {stand_in}:
    import cuda_stand_in
    cuda_stand_in.install()
from PIL import Image
from fashionnet.compare import compare_configs
from fashionnet.errors import UserError
from fashionnet.evaluate import evaluate
from fashionnet.export import export
from fashionnet.list import list_runs
from fashionnet.mistakes import mistakes
from fashionnet.predict import predict
from fashionnet.reproduce import reproduce
from fashionnet.train import train

small = ("device=cpu", "epochs=1", "data.limit=64")
run = train("experiment=debug_profile", *small, run_dir="run")
train(*small, "overwrite=true", "checkpoint.every_seconds=0.001", run_dir="run")
train(*small, "epochs=2", "gradients=autograd", run_dir="other")
train(*small, "model=resnet18", "model.trained=scratch", "model.size=16", "augmentation=light",
      "optimizer=sgd", "data.limit=16", "validation_split=0.001", run_dir="resnet")
train(*small, "epochs=3", run_dir="run")  # continues it from its checkpoint
Image.new("L", (28, 28)).save("black.png")
evaluate("run", device="cpu")
predict("run", ["black.png"], device="cpu")
mistakes("run", device="cpu")
export("run", formats=["pt2"])
assert reproduce("run").verdict == "identical"
compare_configs("run", "other")
assert len(list_runs(".")) == 4
if {stand_in}:
    assert not cuda_stand_in.calls, cuda_stand_in.calls
assert not torch.cuda.is_initialized()
print("untouched")
"""


def on_the_cpu(commands: Commands, folder: Path, stand_in: bool) -> None:
    code = ON_THE_CPU.format(tests=str(Path(__file__).parent), stand_in=stand_in)
    done = commands.execute(code, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "untouched"


@pytest.mark.slow
@without_cuda
def test_on_the_cpu_nothing_asks_for_cuda(commands: Commands, tmp_path: Path) -> None:
    on_the_cpu(commands, tmp_path, stand_in=True)


@pytest.mark.gpu
@needs_cuda
def test_on_the_cpu_a_real_cuda_is_never_initialized(commands: Commands, tmp_path: Path) -> None:
    on_the_cpu(commands, tmp_path, stand_in=False)


# A run's start on a device that is there and not initialized yet.
START = """\
import sys
sys.path.insert(0, {tests!r})
import cuda_stand_in
cuda_stand_in.install(2)
from fashionnet.system import devices
with devices.started({device!r}, 1, deterministic=False):
    print(*cuda_stand_in.calls)
"""


@without_cuda
@pytest.mark.parametrize(
    ("device", "called"), [("cuda:1", "init reset_peak_memory_stats"), ("cpu", "")]
)
def test_cuda_is_initialized_before_it_is_asked_for_its_memory(
    commands: Commands, tmp_path: Path, device: str, called: str
) -> None:
    code = START.format(tests=str(Path(__file__).parent), device=device)
    done = commands.execute(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == called


# A caller's own settings of the process, by torch's newer switches.
SWITCHES = """\
import torch
from fashionnet.evaluate import evaluate
from fashionnet.train import train

switches = [torch.backends.{which}]
switches[0].fp32_precision = {value!r}
torch.backends.cudnn.benchmark = True
before = switches[0].fp32_precision, torch.backends.cudnn.benchmark
run = train("epochs=1", "data.limit=64", "device={device}", "gradients=autograd", run_dir="run")
evaluate("run", device={device!r})
assert (switches[0].fp32_precision, torch.backends.cudnn.benchmark) == before
print(run.record["weights_sha256"])
"""
HAS_SWITCHES = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def with_switch(commands: Commands, folder: Path, which: str, value: str, device: str) -> str:
    folder.mkdir()
    code = SWITCHES.format(which=which, value=value, device=device)
    done = commands.execute(code, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SWITCHES, reason="this torch has the older switches alone")
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
)
def test_switches_set_before_a_run_change_no_bit_and_come_back(
    commands: Commands, tmp_path: Path, device: str
) -> None:
    plain = with_switch(commands, tmp_path / "plain", "cuda.matmul", "ieee", device)
    assert with_switch(commands, tmp_path / "other", "cudnn.conv", "tf32", device) == plain


# ------------------------------------------------------------------------------- on a real GPU

LONG = ("model=mlp", "epochs=12", "data.limit=6000", "device=cuda", "checkpoint.every_seconds=0.2")


@pytest.fixture(scope="module")
def on_gpu(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run on the GPU by the command, in a process of its own."""
    folder = tmp_path_factory.mktemp("gpu")
    stdout = commands.succeed("train", *LONG, "hydra.run.dir=run", cwd=folder)
    return FinishedRun(folder / "run", stdout)


@pytest.mark.gpu
@needs_cuda
def test_the_command_runs_on_a_gpu(commands: Commands, on_gpu: FinishedRun) -> None:
    record = on_gpu.record
    assert record["status"] == "completed"
    assert record["device"].startswith("cuda")
    assert record["peak_gpu_memory_bytes"] > 0
    gpu = record["gpu"]
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert gpu["cuda"] == torch.version.cuda
    assert gpu["driver"] and gpu["cudnn"]


@pytest.mark.gpu
@needs_cuda
def test_two_evaluations_of_the_same_weights_are_equal_on_a_gpu(
    commands: Commands, on_gpu: FinishedRun
) -> None:
    assert on_gpu.record["validation"]["loss"] == on_gpu.history[-1]["val_loss"]
    answer = json.loads(commands.succeed("evaluate", on_gpu.path, "--json", cwd=on_gpu.path))
    assert answer["loss"] == on_gpu.history[-1]["val_loss"]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("way", ["auto", "autograd"])
def test_killed_on_a_gpu_a_run_continues_to_the_same_bits(
    commands: Commands, tmp_path: Path, way: str
) -> None:
    line = commands.line("train", *LONG, f"gradients={way}", "epochs=40")
    whole, killed = f"hydra.run.dir={tmp_path / 'whole'}", f"hydra.run.dir={tmp_path / 'killed'}"
    assert commands.call([*line, whole], tmp_path).returncode == 0
    process = subprocess.Popen([*line, killed], env=commands.environment, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed/checkpoints/last.pt"
    end = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert json.loads((tmp_path / "killed/run.json").read_text())["status"] == "running"
    assert commands.call([*line, killed], tmp_path).returncode == 0
    assert FinishedRun(tmp_path / "killed").bits == FinishedRun(tmp_path / "whole").bits


@pytest.mark.gpu
@needs_cuda
def test_a_run_on_a_gpu_is_reproduced_to_the_bit(commands: Commands, on_gpu: FinishedRun) -> None:
    assert "identical" in commands.succeed("reproduce", on_gpu.path, cwd=on_gpu.path.parent)


DRAWING = """\
from torch import nn


class Net(nn.Sequential):
    \"\"\"Draws from torch's own generator of the device that it is on.\"\"\"

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.5),
                         nn.Linear(64, 10))
"""


PARTS = """\
import sys
from fashionnet.train import train

network = ("model._target_=drawing.Net", "~model.hidden", "~model.dropout", "data.limit=640")
for epochs, name in ((3, "whole"), (1, "parts"), (2, "parts"), (3, "parts")):
    train(*network, f"device={sys.argv[1]}", f"epochs={epochs}", run_dir=name)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
)
def test_a_network_that_draws_from_torchs_generator_continues_to_the_same_bits(
    commands: Commands, tmp_path: Path, device: str
) -> None:
    (tmp_path / "drawing.py").write_text(DRAWING)
    environment = commands.importing(tmp_path) | {"FASHIONNET_ALLOW": "drawing.Net"}
    done = commands.execute(PARTS, device, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert FinishedRun(tmp_path / "parts").bits == FinishedRun(tmp_path / "whole").bits
