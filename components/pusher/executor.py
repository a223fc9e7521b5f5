"""Publishes a blessed model as a whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from typing import Any

import tensorflow as tf
from tfx import types
from tfx.components.pusher import executor
from tfx.dsl.io import fileio
from tfx.proto import pusher_pb2
from tfx.types import artifact_utils, standard_component_specs
from tfx.utils import io_utils, json_utils, proto_utils

from trainer_module.errors import UserError

CARD = "card"  # key of custom_config: JSON that the model's card starts with
CARD_FILE = "assets.extra/model_card.json"

_ENCODER_FILE = "assets.extra/encoder.json"  # facts that the exporter left with the model
_SAVED_MODEL = "saved_model.pb"
_DIGEST = "model_sha256"  # key of the card
_TEMPORARY = ".pushing-"
_STALE_SECONDS = 24 * 3600.0


class Executor(executor.Executor):
    """TFX's Pusher, made atomic.

    The stock executor copies file by file into the version's folder, which a server may open meanwhile and a kill
    leaves half-written, and takes a version that exists already for pushed. This one copies into a hidden folder beside
    the versions and renames it, which is one step on a file system. Object stores have no rename of folders; there
    saved_model.pb, for which TensorFlow Serving waits, is copied last. The new version is the time in seconds, or
    the number after the highest version if that is not lower, so it is always the one that is served. A model that
    is the newest version already, for instance because a run was killed after the rename, is not published twice.
    Properties of the pushed model artifact are the stock executor's.
    """

    def Do(  # noqa: N802
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """Pushes the model if every blessing that is given says so. See the stock executor for the arguments.

        Raises:
            UserError: the destination cannot be written.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        pushed_model = artifact_utils.get_single_instance(output_dict[standard_component_specs.PUSHED_MODEL_KEY])
        if not self.CheckBlessing(input_dict):
            self._MarkNotPushed(pushed_model)
            return
        model_path = self.GetModelPath(input_dict)
        # The archive comes first: once the model can be served nothing is left that could fail.
        io_utils.copy_dir(model_path, pushed_model.uri)
        _write_card(_card(exec_properties) | {_DIGEST: _digest(model_path)}, pushed_model.uri)
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


def push(model_path: str, base_directory: str) -> str:
    """Copies a model to a new version below a directory, in TensorFlow Serving's layout.

    Does nothing if the newest version is this very model, as its card says.

    Args:
        model_path: of a SavedModel with a card.
        base_directory: a local path or one of any file system that TFX knows, such as gs://; made if missing.

    Returns:
        The path of the version, `<base_directory>/<number>`.

    Raises:
        UserError: base_directory is a file or cannot be written.
    """
    base_directory = base_directory.rstrip("/") or "/"
    try:
        if published := _newest_if_same(model_path, base_directory):
            return published
        if "://" in base_directory:
            return _push_remote(model_path, base_directory)
        return _push_local(model_path, base_directory)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(
            f"cannot write to push destination {base_directory}: {_reason(error)}; "
            "name a directory that can be written and has room"
        ) from error


def _base_directory(exec_properties: dict[str, Any]) -> str:
    destination = pusher_pb2.PushDestination()
    proto_utils.json_to_proto(exec_properties[standard_component_specs.PUSH_DESTINATION_KEY], destination)
    if destination.WhichOneof("destination") != "filesystem":
        raise NotImplementedError(f"push destination {destination} is not a file system")
    return destination.filesystem.base_directory


def _push_local(model_path: str, base_directory: str) -> str:
    os.makedirs(base_directory, exist_ok=True)
    _remove_stale(base_directory)
    temporary = os.path.join(base_directory, f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        io_utils.copy_dir(model_path, temporary)
        _flush(temporary)
        return _rename_to_version(temporary, base_directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_to_version(temporary: str, base_directory: str) -> str:
    while True:
        destination = os.path.join(base_directory, str(_next_version(base_directory)))
        try:
            os.rename(temporary, destination)
        except OSError as error:
            # Another pusher was first with this version: renaming onto a folder with files fails.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        else:
            _flush_directory(base_directory)
            return destination


def _push_remote(model_path: str, base_directory: str) -> str:
    fileio.makedirs(base_directory)
    destination = f"{base_directory}/{_next_version(base_directory)}"
    io_utils.copy_dir(model_path, destination, deny_regex_patterns=[re.escape(_SAVED_MODEL)])
    io_utils.copy_file(os.path.join(model_path, _SAVED_MODEL), f"{destination}/{_SAVED_MODEL}")
    return destination


def _next_version(base_directory: str) -> int:
    return max(int(time.time()), 1 + max(_versions(base_directory), default=0))


def _versions(base_directory: str) -> list[int]:
    names = (str(name).rstrip("/") for name in fileio.listdir(base_directory))
    return [int(name) for name in names if name.isdecimal()]


def _newest_if_same(model_path: str, base_directory: str) -> str | None:
    """The newest version, if it is whole and its card names the same content."""
    if not fileio.isdir(base_directory) or not (versions := _versions(base_directory)):
        return None
    newest = f"{base_directory}/{max(versions)}"
    whole = fileio.exists(f"{newest}/{_SAVED_MODEL}")
    return newest if whole and _read_digest(model_path) == _read_digest(newest) is not None else None


def _read_digest(model_path: str) -> str | None:
    card = f"{model_path}/{CARD_FILE}"
    if not fileio.exists(card):
        return None
    with fileio.open(card, "r") as file, contextlib.suppress(json.JSONDecodeError):
        return json.loads(file.read()).get(_DIGEST)
    return None


def _digest(model_path: str) -> str:
    """SHA-256 over the names and contents of a model's files."""
    digest = hashlib.sha256()
    for folder, folders, files in fileio.walk(model_path):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(folder, name)
            with fileio.open(path, "rb") as file:
                content = hashlib.sha256(file.read()).hexdigest()
            digest.update(f"{os.path.relpath(path, model_path)}\0{content}\n".encode())
    return digest.hexdigest()


def _remove_stale(base_directory: str) -> None:
    """Removes what pushes that were killed have left behind."""
    for name in os.listdir(base_directory):
        path = os.path.join(base_directory, name)
        if _is_stale(name, path):
            shutil.rmtree(path, ignore_errors=True)


def _is_stale(name: str, path: str) -> bool:
    match = re.fullmatch(re.escape(_TEMPORARY) + r"(.+)-(\d+)-[0-9a-f]{32}", name)
    if not match:
        return False
    host, process = match.groups()
    if host != socket.gethostname():
        return time.time() - os.path.getmtime(path) > _STALE_SECONDS
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _flush(directory: str) -> None:
    """Waits until the files are on the disk, so that not even a power cut leaves a version with empty files."""
    for folder, _, files in os.walk(directory):
        for file in files:
            with open(os.path.join(folder, file), "rb") as handle:
                os.fsync(handle.fileno())
        _flush_directory(folder)


def _flush_directory(directory: str) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return " ".join(str(error).split())
