"""TensorFlow Serving by docker: a command, and the files that it needs beside it."""

import shlex

from pipeline.deploying import tf_serving
from pipeline.deploying.config import FilesConfig
from pipeline.deploying.located import Located

COMMAND = "serve.sh"
_CONFIG = "/config"


def files(config: FilesConfig, model: Located) -> dict[str, str]:
    """Texts by names. The command binds to this machine's loopback.

    Args:
        config: ports, batches.
        model: on this machine or in a bucket.
    """
    base_path = model.base if model.remote else f"/models/{config.name}"
    return {
        tf_serving.BATCHING: tf_serving.batching(config),
        tf_serving.MODELS: tf_serving.models(config, model, base_path, model.followed),
        COMMAND: _command(config, model),
    }


def _command(config: FilesConfig, model: Located) -> str:
    words = [
        ["docker", "run", "--rm", "--name", config.name],
        ["--publish", f"127.0.0.1:{config.rest_port}:8501", "--publish", f"127.0.0.1:{config.grpc_port}:8500"],
        _mount("$PWD", _CONFIG),
        _model(config, model),
        [tf_serving.image(config)],
        *([flag] for flag in tf_serving.flags(_CONFIG)),
    ]
    lines = " \\\n  ".join(" ".join(_quoted(word) for word in line) for line in words)
    return f"""\
#!/bin/sh
# Serves {" ".join(model.path.split())}
# at http://127.0.0.1:{config.rest_port}/v1/models/{config.name}; ends with: docker stop {config.name}
set -eu
cd "$(dirname "$0")"
exec {lines}
"""


def _model(config: FilesConfig, model: Located) -> list[str]:
    if model.remote:  # read with the Application Default Credentials of whoever starts it
        return _mount("$HOME/.config/gcloud", "/root/.config/gcloud")
    return _mount(model.base, f"/models/{config.name}" + ("" if model.version else "/1"))


def _mount(source: str, target: str) -> list[str]:
    parts = ["type=bind", f"source={source}", f"target={target}", "readonly"]
    return ["--mount", ",".join(f'"{part}"' if "," in part else part for part in parts)]  # as CSV, docker's form


def _quoted(word: str) -> str:
    """For sh; names of variables stay."""
    return f'"{word}"' if "=$" in word else shlex.quote(word)
