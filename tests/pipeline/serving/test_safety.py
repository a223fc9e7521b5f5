"""Hostile clients: whatever they send gets its status, and the server answers the next one as if nothing had been."""

import asyncio
import base64
import concurrent.futures
import contextlib
import gc
import gzip
import json
import logging
import socket
import threading
import time
import zlib
from collections.abc import Iterator

import grpc
import numpy as np
import psutil
import pytest
import requests
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import Running, busy, running
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from pipeline.bench import tiny_requests
from pipeline.serving import incoming, tensors_json
from pipeline.serving.tensors_json import _MAX_LISTS, _MAX_VALUES

PREDICT = "/v1/models/encoder:predict"
SANE = {200, 400, 404, 413, 429}
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
SANE_CODES = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.fixture(scope="module")
def small(encoders) -> Iterator[Running]:
    """A server with small limits and little patience."""
    limits = {"max_request_mb": 0.25, "max_buffered_mb": 0.5, "max_image_mb": 0.1, "max_pixels": 100_000}
    with running(encoders(0), max_queue=32, max_batch=8, timeout=0.6, idle=0.6, max_connections=20, **limits) as made:
        yield made


def instance(data: bytes) -> dict:
    return {"b64": base64.b64encode(data).decode()}


def still_well(server: Running, image: bytes) -> None:
    """It answers, nothing waits, no byte is held, and no request is under way."""
    assert server.predict(instances=[instance(image)]).status_code == 200
    end = time.monotonic() + 10
    budget = server.app._service.budget
    whole = int(server.app._config.max_buffered_mb * 2**20)
    while time.monotonic() < end and (server.app._rest._requests or budget._free != whole):
        time.sleep(0.01)
    assert server.app._batcher.admitted == 0
    assert server.app._batcher._lanes == {}
    assert budget._free == whole
    assert not server.app._rest._requests
    assert server.app._grpc.incoming.free == server.app._config.max_buffered_mb // server.app._config.max_request_mb


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["b64", "instances", "inputs", "image", "image_bytes", "signature_name", "x"]), inner
        )
    ),
    max_leaves=12,
)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "instances": JSON,
        "inputs": JSON,
        "signature_name": st.sampled_from(["pixels", "examples", "serving_default", ""]) | JSON,
    },
)


@FUZZ
@given(document=DOCUMENTS)
def test_any_json_gets_a_status(server, document):
    answer = server.post(PREDICT, data=json.dumps(document))
    assert answer.status_code in SANE
    assert ("error" in answer.json()) == (answer.status_code != 200)


@FUZZ
@given(body=st.binary(max_size=300), path=st.sampled_from([PREDICT, "/v1/models/encoder", "/v1/models/%00:predict"]))
def test_any_bytes_get_a_status(server, body, path):
    assert server.post(path, data=body).status_code in SANE


@FUZZ
@given(data=st.data())
def test_any_damage_to_an_image_is_an_error_or_an_embedding(server, png, data):
    image = bytearray(png(1))
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(image)))
    body = server.predict(instances=[instance(bytes(image[:cut])), instance(png(2))]).json()
    assert len(body["predictions"]) == 2
    assert None not in body["predictions"][1]
    assert {error["index"] for error in body.get("errors", [])} == ({0} if None in body["predictions"][0] else set())


@FUZZ
@given(
    dtype=st.integers(0, 30),
    dims=st.lists(st.integers(-2, 2**40), max_size=5),
    unknown=st.booleans(),
    values=st.lists(st.binary(max_size=4), max_size=4),
    content=st.binary(max_size=16),
    signature=st.sampled_from(["", "pixels", "examples", "no"]),
    name=st.sampled_from(["image_bytes", "image", "examples", "x"]),
)
def test_any_tensor_gets_a_code(server, dtype, dims, unknown, values, content, signature, name):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "encoder", signature
    tensor = request.inputs[name]
    tensor.dtype, tensor.tensor_content, tensor.tensor_shape.unknown_rank = dtype, content, unknown
    for size in dims:
        tensor.tensor_shape.dim.add(size=size)
    tensor.string_val.extend(values)
    tensor.float_val.append(1.0)
    with pytest.raises(grpc.RpcError) as caught:
        server.prediction.Predict(request, timeout=20)
    assert caught.value.code() in SANE_CODES


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_message_gets_a_code(server, data):
    call = server.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    with pytest.raises(grpc.RpcError) as caught:
        call(data, timeout=20)
    assert caught.value.code() in SANE_CODES


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"instances": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"instances": ' + b'{"b64":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    ],
)
def test_deep_nesting_is_400(server, body, png):
    assert server.post(PREDICT, data=body).status_code == 400
    still_well(server, png(0))


@pytest.mark.parametrize(
    "body",
    [
        b'{"instances": [' + b"[]," * _MAX_LISTS + b"0]}",
        b'{"instances": [' + b"0," * 2_000_000 + b"0]}",
        b'{"instances": [' + b'{"b64":""},' * 2000 + b'{"b64":""}]}',
        b'{"instances": [' + b"1" * 5000 + b"]}",
        b'{"signature_name": "pixels", "instances": [' + b"[[]]," * 100_000 + b"[[]]]}",
        b'{"signature_name": "pixels", "inputs": [[' + b"[[0,0,0]]," * 100 + b"[[0,0,0]]]]}",
    ],
)
def test_giant_numbers_of_instances_are_400(server, body, png):
    assert server.post(PREDICT, data=body).status_code == 400
    still_well(server, png(0))


@pytest.mark.parametrize("value", [b'""', b"0.5"])
def test_more_values_than_allowed_are_refused_before_they_are_parsed(server, monkeypatch, value):
    monkeypatch.setattr(tensors_json.orjson, "loads", None)
    body = b'{"instances": [' + (value + b",") * _MAX_VALUES + value + b"]}"
    answer = server.post(PREDICT, data=body)
    assert (answer.status_code, f"more than {_MAX_VALUES} values" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize("form", ['{"instances": %s}', '{"inputs": %s}', '{"inputs": {"image_bytes": %s}}'])
def test_more_instances_than_allowed_are_refused_before_any_is_looked_at(server, form):
    body = form % f"[{'7,' * 2000}7]"  # which are no images
    answer = server.post(PREDICT, data=body)
    said = "2001 instances are over the server's limit of 1024 in a request"
    assert (answer.status_code, answer.json()["error"]) == (400, said)


def test_a_large_body_is_read_beside_the_event_loop(server, monkeypatch, png):
    begun, gate, parse = threading.Event(), threading.Event(), tensors_json.parse

    def slow(body: bytes) -> dict:
        if len(body) > 2**20:
            begun.set()
            gate.wait(20)
        return parse(body)

    monkeypatch.setattr(tensors_json, "parse", slow)
    large = {"instances": [instance(png(0))], "more": "x" * 2**20}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.predict, **large)
        assert begun.wait(20)
        assert server.predict(instances=[instance(png(0))]).status_code == 200
        assert not answer.done()
        gate.set()
        assert answer.result().status_code == 200
    still_well(server, png(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0, 256.0, 1e30])
def test_pixels_that_are_none_are_an_error_of_their_row(server, value):
    pixels = np.full((3, 20, 20, 3), 100, np.float32)
    alone = server.predict(signature_name="pixels", instances=pixels[:1].tolist()).json()["predictions"][0]
    pixels[1, 7, 7, 1] = value
    answer = server.post(PREDICT, data=json.dumps({"signature_name": "pixels", "instances": pixels.tolist()}))
    body = answer.json()
    (error,) = body["errors"]
    assert error["index"] == 1
    assert error["error"].startswith("not_pixels: its values are ")
    assert set(body["predictions"][1]) == {None}
    np.testing.assert_allclose([body["predictions"][0], body["predictions"][2]], [alone, alone], atol=1e-5)


def test_pixels_that_an_interpolation_made_are_taken(server):
    pixels = np.full((1, 20, 20, 3), -0.4, np.float32)
    pixels[0, :10] = 255.4
    assert "errors" not in server.predict(signature_name="pixels", instances=pixels.tolist()).json()


@pytest.mark.parametrize("digits", [30, 5000])
def test_a_length_of_many_digits_is_413(server, digits):
    with socket.create_connection(server.rest.removeprefix("http://").split(":")) as client:
        client.sendall(b"POST /v1/models/encoder:predict HTTP/1.1\r\nHost: x\r\nContent-Length: ")
        client.sendall(b"9" * digits + b"\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_over_the_limit_is_413_and_is_never_held(small, png):
    for headers in ({}, {"Expect": "100-continue"}):
        answer = small.post(PREDICT, data=b"x" * 400_000, headers=headers)
        assert (answer.status_code, "is over" in answer.json()["error"]) == (413, True)
    chunks = (b"x" * 10_000 for _ in range(40))
    assert small.post(PREDICT, data=chunks).status_code == 413
    still_well(small, png(0))


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("POST", "/metrics", 404), ("X", "/", 405)])
def test_what_no_handler_is_for_is_counted_as_well(server, method, path, status):
    counted, errors = server.metric("requests_total"), server.metric("errors_total")
    assert requests.request(method, server.rest + path, timeout=20).status_code == status
    assert (server.metric("requests_total"), server.metric("errors_total")) == (counted + 1, errors + 1)


@pytest.mark.parametrize(("length", "expect"), [(99_999_999_999, ""), (400_000, "Expect: 100-continue\r\n")])
def test_a_body_that_will_not_be_read_is_refused_before_it_comes(small, png, length, expect):
    refusals = small.metric('errors_total{kind="too_many_bytes"}')
    with socket.create_connection(small.rest.removeprefix("http://").split(":")) as client:
        client.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\n{expect}Content-Length: {length}\r\n\r\n".encode())
        client.settimeout(0.4)  # less than a body may take
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"the request is over 262144 bytes" in answer
    assert small.metric('errors_total{kind="too_many_bytes"}') == refusals + 1
    still_well(small, png(0))


def test_a_compressed_bomb_is_refused_while_it_unfolds(small, png):
    for size in (2**19, 2**26):
        body = gzip.compress(b"\0" * size)
        with socket.create_connection(small.rest.removeprefix("http://").split(":")) as client:
            head = (
                f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            client.sendall(head.encode() + body)
            assert client.recv(100).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))
    still_well(small, png(0))


def test_a_compressed_message_is_refused_by_its_unfolded_size(small, png):
    request = predict_pb2.PredictRequest()
    request.inputs["x"].tensor_content = b"\0" * 2**24
    with pytest.raises(grpc.RpcError) as caught:
        small.prediction.Predict(request, timeout=20, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "unfolds to more than" in caught.value.details()  # gRPC itself would have unfolded all of it
    still_well(small, png(0))


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_answered(server, png, compression):
    request = request_of(*[png(0)] * 20)  # smaller when compressed, else gRPC does not
    plain = server.prediction.Predict(request, timeout=20)
    assert server.prediction.Predict(request, timeout=20, compression=compression) == plain


def test_names_that_swell_on_the_wire_get_their_code(server, png):
    request = request_of(png(0))
    for number in range(10):
        request.inputs["\U0001f600" * 99 + str(number)].CopyFrom(request.inputs["image_bytes"])
    strict = ("grpc.absolute_max_metadata_size", 8192)  # above it by default a client refuses more and more often
    with grpc.insecure_channel(server.target, [strict]) as channel, pytest.raises(grpc.RpcError) as caught:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("the inputs are ")


_GZIP = gzip.compress(bytes(99))


@pytest.mark.parametrize("damage", [_GZIP[:2], _GZIP[:-4], _GZIP + b"x", b"\x78"], ids=["head", "cut", "more", "zlib"])
def test_a_damaged_compressed_message_is_an_invalid_argument(server, damage):
    call = server.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    with pytest.raises(grpc.RpcError) as caught:
        call(damage, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the body" in caught.value.details()


GRPC_METHODS = [
    "tensorflow.serving.PredictionService/Predict",
    "tensorflow.serving.PredictionService/GetModelMetadata",
    "tensorflow.serving.ModelService/GetModelStatus",
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


@pytest.mark.parametrize("method", GRPC_METHODS)
def test_slow_messages_are_few_and_are_given_up_and_others_do_not_wait_for_them(small, png, monkeypatch, method):
    monkeypatch.setattr(incoming, "_SOON", 0.3)  # below the server's patience of 0.6
    gone = threading.Event()

    def never() -> Iterator[bytes]:
        gone.wait(30)
        yield from ()

    calls = [small.channel.stream_stream("/" + method)(never(), timeout=20) for _ in range(6)]
    start = time.monotonic()
    while time.monotonic() - start < 0.5:
        small.prediction.Predict(request_of(png(0)), timeout=5)
    codes = [call.code() for call in calls]
    gone.set()
    # Of a quarter of a MiB each, for which half a MiB may be held.
    assert sorted(code.name for code in codes) == ["DEADLINE_EXCEEDED"] * 2 + ["RESOURCE_EXHAUSTED"] * 4
    assert time.monotonic() - start < 5
    still_well(small, png(0))


UNKNOWN_SERVICE = health_pb2.HealthCheckRequest(service="none").SerializeToString()


@pytest.mark.parametrize(
    ("method", "message", "timeout", "code"),
    [
        (GRPC_METHODS[0], b"", 5, grpc.StatusCode.INVALID_ARGUMENT),
        (GRPC_METHODS[0], b"\xff", 5, grpc.StatusCode.INVALID_ARGUMENT),
        (GRPC_METHODS[0], None, 0.01, grpc.StatusCode.DEADLINE_EXCEEDED),  # its client has gone
        (GRPC_METHODS[3], b"\xff", 5, grpc.StatusCode.INVALID_ARGUMENT),
        (GRPC_METHODS[3], UNKNOWN_SERVICE, 5, grpc.StatusCode.NOT_FOUND),
        (GRPC_METHODS[4], b"\xff", 5, grpc.StatusCode.INVALID_ARGUMENT),
        (GRPC_METHODS[4], UNKNOWN_SERVICE, 0.01, grpc.StatusCode.DEADLINE_EXCEEDED),
        (GRPC_METHODS[5], b"\xff", 5, grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["empty", "damaged", "gone", "check", "check-unknown", "watch", "watch-gone", "reflection"],
)
def test_calls_that_fail_are_done_with_at_once_and_do_not_fill_their_connection(
    small, png, method, message, timeout, code
):
    gone = threading.Event()

    def said() -> Iterator[bytes]:
        if message is None:
            gone.wait(30)
        else:
            yield message

    gc.collect()
    gc.disable()  # else it would end them now and then
    try:
        for _ in range(80):  # 32 are taken at a time
            call = small.channel.stream_stream("/" + method)(said(), timeout=timeout)
            assert call.code() is code
    finally:
        gc.enable()
        gone.set()
    still_well(small, png(0))


def test_a_call_without_a_message_is_an_invalid_argument(server):
    call = server.channel.stream_unary("/tensorflow.serving.PredictionService/Predict")
    with pytest.raises(grpc.RpcError) as caught:
        call(iter(()), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_calls_that_last_leave_room_for_others(small, png):
    stub = health_pb2_grpc.HealthStub(small.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(40)]  # of 32 calls in all
    first = []
    for watch in watches:
        with contextlib.suppress(grpc.RpcError):
            first.append(next(watch))
    assert [answer.status for answer in first] == [health_pb2.HealthCheckResponse.SERVING] * 8
    assert answered_soon(small, png(0))
    for watch in watches:
        watch.cancel()
    still_well(small, png(0))


def answered_soon(server, image) -> bool:
    """Whether a call is answered within five seconds: those just refused count until the server has done with them."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(grpc.RpcError):
            return bool(server.prediction.Predict(request_of(image), timeout=5).outputs)
        time.sleep(0.05)
    return False


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that unfolds to side x side pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    pixels = zlib.compress(bytes(min(side * (side + 1), 2**24)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_an_image_that_would_unfold_is_refused_by_its_header(server, png):
    before = psutil.Process().memory_info().rss
    answer = server.predict(instances=[instance(bomb(30_000))] * 20)
    assert (answer.status_code, "too_many_pixels" in answer.text) == (400, True)
    assert psutil.Process().memory_info().rss - before < 200 * 2**20
    still_well(server, png(0))


def test_pixels_that_would_unfold_are_refused(server):
    long = np.zeros((1, 1, 2000, 3), np.float32)
    answer = server.predict(signature_name="pixels", instances=long.tolist())
    assert (answer.status_code, "one side at most 16 times the other" in answer.text) == (400, True)
    assert server.predict(signature_name="pixels", instances=[[[]]]).status_code == 400


def test_slow_clients_are_cut_off_and_others_do_not_wait_for_them(small, png):
    address = small.rest.removeprefix("http://").split(":")
    slow = [socket.create_connection(address) for _ in range(8)]
    for number, client in enumerate(slow):
        head = b"POST /v1/models/encoder:predict HTTP/1.1\r\nHost: x\r\n"
        client.sendall(head + (b"Content-Length: 9999\r\n\r\n{" if number % 2 else b""))
    start = time.monotonic()
    while time.monotonic() - start < 1.2:
        for client in slow:
            with contextlib.suppress(OSError):
                client.sendall(b"X")  # the next byte of a head, or of a body
        assert small.predict(instances=[instance(png(0))]).status_code == 200
        time.sleep(0.1)
    for client in slow:
        client.settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
        client.close()
    still_well(small, png(0))


def test_clients_that_take_no_answer_are_cut_off_and_room_comes_back(small, png):
    host, port = small.rest.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect((host, int(port)))
            client.settimeout(5)
            with contextlib.suppress(OSError):  # the server reads no more of it, or is about to close
                client.sendall(b"GET /v1/models/encoder/metadata HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)
        end = time.monotonic() + 20
        while small.app._rest._streams:
            assert time.monotonic() < end
            time.sleep(0.05)
    still_well(small, png(0))


def test_more_connections_than_allowed_are_closed_and_room_comes_back(small, png):
    address = small.rest.removeprefix("http://").split(":")
    many = [socket.create_connection(address) for _ in range(60)]
    time.sleep(0.2)
    assert len(small.app._rest._streams) <= 20
    for client in many:
        client.close()
    while small.app._rest._streams:
        time.sleep(0.01)
    still_well(small, png(0))


def test_more_grpc_connections_than_allowed_are_closed_and_room_comes_back(small, png):
    def connected(channel: grpc.Channel) -> bool:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
        return True

    alone = ("grpc.use_local_subchannel_pool", 1)
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(small.target, [alone])) for _ in range(30)]
        assert 15 <= sum(map(connected, channels)) <= 20
    with grpc.insecure_channel(small.target, [alone]) as channel:
        end = time.monotonic() + 10
        while not connected(channel):
            assert time.monotonic() < end
    still_well(small, png(0))


def test_a_full_queue_answers_429_and_resource_exhausted_at_once(encoders, png):
    body = {"instances": [instance(png(0))] * 4}
    with running(encoders(0), max_queue=8, max_batch=8) as server:
        with busy(server) as gate, concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda _: server.post(PREDICT, json=body), range(8))
            while server.metric('errors_total{kind="queue_full"}') < 6:
                time.sleep(0.01)
            with pytest.raises(grpc.RpcError) as caught:
                server.prediction.Predict(request_of(png(0)), timeout=20)
            gate.set()
            answers = list(answers)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 6
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["Retry-After"] == "1"
        assert "queue is full" in refused.json()["error"]
        still_well(server, png(0))


def request_of(*images: bytes) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "encoder"
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images))
    return request


def test_deadlines_are_kept_and_what_is_late_is_not_computed(encoders, png):
    with running(encoders(0), timeout=0.3) as server:
        with busy(server):
            batches = server.metric("batch_rows_count ")
            with pytest.raises(grpc.RpcError) as caught:
                server.prediction.Predict(request_of(png(0)), timeout=0.1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            answer = server.predict(instances=[instance(png(0))])
            assert (answer.status_code, "deadline" in answer.json()["error"]) == (504, True)
            assert server.app._batcher.admitted == 0
            assert server.app._batcher._lanes == {}
        assert server.metric("batch_rows_count ") == batches + 1  # that which kept the worker busy
        still_well(server, png(0))


def test_streams_that_are_reset_leave_nothing_behind(server, png):
    request = request_of(png(0))
    for _ in range(10):
        calls = [server.prediction.Predict.future(request, timeout=20) for _ in range(50)]
        for call in calls:
            call.cancel()
    still_well(server, png(0))


def test_connections_that_end_in_the_midst_leave_nothing_behind(small, png):
    address = small.rest.removeprefix("http://").split(":")
    body = json.dumps({"instances": [instance(png(0))]}).encode()
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for cut in (len(head) // 2, len(head), len(head) + len(body) // 2, len(head) + len(body)):
        for _ in range(3):  # fewer in all than may be open
            with socket.create_connection(address) as client:
                client.sendall((head + body)[:cut])
    still_well(small, png(0))


def test_tiny_requests_get_their_status_and_leave_nothing_behind(server, png, caplog):
    # With client and server in one process gRPC's poller logs tracebacks of the one loop that came second.
    caplog.set_level(logging.CRITICAL + 1, "asyncio")
    rest = server.rest.removeprefix("http://")
    asyncio.run(tiny_requests.send(rest, server.target, 500))
    still_well(server, png(0))
    before = held()
    asyncio.run(tiny_requests.send(rest, server.target, 3000))
    still_well(server, png(0))
    end = time.monotonic() + 10  # a connection that the client has closed is there until the server has seen it
    while time.monotonic() < end and held()[1] > before[1]:
        time.sleep(0.05)
    objects, files = held()
    assert objects - before[0] < 300
    assert files <= before[1]


def held() -> tuple[int, int]:
    """Objects that Python's collector knows, and open files, of this process, in which the server runs, too."""
    gc.collect()
    return len(gc.get_objects()), psutil.Process().num_fds()
