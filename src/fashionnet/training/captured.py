"""Taking many steps as one CUDA graph, which a GPU runs without waiting for the host.

A graph fixes what the host decided while it was captured: shapes, addresses and numbers. What
differs from step to step is therefore computed before and copied to fixed places: pictures with
their augmentation, labels, dropout masks, and the factors of the optimizer.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from fashionnet.errors import first_line
from fashionnet.system import processes, seeds
from fashionnet.system.signals import Stop
from fashionnet.training.steps import Chunk, Eager, Taken, batches

if TYPE_CHECKING:
    from fashionnet.training.augmentation import Mix
    from fashionnet.training.optim import Adam
    from fashionnet.training.state import TrainState

log = logging.getLogger("fashionnet")

_MOST_STEPS = 64
# A graph of many kernels is launched as fast with fewer steps, and takes memory for each kernel.
_MOST_WEIGHTS = 256  # tensors that the steps of a graph change
_MOST_WAITING = 2  # graphs that the GPU has not completed

Outputs = tuple[Tensor, Tensor | None]


class Graph(Protocol):
    """Recorded steps.

    Attributes:
        outputs: logits and losses, which each replay writes anew.
    """

    outputs: Outputs

    def replay(self) -> object: ...


class CudaGraph:
    """The kernels that a function launches, recorded without being run; see `torch.cuda.graph`."""

    def __init__(self, function: Callable[[], Outputs]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._running: deque[torch.cuda.Event] = deque()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.outputs = function()

    def replay(self) -> None:
        """Launches the kernels; waits for an earlier replay, so that signals are noticed."""
        self._graph.replay()
        event = torch.cuda.Event()
        event.record()
        self._running.append(event)
        if len(self._running) > _MOST_WAITING:
            self._running.popleft().synchronize()


@dataclass
class _Inputs:
    """Fixed memory for what differs between the steps of a graph.

    Attributes:
        x: pictures, float (S·B, …).
        labels: int64 (S·B,).
        mixes: of each step, where pictures are mixed; empty before the first.
        factors: of the optimizer, float32 (S, groups, 2).
    """

    x: Tensor
    labels: Tensor
    mixes: list[Mix]
    factors: Tensor


class Captured:
    """Takes steps by a graph; the same bits as `Eager`, which takes what is left over.

    The first steps are eager. The next are captured and then taken eagerly. The next are taken both
    ways from the same state. All other steps of the fit are eager if one bit differs, if capturing
    fails, or if the network kept something on the host meanwhile; then the log says so.

    Args:
        record: what makes a graph of a function.
    """

    def __init__(self, record: Callable[[Callable[[], Outputs]], Graph] = CudaGraph) -> None:
        self._record = record
        self._eager = Eager()
        self._num_steps = 0  # of a graph
        self._inputs: _Inputs | None = None
        self._graph: Graph | None = None
        self._is_checked = self._is_off = False

    def take(self, state: TrainState, chunk: Chunk, stop: Stop) -> Taken:
        """Takes the chunk's steps; a signal is noticed between two graphs."""
        size, count = state.batch_size, len(chunk.fractions)
        is_off = self._is_off or torch.is_anomaly_enabled()
        num = 0 if is_off else self._steps_per_graph(state, len(chunk.labels) // size)
        logits: list[Tensor] = []
        losses: list[Tensor] = []
        done, is_interrupted, is_due = 0, False, False
        while done < count and not is_interrupted:
            fits = num and done + num <= len(chunk.labels) // size
            end = done + num if fits else count
            part = chunk.part(done, end, size)
            taken = self._taken(state, part, stop) if fits else self._eager.take(state, part, stop)
            logits.append(taken.logits)
            if taken.losses is not None:
                losses.append(taken.losses)
            done += taken.num_steps
            is_interrupted, is_due = taken.is_interrupted, is_due or taken.is_due
            num = 0 if self._is_off else num
        own_losses = torch.cat(losses) if losses else None
        is_due = self._eager.clock.is_due() or is_due
        return Taken(torch.cat(logits), own_losses, done, is_interrupted, is_due)

    def _steps_per_graph(self, state: TrainState, full_batches: int) -> int:
        """Returns the steps of a graph, a power of two; 0 where the chunk holds fewer."""
        weights = sum(parameter.requires_grad for parameter in state.model.parameters())
        most = max(1, min(_MOST_STEPS, _MOST_WEIGHTS // weights))
        num = 2 ** (min(most, full_batches).bit_length() - 1) if full_batches else 0
        if num > self._num_steps:
            self._num_steps, self._inputs, self._graph = num, None, None
            self._is_checked = False
        return self._num_steps

    def _taken(self, state: TrainState, chunk: Chunk, stop: Stop) -> Taken:
        if self._inputs is None:
            self._inputs = _inputs(state, chunk)
            return self._eager.take(state, chunk, stop)
        if self._graph is None:
            self._capture(state, chunk)
            return self._eager.take(state, chunk, stop)
        if not self._is_checked:
            return self._check(state, chunk, stop)
        logits, losses = self._replayed(state, chunk)
        num = len(chunk.fractions)
        is_interrupted = self._eager.clock.signaled(stop, chunk.ends_epoch)
        return Taken(logits, losses, num, is_interrupted, is_due=False)

    def _capture(self, state: TrainState, chunk: Chunk) -> None:
        before = _Snapshot(state)
        inputs = self._filled(state, chunk)
        host = _OnHost(state.model)
        try:
            self._graph = self._record(lambda: _take_steps(state, inputs))
        except RuntimeError as error:
            self._turn_off(state, first_line(error))
        else:
            if not host.is_equal(_OnHost(state.model)):
                self._turn_off(state, "it counts steps or draws random numbers on the host")
        host.restore_modules()
        before.restore(state)

    def _check(self, state: TrainState, chunk: Chunk, stop: Stop) -> Taken:
        """Takes steps by the graph and eagerly, and compares; what stays is of the eager ones."""
        before = _Snapshot(state)
        outputs = self._replayed(state, chunk)
        found = _Snapshot(state, *outputs)
        before.restore(state)
        taken = self._eager.take(state, chunk, stop)
        if taken.num_steps == len(chunk.fractions):
            if found.is_equal(_Snapshot(state, taken.logits, taken.losses)):
                self._is_checked = True
            else:
                self._turn_off(state, "its results differ")
        return taken

    def _replayed(self, state: TrainState, chunk: Chunk) -> Outputs:
        assert self._graph is not None
        self._filled(state, chunk)
        self._graph.replay()
        logits, losses = self._graph.outputs
        return logits.clone(), losses if losses is None else losses.clone()

    def _filled(self, state: TrainState, chunk: Chunk) -> _Inputs:
        """Computes what differs between steps, and puts it where the graph reads it."""
        assert self._inputs is not None
        inputs, size, optimizer = self._inputs, state.batch_size, cast("Adam", state.optimizer)
        inputs.labels.copy_(chunk.labels)
        if state.augment is None:
            inputs.x.copy_(chunk.x)
        factors = []
        for i, (x, labels, fraction) in enumerate(batches(chunk, size)):
            if state.augment is not None:
                changed, mix = state.augment(x, labels, state.epoch, chunk.first + i)
                inputs.x[i * size : (i + 1) * size] = changed
                if mix is not None and len(inputs.mixes) == i:
                    inputs.mixes.append(mix)  # its memory is fixed from now on
                elif mix is not None:
                    inputs.mixes[i].labels.copy_(mix.labels)
                    inputs.mixes[i].fraction.copy_(mix.fraction)
            state.learning_rate.set(fraction)
            factors.append(optimizer.next_factors())
        for masks in state.masks:
            masks.hold(state.epoch, chunk.first, len(factors))
        values = torch.tensor(factors)
        if inputs.factors.is_cuda:
            values = values.pin_memory()  # for a copy that does not wait
        inputs.factors.copy_(values, non_blocking=True)
        return inputs

    def _turn_off(self, state: TrainState, why: str) -> None:
        self._is_off, self._graph, self._inputs = True, None, None
        name = type(state.model).__qualname__
        log.info("the steps of %s cannot be captured as a CUDA graph: %s", name, why)


def choose(state: TrainState) -> Eager | Captured:
    """Returns how a fit takes its steps: by graphs where device and optimizer allow it."""
    weights = next(state.model.parameters())
    can = (
        weights.is_cuda
        and weights.dtype == torch.float32
        and processes.world_size() == 1
        and hasattr(state.optimizer, "next_factors")
    )
    return Captured() if can else Eager()


def _inputs(state: TrainState, chunk: Chunk) -> _Inputs:
    shape = len(chunk.fractions), len(state.optimizer.param_groups), 2
    factors = torch.empty(shape, device=chunk.x.device)
    return _Inputs(torch.empty_like(chunk.x), torch.empty_like(chunk.labels), [], factors)


def _take_steps(state: TrainState, inputs: _Inputs) -> Outputs:
    """Takes steps as `Eager` does, with all that differs between them read from `inputs`."""
    optimizer = cast("Adam", state.optimizer)
    logits: list[Tensor] = []
    losses: list[Tensor] = []
    parts = inputs.x.split(state.batch_size), inputs.labels.split(state.batch_size)
    for i, (x, labels) in enumerate(zip(*parts, strict=True)):
        for masks in state.masks:
            masks.at_held(i)
        logits.append(state.gradients(x, labels, inputs.mixes[i] if inputs.mixes else None))
        if state.gradients.losses is not None:
            losses.append(state.gradients.losses)
        optimizer.step(inputs.factors[i])
    return torch.cat(logits), torch.cat(losses) if losses else None


class _Snapshot:
    """What steps change, as copies; and what they returned."""

    def __init__(self, state: TrainState, *outputs: Tensor | None) -> None:
        self._model = _copies(state.model)
        self._optimizer = state.optimizer.state_dict()
        for key in ("means", "squares"):
            self._optimizer[key] = [value.clone() for value in self._optimizer[key]]
        self._generators = seeds.global_state(state.device)
        self._outputs = outputs

    def restore(self, state: TrainState) -> None:
        """Puts everything back, in the memory in which it lies."""
        with torch.no_grad():
            for name, value in _tensors(state.model):
                value.copy_(self._model[name])
        state.optimizer.load_state_dict(self._optimizer)
        seeds.load_global_state(self._generators, state.device)

    def is_equal(self, other: _Snapshot) -> bool:
        """Returns whether not one bit of the tensors differs."""
        pairs = zip(self._values(), other._values(), strict=True)
        return all(_is_equal(a, b) for a, b in pairs)

    def _values(self) -> Iterator[Tensor | None]:
        yield from self._model.values()
        yield from self._optimizer["means"]
        yield from self._optimizer["squares"]
        yield from self._outputs


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        yield name, value.detach()


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in _tensors(model)}


class _OnHost:
    """What a network may change from step to step on the host, where a graph does not follow.

    These are the numbers and words in its modules, and the global generators.
    """

    def __init__(self, model: nn.Module) -> None:
        numpys = np.random.get_state(legacy=False)["state"]
        self._generators = (
            random.getstate(),
            (numpys["key"].tobytes(), numpys["pos"]),
            torch.get_rng_state().tolist(),
        )
        self._modules = list(model.modules())
        self._values = [
            {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None)}
            for module in self._modules
        ]

    def is_equal(self, other: _OnHost) -> bool:
        return (self._generators, self._values) == (other._generators, other._values)

    def restore_modules(self) -> None:
        for module, values in zip(self._modules, self._values, strict=True):
            vars(module).update(values)


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (a, b)))
