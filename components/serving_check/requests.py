"""What a model is asked: each signature with real images at three sizes of batch, with none, and with broken ones.

And what TensorFlow Serving asks of it to warm up, which is published with it: drawn pictures, for these are nobody's.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from trainer_module.expected import Probe

BATCHES = (1, 7, 64)
INPUTS = {"serving_default": "image_bytes", "examples": "examples", "pixels": "image"}  # of each signature

_WARM_UP_BATCHES = (1, 7)  # of pixels, 64 images would be tens of megabytes
_NOISE = 24.0  # standard deviation in a drawn picture, of 255
_SEED = 17
_MODEL_NAME = "encoder"


class Kind(enum.Enum):
    """What the answer must be."""

    images = "images"  # the trainer's embeddings
    empty = "empty"  # float32[0, D]
    broken = "broken"  # INVALID_ARGUMENT


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of a signature.

    Attributes:
        signature: its name.
        kind: what must come of it.
        what: it holds, for messages, such as "7 images" or "an image cut in half".
        value: its only argument: string[N], or float32[N, S, S, 3].
        expected: float32[N, D]; None where no vector is expected.
    """

    signature: str
    kind: Kind
    what: str
    value: NDArray
    expected: NDArray[np.float32] | None = None

    @property
    def input(self) -> str:
        """Name of the argument."""
        return INPUTS[self.signature]

    def __str__(self) -> str:
        """The call in words."""
        return f"{self.signature} with {self.what}"


def make_requests(probes: Sequence[Probe]) -> list[Request]:
    """All calls, by signature.

    Args:
        probes: real images, at least one; where there are fewer than a batch holds they come again.
    """
    return [request for signature in INPUTS for request in _of_signature(signature, probes)]


def make_warm_up(side: int) -> list[prediction_log_pb2.PredictionLog]:
    """TensorFlow Serving's warm-up: drawn pictures, by each signature; equal ones every time.

    TensorFlow Serving replays at most 1,000 requests when it loads a version; here are two for each signature.

    Args:
        side: of the pictures, in pixels, as of the images that the model is for.
    """
    squares = _draw(side, max(_WARM_UP_BATCHES))
    files = [(tf.io.encode_png if at % 2 else tf.io.encode_jpeg)(square).numpy() for at, square in enumerate(squares)]
    return [
        _prediction_log(signature, _value(signature, files[:count], squares[:count]))
        for signature in INPUTS
        for count in _WARM_UP_BATCHES
    ]


def _draw(side: int, count: int) -> list[NDArray[np.uint8]]:
    """Slopes of colours under noise, uint8[side, side, 3] each: decoders take about as long as over photographs."""
    generator = np.random.Generator(np.random.Philox(key=_SEED))
    down, right = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    pictures = []
    for slopes in generator.uniform(-60, 60, (count, 2, 3)):
        colours = 128 + down[..., None] * slopes[0] + right[..., None] * slopes[1]
        noisy = colours + generator.normal(0, _NOISE, (side, side, 3))
        pictures.append(noisy.clip(0, 255).astype(np.uint8))
    return pictures


def _of_signature(signature: str, probes: Sequence[Probe]) -> Iterator[Request]:
    for count in BATCHES:
        batch = list(itertools.islice(itertools.cycle(probes), count))
        expected = np.stack([p.square_embedding if signature == "pixels" else p.embedding for p in batch])
        what = f"{count} image{'s' if count > 1 else ''}"
        value = _value(signature, [p.encoded for p in batch], [p.square for p in batch])
        yield Request(signature, Kind.images, what, value, expected)
    yield Request(signature, Kind.empty, "an empty batch", value[:0])
    for what, value in _broken(signature, probes):
        yield Request(signature, Kind.broken, what, value)


def _value(signature: str, encoded: Sequence[bytes], squares: Sequence[NDArray[np.uint8]]) -> NDArray:
    if signature == "pixels":
        return np.stack(squares).astype(np.float32)
    return _strings([_example(data) for data in encoded] if signature == "examples" else encoded)


def _broken(signature: str, probes: Sequence[Probe]) -> Iterator[tuple[str, NDArray]]:
    whole = probes[0].encoded
    if signature == "pixels":
        yield "an image without pixels", np.zeros((1, 0, 0, 3), np.float32)
        return
    wrap = _example if signature == "examples" else bytes
    yield "no bytes", _strings([wrap(b"")])
    yield "bytes that are no image", _strings([wrap(b"no image" * 9)])
    yield "an image cut in half", _strings([wrap(whole[: len(whole) // 2])])
    yield "a broken image among whole ones", _strings([wrap(whole)] * 3 + [wrap(whole[: len(whole) // 2])])
    if signature == "examples":
        yield "an example without image/encoded", _strings([tf.train.Example().SerializeToString()])
        yield "bytes that are no tf.Example", _strings([b"no example"])


def _example(encoded: bytes) -> bytes:
    example = tf.train.Example()
    example.features.feature["image/encoded"].bytes_list.value.append(encoded)
    return example.SerializeToString()


def _strings(values: Sequence[bytes]) -> NDArray:
    return np.array(values, object)  # NumPy's own type of bytes drops zeros at the end


def _prediction_log(signature: str, value: NDArray) -> prediction_log_pb2.PredictionLog:
    asked = predict_pb2.PredictRequest()
    asked.model_spec.name = _MODEL_NAME
    asked.model_spec.signature_name = signature
    asked.inputs[INPUTS[signature]].CopyFrom(tf.make_tensor_proto(value))
    return prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=asked))
