"""What a worker's process runs: installed packages and nothing else, until a job brings its code.

    python -I -S alone.py PACKAGES beam-worker|dask-worker|dask-scheduler ARGUMENTS…

Run by its path, never imported by a worker: `-I -S` keep the user's environment, the working folder and the .pth files
of PACKAGES off the module path, so this project is not there.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
from pathlib import Path

BEAM_WORKER = "beam-worker"
DASK_WORKER = "dask-worker"
DASK_SCHEDULER = "dask-scheduler"


def main(packages: str, what: str, arguments: list[str]) -> None:
    """Becomes the process that is wanted."""
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    sys.path.append(packages)
    if what == BEAM_WORKER:
        _beam_worker(arguments)
        return
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if what == DASK_WORKER:
        import dask
        from distributed.cli import dask_worker

        # Workers, and those that take the place of lost ones, are forked from one process that has imported them.
        multiprocessing.set_forkserver_preload(["apache_beam", "distributed", "tensorflow"])
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
        dask_worker.main(arguments)
    else:
        from distributed.cli import dask_scheduler

        dask_scheduler.main(arguments)


def _end_with_the_parent() -> None:
    """Ends this process when standard input ends, as it does with whoever started it."""
    sys.stdin.buffer.read()
    os._exit(0)


def _beam_worker(arguments: list[str]) -> None:
    """Beam's SDK harness, started as its "container contract" has it: told whom to ask, it fetches all it needs.

    The boot program of Beam's container images does the same, with pip for what is staged.
    """
    parser = argparse.ArgumentParser()
    for name in ("id", "provision_endpoint", "logging_endpoint", "artifact_endpoint", "control_endpoint"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--semi_persist_dir", required=True)
    told = parser.parse_args(arguments)

    import grpc
    from apache_beam.portability.api import (
        beam_artifact_api_pb2_grpc,
        beam_provision_api_pb2,
        beam_runner_api_pb2,
        endpoints_pb2,
    )
    from apache_beam.portability.api import beam_provision_api_pb2_grpc as provision
    from apache_beam.runners.portability.artifact_service import resolve_artifacts
    from apache_beam.runners.worker import sdk_worker_main
    from google.protobuf import json_format, text_format

    with grpc.insecure_channel(told.provision_endpoint) as channel:
        request = beam_provision_api_pb2.GetProvisionInfoRequest()
        info = provision.ProvisionServiceStub(channel).GetProvisionInfo(request, metadata=[("worker_id", told.id)]).info
    staged = tempfile.mkdtemp(dir=told.semi_persist_dir)
    with grpc.insecure_channel(told.artifact_endpoint) as channel:
        retrieval = beam_artifact_api_pb2_grpc.ArtifactRetrievalServiceStub(channel)
        files = resolve_artifacts(info.dependencies, retrieval, staged)
    for file in files:
        name = beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(file.role_payload).staged_name
        if name.endswith(".zip"):
            sys.path.insert(0, beam_runner_api_pb2.ArtifactFilePayload.FromString(file.type_payload).path)

    def endpoint(url: str) -> str:
        return text_format.MessageToString(endpoints_pb2.ApiServiceDescriptor(url=url))

    os.environ |= {
        "WORKER_ID": told.id,
        "LOGGING_API_SERVICE_DESCRIPTOR": endpoint(told.logging_endpoint),
        "CONTROL_API_SERVICE_DESCRIPTOR": endpoint(told.control_endpoint),
        "PIPELINE_OPTIONS": json_format.MessageToJson(info.pipeline_options),
        "SEMI_PERSISTENT_DIRECTORY": staged,
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
    }
    sdk_worker_main.main([])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
