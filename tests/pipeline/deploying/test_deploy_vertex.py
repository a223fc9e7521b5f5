"""Vertex AI: what a deployment sends, what it does when it is typed again, and one line for every fault."""

import json
from collections.abc import Iterator

import grpc
import pytest
import vertex_server
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from google.rpc import status_pb2
from vertex_server import Fault, VertexServer

from pipeline.cloud.vertex import Connection
from pipeline.deploying import vertex
from pipeline.deploying.config import VertexConfig
from pipeline.deploying.located import Located
from trainer_module.errors import UserError

PARENT = "projects/my-project/locations/europe-west4"
MODEL = Located("gs://bucket/encoder", "17", followed=False)
NEXT = Located("gs://bucket/encoder", "18", followed=False)


@pytest.fixture
def service() -> Iterator[tuple[VertexServer, Connection]]:
    with vertex_server.running() as made:
        yield made


def deploy(connection: Connection, model: Located = MODEL, **options) -> list[str]:
    return list(vertex.deploy(VertexConfig(**options), model, connection))


def endpoint(server: VertexServer) -> types.Endpoint:
    return server.endpoints[f"{PARENT}/endpoints/encoder"]


def served(server: VertexServer) -> dict[str, int]:
    """Percent by display name."""
    there = endpoint(server)
    return {one.display_name: there.traffic_split.get(one.id, 0) for one in there.deployed_models}


def test_a_model_is_uploaded_and_deployed_with_all_that_was_asked(service):
    server, connection = service
    said = deploy(
        connection,
        machine_type="n1-standard-8",
        accelerator="NVIDIA_TESLA_T4",
        accelerators=2,
        min_replicas=2,
        max_replicas=6,
        service_account="me@my-project.iam.gserviceaccount.com",
        labels=("team=vision",),
    )
    [upload] = server.sent("UploadModel")
    assert (upload.parent, upload.model_id, upload.parent_model) == (PARENT, "encoder", "")
    assert upload.model.artifact_uri == "gs://bucket/encoder/17"
    assert list(upload.model.version_aliases) == ["v17", "default"]
    assert dict(upload.model.labels) == {"team": "vision"}
    image = upload.model.container_spec.image_uri
    assert image == "europe-docker.pkg.dev/vertex-ai/prediction/tf2-gpu.2-15:latest"
    assert upload.model.container_spec.predict_route == ""  # the prebuilt container has its own
    [sent] = server.sent("DeployModel")
    machines = sent.deployed_model.dedicated_resources
    assert machines.machine_spec.machine_type == "n1-standard-8"
    assert machines.machine_spec.accelerator_type == types.AcceleratorType.NVIDIA_TESLA_T4
    assert machines.machine_spec.accelerator_count == 2
    assert (machines.min_replica_count, machines.max_replica_count) == (2, 6)
    assert sent.deployed_model.service_account == upload.service_account == "me@my-project.iam.gserviceaccount.com"
    assert sent.deployed_model.model == f"{PARENT}/models/encoder@v17"
    assert served(server) == {"encoder 17": 100}
    assert said[0] == f"model: {PARENT}/models/encoder@1 (v17)"
    assert any(f"/v1/{PARENT}/endpoints/encoder:predict" in line for line in said)


def test_a_dry_run_shows_the_very_messages_that_a_first_deployment_sends(service):
    server, connection = service
    options = {"machine_type": "n1-highcpu-8", "labels": ("team=vision",)}
    shown = [json.loads(text) for text in vertex.dry_run(VertexConfig(**options), MODEL, connection)]
    assert server.calls == []
    deploy(connection, **options)
    messages = [types.UploadModelRequest, types.CreateEndpointRequest, types.DeployModelRequest]
    for one, message in zip(shown, messages, strict=True):
        method = one["method"].rpartition("/")[2]
        parsed = json_format.ParseDict(one["request"], message.pb(message()))  # refuses unknown fields
        assert [parsed] == [message.pb(sent) for sent in server.sent(method)]
    assert shown[0]["method"] == "google.cloud.aiplatform.v1.ModelService/UploadModel"


def test_a_dry_run_needs_neither_network_nor_credentials(monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    shown = list(vertex.dry_run(VertexConfig(), MODEL, Connection("my-project", "us-central1")))
    assert json.loads(shown[0])["host"] == "us-central1-aiplatform.googleapis.com"


def test_typed_again_nothing_is_uploaded_or_deployed_twice(service):
    server, connection = service
    deploy(connection)
    said = deploy(connection)
    for method in ("UploadModel", "CreateEndpoint", "DeployModel"):
        assert len(server.sent(method)) == 1
    assert "is deployed already, gets 100 % of the requests" in said


def test_the_next_version_joins_the_model_and_takes_its_share(service):
    server, connection = service
    deploy(connection)
    deploy(connection, NEXT, traffic=10)
    upload = server.sent("UploadModel")[1]
    assert (upload.parent_model, upload.model_id) == (f"{PARENT}/models/encoder", "")
    assert served(server) == {"encoder 17": 90, "encoder 18": 10}
    deploy(connection, NEXT, traffic=100, replace=True)
    assert len(server.sent("DeployModel")) == 2
    assert served(server) == {"encoder 18": 100}


def test_an_image_of_ones_own_is_told_its_folder_routes_and_port():
    config = VertexConfig(image="europe-west4-docker.pkg.dev/my-project/serving/tensorflow:2.16.1")
    made = vertex.requests(config, MODEL, Connection("my-project", "europe-west4"))
    container = made.upload.model.container_spec
    assert made.upload.model.artifact_uri == "gs://bucket/encoder"  # numbered folders lie below it
    assert container.image_uri == config.image
    assert "--model_base_path=$(AIP_STORAGE_URI)" in container.args
    assert f"--rest_api_port={container.ports[0].container_port}" in container.args
    assert container.predict_route == "/v1/models/encoder:predict"
    assert container.health_route == "/v1/models/encoder"


@pytest.mark.parametrize(
    ("region", "image"),
    [
        ("us-central1", "us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest"),
        ("asia-east1", "asia-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest"),
        ("southamerica-east1", "us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest"),
    ],
)
def test_the_prebuilt_image_lies_near_the_region(region, image):
    made = vertex.requests(VertexConfig(), MODEL, Connection("my-project", region))
    assert made.upload.model.container_spec.image_uri == image


@pytest.mark.parametrize(
    ("now", "chosen", "percent", "then"),
    [
        ({}, "0", 10, {"0": 100}),
        ({"1": 100}, "0", 0, {"0": 0, "1": 100}),
        ({"1": 100}, "1", 30, {"1": 100}),
        ({"1": 50, "2": 50}, "0", 99, {"0": 99, "1": 1, "2": 0}),
        ({"1": 60, "2": 30, "3": 10}, "0", 50, {"0": 50, "1": 30, "2": 15, "3": 5}),
        ({"1": 60, "2": 40, "3": 0}, "2", 100, {"2": 100, "1": 0}),
    ],
)
def test_shares_stay_in_proportion_and_are_100_in_all(now, chosen, percent, then):
    assert vertex.shares(now, chosen, percent) == then


@pytest.mark.parametrize(
    ("method", "code", "text", "said"),
    [
        ("UploadModel", "PERMISSION_DENIED", "no aiplatform.models.upload", ["model encoder", "not allowed", "upload"]),
        ("GetModel", "UNAUTHENTICATED", "bad token", ["model encoder", "gcloud auth application-default login"]),
        ("CreateEndpoint", "NOT_FOUND", "no such project", ["endpoint encoder", "not found", "my-project, europe-"]),
        ("DeployModel", "UNAVAILABLE", "server restarts", ["endpoint encoder", "no answer", "try again later"]),
        ("DeployModel", "RESOURCE_EXHAUSTED", "quota custom_model_serving_cpus", ["quota", "serving_cpus"]),
        ("UploadModel", "INVALID_ARGUMENT", "no saved_model.pb found", ["no saved_model.pb found"]),
    ],
)
def test_a_refusal_is_one_line_that_says_what_and_why(service, method, code, text, said):
    server, connection = service
    server.faults[method] = [Fault(grpc.StatusCode[code], text)]
    with pytest.raises(UserError) as refusal:
        deploy(connection)
    for word in said:
        assert word in str(refusal.value)


@pytest.mark.parametrize("method", ["UploadModel", "DeployModel"])
def test_an_operation_that_fails_says_what_the_service_says(service, method):
    server, connection = service
    why = "Model server exited unexpectedly"
    server.work_errors[method] = status_pb2.Status(code=grpc.StatusCode.FAILED_PRECONDITION.value[0], message=why)
    with pytest.raises(UserError, match=why):
        deploy(connection)


def test_what_may_be_asked_twice_is_asked_again_while_there_is_no_answer(service):
    server, connection = service
    lost = Fault(grpc.StatusCode.UNAVAILABLE)
    for method in ("GetModel", "GetEndpoint"):
        server.faults[method] = [lost, lost]
    server.faults["CreateEndpoint"] = [Fault(grpc.StatusCode.UNAVAILABLE, acted=True), None]
    server.faults["GetOperation"] = [lost]
    deploy(connection)
    assert served(server) == {"encoder 17": 100}


def test_an_upload_whose_answer_was_lost_is_not_sent_twice(service):
    server, connection = service
    server.faults["UploadModel"] = [Fault(grpc.StatusCode.UNAVAILABLE, acted=True)]
    with pytest.raises(UserError, match="no answer"):
        deploy(connection)
    assert len(server.sent("UploadModel")) == 1


def test_an_endpoint_that_is_named_by_number_is_never_made(service):
    server, connection = service
    with pytest.raises(UserError, match="endpoint 4711: not found"):
        deploy(connection, endpoint="4711")
    assert server.sent("CreateEndpoint") == []


def test_a_server_that_is_not_there_is_said_to_give_no_answer():
    with vertex_server.running() as (_, gone):
        pass
    with pytest.raises(UserError, match=f"no answer from {gone.address}"):
        deploy(gone)


def test_an_accelerator_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=r"--accelerator T4 .*NVIDIA_TESLA_T4"):
        list(vertex.dry_run(VertexConfig(accelerator="T4"), MODEL, Connection("my-project", "us-central1")))
