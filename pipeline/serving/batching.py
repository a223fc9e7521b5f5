"""Rows of many requests into batches, with bounds on how long a row waits and on how many wait.

While all workers are busy rows gather, so batches grow with the load by themselves. Once a worker is free a batch
starts when it is full, when as many rows are here as there were lately (so a client that is alone does not wait for
others), or when `max_wait` has passed. Everything but the computation happens on the event loop's thread; nothing is
locked.
"""

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from pipeline.serving.refusal import Code, Refused, invalid

Tensors = Mapping[str, np.ndarray]  # every one of as many rows


@dataclasses.dataclass(frozen=True)
class Result:
    """What rows gave.

    Attributes:
        rows: how many came in.
        outputs: by name, one row for each that came in, of NaN or zeros where it failed; empty where all failed.
        errors: of rows that failed, by index.
    """

    rows: int
    outputs: dict[str, np.ndarray]
    errors: dict[int, str]


class Compute(Protocol):
    """A function of rows; it is called in worker threads, several at a time."""

    def __call__(self, tensors: Tensors) -> Result:
        """One result for all rows, with an error for each that failed."""


def row_count(tensors: Tensors) -> int:
    """Rows of tensors that all have as many."""
    return len(next(iter(tensors.values())))


def check_rows(rows: int, most: int) -> None:
    """Refuses more rows than the queue could ever hold.

    Raises:
        Refused: INVALID_ARGUMENT.
    """
    if rows > most:
        raise invalid(f"{rows} instances are over the server's limit of {most} in a request")


class _Request:
    """Rows of one request on their way."""

    def __init__(self, tensors: Tensors, future: "asyncio.Future[Result]") -> None:
        self.tensors, self.future = tensors, future
        self.rows = row_count(tensors)
        self.taken = self.done = 0
        self.arrived = time.monotonic()
        self.parts: list[tuple[int, Result]] = []

    def give_up(self) -> None:
        """Tells that the answer comes too late."""
        if not self.future.done():
            self.future.set_exception(
                Refused(Code.DEADLINE_EXCEEDED, "the deadline passed before the answer was there")
            )

    def finish(self, start: int, part: Result) -> None:
        """Takes the result of rows from `start` on, and tells the whole when it is there."""
        self.parts.append((start, part))
        self.done += part.rows
        if self.done == self.rows and not self.future.done():
            self.future.set_result(_joined(sorted(self.parts, key=lambda part: part[0])))


@dataclasses.dataclass
class _Lane:
    """Requests that may share a batch."""

    compute: Compute
    requests: deque[_Request] = dataclasses.field(default_factory=deque)
    waiting: int = 0  # rows


class Batcher:
    """See the module."""

    def __init__(
        self,
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        workers: int,
        observe: Callable[[int, float], None],
    ) -> None:
        """Has no loop yet: that is the one on which `run` is called.

        Args:
            max_batch: rows in a batch.
            max_wait: seconds that a row waits for others while a worker is free.
            max_queue: rows admitted and not yet answered.
            workers: batches at a time.
            observe: is told rows and seconds of each batch.
        """
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._free = workers
        self._pool = ThreadPoolExecutor(workers, "batch")
        self._observe = observe
        self._lanes: dict[Hashable, _Lane] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._free_since = 0.0
        self._here = 0  # rows in `run`
        self._lately = 0.0  # rows that were here at the last batches, slowly forgotten
        self.admitted = 0

    @contextmanager
    def admission(self, rows: int) -> Iterator[None]:
        """Counts rows as admitted for the time of the context.

        Raises:
            Refused: RESOURCE_EXHAUSTED, too many are admitted already; INVALID_ARGUMENT, they could never be.
        """
        check_rows(rows, self._max_queue)
        if self.admitted + rows > self._max_queue:
            raise Refused(Code.RESOURCE_EXHAUSTED, "the server's queue is full; try again later", "queue_full")
        self.admitted += rows
        try:
            yield
        finally:
            self.admitted -= rows

    async def run(self, lane: Hashable, compute: Compute, tensors: Tensors, timeout: float) -> Result:
        """Computes rows, in batches together with other requests of the same lane.

        Args:
            lane: what may share a batch: the same computation, and rows of one shape.
            compute: of the lane.
            tensors: at least one row.
            timeout: seconds after which nobody wants the answer.

        Raises:
            Refused: DEADLINE_EXCEEDED. Also whatever `compute` raised for a batch that held one of the rows.
        """
        loop = asyncio.get_running_loop()
        request = _Request(tensors, loop.create_future())
        # A timer, for asyncio.wait_for would make a task of each request.
        late = loop.call_later(timeout, request.give_up)
        self._here += request.rows
        queued = self._lanes.setdefault(lane, _Lane(compute))
        queued.requests.append(request)
        queued.waiting += request.rows
        self._start_batches()
        try:
            return await request.future
        finally:
            late.cancel()
            self._here -= request.rows
            if request.taken < request.rows:  # given up, or failed in part
                queued.waiting -= request.rows - request.taken
                queued.requests.remove(request)
                self._forget_if_empty(lane, queued)

    def close(self) -> None:
        """Ends the workers when they are done."""
        self._pool.shutdown(wait=False)

    def _start_batches(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        while self._free and self._lanes:
            key, lane = min(self._lanes.items(), key=lambda item: self._due(item[1]))
            left = self._due(lane) - time.monotonic()
            if left > 0:
                self._timer = asyncio.get_running_loop().call_later(left, self._start_batches)
                return
            self._start(lane)
            self._forget_if_empty(key, lane)

    def _due(self, lane: _Lane) -> float:
        """When a lane's next batch may start; whose oldest row has waited longest comes first."""
        arrived = lane.requests[0].arrived
        if lane.waiting >= self._max_batch or self._here >= self._lately:
            return arrived
        return max(arrived, self._free_since) + self._max_wait

    def _forget_if_empty(self, key: Hashable, lane: _Lane) -> None:
        # Shapes are the clients' choice, so lanes must not stay.
        if not lane.requests and self._lanes.get(key) is lane:
            del self._lanes[key]

    def _start(self, lane: _Lane) -> None:
        slices = list(self._take(lane))
        self._free -= 1
        self._lately = max(self._here, _MEMORY * self._lately)
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        batch = [{name: rows[a:b] for name, rows in request.tensors.items()} for request, a, b in slices]
        done = loop.run_in_executor(self._pool, _compute, lane.compute, batch)
        done.add_done_callback(lambda future: self._finish(future, slices, started))

    def _take(self, lane: _Lane) -> Iterator[tuple[_Request, int, int]]:
        room = _whole_size(min(lane.waiting, self._max_batch), self._max_batch)
        while room and lane.requests:
            request = lane.requests[0]
            begin = request.taken
            request.taken = min(request.rows, begin + room)
            room -= request.taken - begin
            lane.waiting -= request.taken - begin
            if request.taken == request.rows:
                lane.requests.popleft()
            yield request, begin, request.taken

    def _finish(
        self, future: "asyncio.Future[Result]", slices: Sequence[tuple[_Request, int, int]], started: float
    ) -> None:
        self._free += 1
        self._free_since = time.monotonic()
        self._observe(sum(end - begin for _, begin, end in slices), time.monotonic() - started)
        if error := future.exception():
            for request, _, _ in slices:
                if not request.future.done():
                    request.future.set_exception(error)
        else:
            at = 0
            for request, begin, end in slices:
                request.finish(begin, _rows_of(future.result(), at, at + end - begin))
                at += end - begin
        self._start_batches()


def _whole_size(rows: int, most: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... and `most` that is not over a number of rows.

    The rest starts the next batch. TensorFlow keeps prepared primitives for each size that it has seen: with all sizes
    from 1 to 64 the memory of a server grew by a seventh while they turned up one by one.
    """
    if rows == most:
        return rows
    power = 1 << (rows.bit_length() - 1)
    return power + power // 2 if rows >= power + power // 2 and power > 1 else power


_MEMORY = 0.9  # of how many rows were here, from one batch to the next


def filler(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """What stands where a row failed: NaN where the type has it, else zeros (empty strings)."""
    if dtype.kind == "O":
        return np.full(shape, b"", object)
    return np.full(shape, np.nan if dtype.kind == "f" else 0, dtype)


def _compute(compute: Compute, batch: Sequence[Tensors]) -> Result:
    if len(batch) == 1:
        return compute(batch[0])
    return compute({name: np.concatenate([part[name] for part in batch]) for name in batch[0]})


def _rows_of(result: Result, begin: int, end: int) -> Result:
    outputs = {name: rows[begin:end] for name, rows in result.outputs.items()}
    errors = {index - begin: text for index, text in result.errors.items() if begin <= index < end}
    return Result(end - begin, outputs, errors)


def _joined(parts: Sequence[tuple[int, Result]]) -> Result:
    if len(parts) == 1:
        return parts[0][1]
    some = next((part.outputs for _, part in parts if part.outputs), {})
    outputs = {name: np.concatenate([_or_filler(part, name, like) for _, part in parts]) for name, like in some.items()}
    errors = {start + index: text for start, part in parts for index, text in part.errors.items()}
    return Result(sum(part.rows for _, part in parts), outputs, errors)


def _or_filler(part: Result, name: str, like: np.ndarray) -> np.ndarray:
    return part.outputs[name] if part.outputs else filler((part.rows, *like.shape[1:]), like.dtype)
