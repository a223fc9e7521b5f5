"""The process that Vertex AI runs before ImageExampleGen's cache is asked: `driver.resolve`, as an ExecutorOutput.

TFX's own (tfx.orchestration.kubeflow.v2.file_based_example_gen.driver) knows neither our sources nor our fingerprint,
so a run on images that were added deep in a folder would take the old ones from the cache. This one is called with the
same arguments and writes the same message.
"""

import argparse
import sys
from collections.abc import Sequence

from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from tfx.components.example_gen import utils
from tfx.components.example_gen.driver import update_output_artifact
from tfx.dsl.io import fileio
from tfx.orchestration.kubeflow.v2.container import kubeflow_v2_entrypoint_utils as entrypoint
from tfx.types import artifact_utils
from tfx.types.standard_component_specs import EXAMPLES_KEY, INPUT_BASE_KEY, INPUT_CONFIG_KEY
from tfx.utils import io_utils

from components.image_example_gen.driver import resolve


def main(arguments: Sequence[str]) -> None:
    """Resolves the images of a run.

    Args:
        arguments: `--json_serialized_invocation_args` and `--json_serialized_inputs_spec_args` as TFX's containers get
            them; others are Beam's and have no use here.

    Raises:
        UserError: see `driver.resolve`.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--json_serialized_invocation_args", required=True)
    parser.add_argument("--json_serialized_inputs_spec_args", required=True)
    told, _ = parser.parse_known_args(arguments)
    task = json_format.Parse(
        told.json_serialized_invocation_args, pipeline_spec_pb2.ExecutorInput(), ignore_unknown_fields=True
    )
    spec = json_format.Parse(told.json_serialized_inputs_spec_args, pipeline_spec_pb2.ComponentInputsSpec())
    written = task.outputs.output_file
    fileio.makedirs(written.rpartition("/")[0])
    io_utils.write_string_file(written, json_format.MessageToJson(_resolved(task, spec), sort_keys=True))


def _resolved(
    task: pipeline_spec_pb2.ExecutorInput, spec: pipeline_spec_pb2.ComponentInputsSpec
) -> pipeline_spec_pb2.ExecutorOutput:
    properties = resolve(
        entrypoint.parse_execution_properties(task.inputs.parameter_values, task.inputs.parameters, spec)
    )
    names: dict[int, str] = {}
    examples = artifact_utils.get_single_instance(
        entrypoint.parse_raw_artifact_dict(task.outputs.artifacts, names)[EXAMPLES_KEY]
    )
    update_output_artifact(properties, examples.mlmd_artifact)
    output = pipeline_spec_pb2.ExecutorOutput()
    output.artifacts[EXAMPLES_KEY].artifacts.append(entrypoint.to_runtime_artifact(examples, names))
    for key in (INPUT_BASE_KEY, INPUT_CONFIG_KEY, utils.FINGERPRINT_PROPERTY_NAME):
        output.parameter_values[key].string_value = properties[key]
    for key in (utils.SPAN_PROPERTY_NAME, utils.VERSION_PROPERTY_NAME):
        if properties[key] is not None:
            output.parameter_values[key].number_value = properties[key]
    return output


if __name__ == "__main__":
    main(sys.argv[1:])
