"""TensorFlow Serving's own files: which model, and how requests become batches.

The text forms of `tensorflow.serving.ModelServerConfig` and `tensorflow.serving.BatchingParameters`.
"""

import json
import math

from pipeline.deploying.config import FilesConfig
from pipeline.deploying.located import Located
from trainer_module import lines

BATCHING, MODELS = "batching_parameters.txt", "models.config"


def image(config: FilesConfig) -> str:
    """The container's."""
    return config.image or lines.SERVING_IMAGE


def flags(folder: str) -> list[str]:
    """Of tensorflow_model_server, beyond those of its ports.

    Args:
        folder: where the server finds `BATCHING` and `MODELS`.
    """
    return [
        f"--model_config_file={folder}/{MODELS}",
        "--enable_batching=true",
        f"--batching_parameters_file={folder}/{BATCHING}",
        "--enable_model_warmup=true",  # by the requests that lie in the model's assets.extra
        "--rest_api_timeout_in_ms=30000",
    ]


def batching(config: FilesConfig) -> str:
    """How requests become batches. Sizes are few, since the first batch of each size is slow."""
    sizes = [2**power for power in range(math.ceil(math.log2(config.max_batch)))] + [config.max_batch]
    text = [
        f"max_batch_size {{ value: {config.max_batch} }}",
        f"batch_timeout_micros {{ value: {round(1000 * config.max_wait_ms)} }}",
        f"max_enqueued_batches {{ value: {math.ceil(config.max_queue / config.max_batch)} }}",
        f"num_batch_threads {{ value: {config.threads} }}",
        *(f"allowed_batch_sizes: {size}" for size in sizes),
    ]
    return "\n".join(text) + "\n"


def models(config: FilesConfig, model: Located, base_path: str, followed: bool) -> str:
    """Which model, and which version of it.

    Args:
        config: names it.
        model: see there.
        base_path: of the folder of versions, as the server sees it.
        followed: whether later versions take over by themselves.
    """
    policy = "latest { num_versions: 1 }" if followed else f"specific {{ versions: {model.version or 1} }}"
    return f"""\
model_config_list {{
  config {{
    name: "{config.name}"
    base_path: {json.dumps(base_path, ensure_ascii=False)}
    model_platform: "tensorflow"
    model_version_policy {{ {policy} }}
  }}
}}
"""
