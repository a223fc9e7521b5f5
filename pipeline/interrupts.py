"""Ctrl-C and polite kills, none of which is lost on its way to the command line."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_AGAIN = 0.05  # seconds after which whatever forgot an interrupt has ended


class Interrupts:
    """Raises KeyboardInterrupt in the main thread at a signal, as Python does at Ctrl-C, and remembers that it did.

    What is raised while the main thread is in a finaliser, or in a callback from C, Python prints and forgets: there it
    is raised once more. And libraries may raise something else in its place, so who catches that asks here.

    Attributes:
        number: of the signal that came; 0 if none did.
    """

    def __init__(self) -> None:
        """None has come, and none is listened to."""
        self.number = 0
        self._listening = False

    @contextmanager
    def listening(self, numbers: Sequence[int]) -> Iterator[None]:
        """Listens to signals, except where SIGINT is ignored, as in a shell's background, or in another thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [number for number in numbers if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._interrupt) for number in heard}
        self._forgotten_by, sys.unraisablehook = sys.unraisablehook, self._forgotten
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            sys.unraisablehook = self._forgotten_by
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, _: FrameType | None) -> NoReturn:
        self.number = number
        raise KeyboardInterrupt

    def _forgotten(self, told: Any) -> None:
        if not self.number or not issubclass(told.exc_type, KeyboardInterrupt):
            self._forgotten_by(told)
            return
        timer = threading.Timer(_AGAIN, self._send_again)
        timer.daemon = True
        timer.start()

    def _send_again(self) -> None:
        main = threading.main_thread().ident
        if self._listening and main is not None:
            signal.pthread_kill(main, self.number)
