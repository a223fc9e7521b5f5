"""Alarms: what is wrong with a training run, judged from the history of its intervals alone. Needs no TensorFlow."""

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from trainer_module.config import TrainConfig, shuffles_replicas
from trainer_module.errors import UserError

_LEAKS = ("none", "sync")  # by design


@dataclasses.dataclass(frozen=True)
class Interval:
    """What was measured since the interval before; NaN where nothing could be.

    Attributes:
        step: at the end of the interval.
        steps: in the interval, over which the figures are averaged.
        epoch: passes over the images at its end.
        loss to learning_rate: see trainer_module.moco.Metrics.
        embedding_spread: embedding_std as a share of 1 / sqrt(C), that of vectors uniform on the sphere.
        effective_rank: RankMe of the queue's newest keys.
        images_per_second: query images.
        step_ms: milliseconds of wall clock a step, kNN and checkpoints left out.
        input_wait_ms: of these, how many the step waited for its batch.
        input_wait_share: the same as a share of step_ms.
        knn_top1: of the held-out part, where it was measured at the end of this interval.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    pretext_top1: float
    pretext_top5: float
    positive_similarity: float
    negative_similarity: float
    alignment: float
    embedding_std: float
    embedding_spread: float
    effective_rank: float
    learning_rate: float
    images_per_second: float
    step_ms: float
    input_wait_ms: float
    input_wait_share: float
    knn_top1: float


class Kind(enum.Enum):
    """What an alarm is about."""

    collapse = "collapse"
    leak = "leak"
    input = "input"


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One thing that is wrong, as a line that says what was seen and how to mend it."""

    kind: Kind
    text: str


@dataclasses.dataclass(frozen=True)
class History:
    """What the alarms remember of all intervals so far.

    Attributes:
        collapsed, starved: intervals in a row that looked collapsed, or waited too long for the input.
        best_knn, last_knn: of all measurements so far.
        sounding: kinds that have been said and have not cleared since.
    """

    collapsed: int = 0
    starved: int = 0
    best_knn: float = 0.0
    last_knn: float = math.nan
    sounding: frozenset[Kind] = frozenset()


def judge(history: History, interval: Interval, config: TrainConfig) -> tuple[History, tuple[Alarm, ...]]:
    """Adds one interval to the history; pure.

    Args:
        history: of the intervals before.
        interval: the new one.
        config: `watch` holds the limits; the rest is quoted in reasons.

    Returns:
        The history with it, and the alarms that are new: of each kind at most one until it has cleared.
    """
    watch = config.watch
    last_knn = history.last_knn if math.isnan(interval.knn_top1) else interval.knn_top1
    seen = History(
        collapsed=history.collapsed + 1 if _looks_collapsed(interval, config) else 0,
        starved=history.starved + 1 if interval.input_wait_share > watch.max_input_share else 0,
        best_knn=history.best_knn if math.isnan(last_knn) else max(history.best_knn, last_knn),
        last_knn=last_knn,
    )
    wrong: dict[Kind, str] = {}
    if seen.collapsed >= watch.patience:
        wrong[Kind.collapse] = _collapse(interval, config)
    # Of a collapsed network neither figure says anything of batch statistics.
    pretext_up = interval.pretext_top1 > watch.leak_pretext and not seen.collapsed
    if pretext_up and seen.best_knn - last_knn > watch.leak_knn_drop:
        wrong[Kind.leak] = _leak(interval, seen, config)
    if seen.starved >= watch.patience:
        wrong[Kind.input] = _input(interval)
    new = tuple(Alarm(kind, text) for kind, text in wrong.items() if kind not in history.sounding)
    return dataclasses.replace(seen, sounding=frozenset(wrong)), new


def sounding(intervals: Iterable[Interval], config: TrainConfig) -> dict[Kind, str]:
    """Returns what is still wrong after the last interval: alarms that were raised and have not cleared."""
    history, texts = History(), dict[Kind, str]()
    for interval in intervals:
        history, alarms = judge(history, interval, config)
        texts |= {alarm.kind: alarm.text for alarm in alarms}
    return {kind: text for kind, text in texts.items() if kind in history.sounding}


def _looks_collapsed(interval: Interval, config: TrainConfig) -> bool:
    # An untrained network maps all images to nearly one point, so the first epoch says nothing.
    watch = config.watch
    low = interval.embedding_spread < watch.min_embedding_std or interval.effective_rank < watch.min_effective_rank
    return low and interval.epoch > 1


def _collapse(interval: Interval, config: TrainConfig) -> str:
    watch = config.watch
    return (
        f"collapse at step {interval.step}: the embeddings' spread is {interval.embedding_spread:.3f} of a uniform one "
        f"(limit {watch.min_embedding_std:g}), their effective rank {interval.effective_rank:.1f} "
        f"(limit {watch.min_effective_rank:g}); lower train.learning_rate (now {config.learning_rate:g}) "
        f"or raise train.momentum (now {config.momentum:g})"
    )


def _leak(interval: Interval, history: History, config: TrainConfig) -> str:
    return (
        f"leak at step {interval.step}: pretext top-1 is {interval.pretext_top1:.3f} while kNN fell from "
        f"{history.best_knn:.3f} to {history.last_knn:.3f}: {_leak_mend(config)}"
    )


def _leak_mend(config: TrainConfig) -> str:
    mode = config.key_bn.mode.name
    if mode in _LEAKS:
        return (
            f"batch statistics betray the positive (train.key_bn.mode={mode}); set train.key_bn.mode=cross_replica_sum "
            f"with train.replicas={max(2, config.replicas)}"
        )
    if shuffles_replicas(config.key_bn.mode) and config.replicas == 1:
        return (
            f"batch statistics betray the positive (train.key_bn.mode={mode} has nothing to shuffle on one replica); "
            "set train.replicas=2"
        )
    return (
        f"batch statistics may betray the positive (train.key_bn.mode={mode}), or the views are too easy; "
        "raise train.replicas, or lower augment.crop_scale_min"
    )


def _input(interval: Interval) -> str:
    return (
        f"input-bound at step {interval.step}: {interval.input_wait_share:.0%} of a step's {interval.step_ms:.0f} ms "
        "are spent waiting for views; set augment.where=beam (with augment.pairs_per_image as disk allows), "
        "or use a host with more cores"
    )


def check_losses(losses: NDArray[np.floating], first: int, kept: int | None, config: TrainConfig) -> None:
    """Stops a run that has diverged.

    Args:
        losses: float [n], of consecutive steps.
        first: the step that losses[0] belongs to.
        kept: step of the last checkpoint, None before there is one.
        config: its learning rate is quoted.

    Raises:
        UserError: names the first step whose loss is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise UserError(_diverged(f"the loss at step {first + bad[0]} is {losses[bad[0]]}", kept, config))


def check_weights(finite: Mapping[str, bool], step: int, kept: int | None, config: TrainConfig) -> None:
    """Refuses a state that could never be continued; a loss is still finite in the step that ruins the weights.

    Args:
        finite: name of a part of the state -> whether all its numbers are finite.
        step: that the state belongs to.
        kept: step of the last checkpoint, None before there is one.
        config: its learning rate is quoted.

    Raises:
        UserError: names the parts that are not finite.
    """
    bad = [name for name, good in finite.items() if not good]
    if bad:
        raise UserError(_diverged(f"after step {step} not all numbers of {', '.join(bad)} are finite", kept, config))


def _diverged(what: str, kept: int | None, config: TrainConfig) -> str:
    checkpoint = "there is no checkpoint yet" if kept is None else f"the checkpoint of step {kept} is kept"
    return (
        f"training diverged: {what}; lower train.learning_rate (now {config.learning_rate:g}) "
        f"or raise train.temperature (now {config.temperature:g}) and train anew, in another --workdir or without "
        f"the checkpoints of this one; {checkpoint}"
    )
