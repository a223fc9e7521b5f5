"""Spread, effective rank and uniformity against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_module.geometry import effective_rank, embedding_std, uniformity
from trainer_module.knn import unit


def draw(seed: int, rows: int, dim: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, dim)))


def collapsed(rows: int, dim: int) -> np.ndarray:
    return np.repeat(draw(0, 1, dim), rows, axis=0)


def test_spread_is_zero_when_collapsed_and_that_of_the_sphere_when_uniform():
    assert embedding_std(collapsed(100, 64)) == pytest.approx(0.0, abs=1e-6)
    assert embedding_std(draw(1, 20_000, 64)) == pytest.approx(1 / 8, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), dim=st.integers(1, 40))
def test_effective_rank_is_the_entropy_of_the_singular_values_and_within_its_bounds(seed, rows, dim):
    embeddings = draw(seed, rows, dim)
    singular = np.linalg.svd(embeddings.astype(np.float64), compute_uv=False)
    share = singular[singular > 1e-6 * singular.max()] / singular.sum()
    assert effective_rank(embeddings) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert 1 - 1e-6 <= effective_rank(embeddings) <= min(rows, dim) + 1e-6


def test_effective_rank_counts_directions():
    assert effective_rank(collapsed(50, 16)) == pytest.approx(1.0)
    assert effective_rank(np.tile(np.eye(5, 16, dtype=np.float32), (10, 1))) == pytest.approx(5.0)
    assert effective_rank(np.zeros((4, 3), np.float32)) == 0.0


@pytest.mark.parametrize("rows", [2, 1023, 1025])
def test_uniformity_is_that_of_all_pairs(rows):
    embeddings = draw(2, rows, 16).astype(np.float64)
    squared = ((embeddings**2).sum(1)[:, None] + (embeddings**2).sum(1)[None]) - 2 * embeddings @ embeddings.T
    pairs = np.exp(-2 * squared)[~np.eye(rows, dtype=bool)]
    assert uniformity(embeddings.astype(np.float32)) == pytest.approx(np.log(pairs.mean()), rel=1e-4)


def test_uniformity_is_zero_when_collapsed_and_undefined_for_one_image():
    assert uniformity(collapsed(30, 8)) == pytest.approx(0.0, abs=1e-5)
    assert np.isnan(uniformity(draw(3, 1, 8)))
