"""Environments beside .venv for what must never be in it, each made when it is first needed.

Each has a Python and a list of packages of its own. It is built aside and renamed into place, so that what is there is
whole; its list lies in it, so that a changed list makes it anew.
"""

import contextlib
import dataclasses
import fcntl
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import console
from trainer_module.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_ASK = """
import platform, sys, venv, ensurepip
print("%d.%d" % sys.version_info[:2], platform.python_implementation(), sys.executable)
"""
_UNREACHABLE = ("Name or service not known", "NewConnectionError", "Temporary failure in name resolution", "timed out")
_FULL = "No space left on device"


@dataclasses.dataclass(frozen=True)
class SideEnvironment:
    """An environment apart from .venv.

    Attributes:
        name: of its folder, without the dot.
        holds: what a user waits for while it is made, such as "PyTorch".
        pythons: versions that its packages have builds for, such as "3.11"; the first one found is taken.
        requirements: every package, pinned and hashed, and what these need, too: nothing else is installed.
        why: it is apart.
    """

    name: str
    holds: str
    pythons: tuple[str, ...]
    requirements: Path
    why: str

    def python(self, root: Path = ROOT) -> Path:
        """Its Python; makes the environment if it is missing or its list of packages has changed.

        Args:
            root: folder that holds the environment.

        Raises:
            UserError: there is no fitting Python, or the packages cannot be installed.
        """
        venv, work = root / f".{self.name}", root / ".venv-setup"
        if not self._is_ready(venv):
            with _locked(work, self.name, root):
                if not self._is_ready(venv):
                    self._make(venv, work / self.name)
        return venv / "bin" / "python"

    def find_python(self) -> Path:
        """A CPython that can make it: on PATH, from pyenv, from uv, or in the usual folders.

        Raises:
            UserError: there is none.
        """
        for version in self.pythons:
            for candidate in candidates(version):
                if _version(candidate) == version:
                    return candidate
        first, wanted = self.pythons[0], " or ".join(self.pythons)
        raise UserError(
            f"{self.holds} needs a Python {wanted} with venv, and there is none on PATH, in pyenv or in uv: "
            f"pyenv install {first}, uv python install {first}, or apt-get install python{first}-venv"
        )

    def _is_ready(self, venv: Path) -> bool:
        stamp = venv / self.requirements.name
        same = stamp.is_file() and stamp.read_bytes() == self.requirements.read_bytes()
        return same and _version(venv / "bin" / "python") in self.pythons

    def _make(self, venv: Path, building: Path) -> None:
        python = self.find_python()
        console.line(f"setting up {self.holds} in {venv}; the first time takes a minute or two")
        shutil.rmtree(building, ignore_errors=True)
        subprocess.run([python, "-m", "venv", building], check=True, capture_output=True)
        done = subprocess.run(
            [building / "bin" / "python", "-m", "pip", *_install(self.requirements)], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(cause(done.stderr, venv))
        shutil.copy(self.requirements, building)
        shutil.rmtree(venv, ignore_errors=True)
        building.rename(venv)


TORCH = SideEnvironment(
    name="venv-torch",
    holds="PyTorch",
    pythons=("3.11",),
    requirements=ROOT / "pipeline" / "bench" / "requirements-torch.txt",
    why="TFX 1.16 wants Python 3.10 and PyTorch's pinned build 3.11, and nothing but benchmarks may import torch",
)
FAISS = SideEnvironment(
    name="venv-faiss",
    holds="FAISS",
    pythons=("3.10",),
    requirements=ROOT / "pipeline" / "bench" / "requirements-faiss.txt",
    why="nothing but a benchmark may import faiss, and it brings an OpenBLAS and an OpenMP of its own",
)
IMAGES = SideEnvironment(
    name="venv-images",
    holds="what reads and judges Dockerfiles",
    pythons=("3.10",),
    requirements=ROOT / "pipeline" / "bench" / "requirements-images.txt",
    why="nothing but a benchmark reads Dockerfiles",
)

ATHERIS = SideEnvironment(
    name="venv-atheris",
    holds="atheris",
    pythons=("3.10",),
    requirements=ROOT / "pipeline" / "bench" / "requirements-atheris.txt",
    why="nothing but a benchmark may import a fuzzer; its wheel is of 115 MB",
)


def _for_tpu(part: str, holds: str, pythons: tuple[str, ...], why: str) -> SideEnvironment:
    """An environment of ./moco tpu-report."""
    requirements = ROOT / "pipeline" / "tpu" / f"requirements-{part}.txt"
    return SideEnvironment(f"venv-tpu-{part}", holds, pythons, requirements, why)


TPU_LOWER = _for_tpu(
    "lower", "TensorFlow's TPU build", ("3.10",), "it takes the place of TensorFlow, and lacks the CPU's XLA"
)
TPU_COMPILE = _for_tpu(
    "compile",
    "the TPU compiler",
    ("3.12", "3.13"),
    "libtpu goes with a jax that wants a newer Python and a newer NumPy than TFX's",
)


def _install(requirements: Path) -> Sequence[str | Path]:
    """Arguments of pip.

    No dependencies beyond the list, which is complete: TensorFlow's TPU build names a driver that no index has. One
    retry: where an index cannot be reached but pip has another source, pip would else wait for minutes. Python compiles
    the few modules that are imported when they are.
    """
    strict = ("--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--retries=1", "--no-compile")
    return ("install", "--disable-pip-version-check", *strict, "-r", requirements)


@contextlib.contextmanager
def _locked(work: Path, name: str, root: Path) -> Iterator[None]:
    """Holds a lock that ends with this process, however that ends."""
    try:
        work.mkdir(exist_ok=True)
        lock = (work / f"{name}.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {root}, where .{name} is to be made: make it writable") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cause(said: str, venv: Path) -> str:
    """Why pip failed, in one line.

    Args:
        said: pip's standard error.
        venv: that was to be made.
    """
    if _FULL in said:
        return f"cannot make {venv}: no space left on the disk; free some"
    if any(sign in said for sign in _UNREACHABLE):
        return (
            f"cannot make {venv}: pip cannot reach its package index; check the network, the proxy (HTTPS_PROXY) and "
            f"pip's configuration, or name a folder with wheels in PIP_FIND_LINKS"
        )
    errors = [line for line in said.splitlines() if line.startswith("ERROR:")] or ["ERROR: pip failed"]
    return f"cannot make {venv}: pip says: {errors[0].removeprefix('ERROR:').strip()}"


# Finding a Python, as the launcher finds 3.10: shims can be there and fail, so every candidate is run.


def _version(candidate: Path) -> str | None:
    """Such as "3.11", or None for what is no CPython that can make environments."""
    try:
        answer = subprocess.run([candidate, "-Es", "-c", _ASK], cwd="/", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version, kind = [*answer.stdout.split(), "", ""][:2]
    return version if not answer.returncode and kind == "CPython" else None


def candidates(version: str) -> Iterator[Path]:
    """Executables that may be a Python of that version."""
    folders = [Path(folder) for folder in os.get_exec_path() if os.path.isabs(folder)]
    names = (f"python{version}", "python3", "python")
    yield from _executables(folder / names[0] for folder in folders)
    for root in _roots("PYENV_ROOT", ".pyenv"):
        yield from _executables(sorted(root.glob(f"versions/{version}*/bin/python")))
    for root in _roots("UV_PYTHON_INSTALL_DIR", ".local/share/uv/python"):
        yield from _executables(sorted(root.glob(f"cpython-{version}*/bin/{names[0]}")))
    yield from _executables([Path("/usr/local/bin", names[0]), *sorted(Path("/opt").glob(f"*/bin/{names[0]}"))])
    yield from _executables(folder / name for name in names[1:] for folder in folders)


def _roots(variable: str, usual: str) -> list[Path]:
    """Where a version manager keeps its Pythons: sudo changes HOME, but not where the account's own ones are."""
    homes = dict.fromkeys([os.environ.get("HOME", ""), pwd.getpwuid(os.getuid()).pw_dir])
    named = os.environ.get(variable)
    return [*([Path(named)] if named else []), *(Path(home, usual) for home in homes if home)]


def _executables(paths: Iterator[Path] | list[Path]) -> Iterator[Path]:
    return (path for path in paths if path.is_file() and os.access(path, os.X_OK))
