"""Measuring processes: each side of a comparison runs in a process of its own and answers in JSON."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2


class Worker:
    """A process that answers each line of its standard input with one line of JSON; idle in between.

    So two of them can take turns on the same cores without starting anew at each turn.
    """

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._command = [str(part) for part in command]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__ closes it
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def ask(self, question: str) -> Any:
        """Sends one line, waits for the answer.

        Raises:
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
            self._said.seek(0)
            raise RuntimeError(f"{' '.join(self._command)} failed:\n{self._said.read().decode()[-4000:]}")
        return json.loads(answer)


def _environment() -> dict[str, str]:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(THREADS)}
