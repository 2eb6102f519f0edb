"""What torchrun's environment says, and what is made of it before torch is imported."""

from __future__ import annotations

import pytest
import torch

from fashionnet.config import compose
from fashionnet.errors import UserError
from fashionnet.system import devices, launchers, processes
from fashionnet.system.processes import joined


def set_up(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, RANK="3")  # left over from elsewhere
    assert (launchers.world_size(), launchers.rank(), launchers.job_id()) == (1, 0, None)
    assert processes.is_main_process() and processes.world_size() == 1


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    set_up(monkeypatch, WORLD_SIZE="4", RANK="3", TORCHELASTIC_RUN_ID="mine", **local)
    assert (launchers.world_size(), launchers.rank()) == (4, 3)
    assert (launchers.local_world_size(), launchers.local_rank()) == (2, 1)
    assert launchers.job_id() == "mine"
    assert not processes.is_main_process()


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_what_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    set_up(monkeypatch, WORLD_SIZE=value)
    with pytest.raises(UserError, match=f"WORLD_SIZE={value} in the environment must be a number"):
        launchers.world_size()


@pytest.mark.parametrize(
    ("batch_size", "near"), [(33, "32 or 36"), (3, "use 4"), (5, "4 or 8"), (4, None), (32, None)]
)
def test_a_batch_must_be_shared_evenly(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, near: str | None
) -> None:
    set_up(monkeypatch, WORLD_SIZE="4", RANK="0")
    composed = compose.compose(f"batch_size={batch_size}")
    if near is None:
        assert compose.typed(composed).batch_size == batch_size
    else:
        with pytest.raises(
            UserError, match=f"batch_size={batch_size} is the batch of all 4.*{near}"
        ):
            compose.typed(composed)


def test_a_runs_name_is_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch)
    assert compose.run_name(7) != compose.run_name(7)
    assert "_seed7_" in compose.run_name(7)
    set_up(monkeypatch, WORLD_SIZE="2", RANK="1", TORCHELASTIC_RUN_ID="a/b")
    assert compose.run_name(7) == compose.run_name(7) == "seed7_a_b"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="several processes need one run directory"):
        compose.run_name(7)


@pytest.mark.parametrize("num", [0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_rows_cover_a_batch_once(monkeypatch: pytest.MonkeyPatch, num: int, count: int) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: count)
    covered = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        rows = processes.own_rows(num)
        assert rows.total == num and abs((rows.stop - rows.start) - num / count) < 1
        covered += [*range(num)][rows.part]
    assert covered == [*range(num)]


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("cuda", "3", "3 processes on this machine, and 2 CUDA devices: start one process a"),
        ("cuda:1", "2", "device=cuda:1 is one device for 2 processes; use device=cuda"),
        ("mps", "2", "device=mps is for one process; several take device=cuda or cpu"),
    ],
)
def test_every_process_needs_a_device_of_its_own(
    device: str, processes: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(monkeypatch, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, RANK="0")
    monkeypatch.setattr(devices, "pick_device", torch.device)  # as on a machine with two
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=message), joined(device, timeout_seconds=1):
        pytest.fail("it went on")


def test_several_processes_of_a_mac_take_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "pick_device", lambda _: torch.device("mps"))
    assert processes._own_device("auto") == "cpu"
