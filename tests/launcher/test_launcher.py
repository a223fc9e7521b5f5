"""The launcher, run for real in copies of the project whose requirements.txt is one tiny local wheel."""

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.side_env import candidates
from trainer_module import lines

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_PYTHON = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
VERSION = "{}.{}".format(*sys.version_info)
PYTHON = f"python{VERSION}"
PIPELINE = """
import json, os, sys
import tiny
print(json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "python": sys.prefix,
                  "path": sys.path, "tiny": tiny.VERSION}))
sys.exit(7 if "fail" in sys.argv else 0)
"""
NO_INDEX = "http://127.0.0.1:9/simple"
# fmt: off
TOOLS = (
    "sh", "cat", "cp", "cut", "date", "df", "dirname", "env", "getent", "grep", "head", "id", "mkdir", "mv", "readlink",
    "rm", "sed", "sleep", "tail", "tr", "uname", "uniq",
)
# fmt: on


def digest(content: bytes) -> str:
    """SHA-256 as a wheel's RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def write_wheel(folder: Path, version: str) -> str:
    """A wheel of a one-line module, and the line of requirements.txt that pins it."""
    wheel = folder / f"tiny-{version}-py3-none-any.whl"
    info = f"tiny-{version}.dist-info"
    members = {
        "tiny.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{name},sha256={digest(text.encode())},{len(text)}" for name, text in members.items()]
    members[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return f"tiny @ {wheel.as_uri()} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def write_script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


@dataclass(frozen=True)
class Checkout:
    """A copy of the project in `root`, and the only folders that its starts may find programs in."""

    root: Path
    home: Path
    bin: Path

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("SSL_CERT_FILE", "PIP_CERT") if name in os.environ}
        return {**kept, "HOME": str(self.home), "PATH": str(self.bin), **changes}

    def command(self, *arguments: str) -> list[str]:
        return [str(self.root / "moco"), *arguments]

    def start(self, *arguments: str, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=cwd or self.home,
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def require(self, version: str) -> None:
        (self.root / "requirements.txt").write_text(write_wheel(self.home, version))


@pytest.fixture(scope="session")
def real_uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A uv that works: the one that made this environment, or else one fetched as the launcher does it."""
    for known in (REPOSITORY / ".venv-setup/uv/bin/uv", Path(shutil.which("uv") or "/nowhere")):
        if known.exists() and subprocess.run([known, "--version"], capture_output=True, check=False).returncode == 0:
            return known
    folder = tmp_path_factory.mktemp("uv")
    subprocess.run([REAL_PYTHON, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", "uv"], check=True)
    return folder / "bin/uv"


@pytest.fixture
def checkout(tmp_path: Path, real_uv: Path) -> Checkout:
    made = Checkout(root=tmp_path / "the project", home=tmp_path / "home", bin=tmp_path / "bin")
    for folder in (made.root / "pipeline", made.home, made.bin):
        folder.mkdir(parents=True)
    shutil.copy2(REPOSITORY / "moco", made.root)
    (made.root / "pipeline/__main__.py").write_text(PIPELINE)
    made.require("1.0")
    for tool in TOOLS:
        (made.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"these tests need {tool}"))
    (made.bin / "uv").symlink_to(real_uv)
    (made.bin / PYTHON).symlink_to(REAL_PYTHON)
    if lines.NEWER:  # else the launcher would prefer a Python 3.10 that the account has
        rewrite(made, default_python="3.0")
    return made


def result(run: subprocess.CompletedProcess[str]) -> dict:
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def one_line(run: subprocess.CompletedProcess[str], status: int) -> str:
    assert run.returncode == status, run.stderr
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    return lines[0]


# ---- a start that works ---------------------------------------------------------------------------------------------


def test_first_start_sets_up_and_passes_arguments_folder_and_status_through(checkout: Checkout) -> None:
    elsewhere = checkout.home / "my images"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('the folder of the user shadows a module')")
    run = checkout.start("run", "--images", "a b", "", cwd=elsewhere)
    assert result(run) == {
        "arguments": ["run", "--images", "a b", ""],
        "folder": str(elsewhere),
        "python": str(checkout.root / ".venv"),
        "path": result(run)["path"],
        "tiny": "1.0",
    }
    assert "setting up 1 packages" in run.stderr
    assert checkout.start("fail").returncode == 7


def test_second_start_installs_nothing_and_needs_no_uv(checkout: Checkout) -> None:
    result(checkout.start())
    made = (checkout.root / ".venv/pyvenv.cfg").stat()
    write_script(checkout.bin / "uv.new", "echo called >&2; exit 1").replace(checkout.bin / "uv")
    again = checkout.start()
    assert result(again)["tiny"] == "1.0"
    assert again.stderr == ""
    assert (checkout.root / ".venv/pyvenv.cfg").stat() == made


def test_a_symbolic_link_to_the_launcher_starts_its_project(checkout: Checkout) -> None:
    tools = checkout.home / "tools"
    tools.mkdir()
    (tools / "relative").symlink_to("../../the project/moco")
    (tools / "moco").symlink_to(tools / "relative")
    run = subprocess.run(
        ["tools/moco"], cwd=checkout.home, env=checkout.environment(), capture_output=True, text=True, check=False
    )
    assert result(run)["python"] == str(checkout.root / ".venv")


def test_module_paths_of_the_user_are_kept_out(checkout: Checkout) -> None:
    (checkout.home / "json.py").write_text("raise SystemExit('PYTHONPATH shadows a module')")
    run = checkout.start(PYTHONPATH=str(checkout.home), PYTHONHOME="/nowhere", VIRTUAL_ENV="/nowhere")
    assert str(checkout.home) not in result(run)["path"]


def test_other_pythons_of_the_environment_find_the_projects_packages(checkout: Checkout) -> None:
    result(checkout.start())
    found = subprocess.run(
        [checkout.root / ".venv/bin/python", "-c", "import pipeline; print(list(pipeline.__path__)[0])"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(checkout.root / "pipeline")


def test_a_changed_list_is_installed(checkout: Checkout) -> None:
    result(checkout.start())
    checkout.require("2.0")
    assert result(checkout.start())["tiny"] == "2.0"


def test_the_former_environment_is_removed_only_when_the_new_one_is_in_its_place(checkout: Checkout) -> None:
    result(checkout.start())
    checkout.require("2.0")
    (checkout.bin / "rm").unlink()
    seen = checkout.home / "in place"
    look = f'if [ -f "$folder/requirements.txt" ]; then cp "{checkout.root}/.venv/requirements.txt" "{seen}"; fi'
    write_script(checkout.bin / "rm", f'for folder; do {look}; done\nexec {shutil.which("rm")} "$@"')
    assert result(checkout.start())["tiny"] == "2.0"
    assert seen.read_text() == (checkout.root / "requirements.txt").read_text()
    assert sorted(path.name for path in (checkout.root / ".venv-setup").iterdir()) == ["lock", "log"]


def test_an_environment_whose_python_has_gone_is_made_again(checkout: Checkout) -> None:
    result(checkout.start())
    python = checkout.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to(f"/nowhere/bin/{PYTHON}")
    assert result(checkout.start())["tiny"] == "1.0"


# ---- interrupted and simultaneous starts ----------------------------------------------------------------------------


def slow_uv(checkout: Checkout, real_uv: Path) -> Path:
    """Puts a uv on PATH that makes the environment, then waits in the installation until the returned file is there."""
    go_on = checkout.home / "go on"
    (checkout.bin / "uv").unlink()
    write_script(
        checkout.bin / "uv",
        f"case $1 in pip) while [ ! -e '{go_on}' ]; do sleep 0.1; done;; esac\nexec '{real_uv}' \"$@\"",
    )
    return go_on


def wait_for(condition: Callable[[], bool], what: str) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"waited in vain for {what}")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_setup_is_repaired_by_the_next_start(
    checkout: Checkout, real_uv: Path, ending: signal.Signals
) -> None:
    go_on = slow_uv(checkout, real_uv)
    process = subprocess.Popen(checkout.command(), env=checkout.environment(), start_new_session=True)
    half = checkout.root / ".venv-setup/new/bin/python"
    wait_for(half.exists, "the half-made environment")
    os.killpg(process.pid, ending)
    assert process.wait(timeout=30) != 0
    assert not (checkout.root / ".venv").exists()
    go_on.touch()
    assert result(checkout.start())["tiny"] == "1.0"


def test_of_two_starts_at_once_one_sets_up_and_the_other_waits(checkout: Checkout, real_uv: Path) -> None:
    go_on = slow_uv(checkout, real_uv)
    runs: dict[str, subprocess.CompletedProcess[str]] = {}

    def start(name: str) -> threading.Thread:
        thread = threading.Thread(target=lambda: runs.update({name: checkout.start(name)}))
        thread.start()
        return thread

    first = start("first")
    wait_for((checkout.root / ".venv-setup/new/bin/python").exists, "the first start's set-up")
    second = start("second")
    second.join(timeout=2)
    assert second.is_alive()
    go_on.touch()
    first.join()
    second.join()
    assert [result(runs[name])["arguments"] for name in ("first", "second")] == [["first"], ["second"]]
    assert "setting up" in runs["first"].stderr
    assert runs["second"].stderr == "moco: another start is setting up; waiting for it\n"


def test_a_failed_installation_says_why_and_leaves_the_last_environment_in_place(checkout: Checkout) -> None:
    result(checkout.start())
    good = (checkout.root / "requirements.txt").read_text()
    (checkout.root / "requirements.txt").write_text(good.split("--hash")[0] + "--hash=sha256:" + "0" * 64 + "\n")
    run = checkout.start()
    assert run.returncode == 1
    assert "hash mismatch" in run.stderr.lower()
    assert run.stderr.splitlines()[-1].startswith("moco: set-up failed: uv cannot install requirements.txt")
    (checkout.root / "requirements.txt").write_text(good)
    again = checkout.start()
    assert result(again)["tiny"] == "1.0"
    assert again.stderr == ""


# ---- finding Python -------------------------------------------------------------------------------------------------


def test_python_is_found_behind_a_failing_shim(checkout: Checkout) -> None:
    (checkout.bin / PYTHON).unlink()
    write_script(checkout.bin / PYTHON, "echo 'pyenv: python: command not found' >&2; exit 127")
    version = checkout.home / f".pyenv/versions/{VERSION}.99/bin"
    version.mkdir(parents=True)
    (version / "python").symlink_to(REAL_PYTHON)
    run = checkout.start()
    assert result(run)["tiny"] == "1.0"
    assert "command not found" not in run.stderr


def test_python_is_found_beside_pyenvs_shims_when_home_is_another(checkout: Checkout, tmp_path: Path) -> None:
    (checkout.bin / PYTHON).unlink()
    shims, version = tmp_path / "pyenv root/shims", tmp_path / f"pyenv root/versions/{VERSION}.1/bin"
    write_script(shims / PYTHON, "exit 127")
    version.mkdir(parents=True)
    (version / "python").symlink_to(REAL_PYTHON)
    assert result(checkout.start(PATH=f"{shims}:{checkout.bin}"))["tiny"] == "1.0"


def test_python_is_found_in_uvs_folder(checkout: Checkout) -> None:
    (checkout.bin / PYTHON).unlink()
    folder = checkout.home / f".local/share/uv/python/cpython-{VERSION}.99-linux-x86_64-gnu/bin"
    folder.mkdir(parents=True)
    (folder / PYTHON).symlink_to(REAL_PYTHON)
    assert result(checkout.start())["tiny"] == "1.0"


def test_python_is_found_under_its_plain_name_late_on_the_path(checkout: Checkout, tmp_path: Path) -> None:
    (checkout.bin / PYTHON).unlink()
    write_script(checkout.bin / "python", "exit 1")
    late = tmp_path / "late bin"
    late.mkdir()
    (late / "python").symlink_to(REAL_PYTHON)
    assert result(checkout.start(PATH=f"{checkout.bin}:{late}"))["tiny"] == "1.0"


def test_the_interpreter_that_is_used_is_no_link_that_can_change(checkout: Checkout) -> None:
    result(checkout.start())
    assert (checkout.root / ".venv/bin/python").readlink() == REAL_PYTHON


def rewrite(checkout: Checkout, **settings: str) -> None:
    """Gives settings at the head of the launcher other values."""
    launcher = checkout.root / "moco"
    text = launcher.read_text()
    for name, value in settings.items():
        text, found = re.subn(rf"(?<=\b{name}=)('[^']*'|[\d.]+)", f"'{value}'", text, count=1)
        assert found, name
    launcher.write_text(text)


@pytest.fixture
def choosy(checkout: Checkout) -> Checkout:
    """A checkout that wants Pythons that no machine has."""
    rewrite(checkout, default_python="3.98", newer_pythons="3.99 3.100")
    (checkout.bin / PYTHON).unlink()
    return checkout


def test_without_a_fitting_python_one_line_names_those_found_and_how_to_get_one(choosy: Checkout) -> None:
    write_script(choosy.bin / "python3.98", "echo not found >&2; exit 127")
    (choosy.bin / "python3").symlink_to(REAL_PYTHON)
    (choosy.bin / "python").symlink_to(REAL_PYTHON)
    line = one_line(choosy.start(), 2)
    assert f"(found: failing {choosy.bin}/python3.98, {platform.python_version()} at {REAL_PYTHON})" in line
    for way in ("apt-get install python3.98-venv", "pyenv install 3.98", "uv python install 3.98"):
        assert way in line
    assert not (choosy.root / ".venv-setup").exists()


def test_with_no_python_at_all_one_line_says_so(choosy: Checkout) -> None:
    assert "no usable Python 3.98 (found: none)" in one_line(choosy.start(), 2)


# ---- the two lines of TFX -------------------------------------------------------------------------------------------


@pytest.fixture
def newer(checkout: Checkout) -> Checkout:
    """A checkout for which the Python of these tests is one of the newer line, and no glibc too old."""
    rewrite(checkout, default_python="3.0", newer_pythons=f"3.99 {VERSION}", newer_glibc="2.1")
    return checkout


@pytest.fixture
def other_python(checkout: Checkout) -> str:
    """Version of a second Python, which is put on PATH."""
    for version in ("3.12", "3.11", "3.13", "3.10"):
        for found in candidates(version) if version != VERSION else ():
            asked = [found, "-Es", "-c", "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"]
            answer = subprocess.run(asked, cwd="/", capture_output=True, text=True, check=False).stdout.split()
            if answer[:1] == [version]:
                (checkout.bin / f"python{version}").symlink_to(answer[1])
                return version
    pytest.skip("this needs a second Python, and there is none on PATH, in pyenv or in uv")


def require_by_line(checkout: Checkout, default: str) -> None:
    """Pins tiny 1.0 for the Python of the default line and 2.0 for all others."""
    pins = {write_wheel(checkout.home, "1.0"): "==", write_wheel(checkout.home, "2.0"): "!="}
    lines = [pin.replace(" --hash", f" ; python_version {sign} '{default}' --hash") for pin, sign in pins.items()]
    (checkout.root / "requirements.txt").write_text("".join(lines))


def test_where_there_is_no_python_of_the_default_line_a_later_one_gets_the_packages_of_its_own(newer: Checkout) -> None:
    require_by_line(newer, "3.0")
    run = newer.start()
    assert result(run)["tiny"] == "2.0"
    assert result(run)["python"] == str(newer.root / ".venv")
    again = newer.start()
    assert result(again)["tiny"] == "2.0"
    assert again.stderr == ""


def test_where_glibc_is_too_old_for_the_newer_line_one_line_says_what_was_found_and_the_mend(newer: Checkout) -> None:
    rewrite(newer, newer_glibc="2.999")
    line = one_line(newer.start(), 2)
    libc = "-".join(platform.libc_ver())
    assert "no usable Python 3.0 (found: " in line
    assert f"{platform.python_version()}-with-{libc} at {REAL_PYTHON}" in line
    assert "uv python install 3.0" in line
    assert f"A Python 3.99 or {VERSION} with venv serves, with TFX 1.21, where glibc is 2.999 or newer" in line


def test_with_pythons_for_both_lines_the_default_is_taken(newer: Checkout, other_python: str) -> None:
    rewrite(newer, default_python=other_python)
    require_by_line(newer, other_python)
    assert result(newer.start())["tiny"] == "1.0"
    assert (newer.root / ".venv/lib" / f"python{other_python}").is_dir()


def test_a_line_that_is_asked_for_gets_an_environment_beside_the_default_ones(
    newer: Checkout, other_python: str
) -> None:
    rewrite(newer, default_python=other_python)
    require_by_line(newer, other_python)
    asked = newer.start("test", "--line", "1.21", "-k", "a b")
    assert result(asked)["arguments"] == ["test", "-k", "a b"]
    assert result(asked)["python"] == str(newer.root / ".venv-1.21")
    assert result(asked)["tiny"] == "2.0"
    assert not (newer.root / ".venv").exists()
    default = newer.start("test")
    assert result(default)["python"] == str(newer.root / ".venv")
    assert result(default)["tiny"] == "1.0"
    for line, folder in (("1.16", ".venv"), ("1.21", ".venv-1.21")):
        again = newer.start("test", "--line", line)
        assert again.stderr == ""
        assert result(again)["python"] == str(newer.root / folder)


def test_a_line_that_is_asked_for_is_the_usual_environment_where_that_is_of_this_line(newer: Checkout) -> None:
    result(newer.start())
    asked = newer.start("test", "--line", "1.21")
    assert asked.stderr == ""
    assert result(asked)["python"] == str(newer.root / ".venv")
    newer.require("2.0")
    assert result(newer.start("test", "--line", "1.21"))["python"] == str(newer.root / ".venv")


def test_a_line_that_there_is_not_is_refused_in_one_line(checkout: Checkout) -> None:
    assert "--line 1.17: is no line of TFX here; 1.16 or 1.21" in one_line(checkout.start("test", "--line", "1.17"), 2)
    assert "--line wants a line of TFX: 1.16 or 1.21" in one_line(checkout.start("test", "--line"), 2)


def test_a_line_without_a_python_is_refused_in_one_line(newer: Checkout) -> None:
    rewrite(newer, default_python=VERSION, newer_pythons="3.99")
    line = one_line(newer.start("test", "--line", "1.21"), 2)
    assert "no usable Python for TFX 1.21 (found: " in line
    assert "where glibc is 2.1 or newer" in line


def test_the_packages_that_are_counted_are_those_of_this_python(checkout: Checkout) -> None:
    shutil.copy(REPOSITORY / "requirements.txt", checkout.root)
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line.rstrip(" \\")) for line in lines if line[:1].isalnum()]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    assert len(here) < len(pins)
    path = f"{checkout.bin}:{os.defpath}:{os.environ['PATH']}"
    run = checkout.start(PATH=path, UV_OFFLINE="1", UV_NO_CACHE="1")
    assert run.returncode == 1
    assert f"setting up {len(here)} packages" in run.stderr


def copy_python(prefix: Path, *left_out: str) -> Path:
    """The interpreter of these tests in another prefix, without its headers and without some modules."""
    library = prefix / f"lib/{PYTHON}"
    library.mkdir(parents=True)
    for member in (REAL_PYTHON.parents[1] / f"lib/{PYTHON}").iterdir():
        if member.name not in left_out:
            (library / member.name).symlink_to(member)
    for shared in (REAL_PYTHON.parents[1] / "lib").glob("libpython*"):
        (prefix / "lib" / shared.name).symlink_to(shared)
    (prefix / "bin").mkdir()
    return Path(shutil.copy2(REAL_PYTHON, prefix / f"bin/{PYTHON}"))


def test_a_python_that_cannot_make_environments_is_passed_over_and_an_unreachable_index_of_pip_is_named(
    checkout: Checkout, tmp_path: Path
) -> None:
    (checkout.bin / "uv").unlink()
    (checkout.bin / PYTHON).unlink()
    bare = copy_python(tmp_path / "bare", "ensurepip")
    path = f"{bare.parent}:{checkout.bin}"
    (checkout.bin / "python").symlink_to(REAL_PYTHON)
    run = checkout.start(PATH=path, PIP_INDEX_URL=NO_INDEX, PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    assert run.returncode == 1
    assert NO_INDEX in run.stderr
    assert "pip cannot fetch uv" in run.stderr.splitlines()[-1]
    assert (checkout.root / ".venv-setup/uv/bin/python").readlink().resolve() != bare


# ---- what has to be there before the installation -------------------------------------------------------------------


def require_compiled_package(checkout: Checkout) -> None:
    with (checkout.root / "requirements.txt").open("a") as file:
        file.write("pyfarmhash==0.3.2 --hash=sha256:" + "0" * 64 + "\n")


def test_a_missing_compiler_is_said_in_one_line_before_the_installation(checkout: Checkout) -> None:
    require_compiled_package(checkout)
    line = one_line(checkout.start(), 2)
    assert "no C++ compiler works" in line
    assert "apt-get install g++" in line
    assert not (checkout.root / ".venv-setup/new").exists()


def test_a_c_compiler_without_cpp_is_not_taken_for_one(checkout: Checkout) -> None:
    require_compiled_package(checkout)
    for name in ("gcc", "g++", "cc", "c++"):
        write_script(checkout.bin / name, "case \" $* \" in *' c++ '*) exit 1;; esac")
    assert "no C++ compiler works" in one_line(checkout.start(), 2)


def test_a_compiler_that_is_there_lets_the_installation_begin(checkout: Checkout) -> None:
    require_compiled_package(checkout)
    path = f"{checkout.bin}:{os.defpath}:{os.environ['PATH']}"
    run = checkout.start(PATH=path, UV_OFFLINE="1")
    assert run.returncode == 1
    assert "setting up 2 packages" in run.stderr
    assert "set-up failed" in run.stderr


def test_missing_python_headers_are_said_in_one_line_before_the_installation(
    checkout: Checkout, tmp_path: Path
) -> None:
    require_compiled_package(checkout)
    headless = tmp_path / "headless"
    copy_python(headless)
    (checkout.bin / PYTHON).unlink()
    (checkout.bin / PYTHON).symlink_to(headless / f"bin/{PYTHON}")
    line = one_line(checkout.start(), 2)
    assert f"{headless}/include/{PYTHON}/Python.h is missing" in line
    assert f"apt-get install {PYTHON}-dev" in line


def test_a_project_folder_that_cannot_be_written_in_is_said_in_one_line(checkout: Checkout) -> None:
    (checkout.root / ".venv-setup").touch()
    line = one_line(checkout.start(), 2)
    assert f"cannot write in {checkout.root}" in line


def test_too_little_space_is_said_in_one_line_before_the_installation(checkout: Checkout) -> None:
    many = "".join(f"package{number}==1\n" for number in range(10**6))
    (checkout.root / "requirements.txt").write_text(many)
    line = one_line(checkout.start(), 2)
    assert "make room" in line
    assert "needs about 15000000 MB" in line


# ---- uv and the package index ---------------------------------------------------------------------------------------


def test_an_index_that_uv_cannot_reach_is_named_after_uvs_own_messages(checkout: Checkout) -> None:
    (checkout.root / "requirements.txt").write_text("six==1.17.0 --hash=sha256:" + "0" * 64 + "\n")
    run = checkout.start(UV_DEFAULT_INDEX=NO_INDEX, UV_HTTP_RETRIES="0", UV_NO_CACHE="1")
    assert run.returncode == 1
    assert NO_INDEX in run.stderr
    assert "cannot reach the package index" in run.stderr.splitlines()[-1]


def test_uv_is_fetched_with_pip_and_follows_pips_index(checkout: Checkout, tmp_path: Path) -> None:
    """Fetches the real uv from the package index, once, into a folder that the launcher's pip then takes it from."""
    release = next(
        line.split("=", 1)[1].split()[0]
        for line in (checkout.root / "moco").read_text().splitlines()
        if line.startswith("uv_release=")
    )
    wheels = tmp_path / "wheels"
    fetched = subprocess.run(
        [REAL_PYTHON, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, release], check=False
    )
    if fetched.returncode:
        pytest.skip("pip is missing or cannot reach a package index from here")
    (checkout.bin / "uv").unlink()
    (checkout.root / "requirements.txt").write_text("six==1.17.0 --hash=sha256:" + "0" * 64 + "\n")
    run = checkout.start(
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(wheels),
        PIP_INDEX_URL=NO_INDEX,
        PIP_CONFIG_FILE=os.devnull,
        UV_HTTP_RETRIES="0",
        UV_NO_CACHE="1",
    )
    assert (checkout.root / ".venv-setup/uv/bin/uv").exists(), run.stderr
    assert NO_INDEX in run.stderr
    assert "cannot reach the package index" in run.stderr.splitlines()[-1]
