"""Model status, specification and metadata as TensorFlow Serving's protos."""

from collections.abc import Sequence

from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

from pipeline.serving.model import Model
from pipeline.serving.versions import State

_GRPC_UNKNOWN = 2


def status(states: Sequence[State]) -> get_model_status_pb2.GetModelStatusResponse:
    """States of versions."""
    response = get_model_status_pb2.GetModelStatusResponse()
    for state in states:
        one = response.model_version_status.add(version=state.version)
        one.state = get_model_status_pb2.ModelVersionStatus.State.Value(state.name)
        one.status.error_code = _GRPC_UNKNOWN if state.error else 0
        one.status.error_message = state.error
    return response


def spec(name: str, version: int, signature: str = "") -> model_pb2.ModelSpec:
    """Which model has answered."""
    made = model_pb2.ModelSpec(name=name, signature_name=signature)
    made.version.value = version
    return made


def signatures(model: Model) -> get_model_metadata_pb2.SignatureDefMap:
    """A model's signatures."""
    return get_model_metadata_pb2.SignatureDefMap(signature_def=model.definitions)


def asked_version(spec: model_pb2.ModelSpec) -> int | None:
    """The version that a request names; None for the one in service."""
    return spec.version.value if spec.HasField("version") else None
