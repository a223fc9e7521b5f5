"""TensorFlow Serving's REST API over Tornado, with health and metrics beside it.

Tornado and not an ASGI server, because it bounds the time for a request's head and body and the bytes of a body while
it reads; an application behind ASGI never sees the head of a slow client.
"""

import asyncio
import functools
import logging
import re
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import numpy as np
from tornado import iostream, web
from tornado.httpserver import HTTPServer

from pipeline.serving import protos, tensors_json
from pipeline.serving.gzipped import Unfolder
from pipeline.serving.model import Model, Signature
from pipeline.serving.refusal import Code, Refused, invalid
from pipeline.serving.service import Service
from trainer_module import lines

_PREDICT = re.compile(r"(?i)/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:(classify|regress|predict)")
_ASK = re.compile(r"(?i)/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?(/metadata)?")
_MAX_VERSION = 2**63 - 1
# Of a body that is too large so much is read and dropped before the connection is cut, so that its sender hears why.
_READ_ON = 4
_LARGE = 2**20  # bytes of a body whose reading would keep others waiting
_CLIENT_ERRORS = ("tornado.access", "tornado.application", "tornado.general")


class RestServer(HTTPServer):
    """The HTTP server; counts connections, of which each costs a file descriptor."""

    def initialize(self, service: Service) -> None:  # type: ignore[override]
        """Tornado's constructor; listens to nobody yet, see `add_sockets`.

        Args:
            service: that answers.
        """
        config = service.config
        self._requests: set[_Handler] = set()
        given = {"service": service, "requests": self._requests}
        application = web.Application([(".*", _Handler, given)], log_function=_log_nothing)
        super().initialize(
            application,
            idle_connection_timeout=config.idle,
            body_timeout=config.timeout,
            max_body_size=_READ_ON * config.max_request_bytes,
            chunk_size=2**18,
            max_header_size=2**14,
            max_buffer_size=2**20,
        )
        self._streams: set[iostream.IOStream] = set()
        self._max_open = config.max_connections
        # Their lines may quote a request.
        for name in _CLIENT_ERRORS:
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def handle_stream(self, stream: iostream.IOStream, address: tuple) -> None:
        """Takes a new connection, or closes it where there are too many."""
        if len(self._streams) >= self._max_open:
            stream.close()
            return
        self._streams.add(stream)
        super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        """Tornado's, for a connection that ends."""
        self._streams.discard(server_conn.stream)
        super().on_close(server_conn)

    async def drain(self, seconds: float) -> None:
        """Takes no more connections, waits for the requests in flight, and closes what is left."""
        self.stop()
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while clock() < end and (self._requests or any(stream.writing() for stream in self._streams)):
            await asyncio.sleep(0.005)
        await self.close_all_connections()


@web.stream_request_body
class _Handler(web.RequestHandler):
    """One request."""

    def initialize(self, service: Service, requests: set["_Handler"]) -> None:
        self._service, self._requests = service, requests
        self._body, self._held = bytearray(), 0
        self._unfolder: Unfolder | None = None
        self._refusal: Refused | None = None
        self._task: asyncio.Task | None = None

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.clear_header("Server")

    def prepare(self) -> Awaitable[None] | None:
        self._requests.add(self)
        text = self.request.headers.get("Content-Length", "0")
        length = int(text.lstrip("0")[:20] or "0") if text.isdecimal() else 0  # int() takes only so many digits
        with self._refusing():
            self._check_size(length)
        # Who asks first has sent nothing that would have to be read; what is far too large is not read at all.
        asks = self.request.headers.get("Expect", "").lower() == "100-continue"
        if self._refusal and (asks or length > _READ_ON * self._service.config.max_request_bytes):
            return self._answer("predict" if _PREDICT.fullmatch(self.request.path) else "none", self._malformed)
        return None

    def data_received(self, chunk: bytes) -> None:
        if self._refusal is not None:
            return
        with self._refusing():
            if self._held == 0 and self.request.headers.get("Content-Encoding", "").lower() == "gzip":
                self._unfolder = self._unfolder or Unfolder()
            for piece in self._unfolder.pieces(chunk) if self._unfolder else (chunk,):
                self._take(piece)

    def _take(self, chunk: bytes) -> None:
        self._check_size(self._held + len(chunk))
        self._service.budget.take(len(chunk))
        self._held += len(chunk)
        self._body += chunk

    def _check_size(self, size: int) -> None:
        most = self._service.config.max_request_bytes
        if size > most:
            raise Refused(Code.RESOURCE_EXHAUSTED, f"the request is over {most} bytes", "too_many_bytes", 413)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Keeps a refusal until all of the body has come, and what has come of it no longer."""
        try:
            yield
        except Refused as refusal:
            self._refusal = refusal
            self._forget_body()

    def _forget_body(self) -> None:
        self._service.budget.give(self._held)
        self._body, self._held = bytearray(), 0

    def _end_of_request(self) -> None:
        self._requests.discard(self)
        self._forget_body()

    def on_finish(self) -> None:
        self._end_of_request()

    def on_connection_close(self) -> None:
        self._end_of_request()
        if self._task:
            self._task.cancel()

    async def get(self) -> None:
        path = self.request.path
        pages = {"/healthz": self._health, "/readyz": self._health, "/metrics": self._metrics}
        pages["/monitoring/prometheus/metrics"] = self._metrics  # where TensorFlow Serving has them
        if page := pages.get(path):
            page()
        elif path.startswith("/v1/"):
            await self._answer(*self._asked(path))
        else:
            await self._answer("none", self._no_page)

    async def post(self) -> None:
        path = self.request.path
        if match := _PREDICT.fullmatch(path):
            name, version, label, method = match.groups()
            await self._answer(method.lower(), functools.partial(self._predict, name, version, label, method.lower()))
        elif path.startswith("/v1/"):
            await self._answer("none", self._malformed)
        else:
            await self._answer("none", self._no_page)

    async def head(self) -> None:
        await self.get()  # of which Tornado leaves the body out

    async def _other(self) -> None:
        await self._answer("none", self._malformed)

    put = delete = patch = options = _other

    def _asked(self, path: str) -> tuple[str, Any]:
        match = _ASK.fullmatch(path)
        if not match:
            return "none", self._malformed
        name, version, label, metadata = match.groups()
        function = self._metadata if metadata else self._status
        return ("metadata" if metadata else "status"), functools.partial(function, name, version, label)

    async def _answer(self, method: str, function: Any) -> None:
        self._task = asyncio.current_task()
        async with self._service.answering("rest", method) as outcome:
            if self._refusal:
                raise self._refusal
            if self._unfolder:
                self._unfolder.end()
            self._end(200, await function())
        if outcome.refusal:
            self._end(outcome.refusal.http, tensors_json.error(outcome.refusal.message))

    def finish(self, chunk: str | bytes | dict | None = None) -> "asyncio.Future[None]":
        """Tornado's; it would wait for ever for a client that does not take the answer, who keeps a connection so."""
        assert self.request.connection is not None
        stream = self.request.connection.stream  # type: ignore[attr-defined]
        sent = super().finish(chunk)
        if not sent.done():
            timer = asyncio.get_running_loop().call_later(self._service.config.timeout, stream.close)
            sent.add_done_callback(lambda _: timer.cancel())
        return sent

    def _end(self, status: int, body: bytes) -> None:
        self.set_status(status)
        if status == Code.RESOURCE_EXHAUSTED.value:
            self.set_header("Retry-After", "1")
        if self._service.stopping:
            self.set_header("Connection", "close")
        self.finish(body)

    async def _malformed(self) -> bytes:
        raise invalid(f"Malformed request: {self.request.method} {self.request.path[:200]}")

    async def _no_page(self) -> bytes:
        raise Refused(Code.NOT_FOUND, "there is no such page")

    async def _predict(self, name: str, version: str | None, label: str | None, method: str) -> bytes:
        with self._service.versions.lease(unquote(name), _number(version), unquote(label or "")) as model:
            body, self._body = self._body, bytearray()  # still counted as held, for what is parsed is about as large
            read = functools.partial(_read, body, model, method, self._service.config.max_queue)
            signature, form, tensors = await asyncio.to_thread(read) if len(body) > _LARGE else read()
            del body, read
            return tensors_json.answer(form, await self._service.predict(signature, tensors))

    async def _status(self, name: str | None, version: str | None, label: str | None) -> bytes:
        if name is None:
            raise invalid("Missing model name in request.")
        if label:
            with self._service.versions.lease(unquote(name), None, unquote(label)) as model:
                version = str(model.version)
        states = self._service.versions.states(unquote(name), _number(version))
        return _json(protos.status(states))

    async def _metadata(self, name: str | None, version: str | None, label: str | None) -> bytes:
        if name is None:
            raise invalid("Missing model name in request.")
        with self._service.versions.lease(unquote(name), _number(version), unquote(label or "")) as model:
            spec, signatures = protos.spec(unquote(name), model.version), protos.signatures(model)
            return b'{"model_spec": %b, "metadata": {"signature_def": %b}}' % (_json(spec), _json(signatures))

    def _health(self) -> None:
        well = self.request.path == "/healthz" or not self._service.stopping
        self._end(200 if well else 503, b'{"status": "%b"}' % (b"ok" if well else b"stopping"))

    def _metrics(self) -> None:
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.finish(self._service.metrics.page())

    def log_exception(self, *_: Any) -> None:
        """Tornado's would quote the request."""

    def write_error(self, status_code: int, **_: Any) -> None:  # of a method that Tornado does not know
        self._service.metrics.failed("http")
        self._service.metrics.answered("rest", "none", "UNIMPLEMENTED" if status_code == 405 else "INTERNAL", 0)
        self.finish(tensors_json.error(f"HTTP status {status_code}"))


def _read(
    body: bytearray, model: Model, method: str, most: int
) -> tuple[Signature, tensors_json.Form, dict[str, np.ndarray]]:
    document = tensors_json.parse(body)
    tensors_json.check_count(document, most)
    signature = model.signature(tensors_json.signature_name(document))
    if method != "predict":
        raise invalid(f"Expected {method} signature method_name to be tensorflow/serving/{method}")
    return signature, *tensors_json.tensors(document, signature)


def _number(version: str | None) -> int | None:
    if version is None:
        return None
    if len(version) > 19 or int(version) > _MAX_VERSION:
        raise invalid("Failed to convert version: it is no 64-bit number.")
    return int(version)


def _json(message: Any) -> bytes:
    return lines.message_to_json(message).encode()


def _log_nothing(_: web.RequestHandler) -> None:
    """Requests are counted, see `Service.answering`."""
