"""Vertex AI over gRPC: how it is reached, and what goes wrong said in one line.

The clients are google-cloud-aiplatform's own for each of the service's protos. What is sent is made before, as the
protos' messages, so that a dry run prints the very message and needs neither network nor credentials.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any, TypeVar

import grpc
from google.api_core.exceptions import (
    Forbidden,
    GatewayTimeout,
    GoogleAPICallError,
    NotFound,
    RetryError,
    ServerError,
    ServiceUnavailable,
    TooManyRequests,
    Unauthorized,
)
from google.api_core.future.polling import DEFAULT_POLLING
from google.api_core.retry import Retry
from google.auth.exceptions import GoogleAuthError
from google.protobuf import json_format

from components.pusher import credentials
from pipeline.cloud.wording import one_line
from trainer_module.errors import UserError

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# What grpcio says where the token could not be had; another try will not mend it.
_NO_TOKEN = "metadata from plugin"

Client = TypeVar("Client")


@dataclasses.dataclass(frozen=True)
class Connection:
    """How Vertex AI is reached.

    Attributes:
        project: id of the Google Cloud project.
        region: such as europe-west4.
        address: HOST:PORT of a server that is asked without TLS and without credentials, as an emulator on loopback;
            empty for the region's own, with Application Default Credentials.
        timeout: seconds until an answer that stays out counts as lost.
        patience: seconds in which a request that may be sent twice is tried again while there is no answer.
        first_wait: seconds before the second try; the later ones take twice as long each.
        poll: seconds between two looks at what takes long.
    """

    project: str
    region: str
    address: str = ""
    timeout: float = 60.0
    patience: float = 300.0
    first_wait: float = 1.0
    poll: float = 15.0

    @property
    def parent(self) -> str:
        """The resource below which all others lie."""
        return f"projects/{self.project}/locations/{self.region}"

    @property
    def where(self) -> str:
        """In words."""
        return f"project {self.project}, {self.region}"

    @property
    def host(self) -> str:
        """Of the service."""
        return self.address or f"{self.region}-aiplatform.googleapis.com"

    @property
    def retry(self) -> Retry:
        """For requests that may be sent twice."""
        return Retry(is_passing, self.first_wait, 30.0, multiplier=2.0, timeout=self.patience)

    @property
    def again(self) -> dict[str, Any]:
        """Arguments of a call that may be sent twice."""
        return {"retry": self.retry, "timeout": self.timeout}

    @property
    def polling(self) -> Retry:
        """For waiting until an operation of the service is done, however long it takes."""
        return DEFAULT_POLLING.with_timeout(None).with_delay(min(self.first_wait, self.poll), self.poll, 1.5)


def is_passing(error: BaseException) -> bool:
    """Whether another try may succeed."""
    return isinstance(error, ServiceUnavailable) and _NO_TOKEN not in str(error)


@contextlib.contextmanager
def client(kind: type[Client], connection: Connection) -> Iterator[Client]:
    """A client of one of the service's protos, for the time of the context.

    Args:
        kind: such as `google.cloud.aiplatform_v1.PipelineServiceClient`.
        connection: whom it asks.

    Raises:
        UserError: there are no credentials.
    """
    service: Any = kind  # the clients have no common type that says how they are made
    transport = service.get_transport_class("grpc")
    if connection.address:
        made = service(transport=transport(channel=grpc.insecure_channel(connection.address)))
    else:
        token, _ = credentials.default(_SCOPE, "Vertex AI")
        made = service(transport=transport(host=connection.host, credentials=token))
    with made:
        yield made


@contextlib.contextmanager
def errors_told(connection: Connection, what: str) -> Iterator[None]:
    """Says in one line what the service refuses.

    Args:
        connection: whom was asked.
        what: was asked for, in words that begin a line.

    Raises:
        UserError: no right, no quota, no such thing, no answer, or a request that cannot be carried out.
    """
    try:
        yield
    except GoogleAuthError as error:
        raise UserError(f"{what}: {_login(str(error))}") from error
    except (GoogleAPICallError, RetryError) as error:
        cause = error.cause if isinstance(error, RetryError) and error.cause else error
        raise UserError(f"{what}: {_mend(cause, connection)}") from error


def _mend(error: BaseException, connection: Connection) -> str:
    said = words(error)
    if _NO_TOKEN in said or isinstance(error, Unauthorized):
        return _login(said)
    if isinstance(error, Forbidden):
        return f"not allowed in {connection.where} ({said}); the account needs the role Vertex AI User there"
    if isinstance(error, NotFound):
        return f"not found in {connection.where} ({said}); check the name, the project and the region"
    if isinstance(error, TooManyRequests):
        return f"the quota of {connection.where} is used up ({said}); wait, or ask for more under IAM, Quotas"
    if isinstance(error, ServiceUnavailable | GatewayTimeout | RetryError):
        return f"no answer from {connection.host} ({said}); try again later"
    if isinstance(error, ServerError):
        return f"a fault of Vertex AI ({said}); try again later"
    return f"Vertex AI refuses it ({said}); mend what it names"


def _login(said: str) -> str:
    return f"the credentials are not accepted ({one_line(said)}); log in with 'gcloud auth application-default login'"


def words(error: BaseException) -> str:
    """What the service said, on one line."""
    if not isinstance(error, GoogleAPICallError):
        return one_line(str(error)) or type(error).__name__
    code = error.grpc_status_code.name if error.grpc_status_code else str(int(error.code or 0))
    return f"{code}: {one_line(error.message)}"


def as_json(request: Any) -> str:
    """A message of the protos as JSON, with the names that the service's documentation uses."""
    return json_format.MessageToJson(type(request).pb(request), indent=2, ensure_ascii=False)


def dry(method: str, request: Any, connection: Connection) -> str:
    """What would be sent, as one JSON object: where to, which method, and the message.

    Args:
        method: of the service, such as PipelineService/CreatePipelineJob.
        request: the message.
        connection: where it would go.
    """
    name = f"google.cloud.aiplatform.v1.{method}"
    shown = {"host": connection.host, "method": name, "request": json.loads(as_json(request))}
    # Maps of a message have another order in each process, and two requests should be comparable line by line.
    return json.dumps(shown, indent=2, sort_keys=True, ensure_ascii=False)
