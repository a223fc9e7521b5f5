"""One version of a SavedModel, loaded as TensorFlow Serving loads it, and computed row by row as its clients wish.

A `tf.compat.v1.Session` loads in two thirds of the time of `tf.saved_model.load` and costs less a call; it is what
TensorFlow Serving uses. TensorFlow is imported by whoever imports this module.
"""

import dataclasses
import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np
import tensorflow as tf
from PIL import Image
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
from tensorflow_serving.apis import prediction_log_pb2

from components.image_example_gen.codec import BadImage
from pipeline.serving import faults, images
from pipeline.serving.batching import Result, Tensors, filler, row_count
from pipeline.serving.images import Container, ImageLimits
from pipeline.serving.refusal import invalid
from trainer_module.errors import UserError

DEFAULT_SIGNATURE = "serving_default"
ENCODED = "image/encoded"  # feature of a tf.Example
WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
# Of pixels given as numbers: what is longer would become gigabytes when its shorter side is enlarged.
MAX_ASPECT = 16
_DARKEST, _BRIGHTEST = -0.5, 255.5  # what rounds to a pixel's value
_ENLARGED = 256**2  # pixels that a small square image may become
_OF_A_ROW = (
    tf.errors.InvalidArgumentError,
    tf.errors.OutOfRangeError,
    tf.errors.DataLossError,
    tf.errors.UnimplementedError,
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """An input or output of a signature.

    Attributes:
        name: as clients call it.
        tensor: its name in the graph.
        dtype: object for strings.
        shape: None where the rank is unknown; a dimension is None where it may be any.
        enum: the type's number in TensorFlow's protos.
    """

    name: str
    tensor: str
    dtype: np.dtype
    shape: tuple[int | None, ...] | None
    enum: int

    @classmethod
    def of(cls, name: str, info: meta_graph_pb2.TensorInfo) -> "Spec":
        """From a SavedModel."""
        dtype = tf.dtypes.as_dtype(info.dtype)
        shape = tf.TensorShape(info.tensor_shape)
        return cls(
            name,
            info.name,
            np.dtype(dtype.as_numpy_dtype),
            None if shape.rank is None else tuple(shape.as_list()),
            dtype.as_datatype_enum,
        )

    def check(self, rows: np.ndarray) -> None:
        """Refuses a tensor that cannot be this input.

        Raises:
            Refused: INVALID_ARGUMENT.
        """
        fits = self.shape is None or (
            rows.ndim == len(self.shape)
            and all(want in (None, is_) for want, is_ in zip(self.shape, rows.shape, strict=True))
        )
        if not fits or not rows.ndim:
            sides = (
                ["any", "…"] if self.shape is None else ["any" if side is None else str(side) for side in self.shape]
            )
            raise invalid(f"input {self.name} has shape {list(rows.shape)}, not [{', '.join(sides)}]")


class Signature:
    """A function of a model; calling it is what a worker does with a batch."""

    def __init__(
        self,
        session: tf.compat.v1.Session,
        definition: meta_graph_pb2.SignatureDef,
        limits: ImageLimits,
        pool: Executor,
    ) -> None:
        """Makes a callable of the session's.

        Args:
            session: with the model.
            definition: of the signature.
            limits: of images.
            pool: decodes images that are not plain.
        """
        self.inputs = {name: Spec.of(name, info) for name, info in sorted(definition.inputs.items())}
        self.outputs = {name: Spec.of(name, info) for name, info in sorted(definition.outputs.items())}
        self.container = _container(self.inputs)
        self._limits, self._pool = limits, pool
        options = config_pb2.CallableOptions(
            feed=[spec.tensor for spec in self.inputs.values()], fetch=[spec.tensor for spec in self.outputs.values()]
        )
        self._callable = session._make_callable_from_options(options)

    def check(self, tensors: Tensors) -> None:
        """Refuses tensors that cannot be the inputs, before they wait for others.

        Raises:
            Refused: INVALID_ARGUMENT.
        """
        self.check_names(tensors)
        for name, spec in self.inputs.items():
            spec.check(tensors[name])
        if len({len(rows) for rows in tensors.values()}) != 1 or not row_count(tensors):
            raise invalid("every input must have the same number of instances, at least one")
        if (image := tensors.get("image")) is not None and image.ndim == 4:
            self._check_pixels(*image.shape[1:3])

    def check_names(self, names: Collection[str]) -> None:
        """Refuses inputs that are not the signature's.

        Raises:
            Refused: INVALID_ARGUMENT.
        """
        if set(names) != set(self.inputs):
            given = ", ".join(name[:100] for name in sorted(names)[:10]) or "none"
            raise invalid(f"the inputs are {given}, not {', '.join(self.inputs)}")

    def _check_pixels(self, height: int, width: int) -> None:
        shorter, longer = sorted((height, width))
        if not shorter or longer > MAX_ASPECT * shorter or height * width > self._limits.pixels.max_pixels:
            raise invalid(
                f"images of {height}x{width} are not taken: at most {self._limits.pixels.max_pixels} pixels, "
                f"and one side at most {MAX_ASPECT} times the other"
            )

    def __call__(self, tensors: Tensors) -> Result:
        """Computes rows; one that fails gets an error, and the others succeed."""
        rows = row_count(tensors)
        outputs: dict[str, np.ndarray] = {}
        errors: dict[int, str] = {}
        for indices, group in self._groups(tensors, errors):
            self._compute(indices, group, rows, outputs, errors)
        self._check_finite(outputs, errors)
        return Result(rows, outputs, errors)

    def _groups(self, tensors: Tensors, errors: dict[int, str]) -> Iterator[tuple[Sequence[int], Tensors]]:
        """What is computed in one call each: all rows, or as many images as may be decoded at once."""
        (name, rows), *others = tensors.items()
        if self.container is not None:
            for indices, group in images.prepared(rows.tolist(), self.container, self._limits, self._pool, errors):
                yield indices, {name: np.array(group, object)}
        elif others or rows.ndim != 4:
            yield range(len(rows)), tensors
        else:
            if name == "image" and "embedding" in self.outputs:
                _check_values(rows, errors)
            shorter, longer = sorted(rows.shape[1:3])
            good = [index for index in range(len(rows)) if index not in errors]
            step = max(1, self._limits.group_pixels // max(shorter * longer, longer // shorter * _ENLARGED))
            for begin in range(0, len(good), step):
                some = good[begin : begin + step]
                # A slice is no copy.
                yield some, {name: rows[begin : begin + step] if len(good) == len(rows) else rows[some]}

    def _compute(
        self,
        indices: Sequence[int],
        tensors: Tensors,
        rows: int,
        outputs: dict[str, np.ndarray],
        errors: dict[int, str],
    ) -> None:
        """Fills in the outputs of some rows; where the model refuses them, half by half, down to those to blame."""
        try:
            values = self._callable(*(tensors[name] for name in self.inputs))
        except _OF_A_ROW as error:
            if len(indices) == 1:
                errors[indices[0]] = self._explain(tensors, error)
                return
            half = len(indices) // 2
            for part in (slice(None, half), slice(half, None)):
                some = {name: value[part] for name, value in tensors.items()}
                self._compute(indices[part], some, rows, outputs, errors)
            return
        for name, value in zip(self.outputs, values, strict=True):
            if not value.ndim or len(value) != len(indices):
                raise invalid(f"output {name} of this signature has not one row for each instance")
            if name not in outputs:
                outputs[name] = filler((rows, *value.shape[1:]), value.dtype)
            outputs[name][list(indices)] = value

    def _explain(self, tensors: Tensors, error: tf.errors.OpError) -> str:
        if self.container is not None:
            (row,) = next(iter(tensors.values()))
            if said := images.explain(row, self.container, self._limits):
                return said
        lines = [line.strip() for line in error.message.splitlines() if line.strip() and "[[" not in line]
        return f"model: {lines[-1][:200] if lines else type(error).__name__}"

    def _check_finite(self, outputs: Mapping[str, np.ndarray], errors: dict[int, str]) -> None:
        embedding = outputs.get("embedding")
        if embedding is None or embedding.dtype.kind != "f":
            return
        finite = np.isfinite(embedding.reshape(len(embedding), -1)).all(axis=1)
        embedding[~finite] = np.nan
        for index in np.flatnonzero(~finite).tolist():
            errors.setdefault(index, "not_finite: the model gives no finite embedding for it")


class Model:
    """A loaded version."""

    def __init__(self, folder: str, version: int, limits: ImageLimits, pool: Executor) -> None:
        """Loads it.

        Args:
            folder: on this machine.
            version: its number.
            limits: of images.
            pool: decodes images that are not plain.

        Raises:
            UserError: there is no SavedModel that can be loaded.
        """
        self.version = version
        graph = tf.Graph()
        try:
            with graph.as_default():
                self._session = tf.compat.v1.Session(graph=graph)
                meta = tf.compat.v1.saved_model.load(self._session, ["serve"], folder)
            graph.finalize()
            self.definitions = dict(meta.signature_def)
            self.signatures = {
                name: Signature(self._session, definition, limits, pool)
                for name, definition in self.definitions.items()
                if definition.inputs and definition.outputs  # not the initialiser, which has neither
            }
        except Exception as error:  # there is no end to what TensorFlow raises for a damaged model
            raise UserError(f"cannot be loaded as a SavedModel: {faults.words(error)}") from error
        if not self.signatures:
            raise UserError("has no signature that could be called")
        self._folder = folder

    def signature(self, name: str) -> Signature:
        """A signature by name; the default one where it is empty.

        Raises:
            Refused: INVALID_ARGUMENT, there is none.
        """
        name = name or DEFAULT_SIGNATURE
        if name not in self.signatures:
            known = ", ".join(sorted(self.signatures))
            raise invalid(f'Serving signature name: "{name[:100]}" not found in signature def; there are: {known}')
        return self.signatures[name]

    def warm_up(self, rows: Sequence[int]) -> None:
        """Calls every signature once for each number of rows, so that the first request finds everything made.

        The requests that lie with the model for TensorFlow Serving are played first.

        Raises:
            UserError: the model cannot compute them.
        """
        try:
            for tensors, name in self._recorded():
                self._check_warm(self.signature(name)(tensors))
            for signature in self.signatures.values():
                for count in rows if (made := _synthetic(signature)) else ():
                    self._check_warm(signature({name: np.repeat(row, count, axis=0) for name, row in made.items()}))
        except UserError:
            raise
        except Exception as error:  # of the model, of the file of requests and of protobuf
            raise UserError(f"cannot be warmed up: {faults.words(error)}") from error

    @staticmethod
    def _check_warm(result: Result) -> None:
        if len(result.errors) == result.rows:
            raise UserError(f"cannot be warmed up: {result.errors[0]}")

    def _recorded(self) -> Iterator[tuple[Tensors, str]]:
        path = os.path.join(self._folder, WARMUP_FILE)
        if not os.path.exists(path):
            return
        for record in tf.compat.v1.io.tf_record_iterator(path):
            request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
            if request.inputs:
                tensors = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
                yield tensors, request.model_spec.signature_name

    def close(self) -> None:
        """Gives the memory back; nothing may be computing."""
        self._session.close()


def _check_values(rows: np.ndarray, errors: dict[int, str]) -> None:
    """Says which images given as numbers have some that no pixel has."""
    if not rows.size:
        return
    low, high = rows.min(axis=(1, 2, 3)), rows.max(axis=(1, 2, 3))
    for index in np.flatnonzero(~((low >= _DARKEST) & (high <= _BRIGHTEST))).tolist():  # NaN is neither
        if np.isfinite(low[index]) and np.isfinite(high[index]):
            errors[index] = f"not_pixels: its values are {low[index]:g} to {high[index]:g}, not 0 to 255"
        else:
            errors[index] = "not_pixels: its values are not all finite; they must be 0 to 255"


def _container(inputs: Mapping[str, Spec]) -> Container | None:
    """How images lie in a signature's one input; None where it takes no encoded images."""
    spec = next(iter(inputs.values()))
    strings = len(inputs) == 1 and spec.dtype.kind == "O" and spec.shape is not None and len(spec.shape) == 1
    return {"image_bytes": images.BARE, "examples": EXAMPLE}.get(spec.name) if strings else None


def _unwrap_example(row: bytes) -> bytes:
    try:
        feature = tf.train.Example.FromString(row).features.feature
    except Exception as error:  # of protobuf's C++ and of its Python, which have no common base
        raise BadImage("not_an_example", "its bytes are no tf.Example") from error
    values = list(feature[ENCODED].bytes_list.value) if ENCODED in feature else []
    if len(values) != 1:
        raise BadImage("not_an_example", f"it has {len(values)} values of {ENCODED}, not one")
    return values[0]


def _wrap_example(row: bytes, image: bytes) -> bytes:
    example = tf.train.Example.FromString(row)
    example.features.feature[ENCODED].bytes_list.value[:] = [image]
    return example.SerializeToString()


EXAMPLE = Container(_unwrap_example, _wrap_example)


def _synthetic(signature: Signature) -> dict[str, np.ndarray]:
    """One row for each input of the encoder's signatures; nothing for others."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    if signature.container is not None:
        (name,) = signature.inputs
        encoded = io.BytesIO()
        Image.fromarray(noise).save(encoded, "JPEG")
        row = signature.container.wrap(b"", encoded.getvalue())
        return {name: np.array([row], object)}
    if list(signature.inputs) == ["image"]:
        return {"image": noise[np.newaxis].astype(np.float32)}
    return {}
