"""./moco submit: what is refused at once, and a dry run of a compiled file from the command line."""

import datetime
import json
from pathlib import Path

import pytest
import yaml
from compiled import compiled

from pipeline import cli
from pipeline.cloud.submission import run_name, submission
from trainer_module.errors import UserError

VERTEX = ["submit", "--target", "vertex", "--set", "cloud.project=my-project"]
KUBEFLOW = ["submit", "--target", "kubeflow", "--set", "cloud.kubeflow.host=http://localhost:1"]


@pytest.fixture
def pipeline(tmp_path: Path) -> str:
    """A file as `./moco compile --target vertex` writes it."""
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps(compiled()))
    return str(path)


def test_a_dry_run_of_a_compiled_file_shows_one_request(capsys, pipeline):
    of_the_run = ["--images", "gs://bucket/photos", "--epochs", "50"]
    assert cli.main([*VERTEX, "--pipeline", pipeline, *of_the_run, "--label", "team=vision", "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["host"] == "us-central1-aiplatform.googleapis.com"
    sent = shown["request"]["pipelineJob"]["runtimeConfig"]["parameterValues"]
    assert sent == {"images": "gs://bucket/photos", "epochs": 50}
    assert shown["request"]["pipelineJob"]["labels"]["team"] == "vision"


def test_a_dry_run_of_a_schedule_shows_the_schedule(capsys, pipeline):
    arguments = ["--pipeline", pipeline, "--images", "gs://bucket/photos", "--cron", "0 3 * * *", "--dry-run"]
    assert cli.main([*VERTEX, *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["method"].endswith("ScheduleService/CreateSchedule")
    assert shown["request"]["schedule"]["cron"] == "0 3 * * *"


def test_a_dry_run_for_kubeflow_takes_the_file_that_was_compiled_for_it(capsys, tmp_path: Path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(compiled()["pipelineSpec"]))
    assert cli.main([*KUBEFLOW, "--pipeline", str(path), "--images", "gs://b", "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["request"]["pipeline_spec"] == compiled()["pipelineSpec"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "--target", "vertex"], ["cloud.project is missing", "cloud.project=my-project-1"]),
        ([*VERTEX, "--set", "cloud.region=Belgium"], ["cloud.region", "Belgium", "europe-west4"]),
        (VERTEX, ["cloud.root is empty", "--target vertex"]),
        (["submit", "--target", "kubeflow"], ["cloud.kubeflow.host is empty", "http://localhost:8080"]),
        (["submit", "--target", "kubeflow", "--set", "cloud.kubeflow.host=localhost"], ["must begin with http://"]),
        (["submit", "--target", "kubeflow", "--set", "cloud.kubeflow.host=http://"], ["must begin with http://HOST"]),
        (["submit", "--target", "airflow"], ["--target", "airflow", "kubeflow"]),
        ([*VERTEX, "--name", "Run 1"], ["--name Run 1", "--name moco-17"]),
        ([*VERTEX, "--name", "a" * 129], ["may have 128", "--name moco-17"]),
        ([*VERTEX, "--label", "Team"], ["--label Team", "team=vision"]),
        ([*VERTEX, "--parameter", "epochs"], ["--parameter epochs", "NAME=VALUE"]),
        ([*VERTEX, "--label", "a=1", "--label", "a=2"], ["--label a=1 a=2", "twice"]),
        ([*VERTEX, "--epochs", "6", "--parameter", "epochs=5"], ["--parameter epochs", "twice", "--epochs"]),
        ([*VERTEX, "--images", "photos/"], ["--images photos/", "--images gs://BUCKET/photos"]),
        ([*VERTEX, "--span", "yesterday"], ["--span yesterday", "latest", "--span 7"]),
        ([*VERTEX, "--epochs", "0"], ["--epochs 0", "at least 1", "--epochs 200"]),
        ([*VERTEX, "--parameter", "epochs=many"], ["--epochs many", "an integer"]),
        ([*VERTEX, "--cron", "daily"], ["--cron 'daily'", "five fields", "0 3 * * *"]),
        ([*VERTEX, "--cron", "0 3 * * * *"], ["five fields"]),
        ([*VERTEX, "--cron", "0 3 ; * *"], ["five fields"]),
        ([*VERTEX, "--cron", "60 3 * * *"], ["60 is no minute (0 to 59)", "0 3 * * *"]),
        ([*VERTEX, "--cron", "0 3,24 * * *"], ["24 is no hour (0 to 23)"]),
        ([*VERTEX, "--cron", "0 3 0 * *"], ["0 is no day of the month (1 to 31)"]),
        ([*VERTEX, "--cron", "0 3 * FOO *"], ["FOO is no month (1 to 12, JAN to DEC)"]),
        ([*VERTEX, "--cron", "0 3 * * 1-8"], ["1-8 is no day of the week"]),
        ([*VERTEX, "--cron", "*/0 3 * * *"], ["*/0 is no minute"]),
        ([*VERTEX, "--cron", "JAN 3 * * *"], ["JAN is no minute"]),
        ([*VERTEX, "--cron", "CRON_TZ=Berlin 0 3 * * *"], ["no time zone Berlin", "Europe/Berlin"]),
        ([*VERTEX, "--cron", "0 3 * * *", "--watch"], ["--watch", "--cron", "leave one"]),
        ([*VERTEX, "--cancel", "run-1", "--label", "a=b"], ["--cancel NAME", "leave the options"]),
        ([*VERTEX, "--cancel", "run-1", "--watch", "run-2"], ["--watch run-2", "--cancel run-1"]),
        ([*VERTEX, "--cancel", "schedules/1", "--watch"], ["--cancel schedules/1", "leave --watch out"]),
        ([*VERTEX, "--pipeline", "/nowhere.json"], ["--pipeline /nowhere.json", "./moco compile"]),
        ([*VERTEX, "--config", "moco_v3"], ["--config moco_v3", "moco_v2"]),
    ],
)
def test_what_cannot_be_submitted_is_refused_in_one_line(capsys, arguments, words):
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_a_file_that_was_compiled_for_vertex_is_not_sent_to_kubeflow(capsys, tmp_path: Path):
    job = compiled()
    job["pipelineSpec"]["deploymentSpec"]["executors"]["BaselineResolver_executor"] = {"resolver": {}}
    (tmp_path / "pipeline.json").write_text(json.dumps(job))
    asked = ["--pipeline", str(tmp_path / "pipeline.json"), "--images", "gs://b", "--dry-run"]
    assert cli.main([*VERTEX, *asked]) == 0
    assert cli.main([*KUBEFLOW, *asked]) == 2
    assert "write it with ./moco compile --target kubeflow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.json", "{"), ("x.json", "[]"), ("x.json", '{"pipelineSpec": {}}'), ("x.yaml", "a: [1"), ("x.yaml", "word")],
)
def test_a_file_that_is_no_compiled_pipeline_is_refused(capsys, tmp_path: Path, name, text):
    (tmp_path / name).write_text(text)
    assert cli.main([*VERTEX, "--pipeline", str(tmp_path / name), "--dry-run"]) == 2
    assert "no compiled pipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cron",
    [
        "0 3 * * *",
        "*/15 0-6,22 1 JAN-MAR MON",
        "TZ=Europe/Berlin 0 3 * * 1-5",
        "05 03-23/4 31 jul-DEC wed,7",
        "0 3 LW ? 5#2",
    ],
)
def test_a_schedule_has_five_fields_and_may_have_a_time_zone(cron):
    assert submission(cron=cron).cron == cron


@pytest.mark.parametrize(
    ("pipeline", "name"), [("moco-v2", "moco-v2-"), ("My MoCo_v2!", "my-moco-v2-"), ("2nd", "run-2nd-")]
)
def test_names_of_runs_are_such_as_the_service_takes(pipeline, name):
    now = datetime.datetime(2026, 11, 23, 6, 45, 0, tzinfo=datetime.timezone.utc)
    assert run_name("", pipeline, now) == f"{name}20261123-064500"
    with pytest.raises(UserError):
        submission(name="2nd")
