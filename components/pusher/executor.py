"""Publishes a blessed model as a whole or not at all."""

import json
import os
import tempfile
from typing import Any

from tfx import types
from tfx.components.pusher import executor
from tfx.dsl.io import fileio
from tfx.proto import pusher_pb2
from tfx.types import artifact_utils, standard_component_specs
from tfx.utils import io_utils, json_utils, proto_utils

from components.pusher import model_card, publish
from components.pusher.digest import digest
from components.pusher.pointer import CARD_FILE, DIGEST

CARD = "card"  # key of custom_config: JSON that the model's card starts with

_ENCODER_FILE = "assets.extra/encoder.json"  # facts that the exporter left with the model


class Executor(executor.Executor):
    """TFX's Pusher, made atomic.

    The stock executor copies file by file into the version's folder, which a server may open meanwhile and a kill
    leaves half-written, and takes a version that exists already for pushed. This one archives the model, writes its
    card, and publishes it as `components.pusher.publish` says: to a directory or gs://, whole or not at all. The new
    version is the time in seconds, or the number after the highest version if that is not lower, so it is always the
    highest. A model that is in service or the newest version already, for instance because a run was killed after the
    publication, is not published twice. Properties of the pushed model artifact are the stock executor's.
    """

    def Do(  # noqa: N802
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """Pushes the model if every blessing that is given says so. See the stock executor for the arguments.

        Raises:
            UserError: the destination cannot be written, or another publisher was faster.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        pushed_model = artifact_utils.get_single_instance(output_dict[standard_component_specs.PUSHED_MODEL_KEY])
        if not self.CheckBlessing(input_dict):
            self._MarkNotPushed(pushed_model)
            return
        model_path = self.GetModelPath(input_dict)
        # The archive comes first: once the model can be served nothing is left that could fail.
        io_utils.copy_dir(model_path, pushed_model.uri)
        _write_card(_card(exec_properties) | {DIGEST: digest(model_path)}, pushed_model.uri)
        destination = push(pushed_model.uri, _base_directory(exec_properties))
        self._MarkPushed(pushed_model, pushed_destination=destination, pushed_version=os.path.basename(destination))


def _card(exec_properties: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline has to say in the model's card; empty when it says nothing."""
    custom_config = json_utils.loads(exec_properties.get(standard_component_specs.CUSTOM_CONFIG_KEY) or "null") or {}
    return json.loads(custom_config.get(CARD, "{}"))


def _write_card(card: dict[str, Any], model_path: str) -> None:
    """Writes the card beside the graph, where servers ignore it, with the exporter's facts under `encoder`."""
    facts = os.path.join(model_path, _ENCODER_FILE)
    if fileio.exists(facts):
        with fileio.open(facts, "r") as file:
            card = card | {"encoder": json.loads(file.read())}
    io_utils.write_string_file(os.path.join(model_path, CARD_FILE), json.dumps(card, indent=2, sort_keys=True) + "\n")
    io_utils.write_string_file(os.path.join(model_path, model_card.FILE), model_card.to_markdown(card))


def push(model_path: str, base_directory: str) -> str:
    """Publishes a model, see `components.pusher.publish.publish`.

    Args:
        model_path: of a SavedModel; a local path or one of any file system that TFX knows.
        base_directory: a directory, which is made if missing, or gs://BUCKET/PATH.

    Returns:
        The path of the version, `<base_directory>/<number>`.

    Raises:
        UserError: base_directory is a file or cannot be written, or another publisher was faster.
    """
    to = publish.place(base_directory)
    if "://" not in model_path:
        return publish.publish(model_path, to)
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "model")
        io_utils.copy_dir(model_path, local)
        return publish.publish(local, to)


def _base_directory(exec_properties: dict[str, Any]) -> str:
    destination = pusher_pb2.PushDestination()
    proto_utils.json_to_proto(exec_properties[standard_component_specs.PUSH_DESTINATION_KEY], destination)
    if destination.WhichOneof("destination") != "filesystem":
        raise NotImplementedError(f"push destination {destination} is not a file system")
    return destination.filesystem.base_directory
