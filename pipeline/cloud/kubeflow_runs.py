"""Runs and schedules of Kubeflow Pipelines by kfp's client: submitted, watched, cancelled."""

import contextlib
import copy
import dataclasses
import datetime
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api as api
from urllib3.exceptions import HTTPError

from pipeline.cloud.config import CloudConfig, KubeflowConfig
from pipeline.cloud.submission import Submission, plain, run_name, typed
from pipeline.cloud.watching import Look, Stage, State, follow
from pipeline.cloud.wording import one_line
from trainer_module import lines
from trainer_module.errors import UserError

Say = Callable[[str], None]

_STATES: Mapping[str, State] = {
    "PENDING": State.waiting,
    "RUNNING": State.running,
    "PAUSED": State.paused,
    "CANCELING": State.cancelling,
    "SUCCEEDED": State.succeeded,
    "SKIPPED": State.skipped,
    "CANCELED": State.cancelled,
    "FAILED": State.failed,
}
_LONGEST = 2000  # characters of a stage's error
_RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True)
class Server:
    """Kubeflow's, and how often it is asked.

    Attributes:
        config: where it is.
        poll: seconds between two looks at a run.
    """

    config: KubeflowConfig
    poll: float = 15.0


def service(cloud: CloudConfig) -> Server:
    """The one that a configuration names."""
    return Server(cloud.kubeflow)


def request(job: Mapping[str, Any], asked: Submission, experiment: str) -> api.V2beta1Run | api.V2beta1RecurringRun:
    """What is sent for a run, or for a schedule where one is asked for.

    Args:
        job: as `pipeline.cloud.compiling.compile_pipeline` makes it.
        asked: of this run.
        experiment: id of the experiment that it belongs to.

    Raises:
        UserError: a parameter is unknown or wrong, or the schedule is none that Kubeflow knows.
    """
    spec = copy.deepcopy(job["pipelineSpec"])
    if not asked.cached:
        for task in spec["root"]["dag"]["tasks"].values():
            task["cachingOptions"] = {}
    pipeline = spec["pipelineInfo"]["name"]
    labels = {**job.get("labels", {}), **asked.labels}
    common = {
        "experiment_id": experiment,
        "description": ", ".join(f"{key}={value}" for key, value in sorted(labels.items())),
        "pipeline_spec": spec,
        "runtime_config": api.V2beta1RuntimeConfig(parameters=typed(asked.parameters, job)),
    }
    if not asked.cron:
        name = run_name(asked.name, pipeline, datetime.datetime.now(datetime.timezone.utc))
        return api.V2beta1Run(display_name=name, **common)
    return api.V2beta1RecurringRun(
        display_name=asked.name or plain(pipeline),
        mode=api.RecurringRunMode.ENABLE,
        max_concurrency="1",
        no_catchup=True,
        trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=_cron(asked.cron))),
        **common,
    )


def dry_run(job: Mapping[str, Any], asked: Submission, server: Server) -> str:
    """The request as JSON; the experiment's id is the server's secret."""
    body = request(job, asked, f"id of experiment {server.config.experiment}")
    path = "recurringruns" if asked.cron else "runs"
    shown = {
        "host": server.config.host,
        "method": f"POST /apis/v2beta1/{path}",
        "request": api.ApiClient().sanitize_for_serialization(body),
    }
    return json.dumps(shown, indent=2, ensure_ascii=False)


def submit(job: Mapping[str, Any], asked: Submission, server: Server, say: Say) -> str:
    """Begins a run.

    Args:
        job, asked: see `request`.
        server: Kubeflow's.
        say: is told where it can be seen.

    Returns:
        Its id.

    Raises:
        UserError: the server refuses, or does not answer.
    """
    with _errors_told(server, "run"), _client(server) as client:
        made = client.runs.create_run(request(job, asked, _experiment(client, server)))
    say(f"run {made.run_id} ({made.display_name}) at {server.config.host}")
    say(f"  {server.config.host.rstrip('/')}/#/runs/details/{made.run_id}")
    return made.run_id


def schedule(job: Mapping[str, Any], asked: Submission, server: Server, say: Say) -> None:
    """Begins a schedule, see `submit`."""
    with _errors_told(server, "schedule"), _client(server) as client:
        body = request(job, asked, _experiment(client, server))
        made = client.recurring_runs.create_recurring_run(body)
    say(f"schedule {made.display_name}: {asked.cron}; ends with --cancel schedules/{made.recurring_run_id}")


def watch(name: str, server: Server, say: Say) -> State:
    """Follows a run until it ends.

    Args:
        name: of the run, or its id.
        server: Kubeflow's.
        say: is told each change, and what went wrong.

    Raises:
        UserError: there is no such run, or no answer.
    """
    with _errors_told(server, f"run {name}"), _client(server) as client:
        run = _run_id(client, server, name)
        return follow(lambda: _look(client.runs.get_run(run_id=run)), server.poll, say)


def cancel(name: str, server: Server, say: Say) -> None:
    """Ends a run that goes on, or removes a schedule.

    Args:
        name: of the run, or its id; or schedules/ID.
        server: Kubeflow's.
        say: is told what becomes of it.

    Raises:
        UserError: there is none, or it has ended already.
    """
    with _errors_told(server, name), _client(server) as client:
        if name.startswith("schedules/"):
            client.recurring_runs.delete_recurring_run(recurring_run_id=name.removeprefix("schedules/"))
            say(f"removed {name}")
            return
        run = _run_id(client, server, name)
        state = _state(client.runs.get_run(run_id=run).state)
        if state.ends:
            raise UserError(f"run {name} has {state.value} already; there is nothing to cancel")
        client.runs.terminate_run(run_id=run)
    say(f"run {name} is being cancelled")


@contextlib.contextmanager
def _client(server: Server) -> Iterator[Any]:
    """kfp's client, which shows whole answers in its log where something goes wrong."""
    token = None
    if path := server.config.token_file:
        try:
            token = Path(path).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"cloud.kubeflow.token_file={path}: {error.strerror}; name a file with a token") from error
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    namespace = {"namespace": server.config.namespace} if server.config.namespace else {}
    yield lines.kubeflow_client(kfp.Client(host=server.config.host, existing_token=token, **namespace))


@contextlib.contextmanager
def _errors_told(server: Server, what: str) -> Iterator[None]:
    """Says in one line what the server refuses.

    Raises:
        UserError: no right, no such thing, no answer, or a request that cannot be carried out.
    """
    host = server.config.host
    try:
        yield
    except api.ApiException as error:
        said = _said(error)
        mend = {
            401: "name a token with cloud.kubeflow.token_file",
            403: "ask for the right, or name another account's token with cloud.kubeflow.token_file",
            404: "check the name and cloud.kubeflow.namespace",
            429: "wait, and try again",
        }.get(error.status, "try again later" if error.status >= 500 else "mend what it names")
        raise UserError(f"{what}: {host} refuses it ({error.status}: {said}); {mend}") from error
    except (HTTPError, TimeoutError) as error:
        reason = re.sub(r"^(<[^>]*>|\w+\([^)]*\)): ", "", str(getattr(error, "reason", None) or error))  # a connection
        raise UserError(f"{what}: no answer from {host} ({one_line(reason)}); check cloud.kubeflow.host") from error


def _said(error: api.ApiException) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        told = json.loads(error.body)
        return one_line(str(told.get("message") or told["error"]))
    return one_line(str(error.reason or error.body))


def _experiment(client: Any, server: Server) -> str:
    """The id of the experiment, which is made where there is none."""
    namespace = server.config.namespace or None
    try:
        there = client.get_experiment(experiment_name=server.config.experiment, namespace=namespace)
    except ValueError:  # kfp's word for none
        body = api.V2beta1Experiment(display_name=server.config.experiment, namespace=namespace)
        there = client.experiments.create_experiment(body)
    return there.experiment_id


def _run_id(client: Any, server: Server, name: str) -> str:
    if _RUN_ID.fullmatch(name):
        return name
    wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
    within = {"namespace": server.config.namespace} if server.config.namespace else {}  # several users: else refused
    found = client.runs.list_runs(filter=json.dumps(wanted), sort_by="created_at desc", **within).runs or []
    if not found:
        raise UserError(f"run {name}: there is none of that name; give its id")
    return found[0].run_id


def _cron(cron: str) -> str:
    """Kubeflow's, which begins with seconds."""
    if cron.startswith(("CRON_TZ=", "TZ=")):
        raise UserError(f"--cron {cron!r}: Kubeflow takes no time zone and reads the server's; leave it out")
    return f"0 {cron}"


def _look(run: api.V2beta1Run) -> Look:
    details = (run.run_details and run.run_details.task_details) or []
    shown = [detail for detail in details if detail.display_name and detail.display_name != "root"]
    ordered = sorted(shown, key=lambda detail: (str(detail.start_time or detail.create_time), detail.task_id or ""))
    return Look(run.display_name, _state(run.state), [_stage(detail) for detail in ordered], _message(run.error))


def _stage(detail: api.V2beta1PipelineTaskDetail) -> Stage:
    state = _state(detail.state)
    seconds = (detail.end_time - detail.start_time).total_seconds() if detail.end_time and detail.start_time else None
    said = [_message(detail.error), *(_message(past.error) for past in reversed(detail.state_history or []))]
    errors = [next((text for text in said if text), "no error is told")]
    if detail.pod_name:
        errors.append(f"log: kubectl logs {detail.pod_name}")
    return Stage(
        detail.display_name,
        state,
        seconds if state.ends else None,
        tuple(errors) if state is State.failed else (),
    )


def _state(state: str | None) -> State:
    return _STATES.get(state or "", State.waiting)


def _message(error: Any) -> str:
    return one_line(error.message or "", _LONGEST) if error else ""
