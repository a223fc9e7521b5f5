"""Runs in .venv-tpu-lower: as pipeline.tpu._lower, with a fault planted in the step.

The fault is one that the question names, or that the command line names for all questions.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import tensorflow as tf

from pipeline.tpu import _lower
from pipeline.worker import serve
from trainer_module import lowering, moco, replica, shuffle


def keys_stay_shuffled(core, rows, places):
    """The inverse permutation is forgotten: keys keep the places where they were encoded."""
    are_pixels = rows.dtype == tf.int32  # packed; keys are floats
    return replica.gather(core, rows, places if are_pixels else core.index * rows.shape[0] + tf.range(rows.shape[0]))


def summed_gradients(core, tree):
    """Gradients are summed, not averaged."""
    return core.sum(tree) if tf.get_current_name_scope() == "gradients" else replica.mean(core, tree)


_STEP = moco.MoCo._step


def enqueued_before_logits(self, state, x_q, x_k, core):
    """The keys of the batch are among its negatives."""
    after, _ = _STEP(self, state, x_q, x_k, core)
    new, metrics = _STEP(self, state._replace(queue=after.queue), x_q, x_k, core)
    return new._replace(queue=after.queue), metrics


def two_groups(core):
    """The collectives take in half of the cores each."""
    half = core.count // 2
    return [list(range(half)), list(range(half, core.count))]


def exchanged_twice(core, blocks):
    """Key views travel twice."""
    return _EXCHANGE(core, _EXCHANGE(core, blocks))


_EXCHANGE = lowering.LoweredReplica.all_to_all
FAULTS = {
    "inverse permutation forgotten": lambda: mock.patch.object(shuffle, "gather", keys_stay_shuffled),
    "gradients summed, not averaged": lambda: mock.patch.object(moco, "mean", summed_gradients),
    "enqueued before the logits": lambda: mock.patch.object(moco.MoCo, "_step", enqueued_before_logits),
    "exchanged twice": lambda: mock.patch.object(lowering.LoweredReplica, "all_to_all", exchanged_twice),
    "wrong group": lambda: mock.patch.object(lowering.LoweredReplica, "_group", property(two_groups)),
}


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    with FAULTS[fault]() if fault else contextlib.nullcontext():
        yield


def answer(question: dict[str, Any]) -> dict[str, Any]:
    with planted(question.get("fault", *sys.argv[1:])):
        return _lower.answer(question)


if __name__ == "__main__":
    serve(answer)
