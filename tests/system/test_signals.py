"""Signals that end a run: held back while a step is under way, raised elsewhere."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from fashionnet.errors import Interrupted
from fashionnet.system import signals
from fashionnet.system.command_line import reported


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_strikes_at_once(number: int) -> None:
    with pytest.raises(Interrupted) as caught, signals.watched():
        send(number)
        pytest.fail("it went on")
    assert caught.value.status == 128 + number
    assert str(caught.value) == f"interrupted by {signal.Signals(number).name}"


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_deferred_signal_is_noted_and_strikes_afterwards(number: int) -> None:
    reached = False
    with pytest.raises(Interrupted) as caught, signals.watched() as stop:
        with stop.deferred():
            assert stop.signal is None
            send(number)
            assert stop.signal == number
            reached = True
        pytest.fail("it went on")
    assert reached
    assert caught.value.status == 128 + number


def test_a_second_ctrl_c_strikes_at_once() -> None:
    with pytest.raises(Interrupted), signals.watched() as stop, stop.deferred():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("it went on")


def test_other_signals_may_come_again_and_the_first_counts() -> None:
    with pytest.raises(Interrupted) as caught, signals.watched() as stop, stop.deferred():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number)
    assert caught.value.status == 128 + signal.SIGUSR1


def test_an_error_of_the_body_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), signals.watched() as stop, stop.deferred():
        send(signal.SIGTERM)
        raise ZeroDivisionError


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    with signals.watched():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in signals.SIGNALS} == before


def test_another_thread_leaves_the_handlers_alone() -> None:
    def work() -> object:
        with signals.watched() as stop, stop.deferred():
            return signal.getsignal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(work).result() == before


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (Interrupted(signal.SIGTERM), 143, "interrupted by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted by SIGINT"),
    ],
)
def test_a_command_ends_with_one_line_and_the_shells_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, reported():
        raise error
    assert caught.value.code == status
    assert capsys.readouterr().err == line + "\n"


def test_a_handler_that_was_there_has_its_turn_once_the_run_is_saved() -> None:
    done: list[str] = []

    def handler(number: int, _frame: object) -> None:
        done.append(f"handler of {signal.Signals(number).name}")

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(Interrupted), signals.watched() as stop:
            try:
                with stop.deferred():
                    send(signal.SIGUSR2)
                    done.append("the step is finished")
            finally:
                done.append("saved")
        assert done == ["the step is finished", "saved", "handler of SIGUSR2"]
        done.clear()
        with pytest.raises(Interrupted), signals.watched():
            send(signal.SIGUSR1)  # it does not handle this one
        assert not done
        assert signal.getsignal(signal.SIGUSR2) is handler
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_handler_may_end_the_process_in_its_own_way() -> None:
    def handler(_number: int, _frame: object) -> None:
        raise SystemExit(255)  # as submitit's does, when the job is queued again

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(SystemExit) as caught, signals.watched():
            send(signal.SIGUSR2)
        assert caught.value.code == 255
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_an_error_is_not_interrupted_while_it_is_recorded() -> None:
    recorded: list[str] = []
    with pytest.raises(BaseException) as caught, signals.watched() as stop:
        try:
            with stop.deferred():
                raise ValueError("the first")
        except ValueError as error:
            os.kill(os.getpid(), signal.SIGTERM)
            recorded.append(str(error))
            raise
    assert isinstance(caught.value, ValueError) and recorded == ["the first"]
