"""A compiled pipeline run here as the service would run it: each container's own command, with artifacts on disk.

What it takes from the specification alone: which task follows which, the executor's command and arguments, parameters
and their defaults, artifact types, the driver before the cache, and the resolvers' queries. Commands run in processes
forked from one that has imported TFX, since importing it eleven times would take minutes; nothing else is shared.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RUN_EXECUTOR = "tfx.orchestration.kubeflow.v2.container.kubeflow_v2_run_executor"
ROOT = Path(__file__).resolve().parents[3]
_FORKED = multiprocessing.get_context("forkserver")


@dataclasses.dataclass
class LocalService:
    """One pipeline, whose bucket is a folder.

    Attributes:
        job: a PipelineJob.
        parameters: that the run sets.
        folder: where artifacts of the run lie.
        environment: of every container.
    """

    job: dict[str, Any]
    parameters: Mapping[str, Any]
    folder: Path
    environment: Mapping[str, str]
    artifacts: dict[str, dict[str, list[dict[str, Any]]]] = dataclasses.field(default_factory=dict)
    earlier: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        """Runs every task, in the order of their dependencies."""
        for name in self.order():
            self.run_task(name)

    def order(self) -> Iterator[str]:
        """The tasks, each after those that it needs."""
        tasks, done = self._spec["root"]["dag"]["tasks"], set[str]()
        while len(done) < len(tasks):
            name = next(n for n in sorted(tasks) if n not in done and self._needs(tasks[n]) <= done)
            yield name
            done.add(name)

    def run_task(self, name: str) -> None:
        """Runs one task; its outputs are then those of the others' inputs."""
        task = self._spec["root"]["dag"]["tasks"][name]
        component = self._spec["components"][task["componentRef"]["name"]]
        executor = self._spec["deploymentSpec"]["executors"][component["executorLabel"]]
        inputs = {
            key: self.artifacts[one["producerTask"]][one["outputArtifactKey"]] for key, one in _sources(task).items()
        }
        if "resolver" in executor:
            self.artifacts[name] = self._resolve(executor["resolver"], inputs)
            return
        folder = self.folder / name
        told = {
            "inputs": {
                "artifacts": {key: {"artifacts": found} for key, found in inputs.items()},
                "parameterValues": self._parameters(task),
            },
            "outputs": {
                "artifacts": {
                    key: {"artifacts": [self._new(name, key, one["artifactType"])]}
                    for key, one in component.get("outputDefinitions", {}).get("artifacts", {}).items()
                },
                "outputFile": str(folder / "executor_output.json"),
            },
        }
        container = executor["container"]
        if hook := container.get("lifecycle", {}).get("preCacheCheck"):
            self._execute(f"{name}-driver", [*hook["command"], *hook["args"]], told)
            self._take(told, folder)
        self._execute(name, [*container["command"], *container["args"]], told)
        self._take(told, folder)
        self.artifacts[name] = {key: one["artifacts"] for key, one in told["outputs"]["artifacts"].items()}
        self.earlier += [one for found in self.artifacts[name].values() for one in found]

    @property
    def _spec(self) -> dict[str, Any]:
        return self.job["pipelineSpec"]

    @staticmethod
    def _needs(task: dict[str, Any]) -> set[str]:
        return {*task.get("dependentTasks", []), *(one["producerTask"] for one in _sources(task).values())}

    def _parameters(self, task: dict[str, Any]) -> dict[str, Any]:
        root = self._spec["root"]["inputDefinitions"]["parameters"]
        values = {}
        for key, one in task.get("inputs", {}).get("parameters", {}).items():
            if name := one.get("componentInputParameter"):
                values[key] = self.parameters.get(name, root[name].get("defaultValue"))
            else:
                values[key] = one["runtimeValue"]["constant"]
        return values

    def _new(self, task: str, key: str, kind: dict[str, Any]) -> dict[str, Any]:
        name = f"projects/1/locations/here/metadataStores/default/artifacts/{task}-{key}"
        return {"name": name, "uri": str(self.folder / task / key), "type": kind, "metadata": {}}

    def _resolve(self, resolver: dict[str, Any], inputs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The newest artifact that each query finds: its terms are joined by AND, as Vertex ML Metadata has it."""
        return {
            key: [one for one in reversed(self.earlier) if self._matches(one, query["filter"], inputs)][:1]
            for key, query in resolver["outputArtifactQueries"].items()
        }

    @staticmethod
    def _matches(artifact: dict[str, Any], query: str, inputs: Mapping[str, list[dict[str, Any]]]) -> bool:
        def fill(match: re.Match[str]) -> str:
            found = inputs[match[1]]
            return str(found[0]["metadata"][match[2]]) if found else ""

        query = re.sub(r"\{\{\$\.inputs\.artifacts\['(\w+)'\]\.metadata\['(\w+)'\]\}\}", fill, query)
        title = re.search(r"title: (\S+)", artifact["type"]["instanceSchema"])
        assert title
        held = {"schema_title": title[1], "state": "LIVE", "name": artifact["name"]}
        held |= {f"metadata.{key}.number_value": f"{value:g}" for key, value in artifact["metadata"].items()
                 if isinstance(value, float | int)}  # fmt: skip
        terms = (term.split("=", 1) for term in query.split(" AND "))
        return all(held.get(key) == value.strip('"') for key, value in terms)

    def _execute(self, name: str, command: Sequence[str], told: dict[str, Any]) -> None:
        execute([part.replace("{{$}}", json.dumps(told)) for part in command], self.environment, self.folder / name)

    @staticmethod
    def _take(told: dict[str, Any], folder: Path) -> None:
        """What a container says of its outputs is recorded."""
        said = json.loads((folder / "executor_output.json").read_text())
        for key, one in said.get("artifacts", {}).items():
            (artifact,) = told["outputs"]["artifacts"][key]["artifacts"]
            (update,) = one["artifacts"]
            artifact |= {field: update[field] for field in ("uri", "metadata") if field in update}


def _sources(task: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {key: one["taskOutputArtifact"] for key, one in task.get("inputs", {}).get("artifacts", {}).items()}


def execute(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Runs `python -m MODULE ARGUMENTS…` in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    assert list(command[:2]) == ["python", "-m"], command
    log.parent.mkdir(parents=True, exist_ok=True)
    log = log.with_name(f"{log.name}.log")
    process = _FORKED.Process(target=_child, args=([*command[2:]], dict(environment), str(log)))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{command[2]} ended with {process.exitcode}:\n{log.read_text()[-4000:]}")


def preload(modules: Sequence[str]) -> None:
    """Names what the process that containers are forked from imports first."""
    multiprocessing.set_forkserver_preload([*modules])


def _child(arguments: list[str], environment: dict[str, str], log: str) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path[0:0] = [str(ROOT)]
    sys.argv = arguments
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else bool(end.code))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
