"""Google Cloud Storage on loopback, with faults: gcp-storage-emulator behind a proxy of TCP and HTTP.

The proxy passes requests on to the emulator one at a time, and adds what the emulator lacks and our protocols rest on:
  - conditions (ifGenerationMatch) of uploads and deletions, at the start and at the end of resumable ones: 412;
  - `generation` of downloads, and its header;
  - resumable uploads: bytes that were stored already are passed over when they are sent again, and a finished session
    answers again what it answered;
  - rights, retention policies: answers that a test sets;
  - empty objects.
A `plan` decides what becomes of a request: it is called with the request's number, from 0, and the request.
"""

import copy
import dataclasses
import enum
import functools
import http.client
import json
import re
import socket
import ssl
import struct
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gcp_storage_emulator.storage
import public_names
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler


class Fault(enum.Enum):
    """What becomes of one request."""

    request_cut = "half of the body arrives, then the connection is reset; resumable uploads keep that half"
    request_lost = "the whole request is read and never acted on"
    answer_lost = "the request is acted on, and the connection is reset before the answer"
    answer_cut = "the answer ends in the midst of its body"
    answer_slow = "the answer comes in driblets"
    answer_stalls = "the answer begins and goes on only after the client has lost its patience"
    unavailable = "503, not acted on"
    unavailable_after = "503, but acted on"
    too_many = "429"
    timed_out = "408"
    broken = "500"
    bad_gateway = "502"
    gateway_timed_out = "504"
    flipped_upload = "one byte of what is uploaded arrives as another"
    flipped_download = "one byte of what is downloaded arrives as another"


# What a service that is well in a moment answers.
REFUSALS = (
    Fault.unavailable,
    Fault.too_many,
    Fault.timed_out,
    Fault.broken,
    Fault.bad_gateway,
    Fault.gateway_timed_out,
)


@dataclasses.dataclass(frozen=True)
class Request:
    """An HTTP request that was read from its first byte to its last."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(urllib.parse.urlparse(self.path).query))

    @property
    def is_upload(self) -> bool:
        return self.path.startswith("/upload/") and bool(self.body)

    @property
    def is_download(self) -> bool:
        return self.query.get("alt") == "media" or self.path.startswith("/download/")

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


Plan = Callable[[int, Request], Fault | Answer | None]


def no_faults(number: int, request: Request) -> None:
    """The plan under which everything goes well."""


def refusal(status: int, reason: str, message: str) -> Answer:
    """An error as the service words it."""
    error = {"code": status, "message": message, "errors": [{"reason": reason, "message": message}]}
    return Answer(status, {"Content-Type": "application/json"}, json.dumps({"error": error}).encode())


class _Memory(gcp_storage_emulator.storage.Storage):
    """The emulator's objects."""

    def _write_config_to_file(self) -> None:
        """Keeps no second copy as JSON after every change, from which nobody would start again."""


class Storage:
    """One emulator and any number of proxies in front of it."""

    def __init__(self, bucket: str, emulated: _Memory | None = None):
        self.bucket = bucket
        self._emulated = emulated or _Memory(use_memory_fs=True)
        if emulated is None:
            create_bucket(bucket, self._emulated)
        server = HTTPServer(("127.0.0.1", 0), functools.partial(RequestHandler, self._emulated))
        self._port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        weakref.finalize(self, _stop, server)
        self._turns = threading.RLock()
        self._sessions: dict[str, _Session] = {}

    def copy(self) -> "Storage":
        """Another one with the same objects of the same generations."""
        with self._turns:
            return Storage(self.bucket, copy.deepcopy(self._emulated))

    def objects(self) -> dict[str, bytes]:
        """All objects by name, read from the emulator itself."""
        listed = json.loads(self._ask(Request("GET", f"/storage/v1/b/{self.bucket}/o", {}, b"")).body)
        names = [item["name"] for item in listed["items"]]
        return {name: self._ask(Request("GET", self._object(name) + "?alt=media", {}, b"")).body for name in names}

    def put(self, name: str, content: bytes) -> None:
        """Makes an object, by the emulator itself."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        headers = {"content-type": "application/octet-stream"}
        assert (
            self._ask(Request("POST", f"/upload/storage/v1/b/{self.bucket}/o?{query}", headers, content)).status == 200
        )

    def serve(self, request: Request) -> Answer:
        """Acts on a request as the service would."""
        with self._turns:
            answer = self._act(request)
        # The emulator remembers under which address an object was uploaded; proxies come and go.
        here = b'"mediaLink": "http://' + request.headers.get("host", "").encode() + b"/"
        return dataclasses.replace(answer, body=re.sub(rb'"mediaLink": "http://[^/"]+/', here, answer.body))

    def _act(self, request: Request) -> Answer:
        query = request.query
        if "upload_id" in query:
            return self._continue(request, query["upload_id"])
        name = name_of(request)
        if "ifGenerationMatch" in query and not self._matches(name, query["ifGenerationMatch"]):
            return _precondition_failed()
        if request.is_download and "generation" in query and not self._matches(name, query["generation"]):
            return refusal(404, "notFound", "No such generation")
        answer = self._ask(_as_multipart(request, name) if _is_empty_upload(request) else request)
        if query.get("uploadType") == "resumable" and answer.status == 200:
            session = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(answer.headers["Location"]).query))["upload_id"]
            self._sessions[session] = _Session(name, query.get("ifGenerationMatch"))
        if request.is_download and answer.status in (200, 206):
            answer.headers["X-Goog-Generation"] = self._generation(name)
        return answer

    def _continue(self, request: Request, upload_id: str) -> Answer:
        session = self._sessions.get(upload_id)
        if session is None:
            return refusal(404, "notFound", "No such upload")
        if session.answer:
            return session.answer
        if re.fullmatch(r"bytes \*/\d+", request.headers.get("content-range", "")):  # how much is there?
            return Answer(308, {"Range": f"bytes=0-{session.stored - 1}"} if session.stored else {}, b"")
        asked = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", request.headers.get("content-range", ""))
        if asked and int(asked[1]) < session.stored:  # some of it was stored by an earlier try
            fresh = request.body[session.stored - int(asked[1]) :]
            if not fresh:
                return Answer(308, {"Range": f"bytes=0-{session.stored - 1}"}, b"")
            range_ = f"bytes {session.stored}-{asked[2]}/{asked[3]}"
            request = dataclasses.replace(request, body=fresh, headers=request.headers | {"content-range": range_})
        ends = asked and asked[3] != "*" and int(asked[2]) + 1 == int(asked[3])
        if ends and session.condition is not None and not self._matches(session.name, session.condition):
            return _precondition_failed()
        answer = self._ask(request)
        if answer.status == 308 and asked:
            session.stored = int(asked[2]) + 1
        elif answer.status == 200:
            session.answer = answer
        return answer

    def keep_half(self, request: Request) -> None:
        """Stores the first half of a piece of a resumable upload, as the service does with what has arrived."""
        asked = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", request.headers.get("content-range", ""))
        if asked and "upload_id" in request.query and len(request.body) > 1:
            half = request.body[: len(request.body) // 2]
            range_ = f"bytes {asked[1]}-{int(asked[1]) + len(half) - 1}/{asked[3]}"
            self.serve(dataclasses.replace(request, body=half, headers=request.headers | {"content-range": range_}))

    def _matches(self, name: str, generation: str) -> bool:
        return self._generation(name) == generation

    def _generation(self, name: str) -> str:
        try:
            return self._emulated.get_file_obj(self.bucket, name)["generation"]
        except NotFound:
            return "0"

    def _object(self, name: str) -> str:
        return f"/storage/v1/b/{self.bucket}/o/{urllib.parse.quote(name, safe='')}"

    def _ask(self, request: Request) -> Answer:
        with self._turns, closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as connection:
            connection.request(request.method, request.path, request.body or None, _kept(request.headers))
            response = connection.getresponse()
            body = response.read()
            return Answer(response.status, _kept(dict(response.getheaders())), body)


def _stop(server: HTTPServer) -> None:
    """Stops a server, which looks up only every half second: for that nobody has to wait."""
    threading.Thread(target=lambda: (server.shutdown(), server.server_close()), daemon=True).start()


_PUBLIC = ("www.googleapis.com", "storage.googleapis.com")
_HOP_BY_HOP = ("connection", "content-length", "transfer-encoding", "date", "server", "accept-encoding", "expect")


def _kept(headers: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in _HOP_BY_HOP}


@dataclasses.dataclass
class _Session:
    """A resumable upload: what it makes, on what condition, how many bytes are there, and how it ended."""

    name: str
    condition: str | None
    stored: int = 0
    answer: Answer | None = None


def _is_empty_upload(request: Request) -> bool:
    return request.query.get("uploadType") == "media" and not request.body


def _as_multipart(request: Request, name: str) -> Request:
    """The upload of an empty object in the one form in which the emulator understands it."""
    parts = [b"Content-Type: application/json\r\n\r\n{}", b"Content-Type: application/octet-stream\r\n\r\n"]
    body = b"".join(b"--part\r\n" + part + b"\r\n" for part in parts) + b"--part--\r\n"
    path = re.sub("uploadType=media", "uploadType=multipart", request.path)
    return Request(request.method, path, {"content-type": "multipart/related; boundary=part"}, body)


def _precondition_failed() -> Answer:
    return refusal(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")


def name_of(request: Request) -> str:
    """The object that a request is about; empty where it is about none."""
    if "name" in request.query:
        return request.query["name"]
    found = re.search(r"/o/([^?]+)", request.path)
    if found:
        return urllib.parse.unquote(found[1])
    part = re.search(rb'\{.*?"name": ?"([^"]+)".*?\}', request.body)
    return part[1].decode() if part else ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, storage: Storage, plan: Plan, slow: bool, tls: ssl.SSLContext | None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.storage, self.plan, self.slow, self.tls = storage, plan, slow, tls
        if slow:  # else the system takes in what the client sends, however slowly we read
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.requests: list[Request] = []
        self.numbers = threading.Lock()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Greets the client in its own thread, where a slow one keeps nobody waiting."""
        super().finish_request(self.tls.wrap_socket(request, server_side=True) if self.tls else request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients that are killed, and connections that we reset ourselves, are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        server = self.server
        length = int(self.headers.get("Content-Length") or 0)
        request = Request(
            self.command,
            self.path,
            {key.lower(): value for key, value in self.headers.items()},
            self._body(length),
        )
        if len(request.body) < length:  # the client was killed while it sent
            server.storage.keep_half(request)
            self.close_connection = True
            return
        with server.numbers:
            number = len(server.requests)
            server.requests.append(request)
        fault = server.plan(number, request)
        if isinstance(fault, Answer):
            self._send(fault)
        else:
            self._answer(request, fault)

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":  # as TensorFlow's client sends, with a length besides
            return b"".join(iter(self._chunk, b""))
        if not self.server.slow:
            return self.rfile.read(length)
        driblets = []
        for start in range(0, length, max(1, length // 8)):
            time.sleep(0.02)
            driblets.append(self.rfile.read(min(max(1, length // 8), length - start)))
        return b"".join(driblets)

    def _chunk(self) -> bytes:
        line = self.rfile.readline().strip()
        chunk = self.rfile.read(int(line, 16)) if line else b""  # no line: the client was killed
        self.rfile.readline()
        return chunk

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _answer(self, request: Request, fault: Fault | None) -> None:
        storage = self.server.storage
        refusals = {
            Fault.unavailable: refusal(503, "backendError", "Service Unavailable"),
            Fault.too_many: refusal(429, "rateLimitExceeded", "Too many requests"),
            Fault.timed_out: refusal(408, "uploadBrokenConnection", "Request Timeout"),
            Fault.broken: refusal(500, "internalError", "Internal Server Error"),
            Fault.bad_gateway: refusal(502, "badGateway", "Bad Gateway"),
            Fault.gateway_timed_out: refusal(504, "gatewayTimeout", "Gateway Timeout"),
        }
        if fault in refusals:
            return self._send(refusals[fault])
        if fault is Fault.request_cut:
            storage.keep_half(request)
        if fault in (Fault.request_cut, Fault.request_lost):
            return self._reset()
        if fault is Fault.flipped_upload and request.is_upload:
            request = dataclasses.replace(request, body=_flipped(request))
        answer = storage.serve(request)
        if fault is Fault.answer_lost:
            return self._reset()
        if fault is Fault.unavailable_after:
            return self._send(refusals[Fault.unavailable])
        if fault is Fault.flipped_download and request.is_download and answer.body:
            middle = len(answer.body) // 2
            changed = bytes([answer.body[middle] ^ 1])
            answer = dataclasses.replace(answer, body=answer.body[:middle] + changed + answer.body[middle + 1 :])
        return self._send(answer, fault)

    def _send(self, answer: Answer, fault: Fault | None = None) -> None:
        self.send_response_only(answer.status)
        for key, value in answer.headers.items():
            # The emulator takes itself to be reached without TLS.
            self.send_header(key, re.sub("^http:", "https:", value) if self.server.tls else value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        half = len(answer.body) // 2
        if fault is Fault.answer_cut:
            self.wfile.write(answer.body[:half])
            self._reset()
        elif fault is Fault.answer_stalls:
            self.wfile.write(answer.body[:half])
            self.connection.settimeout(20)
            with suppress(OSError):
                self.connection.recv(1)  # until the client hangs up
            self.close_connection = True
        elif fault is Fault.answer_slow:
            step = max(1, len(answer.body) // 8)
            for start in range(0, len(answer.body), step):
                self.wfile.write(answer.body[start : start + step])
                time.sleep(0.02)
        else:
            self.wfile.write(answer.body)

    def _reset(self) -> None:
        """Ends the connection as a crash would: by a reset, not by a farewell."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with suppress(OSError):
            self.wfile.flush()
        self.connection.close()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


def _flipped(request: Request) -> bytes:
    """The body with one bit of the object's own bytes changed: of the last part where there are several."""
    body = request.body
    if request.query.get("uploadType") != "multipart":
        middle = len(body) // 2
    else:
        start = body.rindex(b"\r\n\r\n") + 4
        end = body.rindex(b"\r\n--")
        middle = (start + end) // 2 if end > start else start
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


@contextmanager
def storage(bucket: str = "models") -> Iterator[Storage]:
    """An empty bucket, for the time of the context."""
    yield Storage(bucket)


@contextmanager
def public(behind: Storage, folder: Path, plan: Plan = no_faults) -> Iterator[tuple[_Server, dict[str, str]]]:
    """A proxy under the service's own names, and the environment by which a process's clients come here.

    It is the only way for TensorFlow's gs:// file system, which knows no other address.

    Args:
        behind, plan: see `proxy`.
        folder: for the certificate.
    """
    key, certificate = public_names.certificate(*_PUBLIC)
    (folder / "key.pem").write_bytes(key)
    (folder / "roots.pem").write_bytes(certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "roots.pem", folder / "key.pem")
    with proxy(behind, plan, tls=context) as server, public_names.all_led_to(server.server_port) as https_proxy:
        yield (
            server,
            {
                "https_proxy": https_proxy,
                "CURL_CA_BUNDLE": str(folder / "roots.pem"),
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            },
        )


@contextmanager
def proxy(
    behind: Storage, plan: Plan = no_faults, slow: bool = False, tls: ssl.SSLContext | None = None
) -> Iterator[_Server]:
    """A proxy; `server_port` is where it listens, `requests` what it was asked; `slow` takes uploads in driblets."""
    server = _Server(behind, plan, slow, tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url(server: _Server) -> str:
    """What STORAGE_EMULATOR_HOST has to be."""
    return f"http://127.0.0.1:{server.server_port}"


def at_request(number: int, fault: Fault) -> Plan:
    """A fault that strikes once."""
    return lambda current, _: fault if current == number else None
