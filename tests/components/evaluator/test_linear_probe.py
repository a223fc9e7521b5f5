"""The linear probe: it learns what is linear, and chooses within the train split."""

import numpy as np
import pytest

from components.evaluator.linear_probe import fit


def separable(seed: int, rows: int, classes: int = 3, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    return (np.eye(classes)[labels][:, np.arange(width) % classes] + 0.05 * rng.normal(size=(rows, width))).astype(
        np.float32
    ), labels


def top1(probe, vectors, labels) -> float:
    return float(np.mean(probe.ranking(vectors, 1)[:, 0] == labels))


@pytest.mark.parametrize(("classes", "width"), [(2, 6), (3, 6), (3, 700)])
def test_classes_that_a_plane_separates_are_found(classes, width):
    probe = fit(*separable(0, 300, classes, width))
    assert top1(probe, *separable(1, 100, classes, width)) == 1.0


def test_labels_that_the_embedding_does_not_hold_are_not_found():
    rng = np.random.default_rng(2)
    probe = fit(separable(0, 600)[0], rng.integers(0, 2, 600))
    assert 0.4 < top1(probe, separable(1, 600)[0], rng.integers(0, 2, 600)) < 0.6


def test_the_ranking_holds_each_class_once_the_likeliest_first():
    vectors, labels = separable(0, 300, classes=3)
    ranking = fit(vectors, labels).ranking(vectors, 5)
    assert (np.sort(ranking, axis=1) == [0, 1, 2]).all()
    assert (ranking[:, 0] == labels).all()


def test_classes_keep_their_numbers():
    vectors, labels = separable(0, 60)
    assert set(fit(vectors, labels * 10 + 5).ranking(vectors, 1).ravel()) == {5, 15, 25}


def test_one_class_predicts_itself_and_a_few_images_are_enough():
    vectors, _ = separable(0, 4)
    assert (fit(vectors, np.full(4, 7)).ranking(vectors, 5) == 7).all()
    assert top1(fit(vectors[:2], np.array([0, 1])), vectors[:2], np.array([0, 1])) == 1.0


def test_the_same_images_give_the_same_probe():
    one, other = (fit(*separable(0, 100, width=600)) for _ in range(2))
    assert (one.weights == other.weights).all()
