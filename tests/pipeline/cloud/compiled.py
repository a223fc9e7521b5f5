"""A small compiled pipeline, in the form that `./moco compile` writes."""

from typing import Any

PIPELINE = "moco-small"


def compiled() -> dict[str, Any]:
    """A PipelineJob of two stages, schema 2.1, with three runtime parameters of which one has no default."""
    parameters = {
        "images": {"parameterType": "STRING"},
        "epochs": {"parameterType": "NUMBER_INTEGER", "defaultValue": 200, "isOptional": True},
        "fast": {"parameterType": "BOOLEAN", "defaultValue": False, "isOptional": True},
    }
    container = {"image": "r-docker.pkg.dev/p/moco/cpu:1", "command": ["python", "-m", "stage"]}
    return {
        "displayName": PIPELINE,
        "labels": {"tfx_version": "1-16-0"},
        "pipelineSpec": {
            "pipelineInfo": {"name": PIPELINE},
            "schemaVersion": "2.1.0",
            "sdkVersion": "tfx-1.16.0",
            "defaultPipelineRoot": "gs://bucket/moco",
            "root": {
                "inputDefinitions": {"parameters": parameters},
                "dag": {
                    "tasks": {
                        name: {
                            "taskInfo": {"name": name},
                            "componentRef": {"name": name},
                            "cachingOptions": {"enableCache": True},
                        }
                        for name in ("ImageExampleGen", "Trainer")
                    }
                },
            },
            "components": {name: {"executorLabel": f"{name}_executor"} for name in ("ImageExampleGen", "Trainer")},
            "deploymentSpec": {
                "executors": {f"{name}_executor": {"container": container} for name in ("ImageExampleGen", "Trainer")}
            },
        },
        "runtimeConfig": {"gcsOutputDirectory": "gs://bucket/moco"},
    }
