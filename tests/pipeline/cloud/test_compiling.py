"""The compiled pipelines: as they were when somebody looked, readable by Kubeflow's and Vertex's own loaders."""

import difflib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from essentials import CASES, GOLDEN, compiled, to_yaml
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform
from google.protobuf import json_format
from kfp import components
from kfp.pipeline_spec import pipeline_spec_pb2
from tfx.orchestration.kubeflow.v2.container import kubeflow_v2_entrypoint_utils as entrypoint

from pipeline.cloud import compiling, kubeflow_runs, vertex_runs
from pipeline.cloud.compiling import compile_pipeline, to_text
from pipeline.cloud.submission import submission
from pipeline.cloud.targets import Target
from pipeline.cloud.vertex import Connection
from pipeline.config import load
from trainer_module.errors import UserError

ROOT = Path(compiling.__file__).parents[2]
# Ends whatever asks the network, in Python, and says so even where that is caught.
DEAF = """
import runpy, sys
def told(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print(event, arguments, file=sys.stderr, flush=True)
        raise OSError(f"{event} {arguments}")
sys.addaudithook(told)
"""
COMMAND = DEAF + "runpy.run_module('pipeline', run_name='__main__', alter_sys=True)"


@pytest.fixture(scope="module")
def jobs():
    return {name: compiled(name) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_compiled_pipeline_is_the_one_that_was_looked_at(jobs, name):
    golden, now = (GOLDEN / f"{name}.yaml").read_text(), to_yaml(jobs[name])
    changes = difflib.unified_diff(golden.splitlines(), now.splitlines(), "golden", "now", lineterm="")
    assert golden == now, "\n".join([*changes, "if this is meant: python tests/pipeline/cloud/essentials.py"])


@pytest.mark.parametrize("name", CASES)
def test_no_field_is_unknown_to_the_pipelines_own_protos(jobs, name):
    job = json_format.ParseDict(jobs[name], pipeline_spec_pb2.PipelineJob())
    spec = json_format.ParseDict(jobs[name]["pipelineSpec"], pipeline_spec_pb2.PipelineSpec())
    deployment = json_format.ParseDict(
        jobs[name]["pipelineSpec"]["deploymentSpec"], pipeline_spec_pb2.PipelineDeploymentConfig()
    )
    assert json_format.MessageToDict(job.pipeline_spec) == json_format.MessageToDict(
        json_format.ParseDict(jobs[name]["pipelineSpec"], type(job.pipeline_spec)())
    )
    assert set(spec.components) == set(spec.root.dag.tasks)
    assert {component.executor_label for component in spec.components.values()} == set(deployment.executors)


def test_kubeflows_own_loader_reads_the_yaml(jobs):
    pipeline = components.load_component_from_text(to_text(jobs["vertex_cpu"], Target.kubeflow))
    assert pipeline.pipeline_spec.pipeline_info.name == "moco-vertex-cpu"
    assert len(pipeline.pipeline_spec.root.dag.tasks) == 13
    inputs = pipeline.component_spec.inputs
    assert {name: one.type for name, one in inputs.items()} == {
        "images": "String",
        "span": "String",
        "epochs": "Integer",
    }
    assert (inputs["epochs"].default, inputs["span"].default) == (200, "latest")


def test_vertexs_own_client_reads_the_json_and_takes_a_runs_parameters(jobs, tmp_path):
    path = tmp_path / "pipeline.json"
    path.write_text(to_text(jobs["vertex_v5e_16"], Target.vertex))
    run = aiplatform.PipelineJob(
        display_name="run",
        template_path=str(path),
        parameter_values={"images": "gs://other/day-{SPAN}/*.tar", "span": "7", "epochs": 3},
        project="my-project",
        location="us-west4",
        credentials=AnonymousCredentials(),
    )
    config = run._gca_resource.runtime_config
    assert config.gcs_output_directory == "gs://my-bucket/moco"
    assert dict(config.parameter_values) == {"images": "gs://other/day-{SPAN}/*.tar", "span": "7", "epochs": 3}


def test_what_is_compiled_is_what_submit_sends(jobs):
    asked = submission(name="photos-7", parameters=["images=gs://other/day-{SPAN}/*.tar", "span=7", "epochs=3"])
    vertex = vertex_runs.run_request(jobs["vertex_v5e_16"], asked, Connection("my-project", "us-west4")).pipeline_job
    spec = json_format.MessageToDict(type(vertex).pb(vertex).pipeline_spec)
    assert spec == jobs["vertex_v5e_16"]["pipelineSpec"]
    wanted = {"images": "gs://other/day-{SPAN}/*.tar", "span": "7", "epochs": 3}
    assert dict(vertex.runtime_config.parameter_values) == wanted
    assert jobs["vertex_v5e_16"]["labels"].items() <= dict(vertex.labels).items()
    kubeflow = kubeflow_runs.request(jobs["vertex_cpu"], asked, "experiment")
    assert kubeflow.pipeline_spec == jobs["vertex_cpu"]["pipelineSpec"]
    assert kubeflow.runtime_config.parameters == wanted


def test_what_is_written_is_the_same_each_time_and_names_nothing_of_this_machine(jobs):
    again = compiled("vertex_v5e_16")
    text = to_text(again, Target.vertex)
    assert text == to_text(jobs["vertex_v5e_16"], Target.vertex)
    assert json.loads(text) == again
    assert str(ROOT) not in text


def test_the_command_asks_nobody_from_its_first_import_on_and_needs_no_account(jobs, tmp_path):
    """In a process of its own, without a home and whatever else the environment may tell of an account."""
    file = tmp_path / "pipeline.json"
    words = ["compile", "--target", "vertex", "--config", "vertex_v5e_16", "--out", str(file)]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "nobody")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text() == to_text(jobs["vertex_v5e_16"], Target.vertex)


def test_a_command_that_asks_would_be_seen():
    asks = "import http.client; http.client.HTTPConnection('127.0.0.1', 9).request('GET', '/')"
    done = subprocess.run([sys.executable, "-c", DEAF + asks], capture_output=True, text=True, check=False)
    assert "socket.getaddrinfo" in done.stderr.partition("\n")[0]


def test_the_longest_name_that_is_taken_can_be_compiled():
    name = "n" * 58
    settings = load("vertex_cpu", [f"name={name}"])
    assert compile_pipeline(settings, Target.vertex)["pipelineSpec"]["pipelineInfo"]["name"] == f"moco-{name}"


def test_every_artifact_type_can_be_imported_by_the_containers(jobs):
    for component in jobs["vertex_v5e_16"]["pipelineSpec"]["components"].values():
        for definitions in (component.get("inputDefinitions", {}), component.get("outputDefinitions", {})):
            for artifact in definitions.get("artifacts", {}).values():
                schema = json_format.ParseDict(artifact["artifactType"], pipeline_spec_pb2.ArtifactTypeSchema())
                runtime = pipeline_spec_pb2.RuntimeArtifact(type=schema, uri="gs://b/a")
                assert entrypoint._parse_raw_artifact(runtime, {}).uri == "gs://b/a"


def test_vertex_fills_in_the_project_where_none_is_named():
    job = compile_pipeline(load("vertex_cpu", ["cloud.project=''", "cloud.beam=worker"]), Target.vertex)
    text = to_text(job, Target.vertex)
    assert "--project={{$.pipeline_google_cloud_project_id}}" in text
    assert re.search(r"FnApiRunner", text)
    assert "DataflowRunner" not in text


def test_initial_weights_in_a_bucket_need_no_network_and_an_encoder_that_cannot_be_is_refused():
    weights = "gs://bucket/moco.safetensors"
    job = compile_pipeline(load("vertex_cpu", [f"encoder.weights={weights}"]), Target.vertex)
    told = job["pipelineSpec"]["root"]["dag"]["tasks"]["Trainer"]["inputs"]["parameters"]["custom_config"]
    experiment = json.loads(json.loads(told["runtimeValue"]["constant"])["experiment"])
    assert experiment["encoder"]["weights"] == weights
    assert experiment["code"].endswith(weights)
    with pytest.raises(UserError, match="NoSuchNet"):
        compile_pipeline(load("vertex_cpu", ["encoder=keras.applications.NoSuchNet"]), Target.vertex)
