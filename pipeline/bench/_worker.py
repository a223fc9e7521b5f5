"""Measuring processes: each side of a comparison runs in a process of its own and answers in JSON."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline.worker import Worker

THREADS = 2


def started(command: Sequence[str | Path]) -> Worker:
    """A process that computes in as many threads as the other side's."""
    return Worker(command, {"OMP_NUM_THREADS": str(THREADS)})


class Measured(Protocol):
    """A process whose time is known."""

    @property
    def processor_seconds(self) -> float:
        """That it has used so far."""


class Bystanders:
    """How much of this machine whatever is not measured takes, since this was made."""

    def __init__(self, workers: Sequence[Measured]) -> None:
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
