"""What a person sees while a run goes on: tidy lines, progress bars, and none of the libraries' chatter.

Everything goes to standard output, so that lines and bars keep their order; only errors go to standard error.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from trainer_module import lines
from trainer_module.progress import LOGGER_NAME, Progress

_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "3",
    "ABSL_MIN_LOG_LEVEL": "3",
    "TFDS_LOGGING": "ERROR",
    "PYTHONWARNINGS": "ignore",
}
_CHATTERERS = ("absl", "apache_beam", "grpc", "h5py", "keras", "tensorflow", "tensorflow_transform", "tfx")
_PLAIN_SECONDS = 10.0
_COLUMNS = 80


def prefer_onednn() -> None:
    """Makes TensorFlow use oneDNN on any x86 processor; call it before TensorFlow is imported.

    By itself it does so only where it knows the processor to have AVX-512. On one with AVX2, a training step of the
    demo takes half the time with it.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def quiet(verbose: bool) -> None:
    """Silences TensorFlow, absl, Beam, TFX and warnings; call it before any of them is imported.

    Their records still reach handlers on the root logger, such as that of `logged_to`, but no terminal.

    Args:
        verbose: leave everything audible instead, at level INFO.
    """
    if verbose:
        logging.basicConfig(
            level=logging.INFO, format="%(levelname).1s %(name)s: %(message)s", handlers=[_StderrHandler()]
        )
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
        return
    os.environ.update(_QUIET)
    lines.hush_import_of_tensorflow()
    warnings.simplefilter("ignore")
    # A root handler that prints nothing keeps the libraries from installing one that does (TensorFlow and absl look
    # for one), and keeps Python's handler of last resort out.
    logging.getLogger().addHandler(logging.NullHandler())
    for name in _CHATTERERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is at the time; the mark of a verbose run."""

    @property
    def stream(self) -> TextIO:
        """The present standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


class _LogFile(logging.FileHandler):
    """A log that loses what cannot be written: a traceback for each line would bury what the user must know."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Closes the file, even where the last lines find no room."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Appends every log record of level INFO and above to a file, for the time of the context."""
    root, level = logging.getLogger(), logging.getLogger().level
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def native_stderr_to(path: Path) -> Iterator[None]:
    """Appends what C++ code writes to file descriptor 2 to a file; Python's `sys.stderr` still reaches the terminal.

    Does nothing in a verbose run.
    """
    if any(isinstance(handler, _StderrHandler) for handler in logging.getLogger().handlers):
        yield
        return
    sys.stderr.flush()
    terminal, python_stderr = os.dup(2), sys.stderr
    with path.open("ab") as log:
        os.dup2(log.fileno(), 2)
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1, errors="backslashreplace")
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = python_stderr
        os.dup2(terminal, 2)
        os.close(terminal)


def line(text: str) -> None:
    """Prints a line on standard output without tearing a bar that is being drawn."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def component_line(name: str, text: str, seconds: float, cached: bool) -> str:
    """Returns one component's line: its name, what it did in numbers, and its seconds or "cached"."""
    took = "cached" if cached else f"{seconds:,.1f} s"
    return f"{name:<17} {text:<64} {took:>9}"


@contextlib.contextmanager
def progress_shown() -> Iterator[None]:
    """Draws what `trainer_module.progress.report` says on standard output, for the time of the context."""
    logger = logging.getLogger(LOGGER_NAME)
    level, propagate = logger.level, logger.propagate
    handler = ProgressHandler(sys.stdout, terminal=sys.stdout.isatty())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


class ProgressHandler(logging.Handler):
    """Shows progress records: a bar on a terminal; elsewhere plain lines, at most one every ten seconds a task.

    A bar vanishes when its task is done or another one starts, since a component's line then says what was done. Notes
    are lines that stay.

    Args:
        stream: where to write.
        terminal: whether to draw bars.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO, terminal: bool, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock, self._stream = clock, stream
        self._drawing = _Bars(stream) if terminal else _Lines(stream)
        self._started: dict[str, tuple[float, int]] = {}
        self._finished: tuple[str, int] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one record; one with neither progress, a note nor a task that has begun is none of ours."""
        progress, note, begun = (getattr(record, name, None) for name in ("progress", "note", "begun"))
        try:
            if isinstance(begun, str):
                self._drawing.begin(begun)
            if isinstance(progress, Progress):
                self._show(progress)
            if isinstance(note, str):
                self._drawing.say(note)
        except Exception:  # logging's rule: showing progress must not end the work that reports it
            self.handleError(record)

    def close(self) -> None:
        """Takes the bar off the screen."""
        self._drawing.end()
        super().close()

    def _show(self, progress: Progress) -> None:
        last = progress.total is not None and progress.done >= progress.total
        if last and self._finished == (progress.task, progress.done):
            return
        now = self._clock()
        start, first = self._started.setdefault(progress.task, (now, progress.done))
        if progress.done < first:
            start, first = self._started[progress.task] = (now, progress.done)
        text = _standing(progress, _seconds_left(progress, now - start, first))
        self._drawing.show(progress, text, now, last)
        self._finished = (progress.task, progress.done) if last else None
        if last:
            del self._started[progress.task]


class _Lines:
    """Plain lines: a task's first, then at most one every ten seconds, and its last."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._shown: dict[str, float] = {}

    def show(self, progress: Progress, text: str, now: float, last: bool) -> None:
        shown = self._shown.get(progress.task)
        if shown is None or last or now - shown >= _PLAIN_SECONDS:
            print(f"{progress.task}  {text}", file=self._stream, flush=True)
            self._shown[progress.task] = now
        if last:
            del self._shown[progress.task]

    def begin(self, task: str) -> None:
        """Says nothing: the line of what was done follows."""

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def end(self) -> None:
        self._shown.clear()


class _Bars:
    """One tqdm bar at a time."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._task: str | None = None
        self._bar: _Bar | None = None

    def show(self, progress: Progress, text: str, _now: float, last: bool) -> None:
        if last:
            self.end()
            return
        if self._bar is None or self._task != progress.task:
            self.end()
            self._task = progress.task
            self._bar = _Bar(progress, text, self._stream)
        else:
            self._bar.show(progress, text)

    def begin(self, task: str) -> None:
        self.end()
        self._task, self._bar = task, _Bar(Progress(task, 0, None, "", {}), "working …", self._stream)

    def say(self, text: str) -> None:
        tqdm.write(text, file=self._stream)  # above the bar, which it draws again

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = self._task = None


class _Bar(tqdm):
    """tqdm's bar with our words behind it; without a total, the words alone."""

    def __init__(self, progress: Progress, text: str, stream: TextIO):
        self._words = text
        super().__init__(
            desc=progress.task,
            total=progress.total,
            initial=progress.done,
            file=stream,
            leave=False,
            miniters=1,
            ascii=" ━" if (stream.encoding or "").lower().startswith("utf") else " =",
            dynamic_ncols=True,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's fields and ours, for the bar's format."""
        fields = super().format_dict
        bar = "{bar:20} " if self.total else ""
        # Some pseudo-terminals say that they are 0 columns wide, for which tqdm draws nothing.
        width = fields["ncols"] or _COLUMNS
        return {**fields, "ncols": width, "words": self._words, "bar_format": f"{{desc}}  {bar}{{words}}"}

    def show(self, progress: Progress, text: str) -> None:
        self._words, self.total = text, progress.total
        step = progress.done - int(self.n)  # type: ignore[has-type]
        if step < 0:
            self.n = self.last_print_n = progress.done
            self.refresh()
        else:
            self.update(step)


def _standing(progress: Progress, seconds_left: float | None) -> str:
    """Returns for instance "240/1200 steps  loss 5.31  812 images/s  1:12 left"."""
    total = "" if progress.total is None else f"/{progress.total:,}"
    parts = [f"{progress.done:,}{total} {progress.unit}", *_figures(progress.figures)]
    if seconds_left is not None:
        parts.append(f"{tqdm.format_interval(seconds_left).removeprefix('0')} left")
    return "  ".join(parts)


def _figures(figures: Mapping[str, float]) -> list[str]:
    return [
        f"{_number(value)} {name}" if "/" in name else f"{name} {_number(value)}" for name, value in figures.items()
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _seconds_left(progress: Progress, elapsed: float, first: int) -> float | None:
    """Returns the time left at the mean speed since this task's first report; a resumed task starts beyond 0."""
    if progress.total is None or not first < progress.done < progress.total or elapsed <= 0:
        return None
    return elapsed * (progress.total - progress.done) / (progress.done - first)
