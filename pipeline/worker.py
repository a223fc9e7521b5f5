"""Processes that answer: each line of JSON on their standard input with one line of JSON.

For what has to run in another environment, or apart. Idle in between; what is imported once serves all questions.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer_module.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR", "PYTHONWARNINGS": "ignore"}
_REFUSED = "refused"
_LAST_BYTES = 4000


class Worker:
    """A process that answers each line of its standard input with one line of JSON; idle in between.

    Args:
        command: what runs, in the project's root.
        environment: variables that it gets besides ours.
    """

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self._command = [str(part) for part in command]
        self._said = os.memfd_create("said")  # a file that goes with whoever holds it open
        self._held = contextlib.ExitStack()
        self._held.callback(os.close, self._said)
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env={**os.environ, **_QUIET, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def __enter__(self) -> "Worker":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        self.close()

    def close(self) -> None:
        """Ends the process; may be called again."""
        self._process.kill()
        self._process.communicate()
        self._held.close()

    @property
    def processor_seconds(self) -> float:
        """That the process has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, question: str) -> Any:
        """Sends one line, waits for the answer.

        Raises:
            UserError: what `serve` was refused with.
            RuntimeError: the process has ended; the text has what it said last.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            self._process.wait()
            start = max(0, os.fstat(self._said).st_size - _LAST_BYTES)
            said = os.pread(self._said, _LAST_BYTES, start).decode(errors="replace")
            raise RuntimeError(f"{' '.join(self._command)} failed:\n{said}")
        value = json.loads(answer)
        if isinstance(value, dict) and value.keys() == {_REFUSED}:
            raise UserError(value[_REFUSED])
        return value


def serve(answer: Callable[[Any], Any]) -> None:
    """Answers until the questions end: the other end of a `Worker`, for a process that libraries may print in.

    Args:
        answer: from a question's JSON value to the answer's. A UserError of it is raised again where was asked.
    """
    # The libraries' own standard output becomes standard error, so that nothing tears an answer.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                value = answer(json.loads(line))
            except UserError as error:
                value = {_REFUSED: str(error)}
            print(json.dumps(value), file=answers, flush=True)
