"""Vertex AI's JobService on loopback, for clients that know only its public name.

Clients are told by environment variables alone, as a company's network would: a proxy (https_proxy) that leads every
name here, the roots of certificates that they trust, and a service account's key file.
"""

import contextlib
import datetime
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
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
    key, certificate = _certificate(host)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([_handlers(service)])
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    proxy = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_lead_here, args=(proxy, port), daemon=True).start()
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
        yield {
            "https_proxy": f"http://127.0.0.1:{proxy.getsockname()[1]}",
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(folder / "roots.pem"),
            "GOOGLE_APPLICATION_CREDENTIALS": str(folder / "account.json"),
        }
    finally:
        proxy.close()
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


def _certificate(host: str) -> tuple[bytes, bytes]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


def _lead_here(proxy: socket.socket, port: int) -> None:
    """An HTTP proxy that takes every CONNECT for one to our port."""
    while True:
        try:
            client, _ = proxy.accept()
        except OSError:
            return
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += client.recv(4096)
        target = socket.create_connection(("127.0.0.1", port))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for one, other in ((client, target), (target, client)):
            threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
