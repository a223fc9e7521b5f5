"""Batches: how they form, what bounds them, and that every row gets its own answer whatever becomes of the others."""

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.serving.batching import Batcher, Result, _whole_size
from pipeline.serving.refusal import Code, Refused


class Doubling:
    """Doubles rows, notes the size of each batch, and waits for `gate` first."""

    def __init__(self, open_gate: bool = True) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        if open_gate:
            self.gate.set()

    def __call__(self, tensors):
        rows = tensors["x"]
        self.begun.release()
        self.batches.append(len(rows))
        assert self.gate.wait(20)
        bad = {int(index): "minus" for index in np.flatnonzero(rows < 0)}
        outputs = {} if len(bad) == len(rows) else {"y": np.where(rows < 0, np.nan, 2 * rows)}
        return Result(len(rows), outputs, bad)


def batcher(**changed) -> Batcher:
    given = {"max_batch": 4, "max_wait": 0.0, "max_queue": 100, "workers": 1, "observe": lambda *_: None} | changed
    return Batcher(**given)


def x(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32)}


async def begun(double: Doubling) -> None:
    assert await asyncio.to_thread(double.begun.acquire, timeout=20)


@settings(deadline=None, max_examples=40)
@given(
    requests=st.lists(st.lists(st.integers(-3, 50), min_size=1, max_size=11), min_size=1, max_size=12),
    workers=st.integers(1, 3),
    max_batch=st.integers(1, 6),
)
def test_every_row_gets_its_own_answer_whatever_shares_its_batch(requests, workers, max_batch):
    async def all_of_them():
        made, double = batcher(max_batch=max_batch, workers=workers), Doubling()
        results = await asyncio.gather(*(made.run("lane", double, x(*rows), 60) for rows in requests))
        made.close()
        return results, double.batches, made

    results, batches, made = asyncio.run(all_of_them())
    assert max(batches) <= max_batch
    assert sum(batches) == sum(map(len, requests))
    assert made._lanes == {}
    for rows, result in zip(requests, results, strict=True):
        assert result.rows == len(rows)
        assert set(result.errors) == {index for index, value in enumerate(rows) if value < 0}
        if result.outputs:
            good = [index for index, value in enumerate(rows) if value >= 0]
            np.testing.assert_array_equal(result.outputs["y"][good], 2 * np.float32(rows)[good])


def test_rows_gather_while_the_worker_is_busy():
    async def main():
        made, double = batcher(), Doubling(open_gate=False)
        first = asyncio.create_task(made.run("lane", double, x(0), 60))
        await begun(double)
        others = [asyncio.create_task(made.run("lane", double, x(n), 60)) for n in range(6)]
        await asyncio.sleep(0)
        double.gate.set()
        await asyncio.gather(first, *others)
        return double.batches

    assert asyncio.run(main()) == [1, 4, 2]


def test_a_row_waits_for_company_no_longer_than_it_must():
    async def main():
        made, double = batcher(max_wait=0.3, max_batch=3), Doubling()

        async def of(rows: int) -> tuple[list[int], float]:
            start, before = time.monotonic(), len(double.batches)
            await asyncio.gather(*(made.run("lane", double, x(n), 60) for n in range(rows)))
            return double.batches[before:], time.monotonic() - start

        return [await of(rows) for rows in (1, 1, 3, 3, 2)]

    alone, again, crowd, full, fewer = asyncio.run(main())
    assert alone[0] == again[0] == [1]
    assert max(alone[1], again[1]) < 0.3  # there was nobody to wait for
    assert sum(crowd[0]) == 3
    assert full[0] == [3]
    assert full[1] < 0.3  # a full batch waits for nothing
    assert fewer[0] == [2]
    assert fewer[1] >= 0.3  # there had been three


def test_batches_come_in_few_sizes():
    """So that TensorFlow's memory for prepared primitives stays small."""
    sizes = [_whole_size(rows, 100) for rows in range(1, 101)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert all(2 * size > rows for rows, size in enumerate(sizes, 1))


def test_what_is_too_late_is_given_up():
    async def main():
        made, double = batcher(), Doubling(open_gate=False)
        with pytest.raises(Refused) as caught:
            await made.run("lane", double, x(1), 0.05)
        double.gate.set()
        assert (await made.run("lane", double, x(2), 60)).outputs["y"] == [4]
        return caught.value.code

    assert asyncio.run(main()) is Code.DEADLINE_EXCEEDED


def test_lanes_share_no_batch_and_the_older_one_comes_first():
    async def main():
        made, double, other = batcher(), Doubling(open_gate=False), Doubling()
        order = []
        double_run = asyncio.create_task(made.run("a", double, x(0), 60))
        await begun(double)
        late = []
        for lane, compute in (("b", other), ("a", double), ("b", other)):
            task = asyncio.create_task(made.run(lane, compute, x(1), 60))
            task.add_done_callback(lambda _, lane=lane: order.append(lane))
            late.append(task)
            await asyncio.sleep(0.001)
        double.gate.set()
        await asyncio.gather(double_run, *late)
        return order, double.batches, other.batches

    assert asyncio.run(main()) == (["b", "b", "a"], [1, 1], [2])


def test_more_rows_than_the_queue_takes_are_refused_and_room_comes_back():
    async def main():
        made = batcher(max_queue=5)
        with made.admission(3):
            with pytest.raises(Refused) as full, made.admission(3):
                pass
            with made.admission(2):
                assert made.admitted == 5
        with pytest.raises(Refused) as never, made.admission(6):
            pass
        assert made.admitted == 0
        return full.value.code, never.value.code

    assert asyncio.run(main()) == (Code.RESOURCE_EXHAUSTED, Code.INVALID_ARGUMENT)


def test_a_request_that_is_given_up_leaves_nothing_behind_and_is_not_computed():
    async def main():
        made, double = batcher(max_batch=2), Doubling(open_gate=False)
        first = asyncio.create_task(made.run("lane", double, x(0), 60))
        await begun(double)
        given_up = [asyncio.create_task(made.run("lane", double, x(1, 2, 3), 60)) for _ in range(3)]
        kept = asyncio.create_task(made.run("lane", double, x(4), 60))
        await asyncio.sleep(0.001)
        for task in given_up:
            task.cancel()
        await asyncio.sleep(0.001)
        double.gate.set()
        await asyncio.gather(first, kept)
        return double.batches, made._lanes

    assert asyncio.run(main()) == ([1, 1], {})


def test_a_computation_that_fails_fails_its_requests_and_no_others():
    def broken(tensors):
        raise ValueError("boom")

    async def main():
        made, double = batcher(), Doubling()
        results = await asyncio.gather(
            made.run("broken", broken, x(*range(9)), 60), made.run("lane", double, x(1), 60), return_exceptions=True
        )
        await made.run("lane", double, x(1), 60)
        return results, made._lanes

    (failed, good), lanes = asyncio.run(main())
    assert isinstance(failed, ValueError)
    assert good.outputs["y"] == [2]
    assert lanes == {}
