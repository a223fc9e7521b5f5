"""Runs on Vertex AI: what is sent, what is said while they go on, how they fail and end, a line for every fault."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import vertex_server
from compiled import PIPELINE, compiled
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.cloud.aiplatform_v1 import PipelineServiceClient, types
from google.protobuf import json_format
from google.rpc import status_pb2
from vertex_server import Fault, VertexServer

from pipeline.cloud import submit_command, vertex, vertex_runs
from pipeline.cloud.config import CloudConfig
from pipeline.cloud.submission import submission
from pipeline.cloud.targets import Target
from pipeline.cloud.vertex import Connection
from pipeline.config import Config
from trainer_module.errors import UserError

PARENT = "projects/my-project/locations/europe-west4"
TRAINER_JOB = f"{PARENT}/customJobs/77"
RUN, TASK = types.PipelineState, types.PipelineTaskDetail.State
ASKED = submission(name="run-1", parameters=["images=gs://bucket/photos"], labels=["team=vision"])


@pytest.fixture
def service() -> Iterator[tuple[VertexServer, Connection]]:
    with vertex_server.running() as made:
        yield made


def submit(connection: Connection, asked=ASKED) -> list[str]:
    said: list[str] = []
    vertex_runs.submit(compiled(), asked, connection, said.append)
    return said


def task(number: int, name: str, state: TASK, **more) -> types.PipelineTaskDetail:
    """Of a run, begun number minutes after it, and of one minute where it is at its end."""
    begun = datetime.datetime(2026, 11, 23, 6, number, tzinfo=datetime.timezone.utc)
    ended = {} if state in (TASK.PENDING, TASK.RUNNING) else {"end_time": begun + datetime.timedelta(minutes=1)}
    return types.PipelineTaskDetail(
        task_id=number, parent_task_id=1, task_name=name, state=state, start_time=begun, **ended, **more
    )


def stage(state: RUN, *tasks: types.PipelineTaskDetail, error: str = "") -> types.PipelineJob:
    """A run at one moment; the run itself is its first task, as the service has it."""
    whole = types.PipelineTaskDetail(task_id=1, task_name="run-1", state=TASK.RUNNING)
    return types.PipelineJob(
        state=state,
        job_detail=types.PipelineJobDetail(task_details=[whole, *tasks]),
        error=status_pb2.Status(message=error),
    )


@pytest.fixture
def pipeline(tmp_path: Path) -> str:
    """A file as `./moco compile` writes it."""
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps(compiled()))
    return str(path)


# What is sent.


def test_a_run_is_the_compiled_pipeline_with_what_was_asked_of_this_run(service):
    server, connection = service
    said = submit(connection)
    [sent] = server.sent("CreatePipelineJob")
    assert (sent.parent, sent.pipeline_job_id) == (PARENT, "run-1")
    job = sent.pipeline_job
    assert json_format.MessageToDict(types.PipelineJob.pb(job).pipeline_spec) == compiled()["pipelineSpec"]
    assert job.runtime_config.gcs_output_directory == "gs://bucket/moco"
    assert dict(job.runtime_config.parameter_values) == {"images": "gs://bucket/photos"}
    assert {"team": "vision", "tfx_version": "1-16-0"}.items() <= dict(job.labels).items()
    assert said[0] == "run run-1 in project my-project, europe-west4"
    assert "europe-west4/pipelines/runs/run-1?project=my-project" in said[1]


def test_parameters_have_the_types_that_the_pipeline_declares():
    asked = submission(parameters=["images=gs://b/x=y", "epochs=50", "fast=true"])
    request = vertex_runs.run_request(compiled(), asked, Connection("my-project", "europe-west4"))
    values = types.PipelineJob.pb(request.pipeline_job).runtime_config.parameter_values
    assert values["images"].string_value == "gs://b/x=y"
    assert values["epochs"].number_value == 50
    assert values["fast"].bool_value is True


def test_account_network_and_caching_are_those_that_were_asked(service, pipeline):
    server, connection = service
    cloud = CloudConfig(service_account="me@my-project.iam.gserviceaccount.com", network="projects/1/global/networks/n")
    asked = submission(parameters=["images=gs://b"], cached=False)
    request = submit_command.Request(Target.vertex, Config(cloud=cloud), asked, pipeline=pipeline)
    assert submit_command.run(request, [].append, connection)
    [sent] = server.sent("CreatePipelineJob")
    assert sent.pipeline_job.service_account == cloud.service_account
    assert sent.pipeline_job.network == cloud.network
    tasks = json_format.MessageToDict(types.PipelineJob.pb(sent.pipeline_job).pipeline_spec)["root"]["dag"]["tasks"]
    assert [one["cachingOptions"] for one in tasks.values()] == [{"enableCache": False}] * 2


def test_a_run_without_a_name_bears_the_pipelines_and_the_time():
    request = vertex_runs.run_request(
        compiled(), submission(parameters=["images=gs://b"]), Connection("my-project", "europe-west4")
    )
    name, _, time = request.pipeline_job_id.partition("-20")
    assert name == PIPELINE
    assert datetime.datetime.strptime("20" + time, "%Y%m%d-%H%M%S")
    assert request.pipeline_job.display_name == PIPELINE


def test_a_dry_run_shows_the_very_message_and_sends_nothing(service, monkeypatch):
    server, connection = service
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    text = vertex_runs.dry_run(compiled(), ASKED, connection)
    shown = json.loads(text)
    assert text == json.dumps(shown, indent=2, sort_keys=True)  # so that two requests can be compared line by line
    assert server.calls == []
    submit(connection)
    parsed = json_format.ParseDict(
        shown["request"], types.CreatePipelineJobRequest.pb(types.CreatePipelineJobRequest())
    )
    assert [parsed] == [types.CreatePipelineJobRequest.pb(sent) for sent in server.sent("CreatePipelineJob")]
    assert shown["method"] == "google.cloud.aiplatform.v1.PipelineService/CreatePipelineJob"


# What is said while it goes on.


def followed(connection: Connection, name: str = "run-1") -> tuple[str, list[str]]:
    said: list[str] = []
    state = vertex_runs.watch(name, connection, said.append)
    return state.value, said


def test_each_change_of_state_is_one_line(service):
    server, connection = service
    submit(connection)
    reading, done = task(2, "ImageExampleGen", TASK.RUNNING), task(2, "ImageExampleGen", TASK.SUCCEEDED)
    server.stages = [
        stage(RUN.PIPELINE_STATE_PENDING),
        stage(RUN.PIPELINE_STATE_RUNNING, reading),
        stage(RUN.PIPELINE_STATE_RUNNING, reading),
        stage(RUN.PIPELINE_STATE_RUNNING, task(3, "Trainer", TASK.PENDING), done),
        stage(RUN.PIPELINE_STATE_SUCCEEDED, done, task(3, "Trainer", TASK.SKIPPED)),
    ]
    state, said = followed(connection)
    assert state == "succeeded"
    assert [line.split() for line in said] == [
        ["run-1", "waiting"],
        ["ImageExampleGen", "running"],
        ["run-1", "running"],
        ["ImageExampleGen", "succeeded", "60.0", "s"],
        ["Trainer", "waiting"],
        ["Trainer", "cached", "60.0", "s"],
        ["run-1", "succeeded"],
    ]


def test_a_failing_stage_says_its_own_error_that_of_its_job_and_where_its_log_is(service):
    server, connection = service
    submit(connection)
    detail = types.PipelineTaskExecutorDetail(
        custom_job_detail=types.PipelineTaskExecutorDetail.CustomJobDetail(job=TRAINER_JOB)
    )
    failed = task(
        3,
        "Trainer",
        TASK.FAILED,
        executor_detail=detail,
        error=status_pb2.Status(message="Job failed with code 9.\nSee its log."),
    )
    why = "The replica workerpool0-0 exited with a non-zero status of 1"
    server.custom_jobs[TRAINER_JOB] = types.CustomJob(name=TRAINER_JOB, error=status_pb2.Status(message=why))
    server.stages = [stage(RUN.PIPELINE_STATE_FAILED, failed, error="The failed tasks are: [Trainer].")]
    state, said = followed(connection)
    assert state == "failed"
    assert said[0].split() == ["Trainer", "failed", "60.0", "s"]
    assert said[1].strip() == "Job failed with code 9. See its log"
    assert said[2].strip() == f"job 77: {why}"
    assert "resource.labels.job_id%3D%2277%22?project=my-project" in said[3]
    assert said[4] == "run-1 failed: The failed tasks are: [Trainer]"


def test_a_failing_stage_whose_job_is_gone_says_what_there_is(service):
    server, connection = service
    submit(connection)
    detail = types.PipelineTaskExecutorDetail(
        container_detail=types.PipelineTaskExecutorDetail.ContainerDetail(main_job=TRAINER_JOB)
    )
    past = types.PipelineTaskDetail.PipelineTaskStatus(error=status_pb2.Status(message="out of memory"))
    failed = task(3, "Transform", TASK.FAILED, executor_detail=detail, pipeline_task_status=[past])
    server.stages = [stage(RUN.PIPELINE_STATE_FAILED, failed)]
    _, said = followed(connection)
    assert said[1].strip() == "out of memory"
    assert len(said) == 4


def test_watching_goes_on_while_the_service_gives_no_answer(service):
    server, connection = service
    submit(connection)
    server.stages = [stage(RUN.PIPELINE_STATE_RUNNING), stage(RUN.PIPELINE_STATE_SUCCEEDED)]
    server.faults["GetPipelineJob"] = [None, Fault(grpc.StatusCode.UNAVAILABLE), Fault(grpc.StatusCode.UNAVAILABLE)]
    assert followed(connection)[0] == "succeeded"


@pytest.mark.parametrize(("end", "well"), [("SUCCEEDED", True), ("FAILED", False), ("CANCELLED", False)])
def test_the_command_fails_where_the_run_that_it_watches_does(service, pipeline, end, well):
    server, connection = service
    server.stages = [stage(RUN[f"PIPELINE_STATE_{end}"])]
    request = submit_command.Request(Target.vertex, Config(), ASKED, pipeline=pipeline, watch=True)
    assert submit_command.run(request, [].append, connection) is well


# Cancelling.


def test_a_run_is_cancelled_and_its_end_awaited(service):
    server, connection = service
    submit(connection)
    said: list[str] = []
    request = submit_command.Request(Target.vertex, Config(), submission(), name="run-1", cancel=True, watch=True)
    assert submit_command.run(request, said.append, connection)
    assert [sent.name for sent in server.sent("CancelPipelineJob")] == [f"{PARENT}/pipelineJobs/run-1"]
    assert said == ["run run-1 is being cancelled", "run-1 cancelling", "run-1 cancelled"]


def test_a_run_that_has_ended_is_not_cancelled(service):
    server, connection = service
    submit(connection)
    server.stages = [stage(RUN.PIPELINE_STATE_SUCCEEDED)]
    with pytest.raises(UserError, match="run run-1 has succeeded already"):
        vertex_runs.cancel("run-1", connection, print)
    assert server.sent("CancelPipelineJob") == []


# Schedules.


def schedule(connection: Connection, cron: str = "CRON_TZ=Europe/Berlin 0 3 * * *", name: str = "nightly") -> list[str]:
    said: list[str] = []
    asked = submission(name=name, parameters=["images=gs://bucket/photos"], cron=cron)
    vertex_runs.schedule(compiled(), asked, connection, said.append)
    return said


def test_a_schedule_begins_the_same_run_one_at_a_time(service):
    server, connection = service
    said = schedule(connection)
    [sent] = server.sent("CreateSchedule")
    assert (sent.parent, sent.schedule.display_name) == (PARENT, "nightly")
    assert sent.schedule.cron == "CRON_TZ=Europe/Berlin 0 3 * * *"
    assert sent.schedule.max_concurrent_run_count == 1
    run = sent.schedule.create_pipeline_job_request
    assert (run.parent, run.pipeline_job_id) == (PARENT, "")
    assert dict(run.pipeline_job.runtime_config.parameter_values) == {"images": "gs://bucket/photos"}
    assert said == ["schedule nightly: CRON_TZ=Europe/Berlin 0 3 * * *; ends with --cancel schedules/1"]


def test_a_schedule_typed_again_is_the_same_one_and_another_of_its_name_is_refused(service):
    server, connection = service
    assert schedule(connection) == schedule(connection)
    assert len(server.sent("CreateSchedule")) == 1
    with pytest.raises(UserError, match=r"schedule nightly is there already.*--cancel schedules/1"):
        schedule(connection, cron="0 4 * * *")


def test_a_schedule_is_removed_by_its_id(service):
    server, connection = service
    schedule(connection)
    said: list[str] = []
    vertex_runs.cancel("schedules/1", connection, said.append)
    assert server.schedules == {}
    assert said == ["removed schedules/1"]
    with pytest.raises(UserError, match="schedules/1: not found"):
        vertex_runs.cancel("schedules/1", connection, said.append)


# Faults.


@pytest.mark.parametrize("acted", [False, True])
def test_a_run_whose_answer_was_lost_is_begun_once(service, acted):
    server, connection = service
    server.faults["CreatePipelineJob"] = [Fault(grpc.StatusCode.UNAVAILABLE, acted=acted)]
    submit(connection)
    assert len(server.sent("CreatePipelineJob")) == 2
    assert len(server.jobs) == 1


def test_a_run_typed_again_with_its_name_is_the_same_and_another_of_that_name_is_refused(service):
    server, connection = service
    submit(connection)
    submit(connection)
    assert len(server.jobs) == 1
    with pytest.raises(UserError, match="run run-1 is there already, with another content"):
        submit(connection, submission(name="run-1", parameters=["images=gs://other"]))


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        ("PERMISSION_DENIED", "aiplatform.pipelineJobs.create denied", ["not allowed", "pipelineJobs.create", "role"]),
        ("UNAUTHENTICATED", "expired", ["gcloud auth application-default login"]),
        ("NOT_FOUND", "project gone", ["not found in project my-project, europe-west4"]),
        ("RESOURCE_EXHAUSTED", "Quota exceeded: ConcurrentPipelineJobs", ["quota", "ConcurrentPipelineJobs"]),
        ("INVALID_ARGUMENT", "pipeline root must be gs://", ["pipeline root must be gs://"]),
        ("INTERNAL", "boom", ["a fault of Vertex AI", "boom", "try again later"]),
    ],
)
def test_a_refusal_is_one_line_that_names_the_run_and_says_why(service, code, text, said):
    server, connection = service
    server.faults["CreatePipelineJob"] = [Fault(grpc.StatusCode[code], text)]
    with pytest.raises(UserError) as refusal:
        submit(connection)
    assert str(refusal.value).startswith("run run-1: ")
    for word in said:
        assert word in str(refusal.value)
    assert len(server.sent("CreatePipelineJob")) == 1


@pytest.mark.parametrize("deed", [vertex_runs.watch, vertex_runs.cancel])
def test_a_run_that_there_is_not_is_said_to_be_missing(service, deed):
    with pytest.raises(UserError, match="run run-9: not found in project my-project, europe-west4"):
        deed("run-9", service[1], print)


# Refusals before anything is sent.


def test_a_pipeline_without_a_root_is_refused():
    job = compiled()
    del job["pipelineSpec"]["defaultPipelineRoot"], job["runtimeConfig"]["gcsOutputDirectory"]
    with pytest.raises(UserError, match=r"compile it with cloud\.root"):
        vertex_runs.dry_run(job, ASKED, Connection("my-project", "europe-west4"))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ([], ["images has no value", "--parameter images=VALUE"]),
        (["images=x", "epoch=5"], ["--parameter epoch", "epochs, fast, images"]),
        (["images=x", "epochs=many"], ["--parameter epochs=many", "NUMBER_INTEGER"]),
        (["images=x", "fast=perhaps"], ["--parameter fast=perhaps", "BOOLEAN"]),
    ],
)
def test_a_parameter_that_cannot_be_is_refused(parameters, words):
    with pytest.raises(UserError) as refusal:
        vertex_runs.dry_run(compiled(), submission(parameters=parameters), Connection("my-project", "europe-west4"))
    for word in words:
        assert word in str(refusal.value)


# Credentials.


def test_without_credentials_the_line_says_how_to_get_them(monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    with pytest.raises(UserError, match=r"no credentials for Vertex AI .*gcloud auth application-default login"):
        submit(Connection("my-project", "europe-west4"))


def test_with_credentials_the_regions_own_server_is_asked(monkeypatch, tmp_path: Path):
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    account = {
        "type": "service_account",
        "client_email": "me@my-project.iam.gserviceaccount.com",
        "private_key": key.private_bytes(*form).decode(),
        "token_uri": "https://oauth2.googleapis.com/token",
    }
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with vertex.client(PipelineServiceClient, Connection("my-project", "europe-west4")) as client:
        assert client.transport.host == "europe-west4-aiplatform.googleapis.com:443"
