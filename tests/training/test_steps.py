"""When a fit looks for signals and at losses; that its steps are right, test_loop.py checks."""

from __future__ import annotations

import signal

import pytest

from fashionnet.system import processes
from fashionnet.system.signals import Stop
from fashionnet.training import steps
from fashionnet.training.steps import Clock


class Job:
    """Stands for the other process of a job of two, which takes `seconds` for a step."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        self.seconds, self.signal = seconds, 0
        self.exchanges = 0
        patch.setattr(processes, "world_size", lambda: 2)
        patch.setattr(processes, "maxima", self.maxima)

    def maxima(self, number: int, microseconds: int) -> list[int]:
        self.exchanges += 1
        return [max(number, self.signal), max(microseconds, int(1e6 * self.seconds))]


def test_one_process_looks_for_a_signal_after_each_step() -> None:
    clock, stop = Clock(), Stop()
    assert not clock.signaled(stop, at_once=False)
    stop.signal = signal.SIGTERM
    assert clock.signaled(stop, at_once=False)


@pytest.mark.parametrize(("seconds", "exchanges"), [(1.0, 100), (0.1, 20), (0.01, 2)])
def test_several_processes_exchange_about_twice_a_second(
    monkeypatch: pytest.MonkeyPatch, seconds: float, exchanges: int
) -> None:
    job, clock, stop = Job(monkeypatch, seconds), Clock(), Stop()
    for _ in range(100):
        clock.signaled(stop, at_once=False)
    assert job.exchanges == pytest.approx(exchanges, abs=1)


def test_a_signal_of_another_process_is_found_at_the_next_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, clock, stop = Job(monkeypatch, 0.05), Clock(), Stop()
    assert not clock.signaled(stop, at_once=False)  # the first step fixes the interval: ten steps
    job.signal = signal.SIGUSR1
    found = [clock.signaled(stop, at_once=False) for _ in range(10)]
    assert found == [False] * 9 + [True]
    assert stop.signal == signal.SIGUSR1


def test_a_signal_of_its_own_stays_until_all_processes_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, clock, stop = Job(monkeypatch, 0.05), Clock(), Stop()
    clock.signaled(stop, at_once=False)
    stop.signal = signal.SIGINT
    assert not clock.signaled(stop, at_once=False)
    assert clock.signaled(stop, at_once=True)  # at the end of an epoch
    assert (stop.signal, job.exchanges) == (signal.SIGINT, 2)
    assert clock.signaled(stop, at_once=False)  # and at the first step of the next one


def test_several_processes_look_at_losses_after_the_same_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Job(monkeypatch, 0.25)
    clock, stop = Clock(), Stop()
    due = []
    for _ in range(6):
        clock.signaled(stop, at_once=False)
        due.append(clock.is_due())
    assert due == [True, False, True, False, True, False]


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [True, True]), (1e9, [False, False])])
def test_one_process_looks_at_losses_by_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: list[bool]
) -> None:
    monkeypatch.setattr(steps, "_SECONDS_BETWEEN_LOOKS", seconds)
    clock = Clock()
    assert [clock.is_due() for _ in range(2)] == expected
