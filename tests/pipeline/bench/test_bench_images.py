"""The Dockerfiles as the benchmark reads them: the linter is content, and what is built is what docker would build."""

import json
from pathlib import Path

import pytest

from pipeline.bench.images import read
from pipeline.cloud.smoke import BOOT
from pipeline.side_env import IMAGES, ROOT
from pipeline.worker import Worker
from trainer_module.errors import UserError

ENVIRONMENT = {"PATH": "/bin"}
BASES = dict.fromkeys(("python:3.10-slim-bookworm", "apache/beam_python3.10_sdk:2.65.0", "moco:cpu"), ENVIRONMENT)


@pytest.fixture(scope="module")
def reader():
    try:
        python = IMAGES.python()
    except UserError as error:  # without a package index there is nothing to test with
        pytest.skip(str(error))
    with Worker([python, "-s", ROOT / "pipeline" / "bench" / "_dockerfile.py"]) as worker:
        yield worker


@pytest.mark.parametrize("name", ["cpu", "tpu"])
def test_the_linter_has_nothing_to_say_of_a_dockerfile(reader, name):
    assert read(reader, name, BASES)["lint"] == []


def test_an_image_holds_the_project_and_nothing_else_of_the_repository(reader):
    context = read(reader, "cpu", BASES)["context"]
    assert {path.partition("/")[0] for path in context} == {
        ".dockerignore",
        "components",
        "configs",
        "pipeline",
        "requirements.txt",
        "trainer_module",
    }
    assert {Path(path).suffix for path in context if path.startswith("configs")} == {".yaml"}
    assert not [path for path in context if "__pycache__" in path]


def test_a_container_starts_with_the_environment_and_as_nobody(reader):
    cpu, tpu = (read(reader, name, BASES)["stages"][-1] for name in ("cpu", "tpu"))
    assert cpu["command"] == [str(BOOT)]
    assert tpu["command"] == ["python", "-m", "pipeline.cloud.smoke", "tpu"]
    for stage in (cpu, tpu):
        assert (stage["user"], stage["environment"]["PATH"]) == ("10001:10001", "/opt/venv/bin:/bin")
        assert [step["from"] for step in stage["steps"] if step["do"] == "copy"][-2:] == ["packages", "packages"]


def test_what_the_reader_cannot_follow_is_an_error_and_not_left_out(reader, tmp_path):
    (tmp_path / ".dockerignore").write_text("*\n")
    file = tmp_path / "Dockerfile"
    file.write_text('ARG A=python:3.10-slim-bookworm\nFROM ${A}\nARG B="x y"\nENV C=$B:$PATH\nVOLUME /data\n')
    question = {"dockerfile": str(file), "context": str(tmp_path), "arguments": {"B": "z"}, "bases": BASES}
    with pytest.raises(RuntimeError, match="VOLUME /data"):
        reader.ask(json.dumps(question))
