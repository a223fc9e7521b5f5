"""Measuring processes: each side of a comparison runs in a process of its own and answers in JSON."""

import json
import os
import subprocess
import tempfile
import time
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

    @property
    def processor_seconds(self) -> float:
        """That the process has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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


class Bystanders:
    """How much of this machine whatever is not measured takes, since this was made."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers, self._start = workers, time.monotonic()
        self._busy = self._seconds()

    @property
    def share(self) -> float:
        """0 for a machine that did nothing else, 1 for one that did nothing but something else."""
        passed = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        return max(0.0, (self._seconds() - self._busy) / passed)

    def _seconds(self) -> float:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - sum(worker.processor_seconds for worker in self._workers)


def _environment() -> dict[str, str]:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(THREADS)}
