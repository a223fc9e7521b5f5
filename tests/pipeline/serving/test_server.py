"""./moco serve as a process: what it imports, what it says, how it stops, and what it refuses at once."""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import requests
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running_server import busy, running
from tensorflow_serving.apis import predict_pb2

from pipeline import cli

ROOT = Path(__file__).parents[3]
# Says which of the heavy packages were imported when it ends.
PROGRAM = """
import sys
from pipeline import cli
code = cli.main(["serve", *sys.argv[1:]])
print("imported:", *sorted({"tfx", "apache_beam", "ml_metadata", "tensorflow_transform"} & set(sys.modules)))
sys.exit(code)
"""


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, *arguments, "--rest-port", "0", "--grpc-port", "0"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def process(encoders) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server and its URL."""
    made = start("--model", str(encoders(0)))
    line = made.stdout.readline()
    found = re.search(r"serving encoder version 1 at (http://127\.0\.0\.1:\d+)/v1/models/encoder and gRPC 127\S+", line)
    assert found, line + made.stderr.read()
    yield made, found[1]
    if made.poll() is None:
        made.kill()
        made.communicate()


def test_it_stops_when_what_is_in_flight_is_finished_and_has_said_nothing_of_it(process, png):
    made, url = process
    body = json.dumps({"instances": [{"b64": base64.b64encode(png(3)).decode()}], "note": "MARK-IN-THE-BODY"}).encode()
    bad = requests.post(f"{url}/v1/models/encoder:predict", data=b'{"instances": "MARK-IN-THE-BODY', timeout=30)
    assert bad.status_code == 400
    with socket.create_connection(url.removeprefix("http://").split(":")) as client:
        head = f"POST /v1/models/encoder:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body[:100])
        time.sleep(0.2)
        made.send_signal(signal.SIGTERM)
        assert made.stdout.readline() == "stopping: finishing what is in flight\n"
        time.sleep(0.2)
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{url}/healthz", timeout=5)
        client.sendall(body[100:])
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"Connection: close" in answer
    out, err = made.communicate(timeout=60)
    assert (made.returncode, out, err) == (0, "imported:\n", "")


def test_a_stop_finishes_what_waits_in_the_queue_by_rest_and_grpc(encoders, png):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "encoder"
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([png(0)]))
    with running(encoders(0)) as server, busy(server) as gate, ThreadPoolExecutor(1) as pool:
        rest = pool.submit(server.predict, instances=[{"b64": base64.b64encode(png(0)).decode()}])
        by_grpc = server.prediction.Predict.future(request, timeout=30)
        while server.app._batcher.admitted < 2:
            time.sleep(0.01)
        stopped = asyncio.run_coroutine_threadsafe(server.app.drain(20), server.loop)
        time.sleep(0.2)
        assert not stopped.done()
        gate.set()
        stopped.result(30)
        assert rest.result(30).status_code == 200
        assert len(by_grpc.result().outputs["embedding"].float_val) == 6


def test_a_stop_does_not_wait_for_who_watches_its_health(encoders):
    with running(encoders(0), grace=20.0) as server:
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        answers = [next(watch).status]
        asked = server.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(
            iter([b""]), timeout=60
        )
        next(asked)
        start = time.monotonic()
        server.wait(server.app.drain(20))
        assert time.monotonic() - start < 3
        with pytest.raises(grpc.RpcError) as caught:
            answers.extend(answer.status for answer in watch)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert answers == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


def test_a_signal_before_it_is_ready_ends_it(encoders):
    made = start("--model", str(encoders(0)))
    time.sleep(1.5)
    made.send_signal(signal.SIGINT)
    made.communicate(timeout=60)
    assert made.returncode in (0, 130)  # the latter where Python itself was still starting


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert cli.main(["serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--model"]),
        (["--max-batch", "0"], ["--max-batch 0 must lie in 1 to 4096", "e.g. --max-batch 1"]),
        (["--max-batch", "many"], ["--max-batch", "many"]),
        (["--timeout", "nan"], ["--timeout nan must lie in"]),
        (["--rest-port", "70000"], ["--rest-port 70000", "65535"]),
        (["--rest-port", "9000", "--grpc-port", "9000"], ["--rest-port and --grpc-port are both 9000"]),
        (["--name", "a/b"], ["--name 'a/b'", "--name encoder"]),
        (["--max-buffered-mb", "1"], ["--max-buffered-mb 1 is below --max-request-mb 32"]),
        (["--port", "1"], ["serve takes no --port", "--rest-port"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(capsys, arguments, words):
    said = refused(capsys, *(["--model", "/nowhere"] if arguments else []), *arguments)
    for word in words:
        assert word in said


def test_a_port_that_is_in_use_is_told_before_tensorflow_is_imported(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for option, other in (("--rest-port", "--grpc-port"), ("--grpc-port", "--rest-port")):
            program = PROGRAM.replace("tfx", "tensorflow")
            command = [sys.executable, "-c", program, "--model", str(tmp_path), option, port, other, "0"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 2
            assert done.stderr.startswith(f"moco: {option} {port} on 127.0.0.1: ")
            assert done.stderr.count("\n") == 1
            assert done.stdout == "imported:\n"


def test_it_listens_on_loopback_unless_told_otherwise(process):
    made, url = process
    port = int(url.rpartition(":")[2])
    rows = [line.split() for line in Path(f"/proc/{made.pid}/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1].split(":") for row in rows if row[3] == "0A"]
    (address,) = [host for host, found in listening if int(found, 16) == port]
    assert address == "0100007F"
    os.kill(made.pid, signal.SIGKILL)
