"""How the component's own parameters travel within TFX's CustomConfig."""

import json

from google.protobuf import wrappers_pb2
from tfx.proto import example_gen_pb2


def pack_parameters(parameters: dict[str, str]) -> example_gen_pb2.CustomConfig:
    """Packs texts into a CustomConfig, as JSON within a StringValue: numbers keep their types that way."""
    packed = example_gen_pb2.CustomConfig()
    packed.custom_config.Pack(wrappers_pb2.StringValue(value=json.dumps(parameters, sort_keys=True)))
    return packed


def unpack_parameters(packed: example_gen_pb2.CustomConfig) -> dict[str, str]:
    """Undoes `pack_parameters`."""
    value = wrappers_pb2.StringValue()
    packed.custom_config.Unpack(value)
    return json.loads(value.value)
