"""A linear classifier on frozen embeddings."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

_INVERSE_REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)
_ITERATIONS = 100
_HELD_OUT = 5  # each fifth image of the train split judges the regularisation


def linear_top1(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
    max_train: int,
) -> float:
    """Returns the top-1 accuracy of a multinomial logistic regression on frozen embeddings.

    The embeddings are standardised with the train split's statistics. The strength of the regularisation is chosen
    inside the train split, on each fifth image, so the test images choose nothing.

    Args:
        train: float32 [N, D], in an order that tells nothing of the label.
        train_labels: int64 [N].
        test: float32 [M, D].
        test_labels: int64 [M].
        max_train: most rows of `train` to use, from the first.

    Returns:
        The share of test images whose class is found; NaN when either side is empty.
    """
    if not len(train) or not len(test):
        return float("nan")
    train, train_labels = train[:max_train], train_labels[:max_train]
    if len(np.unique(train_labels)) == 1:
        return float(np.mean(test_labels == train_labels[0]))
    strength = _choose_strength(train, train_labels)
    return float(_fit(train, train_labels, strength).score(test, test_labels))


def _choose_strength(train: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    held_out = np.arange(len(train)) % _HELD_OUT == _HELD_OUT - 1
    if not held_out.any() or len(np.unique(labels[~held_out])) == 1:
        return 1.0
    accuracy = [
        _fit(train[~held_out], labels[~held_out], strength).score(train[held_out], labels[held_out])
        for strength in _INVERSE_REGULARISATIONS
    ]
    return _INVERSE_REGULARISATIONS[int(np.argmax(accuracy))]


def _fit(train: NDArray[np.float32], labels: NDArray[np.int64], strength: float) -> Pipeline:
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))
    with warnings.catch_warnings():
        # The iterations are limited on purpose; the accuracy settles long before the optimiser's own criterion.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(train, labels)
