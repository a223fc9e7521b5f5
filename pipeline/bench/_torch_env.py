"""The environment of PyTorch, which some benchmarks compare with: .venv-torch, made when it is first needed.

It is apart from .venv because TFX 1.16 wants Python 3.10 and PyTorch's pinned build 3.11, and because nothing but these
benchmarks may ever import torch. It is built aside and renamed into place, so that what is there is whole.
"""

import contextlib
import fcntl
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pipeline import console
from trainer_module.errors import UserError

VERSION = "3.11"
_ROOT = Path(__file__).resolve().parents[2]
_REQUIREMENTS = Path(__file__).with_name("requirements-torch.txt")
_ASK = """
import platform, sys, venv, ensurepip
print("%d.%d" % sys.version_info[:2], platform.python_implementation(), sys.executable)
"""
_UNREACHABLE = ("Name or service not known", "NewConnectionError", "Temporary failure in name resolution", "timed out")


def python_with_torch(root: Path = _ROOT) -> Path:
    """The Python of the environment, which is made if it is missing or its list of packages has changed.

    Args:
        root: folder that holds .venv-torch.

    Raises:
        UserError: there is no Python 3.11, or its packages cannot be installed.
    """
    venv, work = root / ".venv-torch", root / ".venv-setup"
    if not _is_ready(venv):
        with _locked(work, root):
            if not _is_ready(venv):
                _make(venv, work / "torch")
    return venv / "bin" / "python"


def _is_ready(venv: Path) -> bool:
    stamp = venv / _REQUIREMENTS.name
    same = stamp.is_file() and stamp.read_bytes() == _REQUIREMENTS.read_bytes()
    return same and _fits(venv / "bin" / "python")


@contextlib.contextmanager
def _locked(work: Path, root: Path) -> Iterator[None]:
    """Holds a lock that ends with this process, however that ends."""
    try:
        work.mkdir(exist_ok=True)
        lock = (work / "torch.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {root}, where .venv-torch is to be made: make it writable") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(venv: Path, building: Path) -> None:
    python = find_python()
    console.line(f"setting up PyTorch in {venv}; the first time takes a minute")
    shutil.rmtree(building, ignore_errors=True)
    subprocess.run([python, "-m", "venv", building], check=True, capture_output=True)
    # One retry: where PyTorch's index cannot be reached but pip has another source, pip would else wait for minutes.
    install = ("install", "--require-hashes", "--only-binary=:all:", "--no-input", "--retries=1", "-r", _REQUIREMENTS)
    done = subprocess.run([building / "bin" / "python", "-m", "pip", *install], capture_output=True, text=True)
    if done.returncode:
        raise UserError(_cause(done.stderr, venv))
    shutil.copy(_REQUIREMENTS, building)
    shutil.rmtree(venv, ignore_errors=True)
    building.rename(venv)


def _cause(said: str, venv: Path) -> str:
    """Why pip failed, in one line."""
    if any(sign in said for sign in _UNREACHABLE):
        return (
            f"cannot make {venv}: pip cannot reach its package index or download.pytorch.org; check the network, the "
            f"proxy (HTTPS_PROXY) and pip's configuration, or name a folder with wheels in PIP_FIND_LINKS"
        )
    errors = [line for line in said.splitlines() if line.startswith("ERROR:")] or ["ERROR: pip failed"]
    return f"cannot make {venv}: pip says: {errors[0].removeprefix('ERROR:').strip()}"


# Finding Python 3.11, as the launcher finds 3.10: shims can be there and fail, so every candidate is run.


def find_python() -> Path:
    """A CPython 3.11 that can make environments: on PATH, from pyenv, from uv, or in the usual folders.

    Raises:
        UserError: there is none.
    """
    for candidate in _candidates():
        if _fits(candidate):
            return candidate
    raise UserError(
        f"PyTorch's environment needs a Python {VERSION} with venv, and there is none on PATH, in pyenv or in uv: "
        f"pyenv install {VERSION}, uv python install {VERSION}, or apt-get install python{VERSION}-venv"
    )


def _fits(candidate: Path) -> bool:
    try:
        answer = subprocess.run([candidate, "-Es", "-c", _ASK], cwd="/", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return not answer.returncode and answer.stdout.split()[:2] == [VERSION, "CPython"]


def _candidates() -> Iterator[Path]:
    folders = [Path(folder) for folder in os.get_exec_path() if os.path.isabs(folder)]
    names = (f"python{VERSION}", "python3", "python")
    yield from _executables(folder / names[0] for folder in folders)
    for root in _roots("PYENV_ROOT", ".pyenv"):
        yield from _executables(sorted(root.glob(f"versions/{VERSION}*/bin/python")))
    for root in _roots("UV_PYTHON_INSTALL_DIR", ".local/share/uv/python"):
        yield from _executables(sorted(root.glob(f"cpython-{VERSION}*/bin/{names[0]}")))
    yield from _executables([Path("/usr/local/bin", names[0]), *sorted(Path("/opt").glob(f"*/bin/{names[0]}"))])
    yield from _executables(folder / name for name in names[1:] for folder in folders)


def _roots(variable: str, usual: str) -> list[Path]:
    """Where a version manager keeps its Pythons: sudo changes HOME, but not where the account's own ones are."""
    homes = dict.fromkeys([os.environ.get("HOME", ""), pwd.getpwuid(os.getuid()).pw_dir])
    named = os.environ.get(variable)
    return [*([Path(named)] if named else []), *(Path(home, usual) for home in homes if home)]


def _executables(paths: Iterator[Path] | list[Path]) -> Iterator[Path]:
    return (path for path in paths if path.is_file() and os.access(path, os.X_OK))
