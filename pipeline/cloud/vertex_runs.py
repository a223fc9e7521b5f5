"""Runs and schedules of Vertex AI Pipelines: submitted, watched, cancelled."""

import contextlib
import datetime
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from google.api_core.exceptions import AlreadyExists, GoogleAPICallError
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform
from google.cloud.aiplatform_v1 import (
    JobServiceClient,
    PipelineServiceClient,
    ScheduleServiceClient,
    types,
)

from pipeline.cloud import vertex
from pipeline.cloud.config import CloudConfig
from pipeline.cloud.submission import Submission, plain, run_name, typed
from pipeline.cloud.vertex import Connection
from pipeline.cloud.watching import Look, Stage, State, follow
from pipeline.cloud.wording import one_line
from trainer_module.errors import UserError

Say = Callable[[str], None]

_CONTENT = "moco-content"  # a label: by it a request is told again whose answer was lost
_LONGEST = 2000  # characters of a stage's error
_CONSOLE = "https://console.cloud.google.com"
_STATES: Mapping[str, State] = {
    "QUEUED": State.waiting,
    "PENDING": State.waiting,
    "RUNNING": State.running,
    "PAUSED": State.paused,
    "CANCEL_PENDING": State.cancelling,
    "CANCELLING": State.cancelling,
    "SUCCEEDED": State.succeeded,
    "SKIPPED": State.cached,  # Vertex AI's word for a stage whose result was in the cache
    "NOT_TRIGGERED": State.skipped,
    "CANCELLED": State.cancelled,
    "FAILED": State.failed,
}


def service(cloud: CloudConfig) -> Connection:
    """The one that a configuration names."""
    return Connection(cloud.project, cloud.region)


def run_request(job: Mapping[str, Any], asked: Submission, connection: Connection) -> types.CreatePipelineJobRequest:
    """What is sent for a run.

    Args:
        job: as `./moco compile --target vertex` writes it.
        asked: of this run.
        connection: project and region.

    Raises:
        UserError: a parameter is unknown or wrong, or one that has no default is missing.
    """
    pipeline = job["pipelineSpec"]["pipelineInfo"]["name"]
    values = typed(asked.parameters, job)
    if not (job["pipelineSpec"].get("defaultPipelineRoot") or job["runtimeConfig"].get("gcsOutputDirectory")):
        raise UserError("the pipeline has no root, the gs:// folder of what it makes; compile it with cloud.root")
    name = run_name(asked.name, pipeline, datetime.datetime.now(datetime.timezone.utc))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        made = aiplatform.PipelineJob(
            display_name=name if asked.name else pipeline,
            template_path=str(file),
            job_id=name,
            parameter_values=values,
            enable_caching=None if asked.cached else False,
            labels={**job.get("labels", {}), **asked.labels},
            credentials=AnonymousCredentials(),  # it asks nobody
            project=connection.project,
            location=connection.region,
        )
    resource = types.PipelineJob.from_json(json.dumps(made.to_dict()))
    resource.service_account, resource.network = asked.service_account, asked.network
    resource.labels[_CONTENT] = _digest(resource)
    return types.CreatePipelineJobRequest(parent=connection.parent, pipeline_job=resource, pipeline_job_id=name)


def schedule_request(job: Mapping[str, Any], asked: Submission, connection: Connection) -> types.CreateScheduleRequest:
    """What is sent for a schedule. One run at a time: where the last one still goes on, a run is left out.

    Args:
        job, asked, connection: see `run_request`.
    """
    run = run_request(job, asked, connection)
    run.pipeline_job_id = ""  # each run gets one of its own
    schedule = types.Schedule(
        display_name=asked.name or plain(job["pipelineSpec"]["pipelineInfo"]["name"]),
        cron=asked.cron,
        max_concurrent_run_count=1,
        create_pipeline_job_request=run,
    )
    return types.CreateScheduleRequest(parent=connection.parent, schedule=schedule)


def dry_run(job: Mapping[str, Any], asked: Submission, connection: Connection) -> str:
    """The request as JSON."""
    if asked.cron:
        return vertex.dry("ScheduleService/CreateSchedule", schedule_request(job, asked, connection), connection)
    return vertex.dry("PipelineService/CreatePipelineJob", run_request(job, asked, connection), connection)


def submit(job: Mapping[str, Any], asked: Submission, connection: Connection, say: Say) -> str:
    """Begins a run. One of the same name and content that is there already is taken for it.

    Args:
        job, asked, connection: see `run_request`.
        say: is told where it can be seen.

    Returns:
        Its name.

    Raises:
        UserError: the service refuses, does not answer, or has another run of that name.
    """
    request = run_request(job, asked, connection)
    name = request.pipeline_job_id
    with vertex.client(PipelineServiceClient, connection) as client, vertex.errors_told(connection, f"run {name}"):
        try:
            client.create_pipeline_job(request, **connection.again)
        except AlreadyExists as error:
            there = client.get_pipeline_job(name=_job_name(name, connection), **connection.again)
            if there.labels.get(_CONTENT) != request.pipeline_job.labels[_CONTENT]:
                raise UserError(
                    f"run {name} is there already, with another content; choose another --name, or leave it out"
                ) from error
    say(f"run {name} in {connection.where}")
    say(f"  {_CONSOLE}/vertex-ai/locations/{connection.region}/pipelines/runs/{name}?project={connection.project}")
    return name


def schedule(job: Mapping[str, Any], asked: Submission, connection: Connection, say: Say) -> None:
    """Begins a schedule. One of the same name and content that is there already is taken for it.

    Args:
        job, asked, connection: see `run_request`.
        say: is told its name.

    Raises:
        UserError: the service refuses, does not answer, or has another schedule of that name.
    """
    request = schedule_request(job, asked, connection)
    wanted = request.schedule
    what = f"schedule {wanted.display_name}"
    with vertex.client(ScheduleServiceClient, connection) as client, vertex.errors_told(connection, what):
        listed = client.list_schedules(
            types.ListSchedulesRequest(parent=connection.parent, filter=f'display_name="{wanted.display_name}"'),
            **connection.again,
        )
        made = next(iter(listed), None)
        if made is None:  # ids are given by the service, so a lost answer is not followed by a second request
            made = client.create_schedule(request, timeout=connection.timeout)
        elif _content(made) != _content(wanted) or made.cron != wanted.cron:
            raise UserError(
                f"{what} is there already, with another content; first ./moco submit --target vertex --cancel "
                f"schedules/{_last(made.name)}, or choose another --name"
            )
    say(f"{what}: {made.cron}; ends with --cancel schedules/{_last(made.name)}")


def watch(name: str, connection: Connection, say: Say) -> State:
    """Follows a run until it ends.

    Args:
        name: of the run.
        connection: the service.
        say: is told each change, and what went wrong.

    Raises:
        UserError: there is no such run, or no answer.
    """
    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(vertex.client(PipelineServiceClient, connection))
        jobs = stack.enter_context(vertex.client(JobServiceClient, connection))
        stack.enter_context(vertex.errors_told(connection, f"run {name}"))

        def look() -> Look:
            there = runs.get_pipeline_job(name=_job_name(name, connection), **connection.again)
            return _look(name, there, jobs, connection)

        return follow(look, connection.poll, say)


def cancel(name: str, connection: Connection, say: Say) -> None:
    """Ends a run that goes on, or removes a schedule; runs that a schedule has begun go on.

    Args:
        name: of the run; or schedules/ID.
        connection: the service.
        say: is told what becomes of it.

    Raises:
        UserError: there is none, or it has ended already.
    """
    if "schedules/" in name:
        _remove_schedule(name, connection)
        say(f"removed {name}")
        return
    with vertex.client(PipelineServiceClient, connection) as client, vertex.errors_told(connection, f"run {name}"):
        state = _state(client.get_pipeline_job(name=_job_name(name, connection), **connection.again).state)
        if state.ends:
            raise UserError(f"run {name} has {state.value} already; there is nothing to cancel")
        client.cancel_pipeline_job(name=_job_name(name, connection), **connection.again)
    say(f"run {name} is being cancelled")


def _remove_schedule(name: str, connection: Connection) -> None:
    full = f"{connection.parent}/schedules/{_last(name)}"
    with vertex.client(ScheduleServiceClient, connection) as client, vertex.errors_told(connection, name):
        removal = client.delete_schedule(name=full, timeout=connection.timeout)
        removal.result(retry=connection.retry, polling=connection.polling)


def _digest(resource: types.PipelineJob) -> str:
    text = json.dumps(types.PipelineJob.to_dict(resource), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content(schedule: types.Schedule) -> str:
    return schedule.create_pipeline_job_request.pipeline_job.labels.get(_CONTENT, "")


def _job_name(name: str, connection: Connection) -> str:
    return f"{connection.parent}/pipelineJobs/{_last(name)}"


def _last(name: str) -> str:
    return name.rpartition("/")[2]


# What a run looks like.


def _look(name: str, job: types.PipelineJob, jobs: JobServiceClient, connection: Connection) -> Look:
    details = list(job.job_detail.task_details)
    parents = {detail.parent_task_id for detail in details}
    stages = [
        _stage(detail, jobs, connection)
        for detail in sorted(details, key=_begun)
        if detail.task_id not in parents and detail.task_name != name  # the run as a whole is a task, too
    ]
    return Look(name, _state(job.state), stages, _line(job.error.message))


def _begun(detail: types.PipelineTaskDetail) -> tuple[float, int]:
    moment = detail.start_time or detail.create_time
    return (moment.timestamp() if moment else math.inf), detail.task_id


def _state(state: Any) -> State:
    return _STATES.get(state.name.removeprefix("PIPELINE_STATE_"), State.waiting)


def _stage(detail: types.PipelineTaskDetail, jobs: JobServiceClient, connection: Connection) -> Stage:
    state = _state(detail.state)
    seconds = (detail.end_time - detail.start_time).total_seconds() if detail.end_time and detail.start_time else None
    errors = tuple(_errors(detail, jobs, connection)) if state is State.failed else ()
    return Stage(detail.task_name, state, seconds if state.ends else None, errors)


def _errors(detail: types.PipelineTaskDetail, jobs: JobServiceClient, connection: Connection) -> Iterator[str]:
    """The stage's own error, that of the job that it was, and where its log is."""
    said = [detail.error.message] + [past.error.message for past in reversed(detail.pipeline_task_status)]
    yield next((_line(text) for text in said if text), "no error is told")
    job = detail.executor_detail.custom_job_detail.job or detail.executor_detail.container_detail.main_job
    if not job:
        return
    with contextlib.suppress(GoogleAPICallError):  # jobs are removed before runs; their log may still be there
        of_job = _line(jobs.get_custom_job(name=job, **connection.again).error.message)
        if of_job and of_job != _line(detail.error.message):
            yield f"job {_last(job)}: {of_job}"
    query = quote(f'resource.labels.job_id="{_last(job)}"', safe="")
    yield f"log: {_CONSOLE}/logs/query;query={query}?project={connection.project}"


def _line(text: str) -> str:
    return one_line(text, _LONGEST)
