"""The processes that train one model together: torchrun's ranks. Rank 0 writes the run.

Every rank takes the same steps over the same global batches and computes its own rows of each, so
that a run of several processes equals a run of one. In a single process these functions do nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from fashionnet.errors import AlreadyReported, UserError, one_line
from fashionnet.system import devices, launchers
from fashionnet.system.rows import Rows

if TYPE_CHECKING:
    from fashionnet.system.signals import Stop

T = TypeVar("T")

# torch raises a plain RuntimeError for a broken connection; these words identify it.
_LOST = re.compile(
    "connection (was )?(closed|reset)|connection refused|timed out|gloo|nccl|socket|broken pipe",
    re.IGNORECASE,
)


def rank() -> int:
    """Returns the rank of this process: the group's once joined, the launcher's before that."""
    return dist.get_rank() if _joined() else launchers.rank()


def world_size() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if _joined() else 1


def describe(device: torch.device) -> str:
    """Returns a device's name for people, with the number of processes if there are several."""
    name = devices.describe(device)
    return f"{world_size()} processes, {name}" if world_size() > 1 else name


def is_main_process() -> bool:
    """Returns whether this process writes the run's directory, its log and its console."""
    return rank() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def joined(device: str, timeout_seconds: float) -> Iterator[str]:
    """Joins the other processes of the job for the body and yields the name of this rank's device.

    Args:
        device: as in `devices.pick_device`; with CUDA each process on a machine gets its own.
        timeout_seconds: how long to wait for the others, here and in every collective operation.

    Raises:
        UserError: fewer CUDA devices than processes, a device that processes cannot share, or a
            process that does not join.
    """
    if launchers.world_size() == 1:
        yield device
        return
    own = _own_device(device)
    backend = "cpu:gloo,cuda:nccl" if own.startswith("cuda") else "gloo"
    if own.startswith("cuda"):
        torch.cuda.set_device(own)  # for the rest of the process, which ends with the job
    store = _meet(timeout_seconds)
    dist.init_process_group(
        backend,
        store=store,
        rank=launchers.rank(),
        world_size=launchers.world_size(),
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield own
        dist.barrier()  # a process that leaves early would disconnect the others
    finally:
        # If a rank is lost, leaving would wait for it; the process ends anyway.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def lost_processes_reported() -> Iterator[None]:
    """Reports in one line that another process of the job was lost while the body ran.

    Raises:
        UserError: torch found a connection closed, or timed out.
    """
    try:
        yield
    except RuntimeError as error:
        if not _joined() or one_line(error) is not None or not _LOST.search(str(error)):
            raise
        raise UserError(
            f"rank {rank()} lost the other processes of this job: one of them ended or hangs "
            f"({_words(error)}); the same command goes on from the last checkpoint"
        ) from error


def _meet(timeout_seconds: float) -> Store:
    """Returns a key-value store that only the processes of this start share.

    torchrun keeps one store through the restarts of a job, with the addresses of processes that
    ended (pytorch/pytorch#135712). Therefore each process announces itself under a new name. Rank 0
    answers each with the name of a meeting, until all have confirmed it.

    Raises:
        UserError: a process did not join in time.
    """
    size, rank = launchers.world_size(), launchers.rank()
    name = uuid.uuid4().hex
    absent = set(range(1, size)) if rank == 0 else {0}
    try:
        store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        if rank > 0:
            store.set(f"here/{rank}", name)
            meeting = store.get(f"come/{name}").decode()
            store.set(f"came/{meeting}/{rank}", "")
            return PrefixStore(meeting, store)
        end = time.monotonic() + timeout_seconds
        while absent and time.monotonic() < end:
            for other in sorted(absent):
                if store.check([f"came/{name}/{other}"]):
                    absent.remove(other)
                elif store.check([f"here/{other}"]):  # it may be of an earlier start: look again
                    store.set(f"come/{store.get(f'here/{other}').decode()}", name)
            time.sleep(0.01)
        if not absent:
            return PrefixStore(name, store)
        why = ""
    except (RuntimeError, ValueError) as error:
        why = f": {_words(error)}"
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    raise UserError(
        f"rank {rank} of {size} waited at {where} for rank {', '.join(map(str, sorted(absent)))} "
        f"in vain, distributed.timeout_seconds={timeout_seconds:g}{why}"
    )


def _words(error: BaseException) -> str:
    """Returns the first sentence of torch's message, without locations in its source."""
    line = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip().partition("\n")[0])
    return line.partition(". ")[0][:200]


def _own_device(device: str) -> str:
    picked = devices.pick_device(device)
    if picked.type == "mps" and device != "auto":
        raise UserError(f"device={device} is for one process; several take device=cuda or cpu")
    if picked.type != "cuda":
        return "cpu"
    here = launchers.local_world_size()
    if here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on this machine, and {torch.cuda.device_count()} CUDA devices: "
            "start one process a device, e.g. torchrun --nproc-per-node=gpu, or device=cpu"
        )
    if picked.index is not None:
        raise UserError(f"device={device} is one device for {here} processes; use device=cuda")
    return f"cuda:{launchers.local_rank()}"


def own_rows(num: int) -> Rows:
    """Returns this rank's rows of `num`, a near-equal part; it may be empty."""
    return Rows(num * rank() // world_size(), num * (rank() + 1) // world_size(), num)


@contextlib.contextmanager
def signals_raise(stop: Stop, noted: bool = True) -> Iterator[None]:
    """Lets signals raise at once in the body; several processes end after the same step instead.

    Args:
        noted: whether a signal that arrived before raises as well.

    Raises:
        Interrupted: a signal arrived.
    """
    if world_size() > 1:
        yield
        return
    with stop.raising():
        if noted:
            stop.raise_if_set()
        yield


def maxima(*values: int) -> list[int]:
    """Returns the maximum of each value over all processes."""
    if not _joined():
        return list(values)
    numbers = torch.tensor(values)  # on the CPU, so that nothing waits for the device
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def sum_over_processes(*sums: Tensor) -> None:
    """Replaces each tensor by its sum over all processes."""
    if _joined():
        for values in sums:
            dist.all_reduce(values)


def from_main_process(make: Callable[[], T]) -> T:
    """Calls `make` on rank 0 alone and returns its result on every rank.

    Raises:
        UserError: what `make` raised on rank 0; the other ranks raise `AlreadyReported`.
    """
    if not _joined():
        return make()
    if is_main_process():
        try:
            value = make()
        except BaseException as error:
            dist.broadcast_object_list([None, one_line(error) or repr(error)])
            raise
        dist.broadcast_object_list([value, None])
        return value
    received: list[object] = [None, None]
    dist.broadcast_object_list(received)
    if received[1] is not None:
        raise AlreadyReported(str(received[1]))
    return received[0]  # type: ignore[return-value]


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Runs the body on rank 0 first, then on the other ranks, which find its work done.

    Raises:
        AlreadyReported: the body failed on rank 0.
    """
    failure: BaseException | None = None
    if is_main_process():
        try:
            yield
        except BaseException as error:
            failure = error

    def report() -> None:
        if failure is not None:
            raise failure

    from_main_process(report)  # a failure is raised here, too
    if not is_main_process():
        yield
