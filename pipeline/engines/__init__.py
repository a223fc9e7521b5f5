"""Engines for Beam's pipelines besides this process: started for a run, and ended with it.

Workers are processes with an environment of their own: the packages of this one, and of this project what the job
brings along, see `archive`. So a stage that runs here runs where there is no copy of the project, too.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.beam import BEAM_ARGUMENTS
from pipeline.engines import alone, archive
from pipeline.engines.config import BeamConfig, Engine

_START_SECONDS = 60.0
_POLL_SECONDS = 0.05
_END_SECONDS = 10.0
_JOB_SECONDS = 10**7  # Beam ends the wait for a job with it


@contextlib.contextmanager
def started(config: BeamConfig) -> Iterator[tuple[str, ...]]:
    """Starts the engine of a configuration, and ends it with the context.

    Args:
        config: a valid configuration.

    Yields:
        Beam's flags for it.

    Raises:
        UserError: no Dask scheduler is at the address.
        RuntimeError: the engine did not start.
    """
    if config.engine is Engine.memory:
        yield BEAM_ARGUMENTS
        return
    with _work_folder() as folder, contextlib.ExitStack() as ending:
        code = archive.write(folder)
        start = _job_server if config.engine is Engine.processes else _dask
        yield (*start(config, folder, ending), f"--files_to_stage={code}", "--sdk_container_image=none")


def check(config: BeamConfig, seconds: float = _START_SECONDS) -> None:
    """Asks a scheduler that must be there already.

    Args:
        config: a valid configuration.
        seconds: to wait for it at the most.

    Raises:
        UserError: it does not answer.
    """
    if config.address:
        from pipeline.engines import dask_runner

        dask_runner.check(config.address, seconds)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moco-beam-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _job_server(config: BeamConfig, folder: Path, ending: contextlib.ExitStack) -> Sequence[str]:
    worker, told = folder / "worker", folder / "job_server"
    worker.write_text(
        f'#!/bin/sh\nexec {shlex.join([*_alone(alone.BEAM_WORKER), f"--semi_persist_dir={folder}"])} "$@"\n'
    )
    worker.chmod(0o700)
    server = [sys.executable, "-m", "pipeline.engines.job_server", str(told), str(config.workers or cores())]
    process = _process(server, folder, ending)
    address = _wait(process, folder, lambda: told.read_text() if told.is_file() else "")
    return (
        "--runner=PortableRunner",
        f"--job_endpoint={address}",
        "--environment_type=PROCESS",
        f"--environment_option=process_command={worker}",
        f"--job_server_timeout={_JOB_SECONDS}",
        "--experiments=disable_logging_submission_environment",  # it would ask pip for all packages, for each stage
    )


def _dask(config: BeamConfig, folder: Path, ending: contextlib.ExitStack) -> Sequence[str]:
    from pipeline.engines import dask_runner

    address = config.address
    if not address:
        told = folder / "scheduler.json"
        scheduler = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told)]
        process = _process([*_alone(alone.DASK_SCHEDULER), *scheduler], folder, ending)
        address = _wait(process, folder, lambda: dask_runner.address_in(told))
        count = str(config.workers or cores())
        workers = ["--nworkers", count, "--nthreads", "1", "--no-dashboard", "--local-directory", str(folder)]
        _process([*_alone(alone.DASK_WORKER), address, *workers], folder, ending)
    dask_runner.check(address, _START_SECONDS)
    return (f"--runner={dask_runner.__name__}.DaskRunner", f"--dask_client_address={address}")


def _alone(what: str) -> list[str]:
    """A command that sees neither this project nor the user's environment, see `alone`."""
    return [sys.executable, "-I", "-S", alone.__file__, sysconfig.get_path("purelib"), what]


def _process(command: Sequence[str], folder: Path, ending: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=archive.ROOT, start_new_session=True
        )
    ending.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    process.kill()
    process.wait()


def _wait(process: subprocess.Popen[bytes], folder: Path, ready: Callable[[], str]) -> str:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        if found := ready():
            return found
        time.sleep(_POLL_SECONDS)
    text = (folder / "log").read_text(errors="replace")
    raise RuntimeError(f"Beam's engine did not start: {process.args!r}\n{text[-4000:]}")
