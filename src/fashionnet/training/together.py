"""Training several networks at once: the steps of an epoch of all of them as one computation.

The jobs of a sweep run as they would alone, each in turns. Where one comes to an epoch's steps it
pauses. Once all have come there, the steps of those that fit together are taken: each network has
its own weights, order, masks and optimizer, and shares the products and all other operations. With
one CPU thread a job the weights are bit-identical to those of the job alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from torch import Tensor

from fashionnet.data.examples import Examples
from fashionnet.errors import UserError
from fashionnet.models.layers import dropouts
from fashionnet.models.transfer import Transfer
from fashionnet.system import devices, seeds, signals, turns
from fashionnet.system.signals import Stop
from fashionnet.system.turns import Worker
from fashionnet.training import loop, metrics, stacked
from fashionnet.training.by_hand import ByHand
from fashionnet.training.evaluation import dtype_of, scaled
from fashionnet.training.gradients import Autograd
from fashionnet.training.loop import Watcher
from fashionnet.training.stacked import Stacked
from fashionnet.training.state import TrainState
from fashionnet.training.steps import Clock

log = logging.getLogger("fashionnet")
T = TypeVar("T")

_CHUNK_STEPS = 64
_CHUNK_BYTES = 16 * 2**20  # of the pictures of all networks
_PART_BYTES = 8 * 2**20  # of what a core keeps of the networks that it takes steps of
_COPIES = 8  # of the weights: gradients, moments, best epoch, a checkpoint being written
_FILES = 12  # that a run keeps open
# Where torch.func pays. On two cores a small convolutional network took 1.65 times as long with it
# as one network after another.
STACKING_DEVICES = ["cuda"]


@dataclass
class Request:
    """A job's wish to take the steps of an epoch.

    Attributes:
        seconds: the job's part of the time that the steps took.
        error: why they could not be taken to the end.
        is_interrupted: whether a signal ended them.
    """

    state: TrainState
    train: Examples
    watcher: Watcher
    total_steps: int
    seconds: float = 0.0
    error: UserError | None = None
    is_interrupted: bool = False

    def key(self) -> tuple[Any, ...]:
        """Returns what requests of one architecture have in common that can be met together."""
        state, model = self.state, self.state.model
        shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
        keeps = tuple(layer.keep for _, layer in dropouts(model))
        data = self.train.images.data_ptr(), len(self.train), state.scale, state.batch_size
        position = state.epoch, state.step, self.total_steps
        return (shapes, keeps, type(state.gradients), dtype_of(model), state.device, data, position)


def why_alone(state: TrainState, train: Examples) -> str | None:
    """Returns why a network cannot be trained together with others; None if it can."""
    name = type(state.model).__qualname__
    reasons = {
        f"{name} has a backbone": isinstance(state.model, Transfer),
        "its pictures are augmented": state.augment is not None,
        "its speed decides how long it is trained": state.budget is not None,
    }
    if holding := [reason for reason, holds in reasons.items() if holds]:
        return holding[0]
    if _is_by_hand(state):
        return None
    if state.device.type not in STACKING_DEVICES:
        return f"the gradients of {name} are not computed by hand"
    if not (isinstance(state.gradients, Autograd) and state.gradients.is_plain):
        return f"{name} minimizes another loss, or in reduced precision"
    images = train.images[:2].to(state.device)
    x = scaled(images, state.scale, torch.empty_like(images, dtype=dtype_of(state.model)))
    return stacked.refusal(state.model, x, train.labels[:2])


def _is_by_hand(state: TrainState) -> bool:
    return type(state.gradients) is ByHand


class Jobs:
    """The jobs of a sweep that may be trained together: they differ in seed or learning rate alone.

    Attributes:
        alone: how many were trained alone, by the reason.
    """

    def __init__(self) -> None:
        self.alone: Counter[str] = Counter()
        self._hands: dict[tuple[int, ...], ByHand | Stacked] = {}
        self._threads = ThreadPoolExecutor(devices.num_cores())
        self._began: float | None = None

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Runs functions, each of which trains a network, and returns what they return.

        Raises:
            BaseException: what the first of those raised that did.
        """
        workers: list[Worker[T]] = []
        rest = list(functions)
        with signals.watched() as stop, stop.deferred():
            while rest and stop.signal is None:
                workers += self._run_some(rest, stop)
        return [worker.result() for worker in workers]

    def _run_some(self, rest: list[Callable[[], T]], stop: Stop) -> list[Worker[T]]:
        """Runs as many of `rest` as fit into memory at once, and takes them off it."""
        workers: list[Worker[T]] = []
        while rest and stop.signal is None and _has_room(workers):
            function = rest.pop(0)
            worker = Worker(lambda function=function: self._job(function), _globals)  # type: ignore[misc]
            worker.resume()
            workers.append(worker)
        if rest and stop.signal is None:
            log.info("%d jobs fit into memory at once; the others come after them", len(workers))
        while waiting := [worker for worker in workers if not worker.is_ended]:
            self._take_epochs([worker.request for worker in waiting], stop)
            for worker in waiting:
                worker.resume()
        self._hands.clear()
        return workers

    def _job(self, function: Callable[[], T]) -> T:
        loop.epoch_taker.set(self._hand_over)
        return function()

    def _hand_over(
        self, state: TrainState, train: Examples, watcher: Watcher, total_steps: int
    ) -> None:
        """Has an epoch's steps taken together with those of other jobs, if that is possible."""
        why = why_alone(state, train)
        if why is not None:
            if self._note_alone(state, why):
                log.info("trained alone: %s", why)
            loop.train_one_epoch(state, train, watcher, total_steps)
            return
        request, began = Request(state, train, watcher, total_steps), time.perf_counter()
        turns.pause(request)
        state.began += time.perf_counter() - began - request.seconds
        if request.error is not None:
            raise request.error
        if request.is_interrupted:
            watcher.interrupted(state)
            watcher.stop.raise_if_set()

    def _take_epochs(self, requests: list[Request], stop: Stop) -> None:
        """Takes an epoch's steps of each job; those that fit together share each operation.

        On the CPU every core takes a few of them by itself: cores that shared each operation would
        wait for one another hundreds of times a second, and many networks would not fit into a
        core's cache.
        """
        parts = []
        for alike in _by_key(requests):
            if len(alike) == 1:
                why = "no other job differs from it in seed or learning rate alone"
                self._note_alone(alike[0].state, why)
            num = _num_parts(alike[0].state, len(alike))
            bounds = [i * len(alike) // num for i in range(num + 1)]
            parts += [alike[start:end] for start, end in itertools.pairwise(bounds)]
        began = time.perf_counter()
        self._began = self._began or began
        # Others are forgotten, with the memory of networks that have left their group.
        self._hands = {_ids(part): self._hand(part) for part in parts}
        with _progress(requests) as progress:
            list(
                self._threads.map(
                    lambda part: _take_steps(part, self._hands[_ids(part)], stop, progress),
                    parts,
                )
            )
        ended = time.perf_counter()
        for request in requests:
            request.seconds = (ended - began) / len(requests)
            request.state.group = {"jobs": len(requests), "fit_seconds": ended - self._began}

    def _note_alone(self, state: TrainState, why: str) -> bool:
        """Counts a job that is trained alone, at its start; returns whether it is there."""
        is_start = (state.epoch, state.step) == (1, 0)
        self.alone[why] += is_start
        return is_start

    def _hand(self, requests: list[Request]) -> ByHand | Stacked:
        """Returns what computes the gradients of these jobs, in memory that they share."""
        known = self._hands.get(_ids(requests))
        if known is not None:
            return known
        kind = ByHand if _is_by_hand(requests[0].state) else Stacked
        hand = kind(*(request.state.model for request in requests))
        for request in requests:
            if hasattr(request.state.optimizer, "rebind"):
                request.state.optimizer.rebind()
        return hand


def _ids(requests: Sequence[Request]) -> tuple[int, ...]:
    """Returns what identifies the fits of some requests; they live until their group ends."""
    return tuple(id(request.state) for request in requests)


@contextlib.contextmanager
def _progress(requests: list[Request]) -> Iterator[Callable[[int], object]]:
    """Yields what reports that some steps were taken: to a progress bar, on a terminal."""
    if not sys.stdout.isatty():
        yield lambda steps: None
        return
    from tqdm import tqdm

    state = requests[0].state
    title = f"epoch {state.epoch}/{state.last_epoch}, {len(requests)} runs"
    num_steps = -(-len(requests[0].train) // state.batch_size)
    total, done = num_steps * len(requests), sum(request.state.step for request in requests)
    with tqdm(
        total=total, initial=done, desc=title, unit="step", leave=False, file=sys.stdout
    ) as bar:
        yield bar.update


def _take_steps(
    requests: list[Request], hand: ByHand | Stacked, stop: Stop, progress: Callable[[int], object]
) -> None:
    """Takes every step of the current epoch that is not taken yet; see `loop.train_one_epoch`.

    Args:
        progress: is called with the number of steps that were taken, of all networks.
    """
    states = [request.state for request in requests]
    first, train, total_steps = states[0], requests[0].train, requests[0].total_steps
    steps_per_epoch = -(-len(train) // first.batch_size)
    done = (first.epoch - 1) * steps_per_epoch
    num_steps = min(steps_per_epoch, total_steps - done)
    orders = [
        seeds.epoch_order(state.seed, state.epoch, len(train))[: num_steps * first.batch_size]
        for state in states
    ]
    for request in requests:
        request.watcher.is_shared = True
        request.state.model.train()
    values = metrics.joined([state.start_figures(len(orders[0])) for state in states])
    clock, unchecked = Clock(), first.step
    with hand.mode(), devices.computing(threads=1):
        for x, labels in _chunks(first, train, [order.to(first.device) for order in orders]):
            taken: list[Tensor] = []
            for batch_x, batch_labels in zip(x, labels, strict=True):
                step = first.step + len(taken)
                for state in states:
                    for masks in state.masks:
                        masks.at(state.epoch, step)
                taken.append(hand(batch_x.flatten(0, 1), batch_labels.view(-1)))
                for state in states:
                    state.learning_rate.set((done + step) / total_steps)
                    state.optimizer.step()
                if stop.signal is not None:
                    break
            _enter(values, first.step * first.batch_size, taken, labels[: len(taken)])
            for state in states:
                state.step += len(taken)
            progress(len(taken) * len(states))
            is_interrupted = stop.signal is not None and first.step < num_steps
            if is_interrupted or clock.is_due() or first.step == num_steps:
                for request in requests:
                    _look(request, unchecked, done, num_steps)
                unchecked = first.step
            if is_interrupted:
                for request in requests:
                    request.is_interrupted, request.watcher.stop.signal = True, stop.signal
                return


def _look(request: Request, unchecked: int, done: int, num_steps: int) -> None:
    """Looks at the losses of a job's steps; one that failed leaves the others alone."""
    if request.error is None:
        try:
            loop.check_losses(request.state, unchecked, done)
        except UserError as error:
            request.error = error
        else:
            request.watcher.steps_taken(request.state, num_steps)


def _enter(values: Tensor, first: int, logits: list[Tensor], labels: Tensor) -> None:
    """Enters the figures of some steps.

    Args:
        values: float (S, 2, positions), of S networks.
        first: the position of the first example.
        logits: (S·N, C) of each step.
        labels: int64 (steps, S, N).
    """
    steps, networks, num = labels.shape
    found, answers = torch.cat(logits), labels.reshape(-1)
    losses = F.cross_entropy(found, answers, reduction="none")
    correct = (found.argmax(1) == answers).to(values.dtype)
    for row, figures in enumerate((losses, correct)):
        by_network = figures.view(steps, networks, num).transpose(0, 1).flatten(1)
        values[:, row, first : first + steps * num] = by_network


def _chunks(
    first: TrainState, train: Examples, orders: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields pictures (steps, S, N, …) and labels (steps, S, N), from the step of `first` on."""
    size, num = first.batch_size, len(orders[0])
    full, short = divmod(num, size)
    shape = train.images.shape[1:]
    bytes_per_step = 4 * size * len(orders) * train.images[0].numel()
    steps = max(1, min(_CHUNK_STEPS, _CHUNK_BYTES // bytes_per_step))
    parts = [(start, min(steps, full - start), size) for start in range(first.step, full, steps)]
    if short and first.step <= full:
        parts.append((full, 1, short))
    memory: dict[int, Tensor] = {}  # pictures are written over those of the chunk before
    for start, count, rows in parts:
        if rows not in memory:
            memory[rows] = torch.empty(
                (count, len(orders), rows, *shape),
                dtype=dtype_of(first.model),
                device=first.device,
            )
        x = memory[rows][:count]
        labels = train.labels.new_empty((count, len(orders), rows))
        for network, order in enumerate(orders):
            indices = order[start * size : start * size + count * rows]
            pixels = train.images.index_select(0, indices)
            scaled(pixels.view(count, rows, *shape), first.scale, x[:, network])
            labels[:, network] = train.labels.index_select(0, indices).view(count, rows)
        yield x, labels


def _by_key(requests: Sequence[Request]) -> list[list[Request]]:
    found: dict[tuple[Any, ...], list[Request]] = {}
    for request in requests:
        found.setdefault(request.key(), []).append(request)
    return list(found.values())


def _num_parts(state: TrainState, num_networks: int) -> int:
    """Returns into how many parts networks like that of `state` are divided."""
    if state.device.type != "cpu":
        return 1
    held = 4 * sum(parameter.nbytes for parameter in state.model.parameters())  # with moments
    cores = devices.num_cores()
    rounds = -(-num_networks * held // (cores * _PART_BYTES))
    return min(num_networks, cores * rounds)


def _has_room(workers: Sequence[Worker[Any]]) -> bool:
    """Returns whether one more job fits beside those that wait, in memory and open files."""
    waiting = [worker.request.state for worker in workers if not worker.is_ended]
    if not waiting:
        return True
    state = waiting[-1]
    needed = _COPIES * sum(p.nbytes for p in state.model.parameters()) * (len(waiting) + 1)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    has_files = soft == resource.RLIM_INFINITY or _FILES * (len(waiting) + 2) < soft
    return has_files and needed < devices.free_memory_bytes(state.device)


def _globals() -> Callable[[], None]:
    """Notes what the jobs of a process share and each changes; returns what restores it."""
    generators = seeds.global_state(torch.device("cpu"))
    hydra_config = HydraConfig.instance().cfg
    handlers, level, propagates = list(log.handlers), log.level, log.propagate

    def restore() -> None:
        seeds.load_global_state(generators, torch.device("cpu"))
        HydraConfig.instance().cfg = hydra_config
        log.handlers[:] = handlers
        log.level, log.propagate = level, propagates

    return restore
