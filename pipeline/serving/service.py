"""What REST and gRPC share: a request with its model, its place in the queue, its deadline and its metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from pipeline.serving import faults, images
from pipeline.serving.batching import Batcher, Result, Tensors, row_count
from pipeline.serving.config import MIB, ServeConfig
from pipeline.serving.metrics import Metrics
from pipeline.serving.model import Signature
from pipeline.serving.refusal import Code, Refused, alone
from pipeline.serving.versions import Versions


class Budget:
    """Bytes of requests that may be held at a time."""

    def __init__(self, size: int) -> None:
        """All of it is free.

        Args:
            size: bytes.
        """
        self._free = size

    def take(self, size: int) -> None:
        """Counts bytes that have come.

        Raises:
            Refused: RESOURCE_EXHAUSTED.
        """
        if size > self._free:
            what = "the server holds as many bytes of requests as it may; try again later"
            raise Refused(Code.RESOURCE_EXHAUSTED, what, "bytes")
        self._free -= size

    def give(self, size: int) -> None:
        """Counts bytes that are forgotten."""
        self._free += size


class Service:
    """See the module."""

    def __init__(self, config: ServeConfig, versions: Versions, batcher: Batcher, metrics: Metrics) -> None:
        """Puts the parts together."""
        self.config, self.versions, self.metrics = config, versions, metrics
        self.budget = Budget(int(config.max_buffered_mb * MIB))
        self._batcher = batcher
        self.stopping = False

    async def predict(self, signature: Signature, tensors: Tensors, timeout: float | None = None) -> Result:
        """Computes a request's rows.

        Args:
            signature: of a leased model.
            tensors: its inputs.
            timeout: seconds that are left of the request's deadline; None for the server's own.

        Raises:
            Refused: the inputs do not fit, the queue is full, the time is over, or every row failed.
        """
        signature.check(tensors)
        shapes = tuple((name, rows.shape[1:]) for name, rows in sorted(tensors.items()))
        with self._batcher.admission(row_count(tensors)):
            left = self.config.timeout if timeout is None else timeout
            result = await self._batcher.run((signature, shapes), signature, tensors, left)
        for text in result.errors.values():
            self.metrics.failed(images.reason(text))
        if len(result.errors) == result.rows:
            raise Refused(Code.INVALID_ARGUMENT, _all_failed(result), "no_row")
        return result

    @asynccontextmanager
    async def answering(self, api: str, method: str) -> AsyncIterator["Outcome"]:
        """Turns whatever a request raises into what its client is told, and counts it."""
        started, outcome = time.monotonic(), Outcome()
        try:
            yield outcome
        except Refused as refusal:
            outcome.refusal = alone(refusal)
        except asyncio.CancelledError:
            outcome.refusal = Refused(Code.CANCELLED, "the client has gone")
            raise
        except Exception as error:
            faults.log(error)
            outcome.refusal = Refused(Code.INTERNAL, f"a fault of the server: {type(error).__name__}")
        finally:
            code = outcome.refusal.code if outcome.refusal else Code.OK
            if outcome.refusal:
                self.metrics.failed(outcome.refusal.kind)
            self.metrics.answered(api, method, code.name, time.monotonic() - started)

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Counts a request's bytes for the time of the context.

        Raises:
            Refused: RESOURCE_EXHAUSTED.
        """
        self.budget.take(size)
        try:
            yield
        finally:
            self.budget.give(size)


class Outcome:
    """How a request ends.

    Attributes:
        refusal: what the client is told in place of an answer.
    """

    def __init__(self) -> None:
        self.refusal: Refused | None = None


def _all_failed(result: Result) -> str:
    """The errors of a request of which nothing is left; the first few of them."""
    shown = [f"instance {index}: {text}" for index, text in sorted(result.errors.items())[:10]]
    more = len(result.errors) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
