"""A linear classifier on frozen embeddings.

A multinomial logistic regression by L-BFGS on standardised features, the protocol of scikit-learn and of CLIP's linear
probes (arXiv 2103.00020, section 3.2); MoCo's own, 100 epochs of SGD at rate 30 (arXiv 1911.05722, section 4.1), comes
to the same optimum only on sets of ImageNet's size. Features of more than 512 dimensions, such as raw pixels, are
reduced to their principal components first.
"""

import dataclasses
import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.extmath import randomized_svd

_INVERSE_REGULARISATIONS = (0.01, 0.1, 1.0)
_ITERATIONS = 100
_COMPONENTS = 512  # beyond these, iterations take long and find nothing
_HELD_OUT = 5  # each fifth image of the train split judges the regularisation


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted classifier.

    Attributes:
        mean, scale: float32 [D], of the standardisation.
        weights, bias: float32 [D, C] and [C].
        classes: int64 [C], ascending.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    classes: NDArray[np.int64]

    def ranking(self, vectors: NDArray[np.floating], count: int) -> NDArray[np.int64]:
        """Returns int64 [N, at most count]: the likeliest classes of vectors [N, D], the likeliest first."""
        logits = (vectors.astype(np.float32) - self.mean) / self.scale @ self.weights + self.bias
        return self.classes[np.argsort(-logits, axis=1, kind="stable")[:, :count]]


def fit(vectors: NDArray[np.floating], labels: NDArray[np.int64]) -> Probe:
    """Fits a probe. The strength of its regularisation is chosen on each fifth of the given images, then all are
    fitted.

    Args:
        vectors: [N, D], N at least 1, of the train split alone, in an order that tells nothing of the label.
        labels: int64 [N].
    """
    vectors = vectors.astype(np.float32)
    mean, scale = vectors.mean(axis=0), vectors.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    standardised = (vectors - mean) / scale
    basis = _principal(standardised)
    features = standardised @ basis
    classes = np.unique(labels)
    if len(classes) == 1:
        weights = np.zeros((1, features.shape[1]), np.float32)
        bias = np.zeros(1, np.float32)
    else:
        weights, bias = _fit(features, labels, _strengths(features, labels))
    return Probe(mean, scale, basis @ weights.T.astype(np.float32), bias.astype(np.float32), classes)


def _principal(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 [D, P], P at most _COMPONENTS: all directions where D is no more, else the main ones."""
    if features.shape[1] <= _COMPONENTS:
        return np.eye(features.shape[1], dtype=np.float32)
    components = min(_COMPONENTS, len(features))
    return randomized_svd(features, components, n_iter=2, random_state=0)[2].T.astype(np.float32)


def _strengths(features: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, ...]:
    """Returns the inverse regularisations up to the chosen one: each fit starts from the one before."""
    held_out = np.arange(len(features)) % _HELD_OUT == _HELD_OUT - 1
    if not held_out.any() or len(np.unique(labels[~held_out])) == 1:
        return _INVERSE_REGULARISATIONS[-1:]
    model = _model()
    accuracy = [
        _refit(model, features[~held_out], labels[~held_out], strength).score(features[held_out], labels[held_out])
        for strength in _INVERSE_REGULARISATIONS
    ]
    return _INVERSE_REGULARISATIONS[: int(np.argmax(accuracy)) + 1]


def _fit(
    features: NDArray[np.float32], labels: NDArray[np.int64], strengths: tuple[float, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns weights [C, D] and bias [C]."""
    model = _model()
    for strength in strengths:
        _refit(model, features, labels, strength)
    if len(model.classes_) > 2:
        return model.coef_, model.intercept_
    # Of two classes scikit-learn keeps the log-odds of the second alone.
    weights, bias = (np.concatenate([-one, one]) * np.float32(0.5) for one in (model.coef_, model.intercept_))
    return weights, bias


def _model() -> LogisticRegression:
    return LogisticRegression(max_iter=_ITERATIONS, warm_start=True)


def _refit(
    model: LogisticRegression, features: NDArray[np.float32], labels: NDArray[np.int64], strength: float
) -> LogisticRegression:
    with warnings.catch_warnings():
        # The iterations are limited on purpose; the accuracy settles long before the optimiser's own criterion.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.set_params(C=strength).fit(features, labels)
