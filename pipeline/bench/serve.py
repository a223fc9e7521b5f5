"""Speed and memory of ./moco serve beside a bare loop that calls the SavedModel's signature.

Every figure comes from a process of its own: `python -m pipeline.bench.serve make|bare|load ...`, and `./moco serve`
itself. Clients speak gRPC with requests that are serialised beforehand, so that they take little of the two cores; how
much is among the figures.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil

from pipeline import console
from pipeline.bench.ingest import SAMPLE

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_METHOD = "/tensorflow.serving.PredictionService/Predict"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        preset: configuration of the encoder.
        side: of the images that it is sent, pixels; JPEG.
        seconds: of each measurement.
        requests: sent before the second look at the memory; 0 leaves memory out.
    """

    preset: str
    side: int
    seconds: float
    requests: int


_SUBJECTS = {
    "demo": Subject("demo", side=64, seconds=10.0, requests=100_000),
    "resnet50": Subject("moco_v2", side=320, seconds=25.0, requests=0),
}
# Clients, and images in each of their requests. 4 clients with batches show the server when requests are few and large.
_LOADS = ((1, 1), (8, 1), (64, 1), (4, 64))
_FIRST_REQUESTS = 1000


def measure() -> dict[str, float]:
    """Measures both encoders.

    Returns:
        For each model and each load ("64x1": 64 clients, one image a request), of the server, and of the bare loop with
        batches of as many images as all clients have on their way, at most 64: images_per_second, p50_ms, p95_ms,
        p99_ms, and cpu_ms_per_image, processor time, which other load on the machine changes less. ratio, of the images
        per second; cpu_ratio, of the bare loop's processor time over the server's; ms_over_bare, of the medians.
        client_cpu: the cores that the clients took. ready_seconds: from the start of `./moco serve` until it answers.
        rss_mb_first, rss_mb, rss_ratio: the server's memory after 1,000 and after 100,000 requests.
    """
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, subject in _SUBJECTS.items():
            for key, value in _measure(subject, pathlib.Path(folder) / name).items():
                figures[f"{name}_{key}"] = round(value, 3)
    return figures


def _measure(subject: Subject, folder: pathlib.Path) -> dict[str, float]:
    model = folder / "1"
    _run("make", subject.preset, str(subject.side), str(model))
    figures: dict[str, float] = {}
    with _server(model) as (target, process, ready):
        figures["ready_seconds"] = ready
        _run("load", target, str(model), "2", "1", "2", "0")
        for clients, rows in _LOADS:
            together = str(min(64, clients * rows))
            console.line(f"{subject.preset}: {clients} clients, {rows} images a request")
            before = _run("bare", str(model), together, str(subject.seconds / 2))
            cpu = _cpu_seconds(process)
            found = _run("load", target, str(model), str(clients), str(rows), str(subject.seconds), "0")
            found["cpu_ms_per_image"] = 1000 * (_cpu_seconds(process) - cpu) / found.pop("images")
            after = _run("bare", str(model), together, str(subject.seconds / 2))
            bare = max((before, after), key=lambda one: one["images_per_second"])
            load = f"{clients}x{rows}"
            figures |= {f"{load}_{key}": value for key, value in found.items()}
            figures |= {f"{load}_bare_{key}": value for key, value in bare.items()}
            figures[f"{load}_ratio"] = found["images_per_second"] / bare["images_per_second"]
            figures[f"{load}_ms_over_bare"] = found["p50_ms"] - bare["p50_ms"]
            figures[f"{load}_cpu_ratio"] = bare["cpu_ms_per_image"] / found["cpu_ms_per_image"]
    if subject.requests:
        figures |= _memory(subject, model)
    return figures


def _memory(subject: Subject, model: pathlib.Path) -> dict[str, float]:
    """Of a server that has seen nothing else."""
    with _server(model) as (target, process, _):
        rss = []
        for requests in (_FIRST_REQUESTS, subject.requests - _FIRST_REQUESTS):
            _run("load", target, str(model), "64", "1", "3600", str(requests))
            rss.append(psutil.Process(process.pid).memory_info().rss / 2**20)
    return {"rss_mb_first": rss[0], "rss_mb": rss[1], "rss_ratio": rss[1] / rss[0]}


@contextlib.contextmanager
def _server(model: pathlib.Path) -> Iterator[tuple[str, subprocess.Popen, float]]:
    """./moco serve on ports of the kernel's choice: its gRPC address, its process, and seconds until it was ready."""
    command = [sys.executable, "-m", "pipeline", "serve", "--model", str(model), "--rest-port", "0", "--grpc-port", "0"]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=_ROOT, env=_environment(), stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        seconds = time.monotonic() - started
        found = re.search(r"gRPC ([\d.]+:\d+)", line)
        if not found:
            raise RuntimeError(f"{' '.join(command)} did not start: {line}")
        yield found[1], process, seconds
    finally:
        process.terminate()
        process.wait()


def _cpu_seconds(process: subprocess.Popen) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def _environment() -> dict[str, str]:
    """Without the choice that other benchmarks make for TensorFlow: `./moco serve` leaves it to TensorFlow."""
    return {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}


def _run(*arguments: str) -> dict[str, float]:
    """One of the processes below."""
    command = [sys.executable, "-m", "pipeline.bench.serve", *arguments]
    done = subprocess.run(command, cwd=_ROOT, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# What those processes do.


def _make(preset: str, side: int, model: pathlib.Path) -> dict[str, float]:
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
    images = list(itertools.islice(_jpegs(side), 256))
    np.save(_images_of(model), np.array(images, object), allow_pickle=True)
    for rows in {rows for _, rows in _LOADS}:
        bodies = [_request(images[at : at + rows]) for at in range(0, len(images), rows)]
        np.save(_requests_of(model, rows), np.array(bodies, object), allow_pickle=True)
    return {}


def _images_of(model: pathlib.Path) -> pathlib.Path:
    return model.with_name("images.npy")


def _requests_of(model: pathlib.Path, rows: int) -> pathlib.Path:
    return model.with_name(f"requests-{rows}.npy")


def _request(images: Sequence[bytes]) -> bytes:
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "encoder"
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images, tf.string))
    return request.SerializeToString()


def _jpegs(side: int) -> Iterator[bytes]:
    from pipeline.bench.ingest import _pictures

    for _, picture in _pictures(str(SAMPLE)):
        file = io.BytesIO()
        picture.resize((side, side)).save(file, "JPEG", quality=90)
        yield file.getvalue()


def _bare(model: pathlib.Path, rows: int, seconds: float) -> dict[str, float]:
    """Calls the signature in a loop, with the images in memory."""
    import tensorflow as tf

    signature = (loaded := tf.saved_model.load(str(model))).signatures["serving_default"]
    images = np.load(_images_of(model), allow_pickle=True)
    batches = [tf.constant(images[at : at + rows], tf.string) for at in range(0, len(images), rows)]
    times = []
    for batch in batches[:2]:
        signature(image_bytes=batch)
    cpu = time.process_time()
    for batch in _until(seconds, itertools.cycle(batches)):
        start = time.perf_counter()
        signature(image_bytes=batch)["embedding"].numpy()
        times.append(time.perf_counter() - start)
    spent = time.process_time() - cpu
    del loaded  # the signature alone does not keep its variables
    return {**_summary(times, rows, sum(times)), "cpu_ms_per_image": 1000 * spent / len(times) / rows}


def _until(seconds: float, items: Iterator[Any]) -> Iterator[Any]:
    end = time.perf_counter() + seconds
    return itertools.takewhile(lambda _: time.perf_counter() < end, items)


def _load(target: str, model: pathlib.Path, clients: int, rows: int, seconds: float, requests: int) -> dict[str, float]:
    """Sends requests from so many clients, each of which waits for its answer before it sends the next."""
    bodies = np.load(_requests_of(model, rows), allow_pickle=True).tolist()
    cpu, start = time.process_time(), time.perf_counter()
    times = asyncio.run(_send(target, bodies, clients, seconds, requests))
    took = time.perf_counter() - start
    spent = time.process_time() - cpu
    return {**_summary(times, rows, took), "client_cpu": spent / took, "images": len(times) * rows}


async def _send(target: str, bodies: Sequence[bytes], clients: int, seconds: float, requests: int) -> list[float]:
    import grpc

    times: list[float] = []
    end = time.perf_counter() + seconds
    left = itertools.count(1)

    async def client(number: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(target, options) as channel:
            call = channel.unary_unary(_METHOD)
            for body in itertools.islice(itertools.cycle(bodies), number, None):
                if time.perf_counter() > end or (requests and next(left) > requests):
                    return
                start = time.perf_counter()
                await call(body)
                times.append(time.perf_counter() - start)

    await asyncio.gather(*map(client, range(clients)))
    return times


def _summary(times: Sequence[float], rows: int, took: float) -> dict[str, float]:
    p50, p95, p99 = np.percentile(times, (50, 95, 99)) * 1000
    return {"images_per_second": len(times) * rows / took, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def _main() -> None:
    """Entry of the measuring processes."""
    parser = argparse.ArgumentParser(description="One measurement of the serving benchmark.")
    parser.add_argument("what", choices=("make", "bare", "load"))
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_args()
    console.quiet(False)
    first, *rest = given.arguments
    if given.what == "make":
        print(json.dumps(_make(first, int(rest[0]), pathlib.Path(rest[1]))))
    elif given.what == "bare":
        print(json.dumps(_bare(pathlib.Path(first), int(rest[0]), float(rest[1]))))
    else:
        model, clients, rows, seconds, requests = rest
        found = _load(first, pathlib.Path(model), int(clients), int(rows), float(seconds), int(requests))
        print(json.dumps(found))


if __name__ == "__main__":
    _main()
