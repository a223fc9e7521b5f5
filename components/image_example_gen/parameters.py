"""How the component's own parameters travel within TFX's CustomConfig."""

import json

from google.protobuf import wrappers_pb2
from tfx.v1 import proto


def pack_parameters(parameters: dict[str, str]) -> proto.CustomConfig:
    """Packs texts into a CustomConfig, as JSON within a StringValue: numbers keep their types that way."""
    packed = proto.CustomConfig()
    packed.custom_config.Pack(wrappers_pb2.StringValue(value=json.dumps(parameters, sort_keys=True)))
    return packed


def unpack_parameters(packed: proto.CustomConfig) -> dict[str, str]:
    """Undoes `pack_parameters`."""
    value = wrappers_pb2.StringValue()
    packed.custom_config.Unpack(value)
    return json.loads(value.value)
