"""Weighted kNN against a brute-force reference and scikit-learn."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from trainer_module.knn import decode, encode, knn_predict, knn_top1, nearest, unit, widened

_PAIR = st.tuples(st.floats(-1, 1, width=32), st.integers(0, 2**32 - 1))


def draw(seed: int, rows: int, dim: int = 8) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, dim)))


def brute_force(bank, labels, queries, k, temperature) -> list[int]:
    predictions = []
    for query in queries:
        similarity = (query[None] @ bank.T)[0]
        nearest = sorted(range(len(bank)), key=lambda row: (-similarity[row], row))[:k]
        votes: dict[int, float] = {}
        for row in nearest:
            weight = np.exp((float(similarity[row]) - float(similarity[nearest[0]])) / temperature)
            votes[labels[row]] = votes.get(labels[row], 0.0) + weight
        predictions.append(min(votes, key=lambda label: (-votes[label], label)))
    return predictions


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bank=st.integers(1, 40),
    queries=st.integers(1, 12),
    classes=st.integers(1, 5),
    k=st.integers(1, 60),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    coarse=st.booleans(),
)
def test_prediction_is_that_of_a_brute_force_vote(seed, bank, queries, classes, k, temperature, coarse):
    rng = np.random.default_rng(seed)
    # Coarse vectors, axes of the space, have exact similarities 0 and 1 and so many ties at the edge of the k.
    make = (lambda n: np.eye(4, dtype=np.float32)[rng.integers(0, 4, n)]) if coarse else lambda n: draw(seed + n, n)
    vectors, tests = make(bank), make(queries)
    labels = rng.integers(0, classes, bank)
    assert knn_predict(vectors, labels, tests, k, temperature).tolist() == brute_force(
        vectors, labels, tests, k, temperature
    )


def test_prediction_is_that_of_scikit_learn_with_the_same_weights():
    bank, queries = draw(1, 500), draw(2, 80)
    labels = np.random.default_rng(3).integers(0, 7, 500)
    # For unit vectors the squared distance is 2 - 2 similarity.
    reference = KNeighborsClassifier(20, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.1))
    assert (knn_predict(bank, labels, queries, 20, 0.1) == reference.fit(bank, labels).predict(queries)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), chunk=st.integers(1, 5000))
def test_chunks_do_not_change_a_prediction(seed, chunk):
    bank, queries = draw(seed, 50), draw(seed + 1, 30)
    labels = np.random.default_rng(seed).integers(0, 4, 50)
    whole = knn_predict(bank, labels, queries, 5, 0.1)
    assert (knn_predict(bank, labels, queries, 5, 0.1, chunk_bytes=chunk) == whole).all()


def test_k_beyond_the_bank_lets_the_whole_bank_vote():
    bank, queries = draw(4, 6), draw(5, 10)
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert (knn_predict(bank, labels, queries, 200, 0.1) == knn_predict(bank, labels, queries, 6, 0.1)).all()


def test_a_tie_of_the_vote_goes_to_the_smallest_class_and_a_tie_at_the_edge_to_the_first_of_the_bank():
    bank = unit(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    query = unit(np.array([[1.0, 0.0]]))
    assert knn_predict(bank, np.array([3, 1, 1]), query, 1, 0.1).tolist() == [3]
    assert knn_predict(bank, np.array([3, 1, 2]), query, 3, 0.1).tolist() == [1]


def test_a_small_temperature_neither_overflows_nor_loses_the_vote():
    bank, labels = draw(6, 30), np.arange(30) % 3
    assert knn_top1(bank, labels, bank, labels, 5, 1e-4) == 1.0


def test_a_class_that_the_bank_lacks_counts_as_not_found():
    bank = draw(7, 10)
    assert knn_top1(bank, np.zeros(10, np.int64), bank, np.arange(10) % 2, 3, 0.1) == 0.5


@pytest.mark.parametrize(("bank", "queries"), [(0, 3), (3, 0)])
def test_top1_of_an_empty_side_is_nan(bank, queries):
    args = (draw(8, bank), np.zeros(bank, np.int64), draw(9, queries), np.zeros(queries, np.int64))
    assert np.isnan(knn_top1(*args, 3, 0.1))


def test_unit_keeps_zero_rows_and_turns_a_row_that_is_not_finite_into_nan():
    rows = unit(np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [3e38, 4e38 / 2]], np.float32))
    np.testing.assert_allclose(rows[0], [0.6, 0.8], rtol=1e-6)
    assert (rows[1] == 0).all()
    assert np.isnan(rows[2]).any()
    assert np.isnan(rows[3]).any()
    assert np.linalg.norm(rows[4]) == pytest.approx(1.0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bank=st.integers(1, 300),
    k=st.integers(1, 40),
    kinds=st.sampled_from([2, 5, 10_000]),
    chunk=st.sampled_from([1, 3000, 1 << 20]),
)
def test_the_nearest_rows_are_those_of_exact_arithmetic(seed, bank, k, kinds, chunk):
    rng = np.random.default_rng(seed)
    # Few kinds of vectors make many rows equally similar, up to a bank whose rows are all among the nearest.
    drawn = unit(rng.normal(size=(kinds, 12)) + 1).astype(np.float16)
    rows, queries = drawn[rng.integers(0, kinds, bank)], drawn[rng.integers(0, kinds, 6)]
    similarities, found = decode(nearest(rows, queries, k, chunk_bytes=chunk))
    for number, query in enumerate(queries):
        # A float16 of at most 1 is a whole number of 2^-24.
        whole = [[int(float(a) * 2.0**24) for a in row] for row in rows]
        asked = [int(float(a) * 2.0**24) for a in query]
        exact = [sum(a * b for a, b in zip(asked, row, strict=True)) for row in whole]
        rounded = np.array(exact, np.float64).astype(np.float32) / np.float32(2.0**48)
        wanted = sorted(range(bank), key=lambda row: (-rounded[row], row))[:k]
        assert found[number].tolist() == wanted
        assert (similarities[number] == rounded[wanted]).all()


def test_rows_below_the_floor_are_left_out_and_no_others():
    bank, queries = draw(20, 3000), draw(21, 40)
    codes = nearest(bank, queries, 30)
    similarities = decode(codes)[0]
    above = nearest(bank, queries, 30, floor=similarities[:, 9])
    assert (above[:, :10] == codes[:, :10]).all()
    assert (decode(above)[0][above > 0] >= np.repeat(similarities[:, 9], (above > 0).sum(axis=1)) - 1e-5).all()
    assert (nearest(bank, queries, 30, floor=np.full(40, np.nan, np.float32)) == codes).all()


def test_pieces_are_widened_as_they_are_into_the_order_that_is_asked_for_and_rows_that_are_not_finite_are_told():
    rng = np.random.default_rng(24)
    vectors = (rng.normal(size=(1500, 6)) * 10.0 ** rng.integers(-7, 1, (1500, 6))).astype(np.float16)
    spoiled = {700: np.nan, 3: np.inf, 1400: -np.inf}
    for row, value in spoiled.items():
        vectors[row, 2] = value
    vectors[3, 4] = -np.inf
    places = rng.permutation(1500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide, finite = widened(np.split(vectors, [0, 7, 700, 1300]), places)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide[places], vectors.astype(np.float32))
    assert set(np.flatnonzero(~finite[places])) == set(spoiled)


def test_a_query_that_is_not_finite_has_no_neighbours_and_disturbs_no_other():
    bank, queries = draw(22, 50), draw(23, 4)
    spoiled = queries.copy()
    spoiled[1, 3], spoiled[2, 0] = np.nan, np.inf
    codes = nearest(bank, spoiled, 5)
    assert (codes[[1, 2]] == 0).all()
    assert (codes[[0, 3]] == nearest(bank, queries, 5)[[0, 3]]).all()


@pytest.mark.parametrize(("bank", "queries"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_side_has_no_neighbours(bank, queries):
    assert nearest(draw(1, bank), draw(2, queries), 2).shape == (queries, min(bank, 2))


@settings(max_examples=100, deadline=None)
@given(st.lists(_PAIR, min_size=2, max_size=20, unique_by=lambda pair: pair[1]))
def test_codes_are_ordered_as_similarities_and_then_rows_and_can_be_read_back(pairs):
    similarities, rows = (np.array(column) for column in zip(*pairs, strict=True))
    codes = encode(similarities, rows)
    assert np.argsort(codes)[::-1].tolist() == sorted(range(len(pairs)), key=lambda i: (-similarities[i], rows[i]))
    back = decode(codes)
    assert (back[0] == similarities.astype(np.float32)).all()
    assert (back[1] == rows).all()
    assert (codes > 0).all()
