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

from components.model_card.card import JSON_FILE, MARKDOWN_FILE, PAGE_FILE
from components.pusher import publish
from components.pusher.digest import digest
from components.pusher.pointer import CARD_FILE, DIGEST
from components.pusher.publisher import WithdrawnError
from trainer_module import progress
from trainer_module.errors import UserError

MODEL_CARD = "model_card"  # key of the input
KEEP = "keep"  # key of custom_config: versions that stay, see components.pusher.config; 0 or absent for all


class Executor(executor.Executor):
    """TFX's Pusher, made atomic.

    The stock executor copies file by file into the version's folder, which a server may open meanwhile and a kill
    leaves half-written, and takes a version that exists already for pushed. This one archives the model with its card,
    if one is given, and publishes both as `components.pusher.publish` says: to a directory or gs://, whole or not at
    all. The new version is the time in seconds, or the number after the highest version if that is not lower, so it is
    always the highest. A model that is in service or the newest version already, for instance because a run was killed
    after the publication, is not published twice, whatever its card says; one that somebody has gone back from does not
    return, and counts as not pushed. Properties of the pushed model artifact are the stock executor's.
    """

    def Do(
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
        cards = input_dict.get(MODEL_CARD)
        card_uri = artifact_utils.get_single_uri(cards) if cards else None
        _write_card(pushed_model.uri, digest(model_path), card_uri)
        base = _base_directory(exec_properties)
        try:
            destination = push(pushed_model.uri, base)
        except WithdrawnError as reason:
            progress.note(str(reason))
            self._MarkNotPushed(pushed_model)
            return
        _keep(base, _custom_config(exec_properties).get(KEEP, 0))
        self._MarkPushed(pushed_model, pushed_destination=destination, pushed_version=os.path.basename(destination))


def _custom_config(exec_properties: dict[str, Any]) -> dict[str, Any]:
    return json_utils.loads(exec_properties.get(standard_component_specs.CUSTOM_CONFIG_KEY) or "null") or {}


def _keep(base: str, count: int) -> None:
    """Removes older versions; that this cannot be done does not undo the publication, and is noted."""
    if not count:
        return
    try:
        publish.keep(publish.place(base), count)
    except UserError as error:
        progress.note(f"older versions were not removed: {error}")


def _write_card(model_path: str, digest: str, card_uri: str | None) -> None:
    """Puts the files of a card beside the graph, where servers ignore them, and the digest into the JSON."""
    card: dict[str, Any] = {}
    if card_uri is not None:
        with fileio.open(os.path.join(card_uri, JSON_FILE), "r") as file:
            card = json.loads(file.read())
        for name in (MARKDOWN_FILE, PAGE_FILE):
            io_utils.copy_file(os.path.join(card_uri, name), _beside(model_path, name), overwrite=True)
    card[DIGEST] = digest
    text = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    io_utils.write_string_file(_beside(model_path, JSON_FILE), text)


def _beside(model_path: str, name: str) -> str:
    return os.path.join(model_path, os.path.dirname(CARD_FILE), name)


def push(model_path: str, base_directory: str) -> str:
    """Publishes a model, see `components.pusher.publish.publish`.

    Args:
        model_path: of a SavedModel; a local path or one of any file system that TFX knows.
        base_directory: a directory, which is made if missing, or gs://BUCKET/PATH.

    Returns:
        The path of the version, `<base_directory>/<number>`.

    Raises:
        UserError: base_directory is a file or cannot be written, or another publisher was faster.
        WithdrawnError: the model is there, and somebody has gone back from it.
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
