"""The lock of a working directory: one run at a time, whoever comes first, and none left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.workdir import opened
from trainer_module.errors import UserError

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pipeline.workdir import opened
from trainer_module.errors import UserError
sys.stdin.readline()
try:
    with opened(sys.argv[1]):
        print("in", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
"""


def start(home: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(home)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_runs_that_start_at_the_same_time_one_goes_on_and_the_others_are_refused(tmp_path: Path):
    home = tmp_path / "new"
    runs = [start(home) for _ in range(6)]
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    said = [run.stdout.readline() for run in runs]
    assert said.count("in\n") == 1
    assert sum(line.startswith(f"another run uses {home}; wait for it") for line in said) == 5
    for run in runs:
        run.communicate()


def test_a_killed_run_leaves_no_lock(tmp_path: Path):
    run = start(tmp_path)
    run.stdin.write("\n")
    run.stdin.flush()
    assert run.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another run uses"), opened(str(tmp_path)):
        pass
    run.kill()
    run.communicate()
    with opened(str(tmp_path)) as home:
        assert home == tmp_path
