"""The nearest neighbours of many queries in a bank that fits no memory, on Beam.

The queries are the small side: every worker holds them all (50,000 x 2,048 float16 are 205 MB) and multiplies them with
parts of the bank as they come by. Of a bundle's parts only each query's k nearest rows leave it; a combiner merges
those of all bundles, block by block of the queries. Nothing is larger than it has to be:

- a worker holds the queries twice (as they came, and joined: 4 Q D bytes), one part of the bank (6 bytes a number, at
  most 384 MiB), a chunk of similarities for each core (some 100 MiB), 24 Q k bytes of codes, and keys and labels of
  the rows that are among some query's k nearest: with Beam itself 2.9 GB for 50,000 queries, 2,048 dimensions and k =
  200. Of all these only the keys and labels can grow with the bank, by 72 bytes a row, until they are Q k;
- what is shuffled is 8 Q k bytes a bundle (80 MB for these), and key and label (72 bytes for SHA-256 in hexadecimal) of
  each row that a block's queries have among their k nearest, once a block: for a bundle of n rows at most 16 n of them.
  With 1.28 million rows in bundles of 64,000 that is 20 x (80 + 74) MB = 3 GB, where the bank has 5.2 GB.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.transforms.window import GlobalWindow
from apache_beam.typehints.decorators import no_annotations
from apache_beam.utils.windowed_value import WindowedValue
from numpy.typing import NDArray

from trainer_module.knn import decode, largest, nearest, unit, widened

_BLOCKS = 16  # of the queries: how many workers can merge at once
_PART_BYTES = 256 << 20  # of the part of the bank that is searched at once, as float32
_PART_ROWS = 65_536
_MERGED_AT_ONCE = 8
_QUERIES_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some images' embeddings; make it with `Rows.of`.

    Attributes:
        keys: bytes S [N], each image's own. Of equally similar rows the one with the smaller key is the nearer.
        vectors: float16 [N, D] of length 1.
        labels: int64 [N], -1 for an image without label.
    """

    keys: NDArray[np.bytes_]
    vectors: NDArray[np.float16]
    labels: NDArray[np.int64]

    @staticmethod
    def of(keys: Sequence[bytes] | NDArray[np.bytes_], vectors: NDArray, labels: NDArray | None = None) -> "Rows":
        """Rows of embeddings of any length, which moves a cosine similarity by less than 1e-3.

        Args:
            keys: [N], with no NUL at the end.
            vectors: float [N, D]; a row that is not finite becomes NaN.
            labels: int [N]; -1 each if left out.
        """
        given = np.full(len(keys), -1) if labels is None else labels
        return Rows(np.asarray(keys, np.bytes_), unit(vectors).astype(np.float16), given.astype(np.int64))

    def __len__(self) -> int:
        """How many."""
        return len(self.keys)

    def take(self, which: NDArray | slice) -> "Rows":
        """Those rows, by numbers or by a mask."""
        return Rows(self.keys[which], self.vectors[which], self.labels[which])

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        """All rows of at least one part."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*((part.keys, part.vectors, part.labels) for part in parts), strict=True)
        return Rows(*(np.concatenate(column) for column in columns))


class Neighbours(NamedTuple):
    """A query's neighbours, the nearest first; fewer than k where the bank has fewer finite rows, or the query is NaN.

    Attributes:
        key: the query's.
        similarities: cosines, float32 [k]: exact for the float16 vectors, then rounded.
        keys: of the neighbours, S [k].
        labels: of the neighbours, int64 [k].
    """

    key: bytes
    similarities: NDArray[np.float32]
    keys: NDArray[np.bytes_]
    labels: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Partial:
    """The nearest rows of a share of the bank to some queries.

    Attributes:
        queries: their keys, S [Q].
        codes: uint64 [Q, at most k], the nearest first (see trainer_module.knn.encode), of positions in `keys`.
        keys: S [T], ascending, of the rows that a code names.
        labels: int64 [T].
    """

    queries: NDArray[np.bytes_]
    codes: NDArray[np.uint64]
    keys: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    @staticmethod
    def none(queries: NDArray[np.bytes_]) -> "Partial":
        """Of a bank without rows."""
        return Partial(queries, np.zeros((len(queries), 0), np.uint64), np.zeros(0, "S1"), np.zeros(0, np.int64))

    def of_queries(self, which: slice) -> "Partial":
        """Of those queries alone, without the rows that none of them names."""
        codes = self.codes[which]
        named = np.zeros(len(self.keys), bool)
        named[decode(codes[codes > 0])[1]] = True
        places = np.cumsum(named) - 1
        return Partial(self.queries[which], _renumbered(codes, places), self.keys[named], self.labels[named])

    def neighbours(self) -> Iterator[Neighbours]:
        """Of each query."""
        similarities, positions = decode(self.codes)
        for number, key in enumerate(self.queries):
            found = self.codes[number] > 0
            rows = positions[number, found]
            yield Neighbours(bytes(key), similarities[number, found], self.keys[rows], self.labels[rows])


def merge(parts: Sequence[Partial], k: int) -> Partial:
    """The k nearest rows of all shares of the bank.

    Args:
        parts: at least one, of the same queries.
        k: neighbours.
    """
    keys = np.concatenate([part.keys for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    order = np.argsort(keys, kind="stable")
    places = np.empty(len(keys), np.int64)
    places[order] = np.arange(len(keys))
    shares = np.split(places, np.cumsum([len(part.keys) for part in parts])[:-1])
    queries = parts[0].queries
    codes = np.zeros((len(queries), min(k, sum(part.codes.shape[1] for part in parts))), np.uint64)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        chunk = slice(start, start + _QUERIES_AT_ONCE)
        renumbered = [_renumbered(part.codes[chunk], share) for part, share in zip(parts, shares, strict=True)]
        codes[chunk] = largest(np.concatenate(renumbered, axis=1), k)
    return Partial(queries, codes, keys[order], labels[order]).of_queries(slice(None))


def _renumbered(codes: NDArray[np.uint64], places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns codes [Q, W] whose position p has become places[p]."""
    if not len(places):
        return codes
    positions = decode(codes)[1]
    moved = positions - places.take(positions, mode="clip")
    return np.where(codes > 0, codes + moved.astype(np.uint64), codes)


class Search:
    """The k nearest rows to some queries in a bank that is given piece by piece."""

    def __init__(self, queries: Rows, k: int, part_bytes: int = _PART_BYTES) -> None:
        """Args:
        queries: what is looked for.
        k: neighbours of each.
        part_bytes: of the part of the bank that is searched at once, as float32.
        """
        self._queries, self._k = queries, k
        # As many rows as possible: each part costs a look at every query's nearest.
        self._part_rows = min(_PART_ROWS, max(1, part_bytes // (4 * max(1, queries.vectors.shape[1]))))
        self._waiting: list[Rows] = []
        self._best = Partial.none(queries.keys)

    def add(self, rows: Rows) -> None:
        """Adds a piece of the bank."""
        while len(rows):
            room = self._part_rows - sum(map(len, self._waiting))
            self._waiting.append(rows.take(slice(0, room)))
            rows = rows.take(slice(room, None))
            if len(self._waiting[-1]) == room:
                self._search_waiting()

    def result(self) -> Partial:
        """Of all that was added."""
        if self._waiting:
            self._search_waiting()
        return self._best

    def _search_waiting(self) -> None:
        keys, labels = (
            np.concatenate(column) for column in zip(*((rows.keys, rows.labels) for rows in self._waiting), strict=True)
        )
        order = np.argsort(keys, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        vectors, finite = widened([rows.vectors for rows in self._waiting], places)
        self._waiting = []
        if not np.all(finite):
            vectors, order = vectors[finite], order[finite]
        full = self._best.codes.shape[1] == self._k
        floor = decode(self._best.codes[:, -1])[0] if full else None
        codes = nearest(vectors, self._queries.vectors, self._k, floor)
        part = Partial(self._queries.keys, codes, keys[order], labels[order])
        self._best = merge([self._best, part], self._k)


class NearestNeighbours(beam.PTransform):
    """Finds the nearest rows of the bank to each query by cosine similarity, exactly.

    Takes {"bank": PCollection[Rows], "queries": PCollection[Rows]}, of any number of rows each, and gives a
    PCollection[Neighbours] with one element a query. The result depends on the rows alone: not on how they are cut into
    elements and bundles, on their order, or on the runner. Keys must be unique within the bank and within the queries.
    A bank's row that is not finite is nobody's neighbour, and a query that is not finite has none.
    """

    def __init__(self, k: int) -> None:
        """Args:
        k: neighbours of each query, at least 1.
        """
        super().__init__()
        self._k = k

    @no_annotations  # Beam has no type hint for several inputs
    def expand(self, inputs: Mapping[str, beam.PCollection]) -> beam.PCollection:
        """See the class.

        Raises:
            ValueError: (when it runs) two queries have the same key.
        """
        blocks = (
            inputs["queries"]
            | "CutQueries" >> beam.FlatMap(_cut).with_output_types(tuple[int, Rows])
            | "GroupQueries" >> beam.GroupByKey()
            | "JoinQueries" >> beam.MapTuple(_join_block).with_output_types(tuple[int, Rows])
        )
        unfound = blocks | "Unfound" >> beam.MapTuple(_unfound).with_output_types(tuple[int, Partial])
        search = beam.ParDo(_SearchFn(self._k), beam.pvalue.AsList(blocks)).with_output_types(tuple[int, Partial])
        found = inputs["bank"] | "Search" >> search
        return (
            (unfound, found)
            | "Flatten" >> beam.Flatten()
            | "Merge" >> beam.CombinePerKey(_MergeFn(self._k))
            | "Neighbours" >> beam.FlatMapTuple(_neighbours).with_output_types(Neighbours)
        )


def _cut(rows: Rows) -> Iterator[tuple[int, Rows]]:
    block = np.array([zlib.crc32(key) % _BLOCKS for key in rows.keys], np.int64)
    for number in np.unique(block):
        yield int(number), rows.take(block == number)


def _join_block(number: int, parts: Iterable[Rows]) -> tuple[int, Rows]:
    rows = Rows.join(list(parts))
    rows = rows.take(np.argsort(rows.keys, kind="stable"))
    twice = np.flatnonzero(rows.keys[1:] == rows.keys[:-1])
    if len(twice):
        raise ValueError(f"{len(twice)} queries have the key of another one, such as {bytes(rows.keys[twice[0]])!r}")
    return number, rows


def _unfound(number: int, queries: Rows) -> tuple[int, Partial]:
    return number, Partial.none(queries.keys)


def _neighbours(_: int, partial: Partial) -> Iterator[Neighbours]:
    return partial.neighbours()


class _SearchFn(beam.DoFn):
    """Searches what comes by in a bundle, and gives (block of queries, Partial) of all of it at the end."""

    def __init__(self, k: int) -> None:
        self._k = k

    def start_bundle(self) -> None:
        """Forgets the last bundle."""
        self._search: Search | None = None
        self._blocks: list[tuple[int, slice]] = []

    def process(self, rows: Rows, blocks: list[tuple[int, Rows]]) -> Iterable[tuple[int, Partial]]:
        """Takes a piece of the bank."""
        if self._search is None and blocks:
            ends = np.cumsum([len(queries) for _, queries in blocks])
            spans = [slice(int(end) - len(queries), int(end)) for end, (_, queries) in zip(ends, blocks, strict=True)]
            self._blocks = [(number, span) for (number, _), span in zip(blocks, spans, strict=True)]
            self._search = Search(Rows.join([queries for _, queries in blocks]), self._k)
        if self._search is not None:
            self._search.add(rows)
        return ()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Gives what was found."""
        if self._search is None:
            return
        partial = self._search.result()
        self._search = None
        window = GlobalWindow()
        for number, span in self._blocks:
            yield WindowedValue((number, partial.of_queries(span)), window.max_timestamp(), (window,))


class _MergeFn(beam.CombineFn):
    """Merges Partials of the same queries, a few at once."""

    def __init__(self, k: int) -> None:
        self._k = k

    def create_accumulator(self) -> list[Partial]:
        """Of no share of the bank."""
        return []

    def add_input(self, accumulator: list[Partial], element: Partial) -> list[Partial]:
        """Adds a share."""
        accumulator.append(element)
        return accumulator if len(accumulator) < _MERGED_AT_ONCE else self.compact(accumulator)

    def merge_accumulators(self, accumulators: Iterable[list[Partial]]) -> list[Partial]:
        """Joins shares."""
        joined: list[Partial] = []
        for accumulator in accumulators:
            for element in accumulator:
                joined = self.add_input(joined, element)
        return joined

    def compact(self, accumulator: list[Partial]) -> list[Partial]:
        """Leaves one."""
        return [merge(accumulator, self._k)] if len(accumulator) > 1 else accumulator

    def extract_output(self, accumulator: list[Partial]) -> Partial:
        """Of all shares."""
        return merge(accumulator, self._k)
