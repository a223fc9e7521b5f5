"""The parts of a server put together. Importing this module imports TensorFlow, which takes seconds."""

import asyncio
import gc
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc

from pipeline.serving.batching import Batcher
from pipeline.serving.config import ServeConfig
from pipeline.serving.grpc_service import GrpcServices
from pipeline.serving.images import ImageLimits
from pipeline.serving.metrics import Metrics
from pipeline.serving.model import Model
from pipeline.serving.rest import RestServer
from pipeline.serving.service import Service
from pipeline.serving.versions import Versions
from trainer_module.errors import UserError

# Each signature's first call makes its executor; another number of rows shows the model that it varies.
_WARM_ROWS = (1, 2)


class App:
    """One server."""

    def __init__(self, config: ServeConfig) -> None:
        """Neither loads nor answers yet; needs a running event loop."""
        self._config = config
        self._decoders = ThreadPoolExecutor(os.cpu_count(), "decode")
        self._metrics = Metrics(lambda: self._batcher.admitted)
        self._batcher = Batcher(
            max_batch=config.max_batch,
            max_wait=config.max_wait_ms / 1000,
            max_queue=config.max_queue,
            workers=config.workers,
            observe=self._metrics.computed,
        )
        self._versions = Versions(config.model, config.name, self._load, self._metrics.in_service)
        self._service = Service(config, self._versions, self._batcher, self._metrics)
        self._rest = RestServer(self._service)
        self._watching: asyncio.Task | None = None

    async def load(self) -> Model:
        """Loads the version in service.

        Raises:
            UserError: there is none that can be loaded.
        """
        return await self._versions.start()

    async def start(self, sockets: list[socket.socket], server: grpc.aio.Server) -> None:
        """Answers from now on, and looks for new versions.

        Args:
            sockets: for REST.
            server: for gRPC; has its port.
        """
        # What there is now stays: the collector need not look at TensorFlow's million objects again and again.
        gc.collect()
        gc.freeze()
        self._grpc = GrpcServices(self._service, server)
        await self._grpc.start()
        self._rest.add_sockets(sockets)
        self._watching = asyncio.create_task(self._versions.watch(self._config.poll))

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and waits for those in flight."""
        self._service.stopping = True
        if self._watching:
            self._watching.cancel()
        await asyncio.gather(self._rest.drain(seconds), self._grpc.drain(seconds))
        self._batcher.close()
        self._decoders.shutdown(wait=False)

    def _load(self, folder: str, version: int) -> Model:
        model = Model(folder, version, ImageLimits.of(self._config), self._decoders)
        try:
            model.warm_up(_WARM_ROWS)
        except UserError:
            model.close()
            raise
        return model
