"""What is watched while a model trains: figures of each interval, online kNN, alarms, progress.

The driver calls `Watch.see` after each of its compiled loops. A tensor's value is asked for at the end of an interval
only, for that waits for the device.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer_module import progress
from trainer_module.alarms import History, Interval, Kind, check_losses, check_weights, judge, sounding
from trainer_module.config import TrainConfig
from trainer_module.errors import UserError
from trainer_module.geometry import effective_rank
from trainer_module.metrics_file import FILE, MetricsFile
from trainer_module.moco import Metrics

RANK_KEYS = 2048  # of the queue's newest keys, on which the effective rank is measured
_REPORT_SECONDS = 0.5
_FLUSH_SECONDS = 10.0
_POINTS = 1_000_000  # of TensorBoard that may wait

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Result:
    """What training did.

    Attributes:
        steps: steps in all, over all starts.
        resumed_from: step of the checkpoint that this start continued, 0 for none.
        images_per_second: query images per second over the last epoch's intervals of that start, without compilation,
            kNN and checkpoints.
        final_loss, pretext_top1, alignment: averages over the last epoch's steps of that start.
        alarms: of all starts, those that have not cleared by the end: kind -> text.
    """

    steps: int
    resumed_from: int
    images_per_second: float
    final_loss: float
    pretext_top1: float
    alignment: float
    alarms: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def leak(self) -> str:
        """What the alarm of a leak through batch normalisation says at the end; empty if it is silent."""
        return self.alarms.get(Kind.leak.value, "")


def timed_next(batches: Iterator[T]) -> tuple[T, tf.Tensor]:
    """Takes the next batch and measures how long it was waited for; for use inside a tf.function.

    To be called outside strategy.run: the time is the host's. Where the host runs ahead of the device, the wait
    overlaps the device's work, and is an upper bound of what the device waited; once the device is the slower of the
    two, batches lie ready and it is zero all the same.

    Args:
        batches: a dataset's iterator, distributed or not.

    Returns:
        The batch, and float32[] seconds.
    """
    before = tf.timestamp()
    with tf.control_dependencies([before]):
        batch = next(batches)
    with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
        after = tf.timestamp()
    return batch, tf.cast(after - before, tf.float32)


def newest_rows(queue: tf.Tensor, pointer: tf.Tensor, enqueued: int, limit: int = RANK_KEYS) -> NDArray[np.float32]:
    """The newest keys of the queue, without the noise that it starts with.

    Args:
        queue: float[K, C].
        pointer: int32[], where the next keys go.
        enqueued: keys since the start of training; more than K is as good as K.
        limit: rows at the most.

    Returns:
        float32[min(enqueued, K, limit), C], the newest first.
    """
    size = queue.shape[0]
    rows = (pointer - 1 - tf.range(min(enqueued, size, limit))) % size
    return tf.cast(tf.gather(queue, rows), tf.float32).numpy()


def finite_parts(state: Any) -> dict[str, bool]:
    """Whether all numbers of each part of a state (a NamedTuple of tensors or lists of them) are finite, by name."""
    return {name: all(map(_is_finite, tf.nest.flatten(part))) for name, part in state._asdict().items()}


def _is_finite(value: Any) -> bool:
    tensor = tf.convert_to_tensor(value)
    return not tensor.dtype.is_floating or bool(tf.reduce_all(tf.math.is_finite(tensor)))


def no_keys() -> NDArray[np.float32]:
    """Stands where there is no queue to look at."""
    return np.zeros((0, 0), np.float32)


class Watch:
    """Collects figures, writes curves, measures kNN, raises alarms, reports progress, stops a run that has diverged.

    Writes `train/metrics.jsonl` (see trainer_module.alarms.Interval for its keys) and TensorBoard points into the log
    folder, one of each an interval. An interval ends each `config.log_steps` steps, where kNN is due, and at the end.
    """

    def __init__(
        self,
        start: int,
        total: int,
        steps_per_epoch: int,
        config: TrainConfig,
        log_dir: str | os.PathLike[str],
        newest_keys: Callable[[], NDArray[np.float32]] = no_keys,
        knn: Callable[[], float] | None = None,
    ) -> None:
        """Goes on from what earlier starts wrote.

        Args:
            start: steps done; a checkpoint of them exists unless it is 0.
            total: steps at the end.
            steps_per_epoch: steps in one pass over the images.
            config: of the training.
            log_dir: for the curves.
            newest_keys: gives the newest keys, float32[n, C], see `newest_rows`.
            knn: gives kNN top-1 of the present weights, see trainer_module.online_knn; None never measures it.
        """
        self._start, self._total, self._steps_per_epoch = start, total, steps_per_epoch
        self._config, self._newest_keys, self._knn = config, newest_keys, knn
        folder = f"{os.fspath(log_dir).rstrip('/')}/train"
        self._file = MetricsFile(f"{folder}/{FILE}", start)
        _mark_start(start, folder)
        self._writer = tf.summary.create_file_writer(folder, max_queue=_POINTS)
        self._untold: list[Interval] = []  # to TensorBoard
        self._history = functools.reduce(lambda h, i: judge(h, i, config)[0], self._file.kept, History())
        self._kept = start or None
        self._pending: list[Metrics] = []
        self._waited: list[tf.Tensor | float] = []
        self._seen = self._closed = self._clock_from = start
        self._clock = self._reported = self._flushed = time.monotonic()
        # A start in the midst of the last epoch answers for all of it.
        self._last_steps = collections.deque(_steps_in(self._file.kept), maxlen=steps_per_epoch)
        self._intervals: list[Interval] = []  # of the last epoch
        self._figures: dict[str, float] = {}

    def see(self, done: int, metrics: Metrics, waited: tf.Tensor | float = math.nan) -> None:
        """Takes note of what one compiled loop did.

        Args:
            done: steps done after it.
            metrics: float32[] each, or float32[n] for the n steps that end at `done`.
            waited: float32[], seconds that the loop waited for its batches in all, see `timed_next`; NaN where that
                was not measured.

        Raises:
            UserError: a loss is not finite. It is noticed at the end of the interval.
        """
        before, self._seen = self._seen, done
        self._pending.append(metrics)
        self._waited.append(waited)
        if before == self._start:
            self._start_clock(metrics)
        if self._crosses(self._config.log_steps, before) or self._knn_due(before) or done == self._total:
            self._close()
        now = time.monotonic()
        if now - self._reported > _REPORT_SECONDS or before == self._start or done == self._total:
            self._reported = now
            progress.report("train", done, self._total, "steps", **self._figures)

    def check_finite(self, done: int, state: Any) -> None:
        """To be called before each checkpoint; also writes out the curves up to it.

        Args:
            done: steps done.
            state: trainer_module.moco.State, tensors or variables; or any NamedTuple of them.

        Raises:
            UserError: a loss since the last interval, or a number of the state, is not finite.
        """
        self._read_losses()
        check_weights(finite_parts(state), done, self._kept, self._config)
        self._flush()

    def saved(self, step: int) -> None:
        """To be called once a checkpoint of that step is whole."""
        self._kept = step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock; for what is no part of a step, such as writing a checkpoint."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - began

    def result(self) -> Result:
        """What training did, once it is over."""
        self._flush()
        self._writer.close()
        means = Metrics(*(float(np.mean(values)) for values in zip(*self._last_steps, strict=True)))
        alarms = {kind.value: text for kind, text in sounding(self._file.intervals(), self._config).items()}
        return Result(
            steps=self._total,
            resumed_from=self._start,
            images_per_second=self._last_rate(),
            final_loss=means.loss,
            pretext_top1=means.pretext_top1,
            alignment=means.alignment,
            alarms=alarms,
        )

    def _flush(self) -> None:
        """Writes the curves out, both kinds at once: a bucket rewrites the whole file for each write."""
        self._file.flush()
        self._flushed = time.monotonic()
        if self._untold:
            with self._writer.as_default():  # at whose end TensorFlow writes
                for interval in self._untold:
                    self._write_points(interval)
            self._untold.clear()

    def _write_points(self, interval: Interval) -> None:
        for name, value in dataclasses.asdict(interval).items():
            if name not in _COUNTERS and math.isfinite(value):
                tf.summary.scalar(name, value, step=interval.step)

    def _crosses(self, every: int, before: int) -> bool:
        return self._seen // every > before // every

    def _knn_due(self, before: int) -> bool:
        epochs = self._config.watch.knn_epochs
        if self._knn is None or not epochs:
            return False
        return self._crosses(epochs * self._steps_per_epoch, before) or self._seen == self._total

    def _start_clock(self, metrics: Metrics) -> None:
        self._figures = {"loss": float(_steps_of(metrics.loss)[-1])}  # waits for the first loop, which compiles
        self._waited.clear()
        self._clock, self._clock_from = time.monotonic(), self._seen

    def _read_losses(self) -> None:
        losses = np.concatenate([np.zeros(0), *(_steps_of(m.loss) for m in self._pending)])
        try:
            check_losses(losses, self._closed + 1, self._kept, self._config)
        except UserError:
            self._flush()  # what led there is what one wants to look at now
            raise

    def _close(self) -> None:
        """Ends an interval: reads what was measured in it, and tells."""
        self._read_losses()
        values = Metrics(*(np.concatenate([_steps_of(v) for v in field]) for field in zip(*self._pending, strict=True)))
        seconds, steps = time.monotonic() - self._clock, self._seen - self._clock_from
        waited = float(np.sum([float(w) for w in self._waited]))
        self._clock, self._clock_from = self._clock + seconds, self._seen
        self._last_steps.extend(Metrics(*row) for row in zip(*values, strict=True))
        means = {name: float(np.mean(v)) for name, v in values._asdict().items()}
        interval = self._interval(means, seconds, steps, waited)
        self._pending.clear()
        self._waited.clear()
        self._closed = self._seen
        self._tell(interval)

    def _interval(self, means: dict[str, float], seconds: float, steps: int, waited: float) -> Interval:
        keys = self._newest_keys()
        step_seconds = seconds / steps if steps else math.nan
        wait = waited / steps if steps else math.nan
        return Interval(
            step=self._seen,
            steps=self._seen - self._closed,
            epoch=self._seen / self._steps_per_epoch,
            embedding_spread=means["embedding_std"] * math.sqrt(keys.shape[1]) if len(keys) else math.nan,
            effective_rank=effective_rank(keys) if len(keys) else math.nan,
            images_per_second=self._config.global_batch / step_seconds,
            step_ms=1e3 * step_seconds,
            input_wait_ms=1e3 * wait,
            input_wait_share=wait / step_seconds,
            knn_top1=self._measure_knn(),
            **{name: means[name] for name in means if name in _MEASURED},
        )

    def _measure_knn(self) -> float:
        if self._knn is None or not self._knn_due(self._closed):
            return math.nan
        with self.paused():
            return self._knn()

    def _tell(self, interval: Interval) -> None:
        self._file.add(interval)
        self._untold.append(interval)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()
        self._intervals = [i for i in self._intervals if i.step > self._seen - self._steps_per_epoch] + [interval]
        self._history, alarms = judge(self._history, interval, self._config)
        for alarm in alarms:
            progress.note(alarm.text)
        self._figures = {"loss": interval.loss}
        if math.isfinite(interval.images_per_second):
            self._figures["images/s"] = interval.images_per_second
        if math.isfinite(self._history.last_knn):
            self._figures["knn"] = self._history.last_knn

    def _last_rate(self) -> float:
        timed = [i for i in self._intervals if math.isfinite(i.step_ms)]
        seconds = sum(i.step_ms * i.steps for i in timed) / 1e3
        return sum(i.steps for i in timed) * self._config.global_batch / seconds if timed else 0.0


_MEASURED = frozenset(field.name for field in dataclasses.fields(Interval)) & frozenset(Metrics._fields)
_COUNTERS = ("step", "steps", "epoch")
_EVENTS = re.compile(r"events\.out\.tfevents\.(?P<time>\d+)\.(?P<rest>.+)")


def _steps_in(intervals: Iterable[Interval]) -> Iterator[Metrics]:
    """The steps of earlier starts, each with the figures of its interval."""
    for interval in intervals:
        values = {name: getattr(interval, name) for name in Metrics._fields}
        yield from [Metrics(**values)] * interval.steps


def _steps_of(value: Any) -> NDArray[np.float64]:
    return np.atleast_1d(np.asarray(value, np.float64))


def _mark_start(step: int, folder: str) -> None:
    """Has TensorBoard drop the points after a step: an earlier start wrote them, and this one writes them again.

    It does so at every mark but the first.
    """
    now = time.time()
    tf.io.gfile.makedirs(folder)
    _put_into_the_past(folder, int(now))
    # TensorBoard reads the files of a folder in the order of their names.
    with tf.io.TFRecordWriter(f"{folder}/events.out.tfevents.{int(now):010d}.0.started-at-{step}") as file:
        file.write(tf.compat.v1.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        began = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        file.write(tf.compat.v1.Event(wall_time=now, step=step + 1, session_log=began).SerializeToString())


def _put_into_the_past(folder: str, now: int) -> None:
    """Renames the files of earlier starts, in their order, where by their names they are not earlier than now.

    TensorFlow names its files by the clock, which may have been put back since.
    """
    files = sorted((name, match) for name in tf.io.gfile.listdir(folder) if (match := _EVENTS.fullmatch(name)))
    if all(int(match["time"]) < now for _, match in files):
        return
    for number, (name, match) in enumerate(files):
        earlier = f"events.out.tfevents.{number:010d}.{match['rest']}"
        if earlier != name:  # a start that was killed in the midst of this may have renamed it
            tf.io.gfile.rename(f"{folder}/{name}", f"{folder}/{earlier}")
