"""Runs on Kubeflow by kfp's own client: what is sent, what is said while they go on, how they fail, and refusals."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kubeflow_server
import pytest
from compiled import PIPELINE, compiled
from kubeflow_server import KubeflowServer

from pipeline.cloud import kubeflow_runs, submit_command
from pipeline.cloud.config import CloudConfig, KubeflowConfig
from pipeline.cloud.kubeflow_runs import Server
from pipeline.cloud.submission import submission
from pipeline.cloud.targets import Target
from pipeline.config import Config
from trainer_module.errors import UserError

ASKED = submission(name="run-1", parameters=["images=gs://bucket/photos", "epochs=50"], labels=["team=vision"])


@pytest.fixture
def service() -> Iterator[tuple[KubeflowServer, Server]]:
    with kubeflow_server.running() as (server, address):
        yield server, Server(KubeflowConfig(host=address), poll=0.01)


def submit(server: Server, asked=ASKED) -> str:
    return kubeflow_runs.submit(compiled(), asked, server, lambda _: None)


def test_a_run_is_the_compiled_pipeline_with_what_was_asked_of_this_run(service):
    kubeflow, server = service
    said: list[str] = []
    run = kubeflow_runs.submit(compiled(), ASKED, server, said.append)
    [sent] = kubeflow.sent("POST", "runs")
    assert sent["display_name"] == "run-1"
    assert sent["pipeline_spec"] == compiled()["pipelineSpec"]
    assert sent["runtime_config"]["parameters"] == {"images": "gs://bucket/photos", "epochs": 50}
    assert sent["description"] == "team=vision, tfx_version=1-16-0"
    assert kubeflow.experiments[sent["experiment_id"]]["display_name"] == "moco"
    assert said == [f"run {run} (run-1) at {server.config.host}", f"  {server.config.host}/#/runs/details/{run}"]


def test_the_experiment_is_made_once(service):
    kubeflow, server = service
    submit(server)
    submit(server)
    assert len(kubeflow.experiments) == 1


def test_a_dry_run_shows_the_very_request_but_the_experiments_id(service):
    kubeflow, server = service
    shown = json.loads(kubeflow_runs.dry_run(compiled(), ASKED, server))
    assert kubeflow.calls == []
    submit(server)
    [sent] = kubeflow.sent("POST", "runs")
    assert shown["method"] == "POST /apis/v2beta1/runs"
    assert {**shown["request"], "experiment_id": sent["experiment_id"]} == sent


def test_without_the_cache_no_stage_may_take_its_result(service):
    kubeflow, server = service
    submit(server, submission(parameters=["images=gs://b"], cached=False))
    [sent] = kubeflow.sent("POST", "runs")
    tasks = sent["pipeline_spec"]["root"]["dag"]["tasks"]
    assert [one["cachingOptions"] for one in tasks.values()] == [{}, {}]
    assert sent["display_name"].startswith(f"{PIPELINE}-20")


def stage(state: str, *tasks: tuple[str, str, str]) -> dict:
    details = [
        {
            "display_name": name,
            "task_id": str(number),
            "state": of,
            "start_time": f"2026-11-23T06:0{number}:00Z",
            **({"end_time": f"2026-11-23T06:0{number}:30Z"} if of in ("SUCCEEDED", "FAILED") else {}),
            **({"error": {"code": 2, "message": error}, "pod_name": f"{name}-pod"} if error else {}),
        }
        for number, (name, of, error) in enumerate(tasks)
    ]
    return {"state": state, "run_details": {"task_details": details}}


def test_each_change_of_state_is_one_line_and_a_failing_stage_says_its_own_error(service):
    kubeflow, server = service
    run = submit(server)
    root = ("root", "RUNNING", "")
    kubeflow.stages = [
        stage("PENDING"),
        stage("RUNNING", root, ("ImageExampleGen", "RUNNING", "")),
        stage("RUNNING", root, ("ImageExampleGen", "SUCCEEDED", ""), ("Trainer", "RUNNING", "")),
        stage("FAILED", root, ("ImageExampleGen", "SUCCEEDED", ""), ("Trainer", "FAILED", "no\nTPU")),
    ]
    said: list[str] = []
    assert kubeflow_runs.watch(run, server, said.append).value == "failed"
    assert [line.split() for line in said] == [
        ["run-1", "waiting"],
        ["ImageExampleGen", "running"],
        ["run-1", "running"],
        ["ImageExampleGen", "succeeded", "30.0", "s"],
        ["Trainer", "running"],
        ["Trainer", "failed", "30.0", "s"],
        ["no", "TPU"],
        ["log:", "kubectl", "logs", "Trainer-pod"],
        ["run-1", "failed"],
    ]


def test_a_run_is_cancelled_by_its_name_and_its_end_awaited(service):
    kubeflow, server = service
    run = submit(server)
    said: list[str] = []
    request = submit_command.Request(Target.kubeflow, Config(), submission(), name="run-1", cancel=True, watch=True)
    assert submit_command.run(request, said.append, server)
    assert kubeflow.sent("POST", f"runs/{run}:terminate") == [None]
    assert said == ["run run-1 is being cancelled", "run-1 cancelling", "run-1 cancelled"]
    with pytest.raises(UserError, match="has cancelled already"):
        kubeflow_runs.cancel("run-1", server, print)


def test_where_there_are_several_users_runs_are_looked_for_in_the_namespace(service):
    kubeflow, server = service
    kubeflow.namespace, kubeflow.stages = "team", [{"state": "RUNNING"}, {"state": "SUCCEEDED"}]
    ours = Server(KubeflowConfig(host=server.config.host, namespace="team"), poll=0.01)
    submit(ours)
    said: list[str] = []
    assert kubeflow_runs.watch("run-1", ours, said.append).value == "succeeded"
    assert said == ["run-1 running", "run-1 succeeded"]


def test_a_schedule_begins_with_seconds_runs_one_at_a_time_and_is_removed_by_its_id(service):
    kubeflow, server = service
    said: list[str] = []
    asked = submission(parameters=["images=gs://b"], cron="0 3 * * 1-5")
    kubeflow_runs.schedule(compiled(), asked, server, said.append)
    [sent] = kubeflow.sent("POST", "recurringruns")
    assert sent["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1-5"}}
    assert (sent["display_name"], sent["max_concurrency"], sent["mode"]) == (PIPELINE, "1", "ENABLE")
    [known] = kubeflow.schedules
    assert said == [f"schedule {PIPELINE}: 0 3 * * 1-5; ends with --cancel schedules/{known}"]
    kubeflow_runs.cancel(f"schedules/{known}", server, said.append)
    assert kubeflow.schedules == {}


def test_a_parameter_that_must_have_a_value_and_has_none_is_refused(service):
    with pytest.raises(UserError, match="parameter images has no value"):
        kubeflow_runs.dry_run(compiled(), submission(), service[1])


def test_a_time_zone_is_refused_since_kubeflow_has_none(service):
    asked = submission(parameters=["images=gs://b"], cron="CRON_TZ=Europe/Berlin 0 3 * * *")
    with pytest.raises(UserError, match="takes no time zone"):
        kubeflow_runs.schedule(compiled(), asked, service[1], print)


def test_the_token_of_a_file_is_sent_and_a_missing_file_refused(service, tmp_path: Path):
    kubeflow, server = service
    (tmp_path / "token").write_text("secret\n")
    submit(Server(KubeflowConfig(host=server.config.host, token_file=str(tmp_path / "token"))))
    assert kubeflow.tokens == {"Bearer secret"}
    with pytest.raises(UserError, match=r"cloud\.kubeflow\.token_file=/nowhere"):
        submit(Server(KubeflowConfig(host=server.config.host, token_file="/nowhere")))


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (401, "token expired", ["token expired", "cloud.kubeflow.token_file"]),
        (403, "User me is not authorized", ["not authorized", "ask for the right"]),
        (400, "Invalid input error: parameter", ["Invalid input error", "mend what"]),
        (429, "slow down", ["slow down", "wait"]),
        (503, "upstream", ["upstream", "try again later"]),
    ],
)
def test_a_refusal_is_one_line(service, status, text, said):
    kubeflow, server = service
    kubeflow.faults["POST", "runs"] = (status, text)
    with pytest.raises(UserError) as refusal:
        submit(server)
    for word in [server.config.host, str(status), *said]:
        assert word in str(refusal.value)


def test_a_run_that_there_is_not_is_said_to_be_missing(service):
    with pytest.raises(UserError, match="run run-9: there is none of that name"):
        kubeflow_runs.watch("run-9", service[1], print)
    with pytest.raises(UserError, match="not found"):
        kubeflow_runs.watch("00000000-0000-0000-0000-000000000000", service[1], print)


def test_a_server_that_is_not_there_is_said_to_give_no_answer():
    with kubeflow_server.running() as (_, address):
        pass
    with pytest.raises(UserError, match=rf"no answer from {address} \([^<(]*refused\); check cloud.kubeflow.host"):
        submit(Server(KubeflowConfig(host=address)))


def test_the_commands_server_is_the_one_that_the_configuration_names(service, tmp_path: Path):
    kubeflow, server = service
    path = tmp_path / "pipeline.yaml"
    path.write_text(json.dumps(compiled()["pipelineSpec"]))
    cloud = CloudConfig(kubeflow=KubeflowConfig(host=server.config.host, experiment="nights"))
    asked = submission(parameters=["images=gs://b"])
    assert submit_command.run(submit_command.Request(Target.kubeflow, Config(cloud=cloud), asked, str(path)), print)
    assert [one["display_name"] for one in kubeflow.experiments.values()] == ["nights"]


def test_ctrl_c_ends_the_watching_and_not_the_run(service, tmp_path: Path):
    kubeflow, server = service
    path = tmp_path / "pipeline.yaml"
    path.write_text(json.dumps(compiled()["pipelineSpec"]))
    kubeflow.stages = [stage("RUNNING")]
    host = f"cloud.kubeflow.host={server.config.host}"
    command = [sys.executable, "-m", "pipeline", "submit", "--target", "kubeflow", "--pipeline", str(path), "--watch"]
    process = subprocess.Popen(
        [*command, "--images", "gs://b", "--name", "run-1", "--set", host],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(3)]
    assert said[2] == "run-1 running\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == (
        "moco: interrupted; what was begun on Google Cloud or Kubeflow goes on there\n"
    )
    assert process.returncode == 130
    assert [path for method, path, _ in kubeflow.calls if method == "POST"][-1] == "runs"
