"""The published encoder, loaded from its SavedModel: needs TensorFlow only, none of the code that trained the model."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from components.pusher import publish
from components.pusher.digest import digest
from trainer_module.errors import UserError

_NOT_SERVED = ("assets.extra",)  # cards, which may be written anew


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A loaded SavedModel's `serving_default`.

    Attributes:
        model: the loaded object, kept because the signature does not keep its variables alive.
        signature: image_bytes: string [N] -> {"embedding": float32 [N, D]}.
        dimensions: D.
        sha256: of the model's files, wherever they lie.
    """

    model: Any
    signature: Callable[..., dict[str, Any]]
    dimensions: int
    sha256: str

    def __call__(self, encoded: Sequence[bytes]) -> list[np.ndarray | str]:
        """Embeds encoded images; one that the model refuses gives the text of its error, and the others succeed."""
        import tensorflow as tf

        try:
            return list(self.signature(image_bytes=tf.constant(encoded, tf.string))["embedding"].numpy())
        except tf.errors.InvalidArgumentError as error:
            if len(encoded) == 1:
                return [f"model: {_reason(error.message)}"]
            return [self([one])[0] for one in encoded]


def version_of(model: str) -> str:
    """The absolute path of a SavedModel.

    Args:
        model: its folder, or a folder of published versions, of which the one in service is taken; may be gs://.

    Raises:
        UserError: there is none.
    """
    with _option_told():
        return publish.resolve(model if "://" in model else os.path.abspath(model))


def load_encoder(model: str) -> Encoder:
    """Loads an encoder.

    Args:
        model: see `version_of`.

    Raises:
        UserError: nothing there, no SavedModel, or one without the signature.
    """
    with _option_told(), publish.local_copy(model) as folder:
        return _load(folder, model if "://" in model else folder)


@contextlib.contextmanager
def _option_told() -> Iterator[None]:
    """Says of a refusal which option it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--model {error}") from error


def _load(folder: str, name: str) -> Encoder:
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(folder)
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise UserError(f"{name}: cannot be loaded as a SavedModel: {_first_line(error)}") from error
    signature = loaded.signatures.get("serving_default")
    if signature is None:
        raise UserError(f"{name}: has no signature serving_default; name a model that './moco run' pushed")
    inputs, outputs = signature.structured_input_signature[1], signature.structured_outputs
    if set(inputs) != {"image_bytes"} or "embedding" not in outputs or outputs["embedding"].shape[1:].rank != 1:
        raise UserError(
            f"{name}: serving_default takes {', '.join(inputs)} and returns {', '.join(outputs)}, "
            "not image_bytes and embedding [N, D]; name a model that './moco run' pushed"
        )
    return Encoder(loaded, signature, int(outputs["embedding"].shape[1]), digest(folder, _NOT_SERVED))


def _reason(message: str) -> str:
    """Returns what went wrong from TensorFlow's error, which tells the graph's history first and its nodes last."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.lstrip().startswith("[[")]
    return lines[-1][:200] if lines else message


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
