"""Environments beside .venv: which Python makes one, when it is made again, what a user hears when it cannot be."""

import dataclasses
import sys
from pathlib import Path

import pytest

from pipeline import side_env
from pipeline.cloud import smoke
from pipeline.side_env import SideEnvironment
from trainer_module.errors import UserError

ALL = (side_env.TORCH, side_env.FAISS, side_env.ATHERIS, side_env.TPU_LOWER, side_env.TPU_COMPILE)
PRESENT = f"{sys.version_info[0]}.{sys.version_info[1]}"


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def pins(environment: SideEnvironment) -> list[str]:
    lines = environment.requirements.read_text().splitlines()
    return [line.split()[0] for line in lines if line and not line.startswith(("#", " ", "--"))]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine with no Python but those that a test makes under HOME and on PATH."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for variable in ("PYENV_ROOT", "UV_PYTHON_INSTALL_DIR"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_a_shim_that_fails_is_passed_over_for_a_python_that_runs(home, monkeypatch):
    script(home / "bin" / "python3.11", "exit 127")
    monkeypatch.setenv("PYENV_ROOT", str(home / "pyenv"))
    script(home / "pyenv" / "versions" / "3.11.1" / "bin" / "python", "echo 3.10 CPython")
    good = script(home / "pyenv" / "versions" / "3.11.9" / "bin" / "python", "echo 3.11 CPython")
    assert side_env.TORCH.find_python() == good


def test_the_first_version_that_is_there_is_taken(tmp_path, monkeypatch):
    newer = script(tmp_path / "python3.13", "echo 3.13 CPython")
    preferred = tmp_path / "python3.12"
    monkeypatch.setattr(side_env, "candidates", lambda version: iter([tmp_path / f"python{version}"]))
    assert side_env.TPU_COMPILE.find_python() == newer
    script(preferred, "echo 3.12 CPython")
    assert side_env.TPU_COMPILE.find_python() == preferred


@pytest.mark.parametrize("environment", ALL, ids=lambda e: e.name)
def test_no_fitting_python_is_one_line_that_says_how_to_get_one(home, monkeypatch, environment):
    broken = [home / "none", script(home / "bin" / "python3", "exit 1")]
    monkeypatch.setattr(side_env, "candidates", lambda _: iter(broken))
    with pytest.raises(UserError, match=r"needs a Python 3\.1.*pyenv install 3\.1") as refused:
        environment.find_python()
    assert "\n" not in str(refused.value)


@pytest.fixture
def impossible(tmp_path):
    """An environment for this Python with a list of packages that no index has."""
    listed = tmp_path / "list.txt"
    listed.write_text(f"--no-index\nno-such-package==1.0 --hash=sha256:{'0' * 64}\n")
    return SideEnvironment("venv-side", "nothing", (PRESENT,), listed, "for a test")


def test_packages_that_cannot_be_had_are_one_line_and_leave_no_environment(tmp_path, impossible):
    with pytest.raises(UserError, match=r"cannot make .*\.venv-side: pip says: .*no-such-package") as refused:
        impossible.python(tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / ".venv-side").exists()


def test_an_environment_is_used_as_it_is_until_the_list_changes(tmp_path, impossible):
    venv = tmp_path / ".venv-side"
    python = script(venv / "bin" / "python", f"echo {PRESENT} CPython x")
    (venv / impossible.requirements.name).write_bytes(impossible.requirements.read_bytes())
    assert impossible.python(tmp_path) == python
    other = dataclasses.replace(impossible, pythons=("2.7",))
    with pytest.raises(UserError):
        other.python(tmp_path)
    impossible.requirements.write_text(impossible.requirements.read_text() + "# changed\n")
    with pytest.raises(UserError):
        impossible.python(tmp_path)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("WARNING: NewConnectionError('...: Name or service not known')\nERROR: No matching", "its package index"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "no space left on the disk"),
    ],
)
def test_what_pip_could_not_do_is_named(tmp_path, said, words):
    assert words in side_env.cause(said, tmp_path)


@pytest.mark.parametrize("environment", ALL, ids=lambda e: e.name)
def test_every_package_is_pinned_with_its_hash(environment):
    text = environment.requirements.read_text()
    names = pins(environment)
    assert names
    assert all("==" in name for name in names)
    starts = [text.index(f"\n{name}") for name in names]
    blocks = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert all("--hash=sha256:" in block for block in blocks)


def test_what_lowers_the_step_is_what_trains_it():
    list_of_both_lines = side_env.ROOT / "requirements.txt"
    main = smoke.pins(list_of_both_lines, python_full_version="3.10.13", python_version="3.10")
    trained = {f"{name}=={version}" for name, version in main.items()}
    lowered = set(pins(side_env.TPU_LOWER))
    assert lowered - trained == {"tensorflow-tpu==2.16.2"}
    assert "tensorflow==2.16.2" in trained
    assert not any(pin.startswith(("libtpu", "tfx", "apache-beam")) for pin in lowered)


def test_the_main_environment_has_neither_torch_nor_the_tpu_s_compiler():
    main = (side_env.ROOT / "requirements.txt").read_text()
    assert not [name for name in ("torch", "jax", "jaxlib", "libtpu", "tensorflow-tpu") if f"\n{name}==" in main]
