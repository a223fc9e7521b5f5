"""A metadata store with the executions of small pipelines, laid out as TFX's launcher lays them out."""

import json
from pathlib import Path
from typing import Any

from ml_metadata import metadata_store
from ml_metadata.proto import metadata_store_pb2

COMPLETE, CACHED = metadata_store_pb2.Execution.COMPLETE, metadata_store_pb2.Execution.CACHED
INPUT, OUTPUT = metadata_store_pb2.Event.INPUT, metadata_store_pb2.Event.OUTPUT
SETTINGS = {"train.queue": 64, "seed": 0}


class Recorder:
    """Puts executions with their artifacts, as ids, into the store of a working directory."""

    def __init__(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        connection = metadata_store_pb2.ConnectionConfig()
        connection.sqlite.filename_uri = str(home / "metadata.sqlite")
        self._store = metadata_store.MetadataStore(connection)

    def execute(
        self,
        component: str,
        run: str,
        inputs: dict[str, int],
        outputs: dict[str, tuple[str, dict[str, Any]]],
        state: int = COMPLETE,
        **parameters: Any,
    ) -> dict[str, int]:
        """One execution; `outputs` are types and properties by key. Returns its own number as "" and the outputs'."""
        kind = self._store.put_execution_type(
            metadata_store_pb2.ExecutionType(name=f"x.{component}"), can_add_fields=True, can_omit_fields=True
        )
        execution = metadata_store_pb2.Execution(type_id=kind, last_known_state=state)
        _set(execution, parameters)
        pairs = [(metadata_store_pb2.Artifact(id=one), _event(INPUT, key)) for key, one in inputs.items()]
        known = {one.id: one for one in self._store.get_artifacts()}
        for artifact, _ in pairs:
            artifact.CopyFrom(known[artifact.id])
        for key, (name, properties) in outputs.items():
            uri = str(self.home / "artifacts" / component / key / run)
            pairs.append((self._artifact(name, uri, properties), _event(OUTPUT, key)))
        contexts = [self._context("pipeline_run", run), self._context("node", f"moco.{component}")]
        number, artifacts, _ = self._store.put_execution(execution, pairs, contexts)
        return {"": number, **dict(zip(outputs, artifacts[len(inputs) :], strict=True))}

    def take_from_cache(self, component: str, run: str, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        """An execution that made nothing: its outputs are there already."""
        done = self.execute(component, run, inputs, {}, CACHED)
        events = [
            metadata_store_pb2.Event(type=OUTPUT, execution_id=done[""], artifact_id=one, path=_event(OUTPUT, key).path)
            for key, one in outputs.items()
        ]
        self._store.put_events(events)

    def publish(self, run: str, version: str, baseline: int | None = None, **images: Any) -> dict[str, int]:
        """A pipeline from images to a published version, whose folder it makes with its card; numbers by name."""
        listed = {"span": 3, "input_fingerprint": "files:2", "manifest": "ab" * 32, "read": 9, "train": 7, "eval": 2}
        packed = json.dumps({"customConfig": {"value": json.dumps({"code": "c0", "ingest": "{}"})}})
        gen = self.execute(
            "ImageExampleGen",
            run,
            {},
            {"examples": ("Examples", listed | images)},
            custom_config=packed,
            input_base="/photos",
            input_config=json.dumps({"splits": [{"name": "images", "pattern": "*.tar"}]}),
        )
        experiment = json.dumps({"experiment": json.dumps({"code": "c1", "seed": 0})})
        trained = self.execute(
            "Trainer", run, {"examples": gen["examples"]}, {"model": ("Model", {})}, custom_config=experiment
        )
        compared = {} if baseline is None else {"baseline_model": baseline}
        judged = self.execute(
            "Evaluator",
            run,
            {"examples": gen["examples"], "model": trained["model"], **compared},
            {"blessing": ("ModelBlessing", {"blessed": 1})},
            eval_config=json.dumps({"metrics_specs": [{"metrics": [{"config": json.dumps({"code": "c2"})}]}]}),
        )
        described = self.execute(
            "ModelCard",
            run,
            {"model": trained["model"], "examples": gen["examples"], "blessing": judged["blessing"]},
            {"model_card": ("ModelCard", {})},
            code=json.dumps({"ImageExampleGen": "c0", "ModelCard": "c3"}),
            config=json.dumps(SETTINGS),
        )
        path = self.home / "serving" / "encoder" / version
        pushed = self.execute(
            "Pusher",
            run,
            {"model_blessing": judged["blessing"], "model_card": described["model_card"]},
            {"pushed_model": ("PushedModel", {"pushed_version": version, "pushed_destination": str(path)})},
            custom_config=json.dumps({"code": "c4", "keep": 0}),
        )
        for folder in (path, self.home / "artifacts" / "Pusher" / "pushed_model" / run):
            write_version(folder, card(run, described[""]))
        return {"images": gen["examples"], "model": trained["model"], "pushed": pushed["pushed_model"]}

    def _artifact(self, name: str, uri: str, properties: dict[str, Any]) -> metadata_store_pb2.Artifact:
        kind = self._store.put_artifact_type(
            metadata_store_pb2.ArtifactType(name=name), can_add_fields=True, can_omit_fields=True
        )
        artifact = metadata_store_pb2.Artifact(type_id=kind, uri=uri)
        _set(artifact, properties)
        return artifact

    def _context(self, kind: str, name: str) -> metadata_store_pb2.Context:
        found = self._store.get_context_by_type_and_name(kind, name)
        if found is not None:
            return found
        number = self._store.put_context_type(metadata_store_pb2.ContextType(name=kind))
        return metadata_store_pb2.Context(type_id=number, name=name)


def card(run: str, execution: int) -> dict[str, Any]:
    """The parts of a model's card that lineage reads."""
    return {
        "model_sha256": "cd" * 32,
        "config": SETTINGS,
        "code": {"Trainer": "c1"},
        "versions": {"moco": "1.0", "python": "3.10.1"},
        "data": {"span": 3, "version": None, "fingerprint": "files:2", "manifest": "ab" * 32, "counts": {"train": 7}},
        "lineage": {"pipeline": "moco", "run": run, "execution": str(execution), "artifacts": {}},
    }


def write_version(path: Path, content: dict[str, Any] | None) -> None:
    """The files that make a published version whole, with a card."""
    for name in ("saved_model.pb", "variables/variables.index"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")
    if content is not None:
        (path / "assets.extra").mkdir(exist_ok=True)
        (path / "assets.extra" / "model_card.json").write_text(json.dumps(content))


def _set(node: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        setattr(node.custom_properties[key], "int_value" if isinstance(value, int) else "string_value", value)


def _event(kind: int, key: str) -> metadata_store_pb2.Event:
    event = metadata_store_pb2.Event(type=kind)
    event.path.steps.add().key = key
    event.path.steps.add().index = 0
    return event
