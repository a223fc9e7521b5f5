"""A gRPC message on its way in: how long it may take, how many may be slow, and what it may unfold to.

gRPC keeps what has come of a message for as long as its sender likes, and unfolds a compressed one before it looks at
its size. So messages are read here, from handlers that are called when the head has come, and are unfolded here.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator

import grpc

from pipeline.serving.gzipped import Unfolder
from pipeline.serving.ports import FRAME
from pipeline.serving.refusal import Code, Refused, invalid
from pipeline.serving.service import Service

# gRPC does not tell that a message is compressed. None of ours begins like gzip, whose first byte is no tag, nor like
# deflate, whose first byte is the tag of a field 15.
_FOLDED = (b"\x1f", b"\x78")
_GZIP_OR_DEFLATE = 32 + zlib.MAX_WBITS
_SOON = 1.0  # seconds in which a message is here that nobody holds back, on an event loop that has much to do


class Incoming:
    """The messages of one server: quick ones, and as many slow ones as may be held at their largest."""

    def __init__(self, service: Service) -> None:
        """None is on its way yet.

        Args:
            service: counts bytes, and has the bounds of sizes and times.
        """
        self._service, config = service, service.config
        self.timeout = config.timeout
        self.free = int(config.max_buffered_mb // config.max_request_mb)
        self._most = config.max_request_bytes + FRAME

    async def message(self, context: grpc.aio.ServicerContext) -> bytes:
        """The one message of a call.

        Raises:
            Refused: DEADLINE_EXCEEDED, it does not come; RESOURCE_EXHAUSTED, too many are slow, too many bytes are
                held, or it unfolds to more than a request may be; INVALID_ARGUMENT, there is none, or it is damaged.
        """
        data = await self._next(context)
        if data is None:
            raise invalid("the call has no message")
        return data

    async def messages(self, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """The messages of a call, each as `message` has it."""
        while (data := await self._next(context)) is not None:
            yield data

    async def _next(self, context: grpc.aio.ServicerContext) -> bytes | None:
        patience = _Patience(self)
        try:
            data = await context.read()
        except asyncio.CancelledError:
            if patience.refusal:
                raise patience.refusal from None
            raise
        finally:
            patience.end()
        if data is grpc.aio.EOF:
            return None
        if data.startswith(_FOLDED):
            with self._service.holding(len(data)):
                return await asyncio.to_thread(unfolded, data, self._most)
        return data


class _Patience:
    """Waits for the message that the current task reads, and ends the reading when it has waited long enough."""

    def __init__(self, incoming: Incoming) -> None:
        self.refusal: Refused | None = None
        self._incoming, self._slow = incoming, False
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, asyncio.get_running_loop()
        self._timer = self._loop.call_later(min(_SOON, incoming.timeout), self._note_slow)

    def _note_slow(self) -> None:
        if not self._incoming.free:
            what = "the server waits for as many slow requests as it may; try again later"
            self._give_up(Refused(Code.RESOURCE_EXHAUSTED, what, "slow"))
            return
        self._incoming.free -= 1
        self._slow = True
        late = Refused(Code.DEADLINE_EXCEEDED, f"the request did not come within {self._incoming.timeout:g} s", "slow")
        self._timer = self._loop.call_later(max(0, self._incoming.timeout - _SOON), self._give_up, late)

    def _give_up(self, refusal: Refused) -> None:
        self.refusal = refusal
        self._task.cancel()

    def end(self) -> None:
        self._timer.cancel()
        self._incoming.free += self._slow


def unfolded(data: bytes, most: int) -> bytes:
    """What a compressed message unfolds to.

    Args:
        data: as it came.
        most: bytes that it may unfold to.

    Raises:
        Refused: RESOURCE_EXHAUSTED, it would be more; INVALID_ARGUMENT, it is damaged.
    """
    unfolder, whole = Unfolder(_GZIP_OR_DEFLATE), bytearray()
    for piece in unfolder.pieces(data):
        whole += piece
        if len(whole) > most:
            raise Refused(Code.RESOURCE_EXHAUSTED, f"the message unfolds to more than {most} bytes", "too_many_bytes")
    unfolder.end()
    return bytes(whole)
