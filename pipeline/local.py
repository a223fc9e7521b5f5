"""Runs the pipeline on this machine: LocalDagRunner, SQLite metadata, Beam in this process.

A working directory holds everything: artifacts, metadata, checkpoints, published versions, config.yaml, log.txt and
result.json. The same command continues a killed run and takes from the cache what did not change.
"""

import contextlib
import datetime
import functools
import itertools
import os
import shutil
import time
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_metadata.proto import metadata_store_pb2
from tfx.orchestration import metadata
from tfx.orchestration.local import local_dag_runner, runner_utils
from tfx.orchestration.portable import launcher, runtime_parameter_utils
from tfx.orchestration.portable.beam_executor_operator import BeamExecutorOperator
from tfx.orchestration.portable.mlmd import execution_lib
from tfx.proto.orchestration import pipeline_pb2, placeholder_pb2
from tfx.types.standard_component_specs import CUSTOM_CONFIG_KEY
from tfx.utils import json_utils

from components import disk
from components.pusher import publish
from components.view_augmenter.executor import check_space
from components.view_augmenter.stages import Job
from pipeline import console, database, engines, report
from pipeline.beam import BEAM_ARGUMENTS
from pipeline.config import Config, to_yaml
from pipeline.create_pipeline import LocalRunner, Places, create_pipeline, make_experiment
from trainer_module import progress
from trainer_module.checkpoints import clear, make_folder, refuse_other_run
from trainer_module.driver import RESULT_FILE
from trainer_module.input import check_batch
from trainer_module.run_fn import LOGS
from trainer_module.strategy import prepare
from trainer_module.torch_weights import check_encoder, digest

_RUN_ID = "pipeline-run-id"
_EXECUTION = metadata_store_pb2.Execution
_MOST_EXECUTIONS = 10**12  # TFX names the folders of drivers by microseconds since 1970


def run(config: Config, images: str, home: Path, *, require_blessing: bool = False) -> int:
    """Runs the pipeline and reports.

    Args:
        config: validated.
        images: folder, file or glob.
        home: working directory, which the caller keeps other runs out of, see pipeline.workdir.
        require_blessing: whether a model that is not blessed makes the exit code 1.

    Returns:
        The exit code.

    Raises:
        UserError: the input is wrong.
    """
    with console.logged_to(home / "log.txt"), console.native_stderr_to(home / "log.txt"):
        return _run(config, images, home, require_blessing)


def _run(config: Config, images: str, home: Path, require_blessing: bool) -> int:
    prepare(config.train)
    check_encoder(config.encoder, config.augment.size)
    engines.check(config.beam)
    serving = config.publish.to or str(home / "serving" / "encoder")
    places = Places(str(home / "artifacts"), serving, _checkpoints(config, home))
    experiment = make_experiment(config, places, digest(config.encoder.weights))
    refuse_other_run(places.checkpoints, experiment.identity())  # known now, and not only once the Trainer finds them
    make_folder(places.checkpoints)
    store = database.path_in(home)
    database.wait_until_free(store)
    database.check(store)
    # A killed run must not leave the outcome of the one before it.
    (home / "result.json").unlink(missing_ok=True)
    connection = metadata.sqlite_metadata_connection_config(str(store))
    _clear_dead_executions(connection, Path(places.root))  # before anything is written: it frees what they took
    _set_unknown_aside(connection, Path(places.root))
    _write(home / "config.yaml", to_yaml(config))
    _forget_lost_versions(connection, places.serving)
    nodes: list[report.Node] = []

    def finished(node: report.Node) -> None:
        nodes.append(node)
        if text := report.describe(node):
            console.line(console.component_line(node.id, text, node.seconds, node.cached))
        if node.id == "ImageExampleGen":
            _check_sizes(config, report.ingested(node)["train"], places.root, stored=node.cached)
        if node.id == "Trainer":  # its model is kept, so other settings may train now, whatever becomes of what follows
            clear(places.checkpoints, LOGS, RESULT_FILE)

    began = time.monotonic()
    # How a training is carried out has no part in the cache key: changed afterwards, it asks for no other model.
    told = {CUSTOM_CONFIG_KEY: json_utils.dumps(experiment.to_custom_config())}
    ending = contextlib.ExitStack()  # of the engine, which is not started where all stages are cached
    engine = functools.cache(lambda: ending.enter_context(engines.started(config.beam)))
    runner = _Runner(finished, {"Trainer": told}, engine)
    try:
        runner.run(create_pipeline(config, places, LocalRunner(images, connection, BEAM_ARGUMENTS)))
    except BaseException as error:
        with contextlib.suppress(OSError):  # where the disk is full, the error says so already
            _write(home / "result.json", report.failed(nodes, runner.current, error, time.monotonic() - began))
        raise
    finally:
        ending.close()
    result = report.collect(nodes, time.monotonic() - began)
    _write(home / "result.json", report.to_json(result))
    for line in report.summary(result, nodes, config, images, home):
        console.line(line)
    return 1 if require_blessing and not result["blessed"] else 0


def _checkpoints(config: Config, home: Path) -> str:
    named = config.train.checkpoints
    if not named:
        return str(home / "checkpoints")
    return named if "://" in named else os.path.abspath(os.path.expanduser(named))


def _check_sizes(config: Config, train: int, root: str, *, stored: bool) -> None:
    """Refuses, as soon as the images have been counted, what later stages would refuse after work in vain."""
    check_batch(train, config.train.global_batch)
    if not stored:  # views of images that were read by an earlier run may be there already
        check_space(Job(f"{root}/ViewAugmenter", config.image, config.augment, config.seed, train))


class _Runner(local_dag_runner.LocalDagRunner):
    """LocalDagRunner that says of each node what came of it.

    Args:
        finished: is told of each node.
        told: node -> execution properties for its executor, in place of those that the cache is asked with.
        engine: starts what Beam's stages run on, and gives the flags for it.
    """

    def __init__(
        self,
        finished: Callable[[report.Node], None],
        told: Mapping[str, Mapping[str, str]],
        engine: Callable[[], Sequence[str]],
    ) -> None:
        super().__init__()
        self._finished, self._told, self._engine = finished, told, engine
        self.current = ""

    def run_with_ir(self, pipeline: pipeline_pb2.Pipeline, run_options: pipeline_pb2.RunOptions | None = None) -> None:
        """Runs the nodes one after the other; partial runs are not supported."""
        del run_options
        # TFX takes two runs of one name for the same, and a clock that was put back can say the same time again.
        started = f"{datetime.datetime.now(datetime.timezone.utc).isoformat()}-{uuid.uuid4().hex[:8]}"
        runtime_parameter_utils.substitute_runtime_parameter(pipeline, {_RUN_ID: started})
        deployment = runner_utils.extract_local_deployment_config(pipeline)
        connection = getattr(
            deployment.metadata_connection_config,
            deployment.metadata_connection_config.WhichOneof("connection_config"),
        )
        for node in pipeline.nodes:
            self.current = node.pipeline_node.node_info.id
            progress.begun(self.current)
            began = time.monotonic()
            node_launcher = _Launcher(
                pipeline_node=node.pipeline_node,
                mlmd_connection=_Metadata(connection),
                pipeline_info=pipeline.pipeline_info,
                pipeline_runtime_spec=pipeline.runtime_spec,
                executor_spec=runner_utils.extract_executor_spec(deployment, self.current),
                custom_driver_spec=runner_utils.extract_custom_driver_spec(deployment, self.current),
            )
            node_launcher.told = self._told.get(self.current, {})
            node_launcher.engine = self._engine
            execution = node_launcher.launch()
            if execution and execution.execution_id:
                seconds = time.monotonic() - began
                own = node_launcher.executor_seconds
                self._finished(_outcome(connection, self.current, execution.execution_id, seconds, own))


class _Metadata(metadata.Metadata):
    """A connection that waits for other programs first, so that what a stage has done is not lost to their lock."""

    def __enter__(self) -> metadata.Metadata:
        database.wait_until_free(Path(self.connection_config.sqlite.filename_uri))
        return super().__enter__()


class _Launcher(launcher.Launcher):
    """A launcher that clocks the executor apart from driver, metadata and publishing, and makes its outputs last.

    Beam's flags are given to the executor only now: they would be part of the cache key, and no result depends on them.
    """

    engine: Callable[[], Sequence[str]]
    executor_seconds = 0.0
    told: Mapping[str, str] = types.MappingProxyType({})  # see _Runner

    def _run_executor(self, execution_info: Any) -> Any:
        execution_info.exec_properties.update(self.told)
        if isinstance(self._executor_operator, BeamExecutorOperator):
            self._executor_operator.beam_pipeline_args = [_constant(flag) for flag in self.engine()]
        began = time.monotonic()
        try:
            done = super()._run_executor(execution_info)
        finally:
            self.executor_seconds = time.monotonic() - began
        # Metadata that say a stage is done must not outlive its files, which a power cut would leave empty.
        for artifact in itertools.chain(*execution_info.output_dict.values()):
            disk.flush(artifact.uri)
        return done


def _constant(text: str) -> placeholder_pb2.PlaceholderExpression:
    expression = placeholder_pb2.PlaceholderExpression()
    expression.value.string_value = text
    return expression


def _outcome(
    connection: metadata_store_pb2.ConnectionConfig, node_id: str, execution_id: int, seconds: float, own: float
) -> report.Node:
    with _Metadata(connection) as handle:
        (execution,) = handle.store.get_executions_by_id([execution_id])
        outputs = execution_lib.get_output_artifacts(handle, execution_id)
    if execution.last_known_state == _EXECUTION.FAILED:
        # A resolver that fails says so in the metadata only, and what follows would run without its inputs.
        raise RuntimeError(f"{node_id} failed; see the log")
    cached = execution.last_known_state == _EXECUTION.CACHED
    return report.Node(node_id, seconds, own, cached, {key: list(value) for key, value in outputs.items()})


def _clear_dead_executions(connection: metadata_store_pb2.ConnectionConfig, root: Path) -> None:
    """Marks executions that a killed run left open as failed, and removes what they had begun to write."""
    with _Metadata(connection) as handle:
        dead = [e for e in handle.store.get_executions() if e.last_known_state == _EXECUTION.RUNNING]
        for execution in dead:
            execution.last_known_state = _EXECUTION.FAILED
            for folder in (*root.glob(f"*/*/{execution.id}"), *root.glob(f"*/.system/*/{execution.id}")):
                shutil.rmtree(folder, ignore_errors=True)
        if dead:
            handle.store.put_executions(dead)


def _set_unknown_aside(connection: metadata_store_pb2.ConnectionConfig, root: Path) -> None:
    """Moves away what lies where executions to come will write: artifacts of metadata that were removed or restored."""
    with _Metadata(connection) as handle:
        newest = max((execution.id for execution in handle.store.get_executions()), default=0)
    folders = (*root.glob("*/*/*"), *root.glob("*/.system/*/*"))
    unknown = [folder for folder in folders if folder.name.isdecimal() and newest < int(folder.name) < _MOST_EXECUTIONS]
    if not unknown:
        return
    aside = root.with_name(f"{root.name}-unknown-{uuid.uuid4().hex[:8]}")
    for folder in unknown:
        there = aside / folder.relative_to(root)
        there.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(there)
    progress.note(f"{len(unknown)} folders of artifacts that {database.FILE} does not know were moved to {aside}")


def _forget_lost_versions(connection: metadata_store_pb2.ConnectionConfig, base: str) -> None:
    """Removes the archives of versions that were published and are gone, so that no cached push stands for them."""
    at = publish.place(base)
    with _Metadata(connection) as handle:
        pushed = handle.store.get_artifacts_by_type("PushedModel")
    archives = [(artifact.custom_properties["pushed_destination"].string_value, artifact.uri) for artifact in pushed]
    here = [(destination, uri) for destination, uri in archives if destination.startswith(f"{at.base}/")]
    there = {at.path(number) for number in publish.whole(at)} if here else set()
    for destination, uri in here:
        if destination not in there:
            shutil.rmtree(uri, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
