"""Has a model called as a server would call it, judges, and writes the blessing."""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from tensorflow_serving.apis import prediction_log_pb2
from tfx import types
from tfx.components.infra_validator import executor as infra_validator
from tfx.dsl.components.base import base_executor
from tfx.dsl.io import fileio
from tfx.types import artifact_utils
from tfx.utils import io_utils, path_utils

from components.serving_check.config import ServingCheckConfig
from components.serving_check.requests import make_requests, make_warm_up
from components.serving_check.session import ask
from components.serving_check.verdict import Verdict, judge
from trainer_module import config_json
from trainer_module.config import Precision
from trainer_module.expected import FILE as EXPECTED_FILE
from trainer_module.expected import read_expected

REPORT_FILE = "serving_check.json"


class Executor(base_executor.BaseExecutor):
    """Writes the InfraBlessing artifact, as TFX's InfraValidator does with `make_warmup`."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See the base class. A model that must not be served is no error, but is not blessed."""
        self._log_startup(input_dict, output_dict, exec_properties)
        model = artifact_utils.get_single_instance(input_dict["model"])
        model_run = artifact_utils.get_single_instance(input_dict["model_run"])
        blessing = artifact_utils.get_single_instance(output_dict["blessing"])
        config = config_json.loads(ServingCheckConfig, exec_properties["config"])
        precision = Precision[exec_properties["precision"]]
        model_path = path_utils.serving_model_path(model.uri, path_utils.is_old_model_artifact(model))
        probes = read_expected(os.path.join(model_run.uri, EXPECTED_FILE))
        requests = make_requests(probes)
        with _on_this_machine(model_path) as folder:
            verdict = judge(requests, ask(folder, requests, config.timeout_s), config, precision)
        _write_report(verdict, blessing.uri)
        if verdict.blessed:
            # The probes are the user's images, of which none may be published with the model.
            _store_with_warm_up(model_path, make_warm_up(len(probes[0].square)), blessing)
        mark(blessing, verdict.blessed)


def mark(blessing: types.Artifact, blessed: bool) -> None:
    """Sets the file and the property by which the stock Pusher tells whether a model was blessed."""
    if blessed:
        infra_validator._mark_blessed(blessing)
    else:
        infra_validator._mark_not_blessed(blessing)


def read_report(blessing_uri: str) -> Verdict:
    """What was found; the outcome alone, without figures, where it was the stock InfraValidator that looked.

    Args:
        blessing_uri: of the `blessing` output.
    """
    path = os.path.join(blessing_uri, REPORT_FILE)
    if not fileio.exists(path):
        blessed = fileio.exists(os.path.join(blessing_uri, infra_validator._BLESSED_FILENAME))
        return Verdict(() if blessed else ("InfraValidator did not bless it; its log says why",), {})
    report = json.loads(io_utils.read_string_file(path))
    return Verdict(tuple(report["reasons"]), report["figures"])


def _write_report(verdict: Verdict, uri: str) -> None:
    text = json.dumps(dataclasses.asdict(verdict), indent=2, sort_keys=True) + "\n"
    io_utils.write_string_file(os.path.join(uri, REPORT_FILE), text)


def _store_with_warm_up(
    model_path: str, warm_up: list[prediction_log_pb2.PredictionLog], blessing: types.Artifact
) -> None:
    """The checked model with its warm-up requests, where a Pusher looks for it; the model itself stays as it is."""
    stored = path_utils.stamped_model_path(blessing.uri)
    io_utils.copy_dir(model_path, stored)
    io_utils.write_tfrecord_file(path_utils.warmup_file_path(stored), *warm_up)
    blessing.set_int_custom_property(infra_validator._MODEL_FLAG_KEY, 1)


@contextlib.contextmanager
def _on_this_machine(model_path: str) -> Iterator[str]:
    """The model's folder, or a copy of it where it lies elsewhere."""
    if "://" not in model_path:
        yield model_path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "model")
        io_utils.copy_dir(model_path, local)
        yield local
