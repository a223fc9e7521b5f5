"""What a task of `dask_runner` does on its worker: lists of elements in, lists of elements out.

Beam is imported inside the functions, since the scheduler imports this module, too, and runs none of them.
"""

import collections
import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import distributed

Elements = list[Any]
Outputs = dict[str | None, Elements]


@dataclasses.dataclass(frozen=True)
class Step:
    """A ParDo.

    Attributes:
        id: of its own in each pipeline.
        payload: the DoFn with all that belongs to it, pickled by Beam.
    """

    id: str
    payload: bytes


class Steps(distributed.WorkerPlugin):
    """Keeps the DoFns that a worker has set up, until the next pipeline.

    Attributes:
        ready: by the step, those that no task uses just now.
    """

    name = "moco-steps"
    idempotent = False

    def setup(self, worker: distributed.Worker) -> None:
        """See the base class."""
        del worker
        self.ready: dict[str, list[Any]] = collections.defaultdict(list)

    def teardown(self, worker: distributed.Worker) -> None:
        """Ends the DoFns."""
        del worker
        for bundle in itertools.chain(*self.ready.values()):
            bundle.runner.teardown()


def impulse() -> Elements:
    """The one element that a pipeline begins with."""
    return [b""]


def run(step: Step, elements: Elements, *sides: Elements) -> Outputs:
    """Processes a partition as one bundle.

    Args:
        step: the ParDo.
        elements: of the partition.
        *sides: the elements of each side input.

    Returns:
        The elements of each output that got any.
    """
    if not elements:
        return {}
    plugin: Any = distributed.get_worker().plugins[Steps.name]
    ready = plugin.ready[step.id]
    bundle = ready.pop() if ready else _bundle(step, sides)
    outputs = bundle.process(elements)
    ready.append(bundle)  # not after an error, which leaves it in whatever state
    return outputs


def tagged(outputs: Outputs, tag: str | None) -> Elements:
    """One of the outputs."""
    return outputs.get(tag, [])


def by_key(elements: Elements, partitions: int, coder: bytes) -> list[Elements]:
    """Deals elements to partitions by their keys, the same way in every process."""
    encode = _coder(coder).encode
    dealt: list[Elements] = [[] for _ in range(partitions)]
    for key, value in elements:
        code = encode(key)
        dealt[zlib.crc32(code) % partitions].append((code, value))
    return dealt


def grouped(partition: int, coder: bytes, *dealt: list[Elements]) -> Elements:
    """(key, values) of the keys of one partition, of which equal encodings make equal keys."""
    groups: dict[bytes, Elements] = {}
    for elements in dealt:
        for code, value in elements[partition]:
            groups.setdefault(code, []).append(value)
    decode = _coder(coder).decode
    return [(decode(code), values) for code, values in groups.items()]


def in_turn(elements: Elements, partitions: int) -> list[Elements]:
    """Deals elements to partitions like cards."""
    return [elements[start::partitions] for start in range(partitions)]


def joined(partition: int, *dealt: list[Elements]) -> Elements:
    """What all have dealt to one partition."""
    return gathered(*(elements[partition] for elements in dealt))


def gathered(*parts: Elements) -> Elements:
    """All elements of several partitions."""
    return [*itertools.chain(*parts)]


def read(bundle: bytes) -> Elements:
    """The elements of a piece of a source."""
    from apache_beam.internal import pickler

    piece = pickler.loads(bundle)
    return [*piece.source.read(piece.source.get_range_tracker(piece.start_position, piece.stop_position))]


def _coder(pickled: bytes) -> Any:
    from apache_beam.internal import pickler

    return pickler.loads(pickled)


def _bundle(step: Step, sides: Sequence[Elements]) -> Any:
    from pipeline.engines.dask_bundle import Bundle

    return Bundle(step.payload, sides)
