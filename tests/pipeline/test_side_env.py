"""PyTorch's environment: which Python makes it, when it is made again, and what a user hears when it cannot be."""

import sys
from pathlib import Path

import pytest

from pipeline.bench import _torch_env
from trainer_module.errors import UserError


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


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
    assert _torch_env.find_python() == good


def test_no_fitting_python_is_one_line_that_says_how_to_get_one(home, monkeypatch):
    monkeypatch.setattr(
        _torch_env, "_candidates", lambda: iter([home / "none", script(home / "bin" / "python3", "exit 1")])
    )
    with pytest.raises(UserError, match=r"Python 3\.11 .*pyenv install") as refused:
        _torch_env.find_python()
    assert "\n" not in str(refused.value)


@pytest.fixture
def impossible_list(tmp_path, monkeypatch):
    """A list of packages that no index has; this Python stands for 3.11."""
    listed = tmp_path / "list.txt"
    listed.write_text(f"--no-index\nno-such-package==1.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(_torch_env, "_REQUIREMENTS", listed)
    monkeypatch.setattr(_torch_env, "VERSION", f"{sys.version_info[0]}.{sys.version_info[1]}")
    monkeypatch.setattr(_torch_env, "find_python", lambda: Path(sys.executable))
    return listed


def test_packages_that_cannot_be_had_are_one_line_and_leave_no_environment(tmp_path, impossible_list):
    with pytest.raises(UserError, match=r"cannot make .*\.venv-torch: pip says: .*no-such-package") as refused:
        _torch_env.python_with_torch(tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / ".venv-torch").exists()


def test_an_environment_is_used_as_it_is_until_the_list_changes(tmp_path, impossible_list):
    venv = tmp_path / ".venv-torch"
    version = _torch_env.VERSION
    python = script(venv / "bin" / "python", f"echo {version} CPython x")
    (venv / impossible_list.name).write_bytes(impossible_list.read_bytes())
    assert _torch_env.python_with_torch(tmp_path) == python
    impossible_list.write_text(impossible_list.read_text() + "# changed\n")
    with pytest.raises(UserError):
        _torch_env.python_with_torch(tmp_path)


def test_a_network_that_cannot_be_reached_is_named(tmp_path):
    said = (
        "WARNING: Retrying after NewConnectionError('...: Name or service not known')\nERROR: No matching distribution"
    )
    assert "cannot reach its package index" in _torch_env._cause(said, tmp_path)


def test_every_package_is_pinned_with_its_hash():
    lines = Path(_torch_env.__file__).with_name("requirements-torch.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", " ", "--"))]
    assert len(pins) == sum(line.strip().startswith("--hash=sha256:") for line in lines)
    assert any(pin.startswith("torch==2.13.0") for pin in pins)
