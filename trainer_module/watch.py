"""What is watched while a model trains: metrics, progress, TensorBoard points, and runs that have gone wrong."""

import collections
import dataclasses
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainer_module import progress
from trainer_module.config import TrainConfig
from trainer_module.errors import UserError
from trainer_module.moco import Metrics


@dataclasses.dataclass(frozen=True)
class Result:
    """What training did.

    Attributes:
        steps: steps in all, over all starts.
        resumed_from: step of the checkpoint that this start continued, 0 for none.
        images_per_second: query images per second of the last start that trained, without the compilation.
        final_loss, pretext_top1, alignment: averages over the last epoch's steps of that start.
    """

    steps: int
    resumed_from: int
    images_per_second: float
    final_loss: float
    pretext_top1: float
    alignment: float


class Watch:
    """Collects metrics, reports progress, writes TensorBoard points, stops a run that has diverged."""

    def __init__(self, start: int, total: int, steps_per_epoch: int, config: TrainConfig, log_dir: Path) -> None:
        self._start, self._total = start, total
        self._config, self._log_dir = config, log_dir
        self._recent: collections.deque[Metrics] = collections.deque(maxlen=steps_per_epoch)
        self._clock_started_at = start
        self._clock = self._reported = time.monotonic()
        self._rate = 0.0
        self._writer = tf.summary.create_file_writer(str(log_dir / "train"))

    def see(self, done: int, metrics: Metrics) -> None:
        """Takes note of one step's metrics; `done` counts it."""
        self._recent.append(metrics)
        if done == self._start + 1:
            float(metrics.loss)  # waits for the first step, which compiles
            self._clock, self._clock_started_at = time.monotonic(), done
        now = time.monotonic()
        if done % self._config.log_steps == 0 or done == self._total:
            self.check_finite(done, metrics)
            self._log(done, metrics)
        if now - self._reported > 0.5 or done in (self._start + 1, self._total):
            self._report(done, metrics, now)

    def check_finite(self, done: int, metrics: Metrics) -> None:
        """Raises a UserError if the loss is not finite."""
        if not np.isfinite(float(metrics.loss)):
            raise UserError(
                f"training diverged: the loss at step {done} is {float(metrics.loss)}; "
                f"lower train.learning_rate (now {self._config.learning_rate:g})"
            )

    def _log(self, done: int, metrics: Metrics) -> None:
        with self._writer.as_default(step=done):
            for name, value in metrics._asdict().items():
                tf.summary.scalar(name, value)

    def _report(self, done: int, metrics: Metrics, now: float) -> None:
        self._reported = now
        figures = {"loss": float(metrics.loss)}
        steps = done - self._clock_started_at
        if steps > 0:
            self._rate = figures["images/s"] = steps * self._config.global_batch / (time.monotonic() - self._clock)
        progress.report("train", done, self._total, "steps", **figures)

    def result(self) -> Result:
        """What training did, once it is over."""
        self._writer.close()
        means = Metrics(*(float(np.mean([float(v) for v in values])) for values in zip(*self._recent, strict=True)))
        return Result(self._total, self._start, self._rate, means.loss, means.pretext_top1, means.alignment)
