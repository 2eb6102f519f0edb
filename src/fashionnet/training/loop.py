"""The training loop: one for every model and every device.

Shapes: N examples, B the batch size, S the batches of a chunk, C classes; pictures are uint8
(N, 28, 28) and stay so in memory. A *chunk* is a run of batches that is gathered, scaled and
measured at once, because those cost as much for one batch as for sixty-four.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from fashionnet.data.examples import Examples
from fashionnet.errors import Interrupted, UserError
from fashionnet.models.weights import all_finite, snapshot, weights_sha256
from fashionnet.system import processes, seeds
from fashionnet.system.signals import Stop
from fashionnet.training.early_stopping import is_better
from fashionnet.training.evaluation import dtype_of, evaluate, scaled
from fashionnet.training.metrics import Metrics
from fashionnet.training.state import Row, TrainState
from fashionnet.training.steps import Chunk

_CHUNK_BATCHES = 64
# Of pictures as floats: larger chunks fall out of a processor's cache.
_CHUNK_BYTES, _CHUNK_BYTES_ON_GPU = 8 * 2**20, 128 * 2**20


class Diverged(UserError):
    """A loss or a weight became nan or infinite."""


class Watcher:
    """Follows a fit without changing it; `stop` says whether the fit should end."""

    is_shared = False  # whether the fit takes its steps together with others, see `together`

    def __init__(self, stop: Stop | None = None) -> None:
        self.stop = stop or Stop()

    def epoch_started(self, fit: TrainState, num_steps: int) -> None:
        """An epoch of `num_steps` begins, or goes on after a resume."""

    def steps_taken(self, fit: TrainState, num_steps: int) -> None:
        """Some of the epoch's steps are done, and their losses were looked at."""

    def epoch_ended(self, fit: TrainState, row: Row) -> None:
        """An epoch is done; `row` is its line of the history."""

    def interrupted(self, fit: TrainState) -> None:
        """The fit ends here because `stop` says so; this is the moment to save it."""


def fit(
    state: TrainState,
    train: Examples,
    validation: Examples,
    epochs: int | None,
    watcher: Watcher,
    steps: int | None = None,
) -> None:
    """Trains up to `epochs` or `steps`, as `model.fit` does; continues where `state` stands.

    A state with a budget decides by itself how many steps there are.

    Args:
        state: fresh or resumed.
        train, validation: on the model's device; validation may be empty.
        epochs: the 1-based epoch to end with; None where `steps` are given.
        watcher: is called at each epoch's start and end and after some steps.
        steps: the number of steps in all; the last epoch may be a part of one.

    Raises:
        Diverged: a loss or weight became nan or infinite; the message names the first bad step.
        Interrupted: a signal asked for an end; the watcher was called before.
    """
    steps_per_epoch = -(-len(train) // state.batch_size)
    num_steps = steps if steps is not None else (epochs or 0) * steps_per_epoch
    budget = state.budget
    if budget is not None:
        budget.start(train, validation, (state.epoch - 1) * steps_per_epoch + state.step)
        num_steps = budget.last_step
    state.last_epoch = -(-num_steps // steps_per_epoch)
    state.began = time.perf_counter()
    if state.unrestored is not None and state.epoch <= state.last_epoch and not state.stopped:
        state.model.load_state_dict(state.unrestored)
        state.unrestored = None
    while (state.epoch <= state.last_epoch or not num_steps) and not state.stopped:
        epoch_began = state.fit_seconds()
        epoch_taker.get()(state, train, watcher, num_steps or state.epoch * steps_per_epoch)
        if budget is not None:
            num_steps = budget.last_step
            state.last_epoch = -(-num_steps // steps_per_epoch)
        # Keras' history: training figures are means over the epoch while the weights moved and
        # dropout was on; validation figures are taken at its end with dropout off.
        trained = state.progress()
        row: Row = {"epoch": state.epoch, "loss": trained.loss, "accuracy": trained.accuracy}
        if len(validation):
            held_out = _validated(state, validation, watcher)
            row |= {"val_loss": held_out.loss, "val_accuracy": held_out.accuracy}
        row |= {
            "lr": state.learning_rate.current,
            "epoch_seconds": state.fit_seconds() - epoch_began,
        }
        state.history.append(row)
        state.weight_hashes.append(weights_sha256(state.model.state_dict()))
        # Without a validation split no epoch can be called the best: the last one counts.
        if not len(validation) or is_better(row["val_loss"], state.best_loss):
            state.best_epoch, state.best_loss = state.epoch, row.get("val_loss")
            state.best_weights = snapshot(state.model)
        figures = {key: row[key] for key in row if key not in ("epoch", "lr", "epoch_seconds")}
        state.learning_rate.after_epoch(figures)
        state.stopped = state.early_stopping.stops_after(state.epoch, figures, state.model)
        state.epoch, state.step, state.figures = state.epoch + 1, 0, None
        watcher.epoch_ended(state, row)
    if state.early_stopping.best_weights is not None and state.unrestored is None:
        state.unrestored = snapshot(state.model)
        state.early_stopping.restore(state.model)


def _validated(state: TrainState, validation: Examples, watcher: Watcher) -> Metrics:
    """Evaluates an epoch whose steps are done; a signal that comes meanwhile ends the fit here."""
    try:
        with processes.signals_raise(
            watcher.stop, noted=False
        ):  # the steps were done before that counts
            return evaluate(state.model, validation, state.scale)
    except Interrupted:
        watcher.interrupted(state)
        raise


def train_one_epoch(state: TrainState, train: Examples, watcher: Watcher, total_steps: int) -> None:
    """Takes every step of the current epoch that is not taken yet.

    Each batch: gradients of its mean loss, one optimizer step. Nothing here waits for the device
    but the check of the losses, a few times a second.

    Args:
        total_steps: of the whole training; they may end in the middle of the epoch.
    """
    steps_per_epoch = -(-len(train) // state.batch_size)
    done = (state.epoch - 1) * steps_per_epoch
    num_steps = min(steps_per_epoch, total_steps - done)
    order = seeds.epoch_order(state.seed, state.epoch, len(train)).to(train.images.device)
    order = order[: num_steps * state.batch_size]
    watcher.epoch_started(state, num_steps)
    state.model.train()
    figures = state.start_figures(len(order))
    unchecked = state.step
    with state.gradients.mode():
        for chunk in chunks(state, train, order, done, total_steps):
            taken = state.steps.take(state, chunk, watcher.stop)
            own = _own_positions(
                chunk.labels[: taken.num_steps * state.batch_size], state.batch_size
            )
            first = state.step * state.batch_size
            figures.put(first + own, taken.logits, chunk.labels[own], taken.losses)
            state.step += taken.num_steps
            is_interrupted = taken.is_interrupted and state.step < num_steps
            is_over = state.budget is not None and state.budget.ends_after(state, train, done)
            if is_interrupted or taken.is_due or is_over or state.step == num_steps:
                check_losses(state, unchecked, done)
                unchecked = state.step
                # A checkpoint may be written here, and only here: all before it is sound.
                watcher.steps_taken(state, num_steps)
            if is_interrupted:
                watcher.interrupted(state)
                watcher.stop.raise_if_set()
            if is_over:
                return


# What takes an epoch's steps; a group of jobs takes those of all of them together.
epoch_taker: ContextVar[Callable[[TrainState, Examples, Watcher, int], None]] = ContextVar(
    "epoch_taker", default=train_one_epoch
)


def _own_positions(labels: Tensor, batch_size: int) -> Tensor:
    """Returns the rows, int64, that this process computed of a chunk with these labels, (S·B,)."""
    rows = torch.arange(len(labels), device=labels.device)
    if processes.world_size() == 1:
        return rows
    return torch.cat(
        [batch[processes.own_rows(len(batch)).part] for batch in rows.split(batch_size)]
    )


def chunks(
    state: TrainState, train: Examples, order: Tensor, done: int, total_steps: int
) -> Iterator[Chunk]:
    """Yields the batches of an epoch, many at a time, from `state.step` on.

    The last chunk of an epoch may be shorter and end in a short batch, as in Keras. The pictures
    are good until the next chunk, which is written over them: memory that comes and goes by the
    megabyte costs more than filling it.

    Args:
        order: the examples of the epoch's steps, int64 (N,).
        done, total_steps: steps of the epochs before, and of the whole training.
    """
    bytes_per_batch = state.batch_size * train.images[0].numel() * 4
    most = _CHUNK_BYTES if state.device.type == "cpu" else _CHUNK_BYTES_ON_GPU
    batches = max(1, min(_CHUNK_BATCHES, most // bytes_per_batch))
    rest = order[state.step * state.batch_size :]
    size = min(batches * state.batch_size, len(rest))
    pixels = train.images.new_empty((size, *train.images.shape[1:]))
    x = torch.empty_like(pixels, dtype=dtype_of(state.model), device=state.device)
    first = state.step
    for indices in rest.split(size) if size else ():
        gathered, batch_x = pixels[: len(indices)], x[: len(indices)]
        torch.index_select(train.images, 0, indices, out=gathered)
        steps = range(first, first - (-len(indices) // state.batch_size))
        yield Chunk(
            scaled(_copied(gathered, state.device), state.scale, batch_x),
            train.labels.index_select(0, _copied(indices, state.device)),
            first,
            [state.fraction(done + step, total_steps) for step in steps],
            ends_epoch=steps.stop * state.batch_size >= len(order),
        )
        first = steps.stop


def _copied(values: Tensor, device: torch.device) -> Tensor:
    """Copies values to a device, which goes on with earlier steps meanwhile."""
    if values.device == device:
        return values
    return values.pin_memory().to(device, non_blocking=True)


def check_losses(state: TrainState, first_step: int, done: int) -> None:
    """Checks that losses and weights are finite.

    Args:
        first_step: the steps of this epoch from here on are checked.
        done: steps of the epochs before.

    Raises:
        Diverged: they are not; the message names the first bad step.
    """
    assert state.figures is not None
    part = first_step * state.batch_size, state.step * state.batch_size
    state.figures.share(*part)
    finite = torch.isfinite(state.figures.losses(*part))
    if not finite.all():
        bad = first_step + int(finite.logical_not().nonzero()[0]) // state.batch_size
        what = f"the loss became nan or infinite at step {done + bad + 1}"
    elif not all_finite(state.model):
        what = f"a weight became nan or infinite by step {done + state.step}"
    else:
        return
    raise Diverged(
        f"{what} (epoch {state.epoch}); a smaller optimizer.lr usually helps. "
        "Earlier checkpoints are kept"
    )
