"""Tiny real SavedModels, and real servers of them on loopback with ports of the kernel's choice."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import keras
import numpy as np
import requests
import tensorflow as tf
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from pipeline.serving import ports
from pipeline.serving.app import App
from pipeline.serving.batching import Result
from pipeline.serving.config import ServeConfig
from trainer_module.config import ImageConfig
from trainer_module.export import EncoderModule
from trainer_module.images import stored_image

SIZE, RESIZE, STORED = 16, 18, 24
D = 6


class Transform(tf.Module):
    """What Transform's graph does: the stored image as a PNG."""

    @tf.function(input_signature=[{"image/encoded": tf.TensorSpec([None, 1], tf.string)}])
    def __call__(self, features):
        stored = tf.map_fn(
            lambda encoded: tf.io.encode_png(stored_image(encoded, ImageConfig(storage_size=STORED))),
            features["image/encoded"][:, 0],
            fn_output_signature=tf.TensorSpec([], tf.string),
        )
        return {"image": stored[:, tf.newaxis]}


def make_encoder(seed: int) -> EncoderModule:
    image = keras.Input((SIZE, SIZE, 3))
    init = keras.initializers.RandomNormal(stddev=0.5, seed=seed)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", kernel_initializer=init)(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dense(D, kernel_initializer=init)(x))
    return EncoderModule(model, Transform(), (120.0, 115.0, 100.0), (60.0, 60.0, 60.0), RESIZE, SIZE)


class HalfPlusTwo(tf.Module):
    """The model of TensorFlow Serving's documentation and tests, and one with several named inputs and outputs."""

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, name="x")])
    def serving_default(self, x):
        return {"y": x / 2 + 2}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="tag"),
            tf.TensorSpec([None, 5], tf.int32, name="signal"),
            tf.TensorSpec([None, 2, 2], tf.float32, name="sensor"),
        ]
    )
    def named(self, tag, signal, sensor):
        return {
            "length": tf.strings.length(tag),
            "total": tf.reduce_sum(signal, 1),
            "mean": tf.reduce_mean(sensor, [1, 2]),
            "copy_bytes": tag,
            "tag": tag,
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def one_number(self, x):
        return {"y": tf.reduce_sum(x)}


@dataclasses.dataclass(frozen=True)
class Running:
    """A server and its clients."""

    app: App
    loop: asyncio.AbstractEventLoop
    rest: str
    target: str
    channel: grpc.Channel

    @property
    def prediction(self) -> prediction_service_pb2_grpc.PredictionServiceStub:
        return prediction_service_pb2_grpc.PredictionServiceStub(self.channel)

    @property
    def models(self) -> model_service_pb2_grpc.ModelServiceStub:
        return model_service_pb2_grpc.ModelServiceStub(self.channel)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.rest + path, timeout=30)

    def post(self, path: str, **body) -> requests.Response:
        # Each on a connection of its own: a kept one may end just when it is used again.
        return requests.post(self.rest + path, timeout=30, **body)

    def predict(self, **document) -> requests.Response:
        return self.post("/v1/models/encoder:predict", json=document)

    def wait(self, coroutine):
        """What a coroutine of the server's loop gives."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("moco_serve_" + name))


@contextlib.contextmanager
def busy(server: Running) -> Iterator[threading.Event]:
    """Keeps the server's only worker busy until the event is set, or the context ends."""
    gate, begun = threading.Event(), threading.Event()

    def compute(tensors):
        begun.set()
        gate.wait(60)
        return Result(1, dict(tensors), {})

    run = server.app._batcher.run("busy", compute, {"x": np.zeros(1)}, 60)
    future = asyncio.run_coroutine_threadsafe(run, server.loop)
    assert begun.wait(30)
    yield gate
    gate.set()
    future.result(30)


@contextlib.contextmanager
def running(model: Path | str, **settings) -> Iterator[Running]:
    """A server in a thread of this process, as `server.serve` makes it, without its signals."""
    config = ServeConfig(
        **{"model": str(model), "rest_port": 0, "grpc_port": 0, "workers": 1, "poll": 3600.0, "grace": 5.0} | settings
    )
    started, ended = threading.Event(), asyncio.Event()
    made: dict = {}

    async def main() -> None:
        try:
            sockets = ports.bind_rest(config)
            server, port = ports.bind_grpc(config)
            app = App(config)
            await app.load()
            await app.start(sockets, server)
            made.update(app=app, loop=asyncio.get_running_loop(), port=sockets[0].getsockname()[1], grpc=port)
        except Exception as error:
            made["error"] = error
            return
        finally:
            started.set()
        await ended.wait()
        await app.drain(config.grace)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    started.wait(60)
    if error := made.get("error"):
        raise error
    target = f"127.0.0.1:{made['grpc']}"
    with grpc.insecure_channel(target) as channel:
        yield Running(made["app"], made["loop"], f"http://127.0.0.1:{made['port']}", target, channel)
    made["loop"].call_soon_threadsafe(ended.set)
    thread.join(30)
    assert not thread.is_alive()
