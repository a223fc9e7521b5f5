"""Beam's job server with worker processes, of which any may be lost.

    python -m pipeline.engines.job_server FILE WORKERS

FILE is written once the server listens, and holds its address. Beam's own local job service has one worker for a job,
cannot start processes the way other portable runners do (environment type PROCESS), and waits for ever for one that
has died. Here a lost worker ends the job's attempt, and the job begins again with fresh ones: what our stages write
comes out the same, and under the same names.
"""

import functools
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_job_api_pb2, beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.worker_handlers import GrpcWorkerHandler, WorkerHandler
from apache_beam.runners.portability.local_job_service import BeamJob, LocalJobServicer

ATTEMPTS = 4  # as many as Dask and Dataflow give a piece of work
_ABORT_SECONDS = 0.5
_END_SECONDS = 5.0
_CLOSED = "Channel closed prematurely"  # what Beam says where the worker's data came to no end

_LOG = logging.getLogger(__name__)


class LostWorkerError(RuntimeError):
    """A worker process ended while it was needed."""


@WorkerHandler.register_environment(common_urns.environments.PROCESS.urn, beam_runner_api_pb2.ProcessPayload)
class ProcessWorker(GrpcWorkerHandler):
    """A worker that is a process, started by Beam's container contract and watched."""

    def __init__(self, payload: Any, state: Any, provision_info: Any, grpc_server: Any) -> None:
        """See the base class."""
        super().__init__(state, provision_info, grpc_server)
        self._payload = payload
        self._stopping = threading.Event()

    def start_worker(self) -> None:
        """Starts the process."""
        endpoints = {
            "id": self.worker_id,
            "logging_endpoint": self.logging_api_service_descriptor().url,
            "artifact_endpoint": self.artifact_api_service_descriptor().url,
            "provision_endpoint": self.control_address,
            "control_endpoint": self.control_address,
        }
        command = [self._payload.command, *(f"--{name}={value}" for name, value in endpoints.items())]
        self._process = subprocess.Popen(command, env=os.environ | dict(self._payload.env))
        threading.Thread(target=self._watch, daemon=True).start()

    def stop_worker(self) -> None:
        """Ends the process; its connections are closed already."""
        self._stopping.set()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _watch(self) -> None:
        """Has everyone give up who waits for an answer, and goes on, since more may be asked meanwhile."""
        code = self._process.wait()
        lost = LostWorkerError(f"the worker process {self._process.pid} ended with {code}")
        while not self._stopping.is_set():
            self.control_conn.abort(lost)
            self._stopping.wait(_ABORT_SECONDS)


class Job(BeamJob):
    """A job that survives lost workers."""

    def __init__(self, workers: int, *job: Any) -> None:
        """Takes the number of worker processes, and what the base class takes."""
        super().__init__(*job)
        self._workers = workers

    def _invoke_runner(self) -> Any:
        self.set_state(beam_job_api_pb2.JobState.RUNNING)
        return self._with_attempts_left(ATTEMPTS - 1)

    def _with_attempts_left(self, more: int) -> Any:
        try:
            return self._attempt()
        except RuntimeError as error:
            if not more or not (isinstance(error, LostWorkerError) or _CLOSED in str(error)):
                raise
            _LOG.warning("a worker was lost (%s); the job begins again", error)
        return self._with_attempts_left(more - 1)

    def _attempt(self) -> Any:
        runner = FnApiRunner(provision_info=self._provision_info)
        runner._num_workers = self._workers  # Beam reads the option where it runs no job server only
        return runner.run_via_runner_api(self._pipeline_proto, self.pipeline_options())


def main(told: Path, workers: int) -> None:
    """Serves until standard input ends, as it does with the process that started this one."""
    logging.basicConfig(level=logging.WARNING)
    server = LocalJobServicer(beam_job_type=functools.partial(Job, workers))
    address = f"localhost:{server.start_grpc_server()}"
    unfinished = told.with_suffix(".part")
    unfinished.write_text(address)
    unfinished.rename(told)
    sys.stdin.buffer.read()
    server.stop()
    os._exit(0)  # threads of a job that nobody waits for any more


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
