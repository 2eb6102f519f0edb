"""A training that fits into a time: it measures its first steps and fixes how many it takes.

From then on it is a training of so many steps. The steps that were measured have the learning rate
of the schedule's beginning, because how far they bring the training is not known yet. They belong
to the schedule's warm-up.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fashionnet.data.examples import Examples
from fashionnet.errors import UserError
from fashionnet.training.evaluation import evaluate

if TYPE_CHECKING:
    from fashionnet.training.state import TrainState

log = logging.getLogger(__name__)

# Fractions of the budget: the first steps, which also prepare the network's operations and are
# slower, are not measured, and those after them for at least so long.
_PREPARED, _MEASURED = 0.01, 0.05
_LEAST_STEPS = 4
_LATEST = 0.5  # fraction of the budget by which the number of steps is fixed in any case
_TIMED_PICTURES = 1000  # in the evaluation that is measured
# A training that is slowed down a little still takes its last steps. It does not take more care:
# the last steps of a schedule have a low rate, and do less for a network than more steps do.
_MARGIN = 0.01
# A machine that becomes slower takes longer for what comes after the last step, too.
_CAUTION = 1.15
# What an epoch and a run cost besides their pictures: checkpoints, curves, the process' end.
_EPOCH_SECONDS, _END_SECONDS = 0.1, 0.5


class Budget:
    """How many steps fit into a time, evaluation included.

    Args:
        seconds: of wall time, for all that a run does.
        began: when its time began, as `time.perf_counter` counts.
        num_test: pictures of the test set that are evaluated at the end.
        plan: `plan()` of a run that is to be repeated to the bit: nothing is measured then, and the
            training ends where that one ended.

    Attributes:
        steps: of the whole training; 0 while its first steps are measured.
        measured: how many first steps were measured.
        end: the step at which the time was over, before the last one; else 0.
    """

    def __init__(
        self,
        seconds: float,
        began: float,
        num_test: int = 0,
        plan: Mapping[str, int] | None = None,
    ) -> None:
        self.seconds = seconds
        self.steps, self.measured, self.end = 0, 0, 0
        self._is_repeated = plan is not None
        if plan is not None:
            self.steps, self.measured = plan["steps"], plan["measured"]
            self.end = plan.get("end", 0)
        self._began, self._num_test = began, num_test
        self._created = self._started = time.perf_counter()
        self._reserve = 0.0  # seconds that are left for what comes after the last step
        self._first_step = 0
        self._looked = 0, self._started  # the step at the last look at the clock, and when it was
        self._measured_looks: list[tuple[int, float]] = []  # steps from look to look, and seconds
        self._num_validation = 0
        self._prepared_seconds = 0.0  # for each picture, e.g. to compute its features

    def plan(self) -> dict[str, int]:
        """Returns what a repetition needs to know; {} while steps are measured."""
        found = {"steps": self.steps, "measured": self.measured, "end": self.end}
        return {key: value for key, value in found.items() if value} if self.steps else {}

    @property
    def last_step(self) -> int:
        """The step that the training ends with; 0 while that is not known."""
        return self.end or self.steps

    def fraction(self, step: int) -> float:
        """Returns how much of the training is done before a step, counted from 0, in 0..1."""
        return 0.0 if step < self.measured or not self.steps else step / self.steps

    def start(self, train: Examples, validation: Examples, step: int) -> None:
        """Notes what is trained and validated on; their features are computed by now.

        Args:
            step: how many steps are taken before; a resumed training begins with some.
        """
        self._num_validation = len(validation)
        self._started = time.perf_counter()
        seconds = self._started - self._created
        self._prepared_seconds = seconds / (len(train) + len(validation))
        self._first_step, self._looked = step, (step, self._started)

    def ends_after(self, state: TrainState, train: Examples, done: int) -> bool:
        """Looks at the clock after some steps; returns whether the time is over.

        Args:
            done: steps of the epochs before.

        Raises:
            UserError: the time does not suffice for one epoch and what comes after it.
        """
        if self._is_repeated:
            return False
        step = done + state.step
        if not self.steps:
            state.progress()  # waits for steps that a GPU is still taking
        now = time.perf_counter()
        num, seconds = step - self._looked[0], now - self._looked[1]
        self._looked = step, now
        if self.steps:
            # So many steps come before the next look.
            next_seconds = seconds / num * min(num, self.steps - step)
            is_over = step < self.steps and self._left(_CAUTION * self._reserve) < next_seconds
            if is_over:
                self.end = step
                log.warning(
                    "the time is over after step %d of %d: the steps became slower than those that "
                    "were measured",
                    *(step, self.steps),
                )
            return is_over
        if now - seconds - self._started >= _PREPARED * self.seconds:
            self._measured_looks.append((num, seconds))
        measured = sum(seconds for _, seconds in self._measured_looks)
        is_long = measured >= _MEASURED * self.seconds
        is_long &= sum(num for num, _ in self._measured_looks) >= _LEAST_STEPS
        if is_long or now - self._began > _LATEST * self.seconds:
            # The median forgets what else the machine did for a moment.
            looks = self._measured_looks or [(step - self._first_step, now - self._started)]
            pace = statistics.median(seconds / num for num, seconds in looks)
            self._fix(state, train, step, pace)
            self._looked = step, time.perf_counter()
        return False

    def _left(self, reserve: float) -> float:
        """Returns how many seconds are left for steps, with so many for what comes after them."""
        return self._began + self.seconds - reserve - time.perf_counter()

    def _fix(self, state: TrainState, train: Examples, step: int, step_seconds: float) -> None:
        """Fixes the number of steps, from the seconds of one and of an evaluation."""
        some = train[: min(len(train), _TIMED_PICTURES)]
        evaluate(state.model, some, state.scale)  # the first time prepares the operations
        began = time.perf_counter()
        evaluate(state.model, some, state.scale)
        picture_seconds = (time.perf_counter() - began) / len(some)
        state.model.train()
        validation = picture_seconds * self._num_validation
        tested = (picture_seconds + self._prepared_seconds) * self._num_test
        self._reserve = 2 * validation + tested + _EPOCH_SECONDS + _END_SECONDS
        per_epoch = -(-len(train) // state.batch_size)
        rest = self._left(self._reserve) - _MARGIN * self.seconds
        each = step_seconds + (validation + _EPOCH_SECONDS) / per_epoch
        steps = step + max(0, int(rest / each))
        if steps < per_epoch or rest < 0:
            needed = self.seconds + (per_epoch - step) * each - rest
            raise UserError(
                f"budget_seconds={self.seconds:g} is too small: an epoch takes about "
                f"{per_epoch * step_seconds:.1f} s here, and with all that comes before and after "
                f"it about {needed:.1f} s; give more, a smaller model, or data.limit=N"
            )
        # An epoch whose steps are under way has been announced as a whole one.
        self.steps = max(steps, state.epoch * per_epoch)
        self.measured = step
        log.info(
            "%d steps of %.2f ms fit into budget_seconds=%g, %.1f epochs",
            *(self.steps, 1000 * step_seconds, self.seconds, self.steps / per_epoch),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the plan and the time that is spent, for a checkpoint."""
        spent = time.perf_counter() - self._began
        return {
            **{"steps": self.steps, "measured": self.measured, "end": self.end},
            **{"spent": spent, "reserve": self._reserve},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; the time that was spent counts."""
        self.steps, self.measured, self.end = state["steps"], state["measured"], state["end"]
        self._reserve = state["reserve"]
        self._began -= state["spent"]
