"""A linear classifier on frozen embeddings.

A multinomial logistic regression by L-BFGS on standardised features, the protocol of scikit-learn and of CLIP's linear
probes (arXiv 2103.00020, section 3.2); MoCo's own, 100 epochs of SGD at rate 30 (arXiv 1911.05722, section 4.1), comes
to the same optimum only on sets of ImageNet's size. Features of more than 512 dimensions, such as raw pixels, are
reduced to their principal components first.

Which images it finds must not depend on how many threads add up, or in which order. So the optimum is reached, in
float64: an optimiser that is stopped on its way enlarges the smallest difference until some images are found by one
machine and not by another. It is reached in some hundred steps since the features are turned to their principal axes,
and each axis is scaled by the curvature of the loss along it; neither moves the optimum.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.utils.extmath import randomized_svd

_INVERSE_REGULARISATIONS = (0.01, 0.1, 1.0)
_ITERATIONS = 1000
_SLOPE = 1e-5  # largest slope at which the optimum counts as reached
_COMPONENTS = 512  # beyond these, iterations take long and find nothing
_HELD_OUT = 5  # each fifth image of the train split judges the regularisation


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted classifier.

    Attributes:
        mean, scale: float64 [D], of the standardisation.
        weights, bias: float64 [D, C] and [C].
        classes: int64 [C], ascending.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    classes: NDArray[np.int64]

    def ranking(self, vectors: NDArray[np.floating], count: int) -> NDArray[np.int64]:
        """Returns int64 [N, at most count]: the likeliest classes of vectors [N, D], the likeliest first."""
        logits = (vectors.astype(np.float64) - self.mean) / self.scale @ self.weights + self.bias
        return self.classes[np.argsort(-logits, axis=1, kind="stable")[:, :count]]


def fit(vectors: NDArray[np.floating], labels: NDArray[np.int64]) -> Probe:
    """Fits a probe. The strength of its regularisation is chosen on each fifth of the given images, then all are
    fitted.

    Args:
        vectors: [N, D], N at least 1, of the train split alone, in an order that tells nothing of the label.
        labels: int64 [N].
    """
    vectors = vectors.astype(np.float64)
    mean, scale = vectors.mean(axis=0), vectors.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    standardised = (vectors - mean) / scale
    axes = _principal(standardised)
    classes, which = np.unique(labels, return_inverse=True)
    found = np.zeros((axes.shape[1] + 1, len(classes)))
    if len(classes) > 1:
        features = standardised @ axes
        for strength in _strengths(features, which, len(classes)):
            found = _optimum(features, which, strength, found)
    return Probe(mean, scale, axes @ found[:-1], found[-1], classes)


def _principal(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the principal axes of [N, D], float64 [D, P]: all where D is at most _COMPONENTS, else the main ones."""
    if features.shape[1] <= _COMPONENTS:
        return np.linalg.eigh(features.T @ features)[1]
    components = min(_COMPONENTS, len(features))
    return randomized_svd(features, components, n_iter=2, random_state=0)[2].T


def _strengths(features: NDArray[np.float64], which: NDArray[np.int64], classes: int) -> tuple[float, ...]:
    """Returns the inverse regularisations up to the chosen one: each fit starts from the one before."""
    held_out = np.arange(len(features)) % _HELD_OUT == _HELD_OUT - 1
    if not held_out.any() or len(np.unique(which[~held_out])) == 1:
        return _INVERSE_REGULARISATIONS[-1:]
    found, accuracy = np.zeros((features.shape[1] + 1, classes)), []
    for strength in _INVERSE_REGULARISATIONS:
        found = _optimum(features[~held_out], which[~held_out], strength, found)
        predicted = (features[held_out] @ found[:-1] + found[-1]).argmax(axis=1)
        accuracy.append(np.mean(predicted == which[held_out]))
    return _INVERSE_REGULARISATIONS[: int(np.argmax(accuracy)) + 1]


def _optimum(
    features: NDArray[np.float64], which: NDArray[np.int64], strength: float, start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Minimises the sum of the images' log-losses and |weights|^2 / (2 strength).

    Args:
        features: [N, P].
        which: class of each, int [N], from 0 to K - 1.
        strength: inverse of the regularisation; of two classes, that of their difference, as scikit-learn has it.
        start: [P + 1, K].

    Returns:
        Weights and, in the last row, biases, which are not regularised: float64 [P + 1, K].
    """
    rows, classes = np.arange(len(features)), start.shape[1]
    penalty = np.append(np.full(features.shape[1], 1 / strength if classes > 2 else 2 / strength), 0.0)[:, None]
    wide = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    curvature = (wide**2).sum(axis=0)[:, None] * (classes - 1) / classes**2 + penalty  # where all are equally likely
    unit = 1 / np.sqrt(curvature)

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(start.shape) * unit
        logits = wide @ weights
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        sums = shares.sum(axis=1, keepdims=True)
        value = np.log(sums).sum() - logits[rows, which].sum() + (penalty * weights**2).sum() / 2
        shares /= sums
        shares[rows, which] -= 1
        return value, ((wide.T @ shares + penalty * weights) * unit).ravel()

    options = {"maxiter": _ITERATIONS, "maxfun": 2 * _ITERATIONS, "gtol": _SLOPE, "ftol": 0.0}
    found = minimize(loss, (start / unit).ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(start.shape) * unit
