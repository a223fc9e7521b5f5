"""Kubeflow Pipelines on loopback: an HTTP server that speaks its v2beta1 API as far as kfp's client asks it."""

import contextlib
import json
import re
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class KubeflowServer:
    """See the module.

    Attributes:
        calls: method, path and body of each request.
        tokens: that requests were sent with.
        faults: by method and path's end, status and message of its answers.
        stages: of the runs: each look at one shows the next, and the last stays.
        namespace: that every list must be asked within, as an installation of several users wants it; empty for one.
        experiments, runs, schedules: what is there, by id.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.tokens: set[str | None] = set()
        self.faults: dict[tuple[str, str], tuple[int, str]] = {}
        self.stages: list[dict] = []
        self.namespace = ""
        self.experiments: dict[str, dict] = {}
        self.runs: dict[str, dict] = {}
        self.schedules: dict[str, dict] = {}

    def sent(self, method: str, path: str) -> list[Any]:
        """Bodies of the requests to a path."""
        return [body for one, there, body in self.calls if (one, there) == (method, path)]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """Status and body."""
        self.calls.append((method, path, body))
        if fault := self.faults.get((method, path)):
            return fault[0], {"error": fault[1], "code": 13, "message": fault[1], "details": []}
        if method == "GET" and path in ("runs", "experiments") and query.get("namespace", "") != self.namespace:
            return 400, {"error": f"Invalid input error: {path} of namespace {query.get('namespace')!r}", "code": 3}
        kind, _, rest = path.partition("/")
        name, _, deed = rest.partition(":")
        return getattr(self, f"_{kind}")(method, name, deed, query, body)

    def _healthz(self, *_: Any) -> tuple[int, Any]:
        return 200, {"multi_user": False}

    def _experiments(self, method: str, _name: str, _deed: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if method == "GET":
            return 200, {"experiments": _filtered(self.experiments, query)}
        return 200, _added(self.experiments, "experiment_id", body)

    def _runs(self, method: str, name: str, deed: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if not name:
            if method == "GET":
                return 200, {"runs": _filtered(self.runs, query)}
            return 200, _added(self.runs, "run_id", {**body, "state": "PENDING"})
        if name not in self.runs:
            return 404, {"error": f"Run {name} not found", "code": 5, "message": f"Run {name} not found"}
        if deed == "terminate":
            self.stages = [{"state": "CANCELING"}, {"state": "CANCELED"}]
        elif self.stages:
            self.runs[name].update(self.stages.pop(0) if len(self.stages) > 1 else self.stages[0])
        return 200, self.runs[name]

    def _recurringruns(self, method: str, name: str, _deed: str, _query: dict[str, str], body: Any) -> tuple[int, Any]:
        if method == "POST":
            return 200, _added(self.schedules, "recurring_run_id", body)
        return (200, {}) if self.schedules.pop(name, None) else (404, {"message": f"Job {name} not found"})


def _added(there: dict[str, dict], key: str, body: dict) -> dict:
    made = {**body, key: str(uuid.uuid4())}
    there[made[key]] = made
    return made


def _filtered(there: dict[str, dict], query: dict[str, str]) -> list[dict]:
    [wanted] = json.loads(query["filter"])["predicates"]
    value = wanted.get("stringValue") or wanted.get("string_value")
    return [one for one in there.values() if one[wanted["key"]] == value]


@contextlib.contextmanager
def running() -> Iterator[tuple[KubeflowServer, str]]:
    """A server and its address, for the time of the context."""
    server = KubeflowServer()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            address = urllib.parse.urlparse(self.path)
            path = re.fullmatch(r"/apis/v2beta1/(.*)", address.path)
            assert path
            server.tokens.add(self.headers.get("authorization"))
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = dict(urllib.parse.parse_qsl(address.query))
            status, body = server.answer(self.command, path[1], query, json.loads(content) if content else None)
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_DELETE = _do

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
