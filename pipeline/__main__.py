"""`python -m pipeline`, which the launcher `./moco` calls."""

import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def _end(_number: int = signal.SIGINT, _frame: FrameType | None = None) -> NoReturn:
    os.write(2, b"moco: interrupted\n")
    os._exit(130)


def _run() -> int:
    # While main's module is imported, Ctrl-C would be a traceback. Where it is ignored, as in a shell's background, it
    # stays ignored.
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, _end)
    from pipeline.cli import main

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a label or path that the terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main(sys.argv[1:])
    except KeyboardInterrupt:  # just before main() listened, or just after
        _end()


if __name__ == "__main__":
    sys.exit(_run())
