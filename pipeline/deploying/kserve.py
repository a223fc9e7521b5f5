"""TensorFlow Serving under KServe: an InferenceService, and the files that it needs as a ConfigMap.

KServe copies storageUri into each new pod once and looks for nothing later, so the version is named: to go to another
one is to apply this file anew, and the annotation with the number makes new pods.
"""

from typing import Any

import yaml

from pipeline.deploying import tf_serving
from pipeline.deploying.config import FilesConfig
from pipeline.deploying.located import Located

FILE = "inference_service.yaml"
_MODELS = "/mnt/models"  # where KServe lays what it has copied
_CONFIG = "/mnt/config"


def files(config: FilesConfig, model: Located) -> dict[str, str]:
    """Texts by names.

    Args:
        config: batches, and how many servers of which size.
        model: in a bucket.
    """
    documents = [_config_map(config, model), _service(config, model)]
    return {FILE: yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=1000)}


class _Plain(yaml.SafeDumper):
    """As people write it: files as blocks, nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes everything out."""
        del data
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """A text of several lines as a block."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _Plain.represent_text)


def _config_map(config: FilesConfig, model: Located) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{config.name}-serving"},
        "data": {
            tf_serving.BATCHING: tf_serving.batching(config),
            tf_serving.MODELS: tf_serving.models(config, model, _MODELS, followed=False),
        },
    }


def _service(config: FilesConfig, model: Located) -> dict:
    room = {"cpu": f"{config.cpus:g}", "memory": f"{config.memory_gb:g}G"}
    served = {
        "modelFormat": {"name": "tensorflow", "version": "2"},
        "protocolVersion": "v1",
        "image": tf_serving.image(config),
        "storageUri": model.base,
        "args": tf_serving.flags(_CONFIG),
        "resources": {"requests": room, "limits": room},
        "volumeMounts": [{"name": "serving", "mountPath": _CONFIG, "readOnly": True}],
    }
    predictor = {
        "minReplicas": config.min_replicas,
        "maxReplicas": config.max_replicas,
        "annotations": {"moco/model-version": model.version},
        "model": served,
        "volumes": [{"name": "serving", "configMap": {"name": f"{config.name}-serving"}}],
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": config.name},
        "spec": {"predictor": predictor},
    }
