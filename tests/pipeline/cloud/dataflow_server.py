"""Dataflow on loopback: an HTTP server that speaks its v1b3 API as far as a client that begins a job asks."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_JOBS = re.compile(r"/v1b3/projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs(?:/(?P<id>[^/?]+))?(?:\?.*)?")


class DataflowServer(ThreadingHTTPServer):
    """See the module.

    Attributes:
        jobs: that were begun: project, region and the Job of the request, in JSON's types.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: list[tuple[str, str, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_port}/"  # the one name that Beam takes with a port


class _Handler(BaseHTTPRequestHandler):
    server: DataflowServer

    def do_POST(self) -> None:
        asked = _JOBS.fullmatch(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked is None or asked["id"]:
            return self._send(404, {})
        self.server.jobs.append((asked["project"], asked["region"], body))
        return self._send(200, self._job(len(self.server.jobs) - 1))

    def do_GET(self) -> None:
        asked = _JOBS.fullmatch(self.path)
        if asked is None or not asked["id"]:
            return self._send(404, {})
        return self._send(200, self._job(int(asked["id"])))

    def _job(self, number: int) -> dict[str, Any]:
        project, region, job = self.server.jobs[number]
        told = {key: job[key] for key in ("name", "type", "clientRequestId")}
        return told | {
            "id": str(number),
            "projectId": project,
            "location": region,
            "currentState": "JOB_STATE_DONE",
        }

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def running() -> Iterator[DataflowServer]:
    """A server, for the time of the context."""
    server = DataflowServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
