"""What counts as found, by neighbours and votes made by hand."""

import numpy as np
import pytest

from components.evaluator.outcomes import HITS, hits_of, vote


def found(voted=(), retrieved=(), ranked=None, label: int = 7) -> set[str]:
    hits = hits_of(label, np.array(voted), np.array(retrieved), None if ranked is None else np.array(ranked))
    assert hits.shape == (len(HITS),)
    return {name for name, hit in zip(HITS, hits, strict=True) if hit == 1.0}


@pytest.mark.parametrize(
    ("place", "names"), [(1, {"top1", "top5"}), (2, {"top5"}), (4, {"top5"}), (5, {"top5"}), (6, set())]
)
def test_top_1_and_top_5_are_the_first_and_the_first_five_classes(place, names):
    classes = [0, 1, 2, 3, 4, 5]
    classes[place - 1] = 7
    assert found(voted=classes) == {f"knn_{name}" for name in names}
    assert found(ranked=classes) == {f"linear_{name}" for name in names}


@pytest.mark.parametrize(
    ("place", "depths"), [(1, (1, 5, 10)), (2, (5, 10)), (5, (5, 10)), (6, (10,)), (10, (10,)), (11, ())]
)
def test_recall_at_k_asks_whether_one_of_the_k_nearest_has_the_label(place, depths):
    labels = [0] * 12
    labels[place - 1] = 7
    assert found(retrieved=labels) == {f"recall_at_{depth}" for depth in depths}


def test_without_a_probe_its_hits_are_neither_right_nor_wrong():
    hits = dict(zip(HITS, hits_of(7, np.array([7]), np.array([7]), None), strict=True))
    assert np.isnan([hits["linear_top1"], hits["linear_top5"]]).all()


def test_votes_weigh_exp_of_similarity_over_temperature_and_only_k_neighbours_vote():
    similarities, labels = np.array([0.9, 0.8, 0.7, 0.6]), np.array([3, 5, 5, 8])
    # exp(9) = 8103 against exp(8) + exp(7) = 4078 at T = 0.1; exp(0.9) = 2.46 against 4.24 at T = 1.
    assert vote(similarities, labels, 3, 0.1, 5).tolist() == [3, 5]
    assert vote(similarities, labels, 3, 1.0, 5).tolist() == [5, 3]
    assert vote(similarities, labels, 4, 0.1, 5).tolist() == [3, 5, 8]
    assert vote(similarities, labels, 4, 0.1, 2).tolist() == [3, 5]
    assert vote(np.array([0.9, 0.8, 0.8, 0.8]), np.array([3, 5, 5, 5]), 1, 1.0, 5).tolist() == [3]
    assert vote(np.array([0.5, 0.5]), np.array([9, 2]), 2, 0.1, 5).tolist() == [2, 9]
