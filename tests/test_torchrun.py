"""Several processes training one model, by real torchrun commands on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fashionnet.config import compose
from fashionnet.data.folders import default_root
from fashionnet.errors import UserError
from fashionnet.models import backbones
from tests.conftest import Commands, FinishedRun
from tests.warm import Forked, Server

# 1,003 pictures in batches of 128: the last one has 107, which no two processes share evenly.
SMALL = (
    *("epochs=2", "data.limit=1003", "batch_size=128", "device=cpu", "threads=1"),
    *("gradients=autograd", "validation_split=0.01"),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def commands(commands: Commands) -> Iterator[Commands]:
    """Commands that fork with all imported that several processes import, too."""
    with contextlib.closing(Server(commands.environment, "torch._dynamo")) as server:
        yield Commands(server, commands.environment)


def torchrun_line(num: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num}", *options]


def start(commands: Commands, num: int, *overrides: str, cwd: Path, **more: str) -> list[Forked]:
    """Starts the processes of one job with what torchrun or Slurm sets for them; rank 0 first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
    return [
        commands.start("train", *overrides, cwd=cwd, RANK=str(i), LOCAL_RANK=str(i), **job)
        for i in range(num)
    ]


def completed(commands: Commands, num: int, *overrides: str, cwd: Path) -> FinishedRun:
    """Runs a job whose directory is named by `overrides`."""
    processes = start(commands, num, *overrides, cwd=cwd)
    stdout, *_ = [process.communicate()[0] for process in processes]
    assert [process.wait() for process in processes] == [0] * num
    (path,) = (arg.partition("=")[2] for arg in overrides if arg.startswith("hydra.run.dir="))
    return FinishedRun(cwd / path, stdout)


def refused(commands: Commands, *overrides: str, cwd: Path, **more: str) -> str:
    """Runs a job of two that is refused; returns the one line of all its processes."""
    processes = start(commands, 2, *overrides, cwd=cwd, **more)
    printed = "".join(process.communicate()[1] for process in processes)
    assert [process.wait() for process in processes] == [2, 2], printed
    (line,) = set(printed.splitlines())
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def interrupt(processes: list[Forked], run: FinishedRun, epochs: int, number: int) -> list[str]:
    """Sends a signal to the last of `processes` after some epochs; returns what all printed."""
    history = run.path / "history.jsonl"
    while not history.exists() or history.read_text().count("\n") < epochs:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.01)
    processes[-1].send_signal(number)
    return [process.communicate()[1] for process in processes]


def weights(run: FinishedRun) -> dict[str, torch.Tensor]:
    state = torch.load(run.path / "checkpoints/last.pt", weights_only=True)
    return dict(state["model"])


@pytest.fixture(scope="module")
def alone(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("alone")
    commands.succeed("train", *SMALL, "hydra.run.dir=run", cwd=folder)
    return FinishedRun(folder / "run")


@pytest.fixture(scope="module")
def shared(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """What a real torchrun makes of it, in a directory that is named after the job."""
    folder = tmp_path_factory.mktemp("two")
    options = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=my job")
    done = commands.call([*torchrun_line(2, *options), "-m", "fashionnet.train", *SMALL], folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("outputs/mlp/*")
    assert path.name == "seed0_my_job"
    return FinishedRun(path, done.stdout)


def test_several_processes_are_one(alone: FinishedRun, shared: FinishedRun) -> None:
    run = shared
    assert run.record["processes"] == 2 and alone.record["processes"] == 1
    assert len(run.history) == len(alone.history) == 2
    for ours, theirs in zip(run.history, alone.history, strict=True):
        for key in ("loss", "val_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5), key
        for key in ("accuracy", "val_accuracy"):  # a picture or two may be on the edge
            assert ours[key] == pytest.approx(theirs[key], abs=4e-3), key
    # Gradients are summed in another order, and nothing else differs.
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(alone)[name], rtol=0, atol=2e-4)
    # One process keeps the run, and tells of it once.
    assert run.stdout.count("test accuracy") == 1
    assert run.record["test"]["evaluations"] == 1
    assert (run.path / "train.log").read_text().count("epoch 1/2") == 1
    assert len([*run.path.glob("tensorboard/train/events*")]) == 1


def test_the_same_bits_again_and_across_interruptions(commands: Commands, tmp_path: Path) -> None:
    # Of three numbers the order of their sum matters; of two it does not.
    small = (*SMALL, "batch_size=126", "epochs=20")
    whole = completed(commands, 3, *small, "hydra.run.dir=whole", cwd=tmp_path)
    assert len(whole.history) == 20
    run = FinishedRun(tmp_path / "run")
    # To a process that does not keep the run: all of them stop after the same step.
    for epochs, number in ((2, signal.SIGUSR1), (6, signal.SIGTERM)):
        processes = start(commands, 3, *small, "hydra.run.dir=run", cwd=tmp_path)
        told = interrupt(processes, run, epochs, number)
        assert {process.wait() for process in processes} == {128 + number}
        assert not any("lost the other processes" in each for each in told)
        assert run.record["status"] == "interrupted"
        assert f"interrupted by {signal.Signals(number).name}" in run.record["error"]
        state = torch.load(run.path / "checkpoints/last.pt", weights_only=True)
        assert epochs <= len(state["history"]) == len(run.history) < 20
    assert completed(commands, 3, *small, "hydra.run.dir=run", cwd=tmp_path).bits == whole.bits


def test_a_job_is_restarted_and_without_further_restarts_names_the_process_that_died(
    commands: Commands, tmp_path: Path
) -> None:
    small = (*SMALL, "epochs=40", "checkpoint.every_seconds=0.05")
    line = [*torchrun_line(2, "--standalone", "--max-restarts=1"), "-m", "fashionnet.train"]
    process = subprocess.Popen(
        [*line, *small, "hydra.run.dir=run"],
        cwd=tmp_path,
        env=commands.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    kill_rank_1(process, tmp_path / "run", 3)
    kill_rank_1(process, tmp_path / "run", 10)  # after the restart
    _, printed = process.communicate(timeout=600)  # far below distributed.timeout_seconds
    assert process.returncode != 0
    assert "(local_rank: 1)" in printed and "Signal 9 (SIGKILL)" in printed
    errors = [each for each in printed.splitlines() if each.startswith("error: ")]
    assert all(each.startswith("error: rank 0 lost the other processes") for each in errors)
    record = FinishedRun(tmp_path / "run").record
    assert (record["status"], record["error"]) == ("failed", errors[-1].removeprefix("error: "))
    whole = completed(commands, 2, *small, "hydra.run.dir=whole", cwd=tmp_path)
    again = completed(commands, 2, *small, "hydra.run.dir=run", cwd=tmp_path)
    assert again.bits == whole.bits


def kill_rank_1(process: subprocess.Popen[str], run: Path, epochs: int) -> None:
    """Kills rank 1 of a torchrun's job after some epochs."""
    history, ranks = run / "history.jsonl", dict[int, int]()
    while not history.exists() or history.read_text().count("\n") < epochs:
        assert process.poll() is None
        time.sleep(0.01)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found = [entry for entry in variables if entry.startswith(b"RANK=")]
        if found:
            ranks[int(found[0].removeprefix(b"RANK="))] = int(child)
    assert set(ranks) == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)


def test_figures_are_those_of_one_process_where_they_are_pooled_often(
    commands: Commands, tmp_path: Path
) -> None:
    # 262 steps an epoch: their figures are pooled twice, and the second part must not count once
    # more what the first had. A learning rate of almost nothing leaves both the same weights.
    often = (
        *(*SMALL, "batch_size=2", "epochs=1", "optimizer.lr=1e-9", "model.dropout=0"),
        *("data.limit=523", "evaluate_test=false"),
    )
    two = completed(commands, 2, *often, "hydra.run.dir=two", cwd=tmp_path)
    commands.succeed("train", *often, "hydra.run.dir=one", cwd=tmp_path)
    one = FinishedRun(tmp_path / "one")
    assert two.history[0]["accuracy"] == one.history[0]["accuracy"]
    assert two.history[0]["loss"] == pytest.approx(one.history[0]["loss"], rel=1e-6)


def test_a_job_restarted_after_its_last_word_is_done(
    commands: Commands, alone: FinishedRun, tmp_path: Path
) -> None:
    before = alone.record
    for restarts in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        done = commands.run(
            *("train", *SMALL, f"hydra.run.dir={alone.path}"), cwd=tmp_path, **{restarts: "1"}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("completed before")
    assert alone.record == before


def test_transfer_learning_is_shared_too(
    alone: FinishedRun, commands: Commands, tmp_path: Path
) -> None:
    # The head first, then all of a network on augmented and mixed pictures, which are drawn for the
    # whole batch. Of 37 pictures in batches of 12 the last is one, which leaves a process none.
    model = (
        *("model=transfer", "model.name=shufflenet_v2_x0_5", "model.trained=all"),
        *("model.pretrained=w.pth", "model.size=32", "augmentation=strong"),
        *("model.dropout=0.2", "fine_tuning.head_epochs=2", "model.head_stages=2"),
        *("label_smoothing=0.1", "class_weights=balanced"),
        *("data.limit=37", "batch_size=12", "epochs=2", "optimizer.lr=1e-4"),
        *("validation_split=0.001", "evaluate_test=false"),
    )
    torch.manual_seed(0)
    backbone, _ = backbones.build("torchvision", "shufflenet_v2_x0_5")
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    cache = {"FASHIONNET_DATA": str(default_root())}
    commands.succeed("train", *model, "hydra.run.dir=alone", cwd=tmp_path, **cache)
    processes = start(commands, 2, *model, "hydra.run.dir=shared", cwd=tmp_path, **cache)
    # shufflenet has filters of 1 x 1, with strides of their own: torch may warn of them.
    assert [process.communicate()[1] for process in processes] == ["", ""]
    one, two = FinishedRun(tmp_path / "alone"), FinishedRun(tmp_path / "shared")
    for ours, theirs in zip(two.history, one.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=2e-3)
    assert two.record["head"]["loss"] == pytest.approx(one.record["head"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["gradients=by_hand"], "gradients=by_hand is for one process"),
        (["-m", "seed=0,1"], "a sweep starts its runs itself"),
    ],
)
def test_what_is_wrong_is_told(
    overrides: list[str], said: str, commands: Commands, tmp_path: Path
) -> None:
    words = [word for word in SMALL if word.partition("=")[0] not in "".join(overrides)]
    line = (*overrides, *words, *(["hydra.run.dir=run"] if "-m" not in overrides else []))
    assert said in refused(commands, *line, cwd=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = compose.compose("batch_size=129", "device=cpu")
    with pytest.raises(UserError, match="batch_size=129 is the batch of all 2 processes together"):
        compose.typed(config)


def test_a_weight_without_a_part_in_the_output_is_named(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n\n"
        "class Idle(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, 10))\n"
        "        self.append(nn.Linear(10, 10))\n\n"
        "    def forward(self, x):\n"
        "        return self[1](self[0](x))\n"
    )
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/idle.yaml").write_text("_target_: mynets.Idle\n")
    own = {"FASHIONNET_ALLOW": "mynets.Idle", **commands.importing(tmp_path)}
    line = ("--config-dir", "conf", *SMALL, "model=idle")
    told = refused(commands, *line, "hydra.run.dir=run", cwd=tmp_path, **own)
    assert "the model's 2.weight takes no part in its output" in told
    assert not (tmp_path / "run").exists()
    commands.succeed("train", *line, "hydra.run.dir=alone", cwd=tmp_path, **own)


def test_a_directory_that_is_taken_is_told_once(
    alone: FinishedRun, commands: Commands, tmp_path: Path
) -> None:
    before = alone.record
    told = refused(commands, *SMALL, f"hydra.run.dir={alone.path}", cwd=tmp_path)
    assert "holds a completed run" in told
    assert alone.record == before


def test_a_meeting_that_nobody_joins_is_told(commands: Commands, tmp_path: Path) -> None:
    overrides = (*SMALL, "distributed.timeout_seconds=3", "hydra.run.dir=run")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    launched |= {"MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    line = commands.fail("train", *overrides, cwd=tmp_path, **launched)
    assert line.startswith(f"rank 0 of 2 waited at 127.0.0.1:{port} for rank 1 in vain")
    assert "distributed.timeout_seconds=3" in line
    assert not (tmp_path / "run").exists()


def test_reproduce_says_that_there_were_several(
    commands: Commands, shared: FinishedRun, tmp_path: Path
) -> None:
    done = commands.run(
        "reproduce", shared.path, "--out", tmp_path / "again", "--json", cwd=tmp_path
    )
    found: Mapping[str, Any] = json.loads(done.stdout)
    assert done.returncode in (0, 3)  # to rounding the same
    differing = {difference["key"]: difference for difference in found["environment"]}
    assert (differing["processes"]["first"], differing["processes"]["second"]) == (2, 1)


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """Two hosts on this machine, network namespaces with a wire between them: how to run there."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("making two hosts takes root and Debian's iproute2")
    names = [f"fashionnet-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*words: str) -> str:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
        return done.stdout

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        wire = ("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
        ip("-n", names[0], *wire)
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.77.{number}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
        rendezvous = ("--rdzv-id=two", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.77.1:29400")
        yield [
            [
                *("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=wire"),
                *torchrun_line(1, "--nnodes=2", *rendezvous, f"--local-addr=10.77.77.{number}"),
                f"--rdzv-conf=is_host={number == 1}",  # no name leads to an address there
                *("-m", "fashionnet.train"),
            ]
            for number, name in enumerate(names, 1)
        ]
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                for process in ip("netns", "pids", name).split():
                    os.kill(int(process), signal.SIGKILL)
                ip("netns", "del", name)


def test_two_hosts(
    hosts: list[list[str]], alone: FinishedRun, commands: Commands, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(commands.call, [*line, *SMALL, "hydra.run.dir=run"], tmp_path)
            for line in hosts
        ]
        first, second = (job.result() for job in jobs)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    # Which of them is rank 0 is torchrun's to say; that one alone tells of the run.
    assert sorted([first.stdout.count("epoch 2/2"), second.stdout.count("epoch 2/2")]) == [0, 1]
    run = FinishedRun(tmp_path / "run")
    assert run.record["processes"] == 2
    for ours, theirs in zip(run.history, alone.history, strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=2e-5)
