"""A compiled pipeline, short enough to be read: what runs where, on what, and which parameters are a run's own."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

GOLDEN = Path(__file__).parent / "golden"
CASES = {"vertex_v5e_16": "vertex", "vertex_cpu": "kubeflow"}


def essentials(job: dict[str, Any]) -> dict[str, Any]:
    """The parts of a PipelineJob that a reviewer wants to see, by stage. Fingerprints of code are left out."""
    spec = job["pipelineSpec"]
    executors = spec["deploymentSpec"]["executors"]
    tasks = spec["root"]["dag"]["tasks"]
    containers = [executor["container"] for executor in executors.values() if "container" in executor]
    return {
        "name": spec["pipelineInfo"]["name"],
        "schema": spec["schemaVersion"],
        "root": spec["defaultPipelineRoot"],
        "labels": {key: value for key, value in job["labels"].items() if not key.startswith("tfx_")},
        "parameters": spec["root"]["inputDefinitions"]["parameters"],
        "beam": _the_one([_beam_flags(container) for container in containers]),
        "image": _the_one([container["image"] for container in containers]),
        "machine": _the_one([container["resources"] for container in containers]),
        "training": _training(tasks["Trainer"]),
        "stages": {name: _stage(task, executors[f"{name}_executor"]) for name, task in tasks.items()},
    }


def _stage(task: dict[str, Any], executor: dict[str, Any]) -> dict[str, Any]:
    inputs = task.get("inputs", {})
    stage: dict[str, Any] = {
        "after": task.get("dependentTasks", []),
        "cached": [] if task.get("cachingOptions", {}).get("enableCache") else "never",
        "inputs": {
            name: "{producerTask}.{outputArtifactKey}".format(**artifact["taskOutputArtifact"])
            for name, artifact in inputs.get("artifacts", {}).items()
        },
        "of the run": {
            name: parameter["componentInputParameter"]
            for name, parameter in inputs.get("parameters", {}).items()
            if "componentInputParameter" in parameter
        },
    }
    if resolver := executor.get("resolver"):
        stage["resolves"] = {name: query["filter"] for name, query in resolver["outputArtifactQueries"].items()}
    if container := executor.get("container"):
        stage["runs"] = container["args"][container["args"].index("--executor_class_path") + 1]
        if "lifecycle" in container:
            stage["driver"] = " ".join(container["lifecycle"]["preCacheCheck"]["command"])
    return {name: value for name, value in stage.items() if value not in ([], {})}


def _training(task: dict[str, Any]) -> dict[str, Any]:
    told = json.loads(task["inputs"]["parameters"]["custom_config"]["runtimeValue"]["constant"])
    experiment = json.loads(told.pop("experiment"))
    train = experiment["train"]
    return {
        **told,
        "checkpoints": experiment["checkpoints"],
        "train": {key: train[key] for key in ("strategy", "global_batch", "precision", "tpu")},
    }


def _beam_flags(container: dict[str, Any]) -> list[str]:
    ours = re.compile(r"--(?!executor_class_path|json_serialized)\w")
    return [argument for argument in container["args"] if ours.match(argument)]


def _the_one(values: list[Any]) -> Any:
    """What all stages have in common, and they must."""
    assert all(value == values[0] for value in values)
    return values[0]


def to_yaml(job: dict[str, Any]) -> str:
    """As it lies in golden/."""
    return yaml.safe_dump(essentials(job), sort_keys=True, width=120)


def compiled(name: str) -> dict[str, Any]:
    """One of the cases, compiled."""
    from pipeline.cloud.compiling import compile_pipeline
    from pipeline.cloud.targets import Target
    from pipeline.config import load

    return compile_pipeline(load(name), Target[CASES[name]])


if __name__ == "__main__":  # python tests/pipeline/cloud/essentials.py, after a change that is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        (GOLDEN / f"{case}.yaml").write_text(to_yaml(compiled(case)))
