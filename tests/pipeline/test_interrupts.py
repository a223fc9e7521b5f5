"""Interrupts: none is forgotten, and none is called by another name."""

import signal
import sys
import threading
import time

import pytest

from pipeline import cli
from pipeline.interrupts import Interrupts


class Finalised:
    """Is interrupted while it is finalised, where Python forgets what is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_interrupts_and_is_remembered(number):
    interrupts = Interrupts()
    assert not interrupts.number
    with pytest.raises(KeyboardInterrupt), interrupts.listening([signal.SIGINT, signal.SIGTERM]):
        signal.raise_signal(number)
    assert interrupts.number == number


def test_an_interrupt_that_python_forgets_comes_again_and_is_not_printed(capsys):
    def work() -> None:
        with Interrupts().listening([signal.SIGTERM]):
            Finalised()
            end = time.monotonic() + 10
            while time.monotonic() < end:
                time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not capsys.readouterr().err


def test_a_wait_for_a_lock_ends_by_an_interrupt_that_python_forgot():
    lock = threading.Lock()
    lock.acquire()

    def wait() -> None:
        with Interrupts().listening([signal.SIGTERM]):
            Finalised()
            lock.acquire(timeout=10)

    with pytest.raises(KeyboardInterrupt):
        wait()


def test_what_else_python_forgets_is_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    class Broken:
        def __del__(self) -> None:
            raise ValueError

    with Interrupts().listening([signal.SIGTERM]):
        Broken()
    assert [one.exc_type for one in told] == [ValueError]


def test_what_was_there_is_there_again():
    def before(*_) -> None:
        pass

    former = signal.signal(signal.SIGTERM, before)
    try:
        hook = sys.unraisablehook
        with Interrupts().listening([signal.SIGTERM]):
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before
        assert sys.unraisablehook is hook
    finally:
        signal.signal(signal.SIGTERM, former)


def test_ctrl_c_that_is_ignored_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts().listening([signal.SIGINT]):
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_another_thread_listens_to_nothing():
    heard = []

    def listen() -> None:
        with Interrupts().listening([signal.SIGTERM]):
            heard.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_command_that_was_interrupted_says_so_whatever_a_library_made_of_it(monkeypatch, capsys, number):
    def dispatch(_) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ValueError("a library's own word") from None

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    assert cli.main(["embed"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "moco: interrupted; the same command continues\n"
