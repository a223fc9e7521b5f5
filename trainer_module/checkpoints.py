"""Checkpoints: whole or not at all, written while training goes on, checked when they are read.

A checkpoint is one TensorFlow tensor bundle, `step-00000120.index` and its data file. TensorFlow writes both under
temporary names and renames the index last, so a checkpoint whose index is there was written to the end; it keeps a
CRC-32C of every tensor, so one that was damaged later does not pass for a good one. All of it works on gs://.
"""

import json
import posixpath
import re
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer_module import progress
from trainer_module.errors import UserError

Identity = Mapping[str, Any]  # {"train.learning_rate": 0.03, …}: what decides the weights, in JSON's types

_CONTENTS = "contents"
_INDEX = re.compile(r"(step-(\d+))\.index")
_OURS = re.compile(r"step-(\d+)\..*")
_DAMAGED = (
    tf.errors.DataLossError,
    tf.errors.FailedPreconditionError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.OutOfRangeError,
)
_SHOWN = 6  # differing keys in one line
_REASON = 400  # characters of TensorFlow's reason, which names the file and what is wrong with it
_CODE = "code"  # of an identity; an improvement of the code must not cost a long training


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: steps done; also the position in the input.
        tensors: the state by name.
        identity: of the run that wrote it.
    """

    step: int
    tensors: dict[str, np.ndarray]
    identity: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        directory: local or on gs://; made if missing.
        keep: how many of the newest are kept.
        identity: of this run. A checkpoint that differs in a key that both have is refused.
    """

    def __init__(self, directory: str, keep: int, identity: Identity) -> None:
        self._directory, self._keep, self._identity = directory, keep, identity
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._whole: int | None = None

    @property
    def whole(self) -> int | None:
        """Step of the last checkpoint that was written to its end since the start."""
        return self._whole

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, or None where none was ever written.

        A damaged one is passed over with a note for the user.

        Raises:
            UserError: all are damaged, or they are of another run.
        """
        damaged: list[str] = []
        for step in _steps(self._directory):
            try:
                saved = _read(self._directory, step)
            except _DAMAGED as error:
                damaged.append(f"{_prefix(self._directory, step)} is damaged ({_reason(error)})")
                continue
            _refuse_difference(self._directory, saved.identity, self._identity)
            for fault in damaged:
                progress.note(f"{fault}; training goes on from step {step:,}")
            if saved.identity.get(_CODE) != self._identity.get(_CODE):
                progress.note(f"training goes on from step {step:,} with other code than began it")
            return saved
        if damaged:
            raise UserError(f"{damaged[0]}, and no other is left; remove {self._directory} to start anew")
        return None

    def save(self, step: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Begins to write a checkpoint; returns once the one before is written.

        Args:
            step: steps done.
            tensors: the state by name; not to be changed by the caller afterwards.

        Raises:
            tf.errors.OpError: the one before could not be written.
        """
        self.wait()
        self._writing = self._writer.submit(self._write, step, tensors)

    def wait(self) -> None:
        """Returns once everything is written.

        Raises:
            tf.errors.OpError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()

    def _write(self, step: int, tensors: Mapping[str, np.ndarray]) -> None:
        tf.io.gfile.makedirs(self._directory)
        contents = _Contents({name: tf.as_dtype(v.dtype).name for name, v in tensors.items()}, dict(self._identity))
        tf.raw_ops.SaveV2(
            prefix=_prefix(self._directory, step),
            tensor_names=[_CONTENTS, *tensors],
            shape_and_slices=["", *("" for _ in tensors)],
            tensors=[json.dumps(contents._asdict()), *tensors.values()],
        )
        self._whole = step
        # A later step than this one was found damaged, else training would have gone on from there.
        kept = [s for s in _steps(self._directory) if s <= step][: self._keep]
        _remove(self._directory, [name for name, s in _files(self._directory) if s not in kept])


def refuse_other_run(directory: str, identity: Identity) -> None:
    """Refuses a folder whose newest whole checkpoint is of another run; reads no more than its identity.

    Args:
        directory: of the checkpoints; may be missing.
        identity: what is known so far of this run; only keys that both have are compared.

    Raises:
        UserError: they differ.
    """
    for step in _steps(directory):
        try:
            stored = _read_contents(directory, step).identity
        except _DAMAGED:
            continue
        return _refuse_difference(directory, stored, identity)
    return None


def make_folder(directory: str) -> None:
    """Makes the folder of the checkpoints, so that one that cannot be is known before the work.

    Args:
        directory: local or on gs://.

    Raises:
        UserError: it cannot be made or reached.
    """
    try:
        tf.io.gfile.makedirs(directory)
    except tf.errors.OpError as error:
        raise UserError(
            f"{directory}: checkpoints cannot be written there ({_reason(error)}); check path and permission"
        ) from error


def clear(directory: str, folder: str, file: str) -> None:
    """Removes the checkpoints and what a training leaves beside them, and the folder if nothing else is in it.

    Args:
        directory: of the checkpoints; may be missing.
        folder, file: names of what else is removed.
    """
    _remove(directory, [name for name, _ in _files(directory)])
    if tf.io.gfile.isdir(posixpath.join(directory, folder)):
        tf.io.gfile.rmtree(posixpath.join(directory, folder))
    if tf.io.gfile.exists(posixpath.join(directory, file)):
        tf.io.gfile.remove(posixpath.join(directory, file))
    if tf.io.gfile.isdir(directory) and not tf.io.gfile.listdir(directory):
        tf.io.gfile.rmtree(directory)


def _refuse_difference(directory: str, stored: Identity, present: Identity) -> None:
    differing = [key for key in stored if key != _CODE and key in present and stored[key] != present[key]]
    if differing:
        shown = [f"{key}={_show(stored[key])}, now {_show(present[key])}" for key in differing[:_SHOWN]]
        more = [f"and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
        raise UserError(
            f"{directory} is of a run with {', '.join([*shown, *more])}; "
            "finish it with the former settings, or remove the folder to start anew"
        )


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _prefix(directory: str, step: int) -> str:
    return posixpath.join(directory, f"step-{step:08d}")


def _files(directory: str) -> list[tuple[str, int]]:
    """Names of all files of checkpoints, unfinished ones too, each with its step; an index comes before its data."""
    names = tf.io.gfile.listdir(directory) if tf.io.gfile.isdir(directory) else []
    ours = [(name, match) for name in names if (match := _OURS.fullmatch(name))]
    return sorted(((name, int(match[1])) for name, match in ours), key=lambda f: (not _INDEX.fullmatch(f[0]), f[0]))


def _steps(directory: str) -> list[int]:
    """Steps of the finished checkpoints, newest first."""
    return sorted((step for name, step in _files(directory) if _INDEX.fullmatch(name)), reverse=True)


def _remove(directory: str, names: Sequence[str]) -> None:
    for name in names:  # without its index, a checkpoint that is half removed does not count
        tf.io.gfile.remove(posixpath.join(directory, name))


class _Contents(NamedTuple):
    """What a checkpoint says of itself: dtypes of its tensors by name, and the identity."""

    dtypes: dict[str, str]
    identity: dict[str, Any]


def _read(directory: str, step: int) -> Saved:
    contents = _read_contents(directory, step)
    tensors = _restore(_prefix(directory, step), contents.dtypes)
    return Saved(step, dict(zip(contents.dtypes, tensors, strict=True)), contents.identity)


def _read_contents(directory: str, step: int) -> _Contents:
    (text,) = _restore(_prefix(directory, step), {_CONTENTS: "string"})
    return _Contents(**json.loads(text.item()))


def _restore(prefix: str, dtypes: Mapping[str, str]) -> list[np.ndarray]:
    # Not by TensorFlow's CheckpointReader: it reports a network that is away and a damaged file alike.
    tensors = tf.raw_ops.RestoreV2(
        prefix=prefix,
        tensor_names=list(dtypes),
        shape_and_slices=[""] * len(dtypes),
        dtypes=[tf.as_dtype(dtype) for dtype in dtypes.values()],
    )
    return [tensor.numpy() if tensor.shape.rank else np.asarray(tensor.numpy()) for tensor in tensors]


def _reason(error: tf.errors.OpError) -> str:
    # Before the reason TensorFlow writes the graph's node that failed.
    said = re.sub(r"\{\{.*?\}\} ?", "", str(error.message)).splitlines()[0]
    return textwrap.shorten(said, _REASON, placeholder=" …")
