"""Checkpoints: whole or not at all, written while training goes on, checked when they are read.

A checkpoint is one TensorFlow tensor bundle, `step-00000120.index` and its data file. TensorFlow writes both under
temporary names and renames the index last, so a checkpoint whose index is there was written to the end; it keeps a
CRC-32C of every tensor, so one that was damaged later does not pass for a good one. All of it works on gs://.
"""

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer_module import progress
from trainer_module.errors import UserError

Identity = Mapping[str, Any]  # {"train.learning_rate": 0.03, …}: what decides the weights, in JSON's types

_IDENTITY = "identity"
_INDEX = re.compile(r"(step-(\d+))\.index")
_OURS = re.compile(r"step-(\d+)\..*")
_DAMAGED = (
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.OutOfRangeError,
    tf.errors.InvalidArgumentError,
    tf.errors.InternalError,
    tf.errors.UnimplementedError,
    tf.errors.UnknownError,
)
_SHOWN = 6  # differing keys in one line


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
        everything = {**tensors, _IDENTITY: np.array(json.dumps(dict(self._identity), sort_keys=True), object)}
        tf.raw_ops.SaveV2(
            prefix=_prefix(self._directory, step),
            tensor_names=list(everything),
            shape_and_slices=[""] * len(everything),
            tensors=list(everything.values()),
        )
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
            stored = _read_identity(tf.train.load_checkpoint(_prefix(directory, step)))
        except _DAMAGED:
            continue
        return _refuse_difference(directory, stored, identity)
    return None


def _refuse_difference(directory: str, stored: Identity, present: Identity) -> None:
    differing = [key for key in stored if key in present and stored[key] != present[key]]
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


def _read(directory: str, step: int) -> Saved:
    reader = tf.train.load_checkpoint(_prefix(directory, step))
    names = [name for name in reader.get_variable_to_shape_map() if name != _IDENTITY]
    return Saved(step, {name: np.asarray(reader.get_tensor(name)) for name in names}, _read_identity(reader))


def _read_identity(reader: Any) -> dict[str, Any]:
    identity: dict[str, Any] = json.loads(reader.get_tensor(_IDENTITY))
    return identity


def _reason(error: tf.errors.OpError) -> str:
    return str(error.message).splitlines()[0][:100]
