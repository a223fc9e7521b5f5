"""What ML Metadata know of what made an artifact. Reads the store alone; needs neither TFX nor TensorFlow."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_metadata import metadata_store
from ml_metadata.proto import metadata_store_pb2

ASIDE = ("baseline_model",)  # inputs that an execution only compares with, and that have no part in what it makes

_RUN, _NODE = "pipeline_run", "node"  # types of TFX's contexts


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact.

    Attributes:
        id: in the store.
        type: such as "Examples".
        uri: its folder.
        properties: numbers and texts.
    """

    id: int
    type: str
    uri: str
    properties: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Execution:
    """An execution that has succeeded.

    Attributes:
        id: in the store.
        component: id of the component in the pipeline.
        run: of the pipeline.
        finished_ms: milliseconds since 1970, by the clock of the machine that it ran on.
        code: fingerprint of the sources that it ran, see pipeline.fingerprint; None where it noted none.
        parameters: as TFX stores them, mostly JSON texts.
        inputs, outputs: ids of artifacts by key.
    """

    id: int
    component: str
    run: str
    finished_ms: int
    code: str | None
    parameters: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Graph:
    """Executions and artifacts that others were made from, by their ids."""

    executions: Mapping[int, Execution]
    artifacts: Mapping[int, Artifact]

    def maker(self, artifact: int) -> Execution | None:
        """The execution that made an artifact."""
        made = (e for e in self.executions.values() if any(artifact in ids for ids in e.outputs.values()))
        return next(made, None)

    def of_component(self, component: str) -> Execution | None:
        """The execution of a component."""
        return next((e for e in self.executions.values() if e.component == component), None)

    def roots(self) -> list[Execution]:
        """Executions that were made from nothing in the store: they have read the images."""
        return [execution for execution in self.executions.values() if not execution.inputs]


class Store:
    """A metadata store, opened so that it cannot be changed."""

    def __init__(self, database: Path) -> None:
        """Opens it.

        Args:
            database: SQLite's file.

        Raises:
            RuntimeError: it is none.
        """
        config = metadata_store_pb2.ConnectionConfig()
        config.sqlite.filename_uri = str(database)
        config.sqlite.connection_mode = metadata_store_pb2.SqliteMetadataSourceConfig.READONLY
        self._store = metadata_store.MetadataStore(config)
        self._artifact_types = {kind.id: kind.name for kind in self._store.get_artifact_types()}

    def artifacts(self, kind: str) -> list[Artifact]:
        """All artifacts of a type, in the order in which they were made."""
        if kind not in self._artifact_types.values():
            return []
        return [self._artifact(one) for one in sorted(self._store.get_artifacts_by_type(kind), key=lambda a: a.id)]

    def artifact(self, number: int) -> Artifact | None:
        """One artifact; None where there is none of that number."""
        found = self._store.get_artifacts_by_id([number])
        return self._artifact(found[0]) if found else None

    def execution(self, number: int) -> Execution | None:
        """One execution; None where there is none of that number, or it did not succeed."""
        return next(iter(self._executions([number])), None)

    def makers(self, artifacts: Iterable[int]) -> dict[int, Execution]:
        """The executions that made artifacts, by the artifact; those that took them from the cache made nothing."""
        wanted = list(artifacts)
        events = self._store.get_events_by_artifact_ids(wanted) if wanted else []
        made = [event for event in events if event.type == metadata_store_pb2.Event.OUTPUT]
        found = {execution.id: execution for execution in self._executions({event.execution_id for event in made})}
        return {event.artifact_id: found[event.execution_id] for event in made if event.execution_id in found}

    def upstream(self, artifact: int) -> Graph:
        """All that an artifact was made from, and what `ASIDE` names of it."""
        executions: dict[int, Execution] = {}
        seen, waiting = {artifact}, {artifact}
        while waiting:
            made_by = {e.id: e for e in self.makers(waiting).values() if e.id not in executions}
            executions |= made_by
            used = {(key, one) for e in made_by.values() for key, ids in e.inputs.items() for one in ids}
            waiting = {one for key, one in used if key not in ASIDE} - seen
            seen |= waiting | {one for key, one in used if key in ASIDE}
        produced = {one for e in executions.values() for ids in e.outputs.values() for one in ids}
        artifacts = (self._artifact(one) for one in self._store.get_artifacts_by_id(sorted(seen | produced)))
        return Graph(dict(sorted(executions.items())), {one.id: one for one in artifacts})

    def _executions(self, numbers: Iterable[int]) -> list[Execution]:
        wanted = sorted(numbers)
        if not wanted:
            return []
        complete = metadata_store_pb2.Execution.COMPLETE
        found = [e for e in self._store.get_executions_by_id(wanted) if e.last_known_state == complete]
        events: dict[int, list[Any]] = collections.defaultdict(list)
        for event in self._store.get_events_by_execution_ids([e.id for e in found]) if found else ():
            events[event.execution_id].append(event)
        return [self._execution(one, events[one.id]) for one in found]

    def _execution(self, one: metadata_store_pb2.Execution, events: Sequence[Any]) -> Execution:
        contexts = {context.type: context.name for context in self._store.get_contexts_by_execution(one.id)}
        component = contexts.get(_NODE, "").rpartition(".")[2]
        parameters = _values(one)
        return Execution(
            id=one.id,
            component=component,
            run=contexts.get(_RUN, ""),
            finished_ms=one.last_update_time_since_epoch,
            code=find_code(parameters, component),
            parameters=parameters,
            inputs=_by_key(events, metadata_store_pb2.Event.INPUT),
            outputs=_by_key(events, metadata_store_pb2.Event.OUTPUT),
        )

    def _artifact(self, one: metadata_store_pb2.Artifact) -> Artifact:
        return Artifact(one.id, self._artifact_types[one.type_id], one.uri, _values(one))


def find_code(value: Any, component: str) -> str | None:
    """The fingerprint among the parameters of an execution, however deep: components pass JSON within JSON.

    Args:
        value: parameters; or a part of them.
        component: whose fingerprint it is, where there are several.
    """
    value = _opened(value)
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return None
    if "code" in value:
        code = _opened(value["code"])
        return code.get(component) if isinstance(code, Mapping) else str(code)
    return next((code for item in value.values() if (code := find_code(item, component)) is not None), None)


def _opened(value: Any) -> Any:
    """What a JSON text of an object or a list says; anything else as it is."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _values(node: metadata_store_pb2.Artifact | metadata_store_pb2.Execution) -> dict[str, Any]:
    """Numbers and texts of an artifact or execution."""
    both = [*node.properties.items(), *node.custom_properties.items()]
    simple = ("int_value", "double_value", "string_value", "bool_value")
    return {key: getattr(value, kind) for key, value in sorted(both) if (kind := value.WhichOneof("value")) in simple}


def _by_key(events: Sequence[Any], kind: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = collections.defaultdict(list)
    for event in events:
        if event.type == kind:
            found[event.path.steps[0].key].append(event.artifact_id)
    return {key: tuple(ids) for key, ids in sorted(found.items())}
