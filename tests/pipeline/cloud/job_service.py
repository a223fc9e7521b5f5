"""Vertex AI's JobService on loopback, for clients that know only its public name.

Clients are told by environment variables alone, as a company's network would: a proxy and the roots of certificates
(see public_names), and a service account's key file.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import public_names
from google.cloud.aiplatform_v1.types import CreateCustomJobRequest, CustomJob, GetCustomJobRequest, JobState

_SERVICE = "google.cloud.aiplatform.v1.JobService"


class JobService:
    """Runs each job that is created, in a thread.

    Args:
        work: does what a job says; what it raises makes the job fail.
    """

    def __init__(self, work: Callable[[CustomJob], None]) -> None:
        self.created: list[CreateCustomJobRequest] = []
        self._work = work
        self._jobs: dict[str, CustomJob] = {}

    def create(self, request: CreateCustomJobRequest, _: grpc.ServicerContext) -> CustomJob:
        """CreateCustomJob."""
        self.created.append(request)
        job = CustomJob(request.custom_job)
        job.name = f"{request.parent}/customJobs/{len(self.created)}"
        job.state = JobState.JOB_STATE_RUNNING
        self._jobs[job.name] = job
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return job

    def get(self, request: GetCustomJobRequest, _: grpc.ServicerContext) -> CustomJob:
        """GetCustomJob."""
        return self._jobs[request.name]

    def _run(self, job: CustomJob) -> None:
        try:
            self._work(job)
        except Exception as error:
            job.error = {"code": 13, "message": str(error)}
            job.state = JobState.JOB_STATE_FAILED
            return
        job.state = JobState.JOB_STATE_SUCCEEDED


@contextlib.contextmanager
def served(service: JobService, host: str, folder: Path) -> Iterator[dict[str, str]]:
    """Serves, and gives the environment by which clients of `host` come here.

    Args:
        service: that answers.
        host: e.g. us-central1-aiplatform.googleapis.com.
        folder: for the certificate and the key file.
    """
    key, certificate = public_names.certificate(host)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([_handlers(service)])
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    (folder / "roots.pem").write_bytes(certificate)
    account = {
        "type": "service_account",
        "project_id": "my-project",
        "private_key_id": "1",
        "private_key": key.decode(),
        "client_email": "moco@my-project.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }
    (folder / "account.json").write_text(json.dumps(account))
    try:
        with public_names.all_led_to(port) as proxy:
            yield {
                "https_proxy": proxy,
                "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(folder / "roots.pem"),
                "GOOGLE_APPLICATION_CREDENTIALS": str(folder / "account.json"),
            }
    finally:
        server.stop(None)


def _handlers(service: JobService) -> grpc.GenericRpcHandler:
    def unary(method: Callable, request: type) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            method, request_deserializer=request.deserialize, response_serializer=CustomJob.serialize
        )

    return grpc.method_handlers_generic_handler(
        _SERVICE,
        {
            "CreateCustomJob": unary(service.create, CreateCustomJobRequest),
            "GetCustomJob": unary(service.get, GetCustomJobRequest),
        },
    )
