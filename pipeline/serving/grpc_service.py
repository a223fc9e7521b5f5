"""TensorFlow Serving's gRPC services over grpcio, with health checking and reflection.

Messages come as bytes and are parsed here, so that malformed ones get their status and nothing of them is logged.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar
from urllib.parse import quote

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, predict_pb2

from pipeline.serving import protos
from pipeline.serving.batching import Result
from pipeline.serving.incoming import Incoming
from pipeline.serving.model import DEFAULT_SIGNATURE, Signature, Spec
from pipeline.serving.refusal import Code, Refused, alone, invalid
from pipeline.serving.service import Service
from trainer_module import lines

PREDICTION_SERVICE = lines.serving_service("prediction_service_pb2", "PredictionService").full_name
MODEL_SERVICE = lines.serving_service("model_service_pb2", "ModelService").full_name
ERROR_OUTPUT = "error"  # string[N], there only where a row failed
_METADATA = "signature_def"
_MAX_DETAILS = 4096  # bytes of a status's message as they are sent; a client takes 8192 with all that goes beside it
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # what gRPC sends as it is
_LAST_WORD = 0.1  # seconds in which who watches the server's health hears that it stops

Request = TypeVar("Request", bound=Message)


class GrpcServices:
    """The services of a server that has its port.

    Attributes:
        incoming: reads its messages.
    """

    def __init__(self, service: Service, server: grpc.aio.Server) -> None:
        """Adds nothing yet.

        Args:
            service: that answers.
            server: that is not started.
        """
        self._service, self._server = service, server
        self._health = health.aio.HealthServicer()
        self.incoming = Incoming(service)
        self._streams = _Streams(max(1, service.config.max_queue // 4))

    async def start(self) -> None:
        """Answers from now on."""
        service = self._service
        prediction = _Prediction(service)
        incoming = self.incoming
        handler = functools.partial(_handler, service, incoming)
        metadata, status = get_model_metadata_pb2.GetModelMetadataRequest, get_model_status_pb2.GetModelStatusRequest
        handlers = {
            PREDICTION_SERVICE: {
                "Predict": handler("predict", predict_pb2.PredictRequest, prediction.predict),
                "GetModelMetadata": handler("metadata", metadata, prediction.metadata),
            },
            MODEL_SERVICE: {"GetModelStatus": handler("status", status, prediction.status)},
        }
        for name in ("", *handlers):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        reflecting = reflection.aio.ReflectionServicer((*handlers, health.SERVICE_NAME, reflection.SERVICE_NAME))
        handlers[health.SERVICE_NAME] = {
            "Check": _check_handler(self._health, incoming),
            "Watch": self._streams.handler(functools.partial(_watch, self._health, incoming)),
        }
        handlers[reflection.SERVICE_NAME] = {
            "ServerReflectionInfo": self._streams.handler(functools.partial(_reflect, reflecting, incoming))
        }
        for name, methods in handlers.items():
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
        await self._server.start()

    async def drain(self, seconds: float) -> None:
        """Says that it is not serving, takes nothing new, and waits for what is in flight."""
        await self._health.enter_graceful_shutdown()
        await self._streams.stop()
        await self._server.stop(seconds)


class _Streams:
    """Calls that last as long as their clients like.

    They are fewer than all calls may be, so that they keep nobody out, and end when the server stops.
    """

    def __init__(self, most: int) -> None:
        """There is none.

        Args:
            most: at a time.
        """
        self._most, self._stopping = most, False
        self._tasks: set[asyncio.Task] = set()

    def handler(self, function: Callable[[grpc.aio.ServicerContext], Awaitable[None]]) -> grpc.RpcMethodHandler:
        """A method whose calls are counted here."""

        async def answer(_: object, context: grpc.aio.ServicerContext) -> None:
            async with _aborting(context):
                with self._one():
                    await function(context)

        return grpc.stream_stream_rpc_method_handler(answer, response_serializer=_serialized)

    async def stop(self) -> None:
        """Ends those that are there, after what was just written to them."""
        self._stopping = True
        if self._tasks:
            await asyncio.sleep(_LAST_WORD)
        for task in self._tasks:
            task.cancel()

    @contextmanager
    def _one(self) -> Iterator[None]:
        if self._stopping or len(self._tasks) >= self._most:
            code = Code.UNAVAILABLE if self._stopping else Code.RESOURCE_EXHAUSTED
            raise Refused(code, "the server is stopping" if self._stopping else "too many streams; try again later")
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self._stopping:
                raise Refused(Code.UNAVAILABLE, "the server is stopping") from None
            raise
        finally:
            self._tasks.discard(task)


class _Prediction:
    """The methods."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def predict(self, request: predict_pb2.PredictRequest, timeout: float | None) -> predict_pb2.PredictResponse:
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        spec = request.model_spec
        with self._service.versions.lease(spec.name, protos.asked_version(spec), spec.version_label) as model:
            signature = model.signature(spec.signature_name)
            wanted = _wanted(request.output_filter, signature)
            tensors = tensors_of(request.inputs, signature, self._service.config.max_request_bytes)
            result = await self._service.predict(signature, tensors, timeout)
            name = spec.signature_name or DEFAULT_SIGNATURE
            response = predict_pb2.PredictResponse(model_spec=protos.spec(spec.name, model.version, name))
        _fill(response, result, signature, wanted)
        return response

    async def metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, _: float | None
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        if not request.metadata_field:
            raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
        if unknown := set(request.metadata_field) - {_METADATA}:
            raise invalid(f"Metadata field {min(unknown)[:100]} is not supported; there is: {_METADATA}")
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        spec = request.model_spec
        with self._service.versions.lease(spec.name, protos.asked_version(spec), spec.version_label) as model:
            made = protos.spec(spec.name, model.version)
            response = get_model_metadata_pb2.GetModelMetadataResponse(model_spec=made)
            response.metadata[_METADATA].Pack(protos.signatures(model))
            return response

    async def status(
        self, request: get_model_status_pb2.GetModelStatusRequest, _: float | None
    ) -> get_model_status_pb2.GetModelStatusResponse:
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        spec = request.model_spec
        version = protos.asked_version(spec)
        if spec.version_label:
            with self._service.versions.lease(spec.name, None, spec.version_label) as model:
                version = model.version
        return protos.status(self._service.versions.states(spec.name, version))


def _handler(
    service: Service,
    incoming: Incoming,
    method: str,
    kind: type[Request],
    function: Callable[[Request, float | None], Awaitable[Message]],
) -> grpc.RpcMethodHandler:
    """A method of one message, read as a stream of one, since only so is its reading in our hands."""

    async def answer(_: object, context: grpc.aio.ServicerContext) -> bytes:
        async with service.answering("grpc", method) as outcome:
            data = await incoming.message(context)
            with service.holding(len(data)):
                return (await function(parsed(kind, data), context.time_remaining())).SerializeToString()
        await _abort(context, outcome.refusal)
        return b""  # is not sent

    return grpc.stream_unary_rpc_method_handler(answer)


@asynccontextmanager
async def _aborting(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Tells the client what is refused; gRPC raises what it keeps of an abort once more when the method has returned.

    What it keeps has frames that hold the call in turn, which would be one of its connection's calls until Python
    looks for circles.
    """
    refusal = None
    try:
        yield
    except Refused as refused:
        refusal = alone(refused)
    except grpc.aio.AbortError as kept:
        alone(kept)
    if refusal:
        await _abort(context, refusal)


async def _abort(context: grpc.aio.ServicerContext, refusal: Refused) -> None:
    try:
        await context.abort(grpc.StatusCode[refusal.code.name], _cut(refusal.message))
    except grpc.aio.AbortError as kept:
        alone(kept)


def _cut(message: str) -> str:
    """As much of a message as a client takes, which refuses a long one with a code of its own."""
    while len(quote(message, safe=_PLAIN)) > _MAX_DETAILS:
        message = message[: len(message) * 3 // 4]
    return message


def _check_handler(servicer: health.aio.HealthServicer, incoming: Incoming) -> grpc.RpcMethodHandler:
    async def answer(_: object, context: grpc.aio.ServicerContext) -> Message:
        async with _aborting(context):
            return await servicer.Check(parsed(health_pb2.HealthCheckRequest, await incoming.message(context)), context)
        return health_pb2.HealthCheckResponse()  # is not sent

    return grpc.stream_unary_rpc_method_handler(answer, response_serializer=_serialized)


async def _watch(servicer: health.aio.HealthServicer, incoming: Incoming, context: grpc.aio.ServicerContext) -> None:
    await servicer.Watch(parsed(health_pb2.HealthCheckRequest, await incoming.message(context)), context)


async def _reflect(
    servicer: reflection.aio.ReflectionServicer, incoming: Incoming, context: grpc.aio.ServicerContext
) -> None:
    kind = reflection_pb2.ServerReflectionRequest
    requests = (parsed(kind, data) async for data in incoming.messages(context))
    async for response in servicer.ServerReflectionInfo(requests, context):
        await context.write(response)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def parsed(kind: type[Request], data: bytes) -> Request:
    """A message.

    Raises:
        Refused: INVALID_ARGUMENT, the bytes are none.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise invalid(f"the message is no {kind.__name__}") from error


def tensors_of(inputs: Mapping[str, tensor_pb2.TensorProto], signature: Signature, most: int) -> dict[str, np.ndarray]:
    """The inputs of a request.

    Args:
        inputs: as they came.
        signature: that is asked.
        most: bytes of numbers in one of them.

    Raises:
        Refused: INVALID_ARGUMENT, they are not the signature's.
    """
    signature.check_names(inputs)
    return {name: _tensor(inputs[name], spec, most) for name, spec in signature.inputs.items()}


def _tensor(proto: tensor_pb2.TensorProto, spec: Spec, most: int) -> np.ndarray:
    """A tensor; one that would be larger than a request may be is refused before it is made.

    A proto may hold one value for a tensor of any size.
    """
    if proto.dtype != spec.enum:
        raise invalid(f"input {spec.name} has type {_type(proto.dtype)}, not {_type(spec.enum)}")
    shape = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in shape) or len(shape) > 8:
        raise invalid(f"input {spec.name} has no shape")
    size = 1
    for side in shape:
        size *= side
    if spec.dtype == object:
        if size != len(proto.string_val):
            raise invalid(f"input {spec.name} has {len(proto.string_val)} values for a shape of {size}")
        strings = np.empty(size, object)
        strings[:] = proto.string_val
        return strings.reshape(shape)
    if size * spec.dtype.itemsize > most:
        raise invalid(f"input {spec.name} is over {most} bytes")
    try:
        return tf.make_ndarray(proto)
    except (ValueError, TypeError) as error:
        raise invalid(f"input {spec.name} has not the values of its shape") from error


def _type(number: int) -> str:
    try:
        return tf.dtypes.as_dtype(number).name
    except (TypeError, KeyError):  # there is no such type
        return f"number {number}"


def _wanted(names: Sequence[str], signature: Signature) -> list[str]:
    """The outputs that a request names.

    Raises:
        Refused: INVALID_ARGUMENT, there is no such output, or it is named twice.
    """
    if unknown := set(names) - {*signature.outputs, ERROR_OUTPUT}:
        raise invalid(f"output tensor alias not found in signature: {min(unknown)[:100]}")
    if len(set(names)) < len(names):
        raise invalid("output_filter names an output twice")
    return list(names)


def _fill(response: predict_pb2.PredictResponse, result: Result, signature: Signature, wanted: list[str]) -> None:
    """Writes the outputs that are wanted, all where none is named, with values as lists, as TensorFlow Serving does."""
    for name, spec in signature.outputs.items():
        if not wanted or name in wanted:
            _write(response.outputs[name], result.outputs[name], spec.enum)
    if result.errors and (not wanted or ERROR_OUTPUT in wanted):
        texts = [result.errors.get(index, "").encode() for index in range(result.rows)]
        _write(response.outputs[ERROR_OUTPUT], np.array(texts, object), tf.string.as_datatype_enum)


def _write(proto: tensor_pb2.TensorProto, rows: np.ndarray, dtype: int) -> None:
    if dtype != tf.float32.as_datatype_enum:
        proto.CopyFrom(tf.make_tensor_proto(rows, tf.dtypes.as_dtype(dtype)))
        proto.dtype = dtype
        return
    proto.dtype = dtype
    for side in rows.shape:
        proto.tensor_shape.dim.add(size=side)
    proto.float_val.extend(rows.ravel().tolist())
