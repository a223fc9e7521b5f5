"""The streamed search for neighbours: against brute force, and against itself on other pieces and bundles."""

import tracemalloc

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluator.neighbours import NearestNeighbours, Neighbours, Partial, Rows, Search, merge

RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def draw(seed: int, count: int, prefix: str = "b", dim: int = 16, kinds: int = 0) -> Rows:
    """Rows in an order that is not that of their keys; of so many kinds of vectors, or all different."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(kinds or count, dim))
    keys = [f"{prefix}{number:04d}".encode() for number in rng.permutation(count)]
    chosen = vectors[rng.integers(0, kinds, count)] if kinds else vectors
    return Rows.of(keys, chosen, rng.integers(-1, 5, count))


def pieces(seed: int, rows: Rows, most: int) -> list[Rows]:
    """The rows in another order, cut at random; some pieces are empty."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, len(rows) + 1, rng.integers(0, most + 1)))
    return [rows.take(part) for part in np.split(rng.permutation(len(rows)), cuts)]


def searched(bank: list[Rows], queries: Rows, k: int, part_bytes: int = 1 << 20) -> Partial:
    search = Search(queries, k, part_bytes)
    for rows in bank:
        search.add(rows)
    return search.result()


def plain(found) -> list:
    return sorted((n.key, n.similarities.tolist(), n.keys.tolist(), n.labels.tolist()) for n in found)


def brute_force(bank: Rows, queries: Rows, k: int) -> list:
    similarity = (queries.vectors.astype(np.float64) @ bank.vectors.astype(np.float64).T).astype(np.float32)
    found = []
    for number, key in enumerate(queries.keys):
        nearest = sorted(range(len(bank)), key=lambda row: (-similarity[number, row], bank.keys[row]))[:k]
        found.append(Neighbours(key, similarity[number, nearest], bank.keys[nearest], bank.labels[nearest]))
    return plain(found)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bank=st.integers(0, 120),
    queries=st.integers(0, 9),
    k=st.integers(1, 150),
    kinds=st.sampled_from([0, 0, 1, 4]),
    part_bytes=st.sampled_from([1, 700, 1 << 20]),
)
def test_neighbours_are_those_of_brute_force_with_ties_by_key_however_the_bank_is_cut(
    seed, bank, queries, k, kinds, part_bytes
):
    rows, tests = draw(seed, bank, kinds=kinds), draw(seed + 1, queries, "q")
    found = searched(pieces(seed, rows, 5), tests, k, part_bytes)
    assert plain(found.neighbours()) == brute_force(rows, tests, k)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 60), kinds=st.sampled_from([0, 3]))
def test_merging_shares_in_any_order_and_grouping_is_searching_the_whole(seed, k, kinds):
    rows, tests = draw(seed, 90, kinds=kinds), draw(seed + 1, 7, "q")
    parts = [searched([share], tests, k) for share in pieces(seed, rows, 6)]
    rng = np.random.default_rng(seed)
    while len(parts) > 1:
        taken = [parts.pop(rng.integers(len(parts))) for _ in range(min(len(parts), rng.integers(2, 4)))]
        parts.append(merge(taken, k))
    assert plain(parts[0].neighbours()) == brute_force(rows, tests, k)


def test_a_partial_holds_only_rows_that_it_names():
    rows, tests = draw(1, 400), draw(2, 6, "q")
    found = searched([rows], tests, 5)
    named = {key for neighbours in found.neighbours() for key in neighbours.keys}
    assert set(found.keys) == named
    first = found.of_queries(slice(0, 1))
    assert plain(first.neighbours()) == [row for row in plain(found.neighbours()) if row[0] == tests.keys[0]]
    assert len(first.keys) == 5


def test_a_row_that_is_not_finite_is_nobody_s_neighbour_and_a_query_that_is_not_has_none():
    vectors = np.random.default_rng(3).normal(size=(30, 8))
    vectors[4, 2], vectors[9, 0] = np.nan, np.inf
    keys = [f"{number:02d}".encode() for number in range(30)]
    rows = Rows.of(keys, vectors)
    found = {neighbours.key: neighbours for neighbours in searched([rows], rows, 40).neighbours()}
    assert found[b"04"].keys.tolist() == found[b"09"].keys.tolist() == []
    assert set(found[b"00"].keys.tolist()) == set(keys) - {b"04", b"09"}
    assert found[b"00"].keys[0] == b"00"


def test_float16_moves_a_similarity_by_less_than_a_thousandth():
    rng = np.random.default_rng(4)
    vectors, tests = rng.normal(size=(500, 2048)), rng.normal(size=(20, 2048)) + 0.5
    rows, queries = (Rows.of([b"%04d" % n for n in range(len(v))], v) for v in (vectors, tests))
    lengths = np.linalg.norm(vectors, axis=1), np.linalg.norm(tests, axis=1)
    cosines = np.sort(tests @ vectors.T / lengths[1][:, None] / lengths[0], axis=1)[:, ::-1]
    found = np.stack([n.similarities for n in searched([rows], queries, 500).neighbours()])
    assert np.abs(found - cosines).max() < 1e-3


def test_memory_does_not_grow_with_the_bank():
    tests = draw(5, 50, "q", dim=256)

    def peak(shards: int) -> int:
        search = Search(tests, 20, part_bytes=1 << 20)
        tracemalloc.start()
        for shard in range(shards):
            search.add(draw(6 + shard, 1000, f"{shard:02d}-", dim=256))
        search.result()
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    small = peak(4)
    assert peak(20) < 1.1 * small
    assert small < 8 * 2**20


def on_beam(bank: list[Rows], queries: list[Rows], k: int, wanted: list, *options: str) -> None:
    def check(found):
        assert plain(found) == wanted

    arguments = beam.options.pipeline_options.PipelineOptions(list(options))
    with beam.Pipeline(runner=RUNNER, options=arguments) as pipeline:
        sides = {
            "bank": pipeline | "Bank" >> beam.Create(bank),
            "queries": pipeline | "Queries" >> beam.Create(queries),
        }
        assert_that(sides | NearestNeighbours(k), check)


@pytest.mark.parametrize("options", [(), ("--direct_num_workers=3", "--direct_running_mode=multi_threading")])
def test_beam_finds_what_brute_force_finds_in_one_bundle_and_in_several(options):
    rows, tests = draw(7, 300, kinds=40), draw(8, 50, "q")
    wanted = brute_force(rows, tests, 12)
    on_beam(pieces(9, rows, 12), pieces(10, tests, 5), 12, wanted, *options)


def test_a_query_without_a_bank_has_an_element_without_neighbours():
    tests = draw(11, 5, "q")
    on_beam([], [tests], 3, [(key, [], [], []) for key in sorted(tests.keys.tolist())])


def test_a_bank_without_queries_gives_nothing():
    on_beam([draw(12, 20)], [], 3, [])


def test_two_queries_of_one_key_are_an_error():
    tests = draw(13, 4, "q")
    with pytest.raises(Exception, match=r"1 queries have the key of another one, such as b'q000"):
        on_beam([draw(14, 9)], [tests, tests.take(slice(0, 1))], 3, [])
