"""The linear probe: it learns what is linear, and chooses within the train split."""

import numpy as np
import pytest

from components.evaluator.linear_probe import linear_top1


def separable(seed: int, rows: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    return (np.eye(classes, 6)[labels] + 0.05 * rng.normal(size=(rows, 6))).astype(np.float32), labels


def test_classes_that_a_plane_separates_are_found():
    assert linear_top1(*separable(0, 300), *separable(1, 100), max_train=1000) == 1.0


def test_labels_that_the_embedding_does_not_hold_are_not_found():
    train, _ = separable(0, 600)
    test, _ = separable(1, 600)
    rng = np.random.default_rng(2)
    accuracy = linear_top1(train, rng.integers(0, 2, 600), test, rng.integers(0, 2, 600), max_train=1000)
    assert 0.4 < accuracy < 0.6


def test_only_the_first_rows_up_to_the_limit_are_used():
    train, labels = separable(0, 300)
    wrong = np.concatenate([labels[:100], (labels[100:] + 1) % 3])
    test = separable(1, 100)
    assert linear_top1(train, wrong, *test, max_train=100) == 1.0
    assert linear_top1(train, wrong, *test, max_train=300) < 0.5


def test_one_class_predicts_itself_and_a_few_images_are_enough():
    train, _ = separable(0, 4)
    assert linear_top1(train, np.zeros(4, int), train, np.array([0, 0, 0, 1]), max_train=10) == 0.75
    assert linear_top1(train[:2], np.array([0, 1]), train[:2], np.array([0, 1]), max_train=10) == 1.0


@pytest.mark.parametrize(("train", "test"), [(0, 3), (3, 0)])
def test_an_empty_side_is_nan(train, test):
    assert np.isnan(linear_top1(*separable(0, train), *separable(1, test), max_train=10))
