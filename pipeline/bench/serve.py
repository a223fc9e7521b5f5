"""Speed and memory of ./moco serve beside a bare loop that calls the SavedModel's signature, against their targets.

Takes about ten minutes on two cores, of which the requests between the two looks at the memory (--count of them,
100,000 if not told otherwise) are two.

Server, bare loop and clients are processes of their own, of which one is busy at a time, but for the clients, who ask
the server from the same cores: what they take the server does not have. They send gRPC requests that were serialised
beforehand, and how much they took is among the figures. The bare loop gets the very bytes that the clients send, in
memory, in batches of as many images as all clients have on their way, and turns with the server.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline import console
from pipeline.bench._worker import Bystanders
from pipeline.bench.ingest import SAMPLE
from pipeline.worker import ROOT, Worker, serve

# `./moco serve` leaves the choice of oneDNN to TensorFlow, which other benchmarks make for it.
_PYTHON = ("env", "-u", "TF_ENABLE_ONEDNN_OPTS", sys.executable)
_MEASURING = (*_PYTHON, "-m", "pipeline.bench.serve")
_METHOD = "/tensorflow.serving.PredictionService/Predict"
_FIRST_REQUESTS = 1000
_WARM_SECONDS = 2.0
_IMAGES = 256
_MAX_BATCH = 64  # of the server, too, unless it is told otherwise


@dataclasses.dataclass(frozen=True)
class Load:
    """What is on its way at a time.

    Attributes:
        clients: each waits for its answer before it sends the next request.
        rows: images in a request.
    """

    clients: int
    rows: int

    def __str__(self) -> str:
        """As in the names of figures."""
        return f"{self.clients}x{self.rows}"

    @property
    def together(self) -> int:
        """Images in a batch of the bare loop."""
        return min(_MAX_BATCH, self.clients * self.rows)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        preset: configuration of the encoder.
        side: of the images that it is sent, pixels; JPEG.
        seconds: of each measurement.
        loads: that it is measured under.
        memory: whether the server's memory is looked at.
    """

    preset: str
    side: int
    seconds: float
    loads: tuple[Load, ...]
    memory: bool = False


# 4 clients with batches show the server where requests are few and large.
_SINGLE = (Load(1, 1), Load(8, 1), Load(64, 1))
_SUBJECTS = {
    "demo": Subject("demo", side=64, seconds=8.0, loads=(*_SINGLE, Load(4, 64)), memory=True),
    "resnet50": Subject("moco_v2", side=320, seconds=20.0, loads=_SINGLE),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a figure has to be.

    Attributes:
        figure: its name, without the subject's.
        limit: the most that it may be, or the least.
        least: whether it is the least.
    """

    figure: str
    limit: float
    least: bool = False

    def line(self, name: str, value: float) -> str:
        """Figure and target in words."""
        holds = value >= self.limit if self.least else value <= self.limit
        return (
            f"{'holds' if holds else 'MISSED':<7} {name + '_' + self.figure:<28} {value:>10,.3f}   "
            f"{'at least' if self.least else 'at most'} {self.limit:g}"
        )


_TARGETS = (
    Target("64x1_ratio", 0.9, least=True),
    Target("4x64_ratio", 0.9, least=True),
    Target("1x1_ms_over_bare", 3.0),
    Target("ready_seconds", 10.0),
    Target("rss_ratio", 1.05),
)


def measure(count: int = 100_000) -> Mapping[str, float]:
    """Measures both encoders, with their initial weights, and says which targets are met.

    Args:
        count: requests before the second look at the memory.

    Returns:
        For each model and each load ("64x1": 64 clients, one image a request), of the server, and of the bare loop:
        images_per_second, p50_ms, p95_ms, p99_ms of a request and of a call, and cpu_ms_per_image, processor time,
        which other load on the machine changes less. ratio, of the images per second; cpu_ratio, of the bare loop's
        processor time over the server's; ms_over_bare, of the medians. client_cpu: the cores that the clients took.
        ready_seconds: from the start of `./moco serve` until it answers. others: the share of the machine that whatever
        is not measured took. rss_mb_first, rss_mb, rss_ratio: the server's memory after 1,000 and after `count`
        requests of one image from 64 clients.
    """
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, subject in _SUBJECTS.items():
            for key, value in _measure(name, subject, Path(folder) / name / "1", count).items():
                figures[f"{name}_{key}"] = round(value, 3)
    for name, target in itertools.product(_SUBJECTS, _TARGETS):
        if f"{name}_{target.figure}" in figures:
            console.line(target.line(name, figures[f"{name}_{target.figure}"]))
    return figures


def make(preset: str, side: int, model: Path) -> None:
    """Exports an encoder with its initial weights, and 256 images beside it, in a process of its own.

    Args:
        preset: configuration of the encoder.
        side: of the images, pixels.
        model: folder for the SavedModel.

    Raises:
        RuntimeError: that process failed.
    """
    command = [*_MEASURING, "make", preset, str(side), str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def _measure(name: str, subject: Subject, model: Path, count: int) -> dict[str, float]:
    make(subject.preset, subject.side, model)
    figures: dict[str, float] = {}
    with Server(model) as server, _started("bare", model) as bare, _started("load", model) as clients:
        figures["ready_seconds"] = server.ready_seconds
        _ask(clients, target=server.target, load=Load(2, 1), seconds=_WARM_SECONDS)
        others = Bystanders((server, bare, clients))
        for load in subject.loads:
            found = _compare(server, bare, clients, load, subject.seconds)
            console.line(_line(name, load, found))
            figures |= {f"{load}_{key}": value for key, value in found.items()}
        figures["others"] = others.share
    if subject.memory:
        figures |= _memory(model, count)
    return figures


def _compare(server: "Server", bare: Worker, clients: Worker, load: Load, seconds: float) -> dict[str, float]:
    """One load: half of the bare loop before the server, half of it after."""
    before = _ask(bare, rows=load.together, seconds=seconds / 2)
    cpu = server.processor_seconds
    served = _ask(clients, target=server.target, load=load, seconds=seconds)
    served["cpu"] = server.processor_seconds - cpu
    after = _ask(bare, rows=load.together, seconds=seconds / 2)
    both = {key: before[key] + after[key] for key in before}
    found, loop = _summary(served, load.rows), _summary(both, load.together)
    return {
        **found,
        **{f"bare_{key}": value for key, value in loop.items()},
        "client_cpu": served["client_cpu"],
        "ratio": found["images_per_second"] / loop["images_per_second"],
        "ms_over_bare": found["p50_ms"] - loop["p50_ms"],
        "cpu_ratio": loop["cpu_ms_per_image"] / found["cpu_ms_per_image"],
    }


def _summary(measured: Mapping[str, Any], rows: int) -> dict[str, float]:
    images = len(measured["times"]) * rows
    p50, p95, p99 = np.percentile(measured["times"], (50, 95, 99)) * 1000
    return {
        "images_per_second": images / measured["took"],
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "cpu_ms_per_image": 1000 * measured["cpu"] / images,
    }


def _line(name: str, load: Load, found: Mapping[str, float]) -> str:
    return (
        f"{name:<9} {load.clients:>2} clients x {load.rows:>2}: {found['images_per_second']:>8,.1f} images/s, bare "
        f"{found['bare_images_per_second']:>8,.1f}, ratio {found['ratio']:.2f}; p50 {found['p50_ms']:,.1f} ms, bare "
        f"{found['bare_p50_ms']:,.1f}, p95 {found['p95_ms']:,.1f}, p99 {found['p99_ms']:,.1f}; "
        f"clients took {found['client_cpu']:.2f} cores"
    )


def _memory(model: Path, count: int) -> dict[str, float]:
    """Of a server that has seen nothing else."""
    rss = []
    with Server(model) as server, _started("load", model) as clients:
        for requests in (_FIRST_REQUESTS, max(1, count - _FIRST_REQUESTS)):
            _ask(clients, target=server.target, load=Load(64, 1), requests=requests)
            rss.append(server.look().rss_mb)
            console.line(f"memory {rss[-1]:,.1f} MiB after {requests:,} requests{' more' if rss[1:] else ''}")
    return {"rss_mb_first": rss[0], "rss_mb": rss[1], "rss_ratio": rss[1] / rss[0]}


@dataclasses.dataclass(frozen=True)
class Look:
    """What a process holds: MiB of memory, open files, threads."""

    rss_mb: float
    files: int
    threads: int


class Server:
    """`./moco serve` on ports of the kernel's choice, for the time of the context.

    Attributes:
        rest, target: "host:port" of its HTTP and of its gRPC.
        ready_seconds: from its start until it said that it is ready.
    """

    def __init__(self, model: Path) -> None:
        """Starts it, and waits until it is ready.

        Args:
            model: a SavedModel.

        Raises:
            RuntimeError: it did not start.
        """
        command = ["-m", "pipeline", "serve", "--model", str(model), "--rest-port", "0", "--grpc-port", "0"]
        started = time.monotonic()
        self._process = subprocess.Popen(
            [*_PYTHON, *command], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        line = self._process.stdout.readline() if self._process.stdout else ""
        self.ready_seconds = time.monotonic() - started
        found = re.search(r"http://([\d.]+:\d+)/.* and gRPC ([\d.]+:\d+)", line)
        if not found:
            self._process.kill()
            raise RuntimeError(f"./moco serve did not start: {line}")
        self.rest, self.target = found.groups()
        self._measured = psutil.Process(self._process.pid)

    def __enter__(self) -> "Server":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops it."""
        self._process.terminate()
        self._process.communicate()

    @property
    def processor_seconds(self) -> float:
        """That it has used so far."""
        times = self._measured.cpu_times()
        return times.user + times.system

    def look(self) -> Look:
        """What it holds now."""
        measured = self._measured
        return Look(measured.memory_info().rss / 2**20, measured.num_fds(), measured.num_threads())


def _started(what: str, model: Path) -> Worker:
    return Worker([*_MEASURING, what, str(model)])


def _ask(worker: Worker, **question: Any) -> dict[str, Any]:
    return worker.ask(json.dumps(question, default=dataclasses.asdict))


# What those processes do.


def _make(preset: str, side: int, model: Path) -> None:
    """Exports an encoder with its initial weights, and the images beside it."""
    import tensorflow as tf

    from pipeline import config
    from trainer_module.encoder import build_encoder
    from trainer_module.export import ENCODED, EncoderModule, save_encoder
    from trainer_module.images import eval_resize, stored_image

    settings = config.load(preset, [])

    class Transform(tf.Module):
        """What Transform's graph does to an image."""

        @tf.function(input_signature=[{ENCODED: tf.TensorSpec([None, 1], tf.string)}])
        def __call__(self, features: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            stored = tf.map_fn(
                lambda encoded: tf.io.encode_png(stored_image(encoded, settings.image), compression=0),
                features[ENCODED][:, 0],
                fn_output_signature=tf.TensorSpec([], tf.string),
            )
            return {"image": stored[:, tf.newaxis]}

    size = settings.augment.size
    backbone = build_encoder(settings.encoder, size, settings.train.precision, seed=0).backbone
    statistics = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    resize = eval_resize(settings.image, settings.augment)
    save_encoder(EncoderModule(backbone, Transform(), *statistics, resize, size), {}, str(model))
    np.save(_images_of(model), np.array(list(itertools.islice(_jpegs(side), _IMAGES)), object), allow_pickle=True)


def _images_of(model: Path) -> Path:
    return model.with_name("images.npy")


def _jpegs(side: int) -> Iterator[bytes]:
    from pipeline.bench.ingest import _pictures

    for _, picture in _pictures(str(SAMPLE)):
        file = io.BytesIO()
        picture.resize((side, side)).save(file, "JPEG", quality=90)
        yield file.getvalue()


class _Bare:
    """Calls the signature in a loop, with the images in memory."""

    def __init__(self, model: Path) -> None:
        import tensorflow as tf

        self._loaded = tf.saved_model.load(str(model))  # the signature alone does not keep its variables
        self._signature = self._loaded.signatures["serving_default"]
        self._images = np.load(_images_of(model), allow_pickle=True)
        self._constant = lambda images: tf.constant(images, tf.string)
        self._warm: set[int] = set()

    def __call__(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Calls of `rows` images for `seconds`."""
        rows = question["rows"]
        batches = [self._constant(self._images[at : at + rows]) for at in range(0, len(self._images), rows)]
        if rows not in self._warm:
            self._call(batches[0])
            self._warm.add(rows)
        times: list[float] = []
        cpu, start = time.process_time(), time.perf_counter()
        for batch in itertools.cycle(batches):
            times.append(self._call(batch))
            if time.perf_counter() - start > question["seconds"]:
                return {"times": times, "took": sum(times), "cpu": time.process_time() - cpu}
        raise AssertionError("the batches are a cycle")

    def _call(self, batch: Any) -> float:
        start = time.perf_counter()
        self._signature(image_bytes=batch)["embedding"].numpy()
        return time.perf_counter() - start


class _Clients:
    """Sends requests from so many clients, each of which waits for its answer before it sends the next."""

    def __init__(self, model: Path) -> None:
        self._images = np.load(_images_of(model), allow_pickle=True).tolist()

    def __call__(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Requests of the `load` to the `target` for `seconds`, or `requests` of them; times are of the former."""
        load, requests = Load(**question["load"]), question.get("requests")
        bodies = [_request(self._images[at : at + load.rows]) for at in range(0, len(self._images), load.rows)]
        numbers = iter(range(requests)) if requests else itertools.count()
        times, took, cpu = asyncio.run(
            _send(question["target"], bodies, load.clients, numbers, question.get("seconds", float("inf")))
        )
        return {"times": [] if requests else times, "took": took, "client_cpu": cpu / took}


def _request(images: Sequence[bytes]) -> bytes:
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "encoder"
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images, tf.string))
    return request.SerializeToString()


async def _send(
    target: str, bodies: Sequence[bytes], clients: int, numbers: Iterator[int], seconds: float
) -> tuple[list[float], float, float]:
    """Seconds of each request, of all of it, and of processor time."""
    import grpc

    times: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(target, options)) for _ in range(clients)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        cpu, start = time.process_time(), time.perf_counter()

        async def client(channel: grpc.aio.Channel) -> None:
            call = channel.unary_unary(_METHOD)
            for number in numbers:
                begun = time.perf_counter()
                if begun - start > seconds:
                    return
                await call(bodies[number % len(bodies)])
                times.append(time.perf_counter() - begun)

        await asyncio.gather(*map(client, channels))
        return times, time.perf_counter() - start, time.process_time() - cpu


def _main() -> None:
    """Entry of the measuring processes."""
    parser = argparse.ArgumentParser(description="One process of the serving benchmark.")
    parser.add_argument("what", choices=("make", "bare", "load"))
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_args()
    console.quiet(False)
    if given.what == "make":
        preset, side, folder = given.arguments
        _make(preset, int(side), Path(folder))
    else:
        model = Path(*given.arguments)
        serve(_Bare(model) if given.what == "bare" else _Clients(model))


if __name__ == "__main__":
    _main()
