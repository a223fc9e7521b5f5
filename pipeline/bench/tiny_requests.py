"""A million tiny requests, most of them wrong, by REST and gRPC: each gets its status, and the server keeps nothing.

Takes a quarter of an hour on two cores, or less with --count N. Fails at the first request that is answered otherwise
than it must be.
"""

import asyncio
import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import console
from pipeline.bench import serve

if TYPE_CHECKING:
    import grpc

_CONNECTIONS = 8
_FIRST_SHARE = 0.01
_PREDICT = "POST /v1/models/encoder:predict"
# What is sent: start of the head, body, status.
_BY_REST = (
    (_PREDICT, b"{}", 400),
    (_PREDICT, b"", 400),
    (_PREDICT, b"[", 400),
    (_PREDICT, b"[1]", 400),
    (_PREDICT, b'{"instances": [NaN]}', 400),
    (_PREDICT, b'{"instances": [{"b64": "*"}]}', 400),
    (_PREDICT, b'{"instances": [{"b64": "AAA="}]}', 400),
    (_PREDICT, b'{"instances": [], "signature_name": "no"}', 400),
    (_PREDICT, b'{"instances": [[]], "signature_name": "pixels"}', 400),
    (_PREDICT, b"\x00\xff", 400),
    ("POST /v1/models/encoder/versions/99:predict", b"{}", 404),
    ("POST /v1/models/encoder:classify", b"{}", 400),
    ("PUT /v1/models/encoder", b"{}", 400),
    ("GET /v1/models/encoder", b"", 200),
    ("GET /v1/models/encoder/labels/no", b"", 400),
    ("GET /v1/models/other", b"", 404),
    ("GET /nothing", b"", 404),
    ("GET /readyz", b"", 200),
)
# Method, message, name of the status; CANCELLED: the stream is reset as soon as it is sent.
_SERVICE = "/tensorflow.serving.PredictionService/"
_NAMED = b"\x0a\x09\x0a\x07encoder"  # a PredictRequest of the model, with no inputs
_BY_GRPC = (
    ("Predict", b"", "INVALID_ARGUMENT"),
    ("Predict", b"\xff", "INVALID_ARGUMENT"),
    ("Predict", _NAMED, "INVALID_ARGUMENT"),
    ("Predict", _NAMED, "CANCELLED"),
    ("GetModelMetadata", _NAMED, "INVALID_ARGUMENT"),
    ("Classify", b"", "UNIMPLEMENTED"),
)


def measure(count: int = 1_000_000) -> Mapping[str, float]:
    """Sends them to a server of the demo's encoder.

    Args:
        count: requests, of which the first hundredth is sent before the first look.

    Returns:
        requests, requests_per_second; rss_mb_first, rss_mb, rss_ratio: the server's memory after the first hundredth
        and at the end; files_first, files: that it holds open; threads_first, threads.

    Raises:
        RuntimeError: a request was answered with another status.
    """
    first = max(1, int(count * _FIRST_SHARE))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "1"
        serve.make("demo", 64, model)
        with serve.Server(model) as server:
            looks, seconds = [], 0.0
            for requests in (first, max(1, count - first)):
                seconds += asyncio.run(send(server.rest, server.target, requests))
                looks.append(server.look())
                console.line(f"{requests:,} requests: {looks[-1]}")
    before, after = (dataclasses.asdict(look) for look in looks)
    return {
        "requests": float(count),
        "requests_per_second": count / seconds,
        **{f"{name}_first": float(value) for name, value in before.items()},
        **{name: float(value) for name, value in after.items()},
        "rss_ratio": after["rss_mb"] / before["rss_mb"],
    }


async def send(rest: str, target: str, requests: int) -> float:
    """Sends requests of each kind in turn, over several connections of each protocol.

    Args:
        rest: "host:port" of HTTP.
        target: "host:port" of gRPC.
        requests: in all.

    Returns:
        Seconds.

    Raises:
        RuntimeError: one was answered with another status.
    """
    import grpc

    numbers = iter(range(requests))
    start = time.perf_counter()
    async with grpc.aio.insecure_channel(target) as channel:
        by_rest = (_by_rest(rest, numbers) for _ in range(_CONNECTIONS))
        by_grpc = (_by_grpc(channel, numbers) for _ in range(_CONNECTIONS))
        await asyncio.gather(*by_rest, *by_grpc)
    return time.perf_counter() - start


async def _by_rest(address: str, numbers: Iterator[int]) -> None:
    reader, writer = await asyncio.open_connection(*address.split(":"))
    with contextlib.closing(writer):
        for number in numbers:
            line, body, wanted = _BY_REST[number % len(_BY_REST)]
            writer.write(b"%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (line.encode(), len(body), body))
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length))
            _check(f"{line} {body!r}", int(head.split(b" ", 2)[1]), wanted)


async def _by_grpc(channel: "grpc.aio.Channel", numbers: Iterator[int]) -> None:
    for number in numbers:
        method, message, wanted = _BY_GRPC[number % len(_BY_GRPC)]
        call = channel.unary_unary(_SERVICE + method)(message)
        if wanted == "CANCELLED":
            await asyncio.sleep(0)
            call.cancel()
        _check(f"{method} {message!r}", (await call.code()).name, wanted)


def _check(what: str, found: int | str, wanted: int | str) -> None:
    if found != wanted:
        raise RuntimeError(f"{what} was answered with {found} and not with {wanted}")
