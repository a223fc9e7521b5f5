"""metrics.jsonl: one line of JSON for each interval of a training, over all its starts."""

import dataclasses
import json
import math
from typing import Any

import tensorflow as tf

from trainer_module.alarms import Interval

FILE = "metrics.jsonl"


class MetricsFile:
    """Appends intervals; what could not be measured is null.

    Lines are kept until `flush`, since a bucket rewrites the whole file for each write.
    """

    def __init__(self, path: str, start: int) -> None:
        """Takes up the file where training goes on.

        Lines beyond the step `start`, which are about to be written again, and what an interrupted write left are
        removed, so that each step is told once.

        Args:
            path: of the file; its folder is made.
            start: steps done.
        """
        self._path = path
        self._lines: list[str] = []
        tf.io.gfile.makedirs(path.rpartition("/")[0])
        text = _read(path)
        self.kept = tuple(interval for interval in _intervals(text) if interval.step <= start)
        kept = "".join(map(_to_line, self.kept))
        if kept != text:
            _replace(path, kept)

    def add(self, interval: Interval) -> None:
        """Takes one line."""
        self._lines.append(_to_line(interval))

    def flush(self) -> None:
        """Writes the lines taken so far."""
        if self._lines:
            with tf.io.gfile.GFile(self._path, "a") as file:
                file.write("".join(self._lines))
            self._lines.clear()

    def intervals(self) -> tuple[Interval, ...]:
        """All intervals that were flushed, of earlier starts, too."""
        return read_intervals(self._path)


def read_intervals(path: str) -> tuple[Interval, ...]:
    """The intervals in the file, in order; none if there is no file."""
    return _intervals(_read(path))


def _read(path: str) -> str:
    if not tf.io.gfile.exists(path):
        return ""
    with tf.io.gfile.GFile(path) as file:
        return str(file.read())


def _intervals(text: str) -> tuple[Interval, ...]:
    # Only a line with its end is whole; the last may have been cut short.
    lines = text.split("\n")[:-1]
    return tuple(interval for line in lines for interval in [_from_line(line)] if interval is not None)


def _to_line(interval: Interval) -> str:
    values = {name: _or_null(value) for name, value in dataclasses.asdict(interval).items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_line(line: str) -> Interval | None:
    try:
        values: dict[str, Any] = {n: math.nan if v is None else v for n, v in json.loads(line).items()}
        return Interval(**values)
    except (ValueError, TypeError, AttributeError):  # no JSON, or not of this program
        return None


def _replace(path: str, text: str) -> None:
    part = f"{path}.part"
    with tf.io.gfile.GFile(part, "w") as file:
        file.write(text)
    tf.io.gfile.rename(part, path, overwrite=True)
