"""The images' Dockerfiles and their smoke test: versions that agree with the lists, and what is missing is said."""

import re
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from pipeline.cloud import smoke
from pipeline.side_env import ROOT

CPU, TPU = ((ROOT / "pipeline" / "cloud" / "images" / f"{name}.Dockerfile").read_text() for name in ("cpu", "tpu"))


def pinned(package: str, path: str = "requirements.txt") -> str:
    return smoke.pins(ROOT / path, python_full_version="3.10.13", python_version="3.10")[canonicalize_name(package)]


def test_beams_own_program_is_of_the_version_that_the_pipeline_is_built_with():
    assert f"ARG BEAM_IMAGE=apache/beam_python3.10_sdk:{pinned('apache-beam')}\n" in CPU


def test_packages_are_installed_by_the_launchers_own_uv():
    (uv,) = re.findall(r"^uv_release=(\S+)", (ROOT / "moco").read_text(), re.MULTILINE)
    assert f" {uv} " in CPU


def test_the_tpu_build_is_of_tensorflows_version():
    assert pinned("tensorflow-tpu", "pipeline/tpu/requirements-lower.txt") == pinned("tensorflow")


def test_both_images_are_of_one_python_and_run_as_nobody_who_owns_anything():
    for text in (CPU, TPU):
        assert "ARG PYTHON_IMAGE=python:3.10-slim-bookworm\n" in text
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "10001:10001"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (("python", "-m", "no_such_module"), "no_such_module"),
        (("python", "-m", "pipeline", "--executor_class_path", "pipeline.cloud.smoke.NoClass"), "NoClass"),
        (("nopython", "-m", "pipeline"), "nopython"),
        (("pipeline.cloud.smoke.no_function",), "no_function"),
    ],
)
def test_a_command_that_the_image_could_not_start_is_missing(monkeypatch, command, fault):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    (finding,) = smoke.look([command])
    assert finding.what == " ".join(command)
    assert fault in finding.fault


def test_a_command_that_it_can_start_is_not(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    started = ("python", "-m", "pipeline", "--executor_class_path", "pipeline.cloud.smoke.Finding")
    assert [finding.fault for finding in smoke.look([started, ("pipeline.cloud.smoke",)])] == ["", ""]


def test_another_python_first_on_the_path_is_seen(monkeypatch, tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}")
    (finding,) = smoke.look([("python", "-m", "pipeline")])
    assert "on PATH is not" in finding.fault
