"""Intervals and paired tests: they cover what they promise, and come out the same again."""

import numpy as np
import pytest

from components.evaluator.resampling import DRAWS, mean_draws, mean_estimates, resamples, sign_test


def test_every_resample_draws_as_many_images_as_there_are_and_the_same_again():
    counts = np.concatenate(list(resamples(37)))
    assert counts.shape == (DRAWS, 37)
    assert (counts.sum(axis=1) == 37).all()
    assert (np.concatenate(list(resamples(37))) == counts).all()
    assert len(np.unique(counts, axis=0)) == DRAWS


def test_the_parts_that_memory_asks_for_are_one_drawing():
    assert np.concatenate(list(resamples(5_000))).shape == (DRAWS, 5_000)
    assert len(list(resamples(5_000))) > 1


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    estimates = mean_estimates((rng.random((120, 300)) < 0.7).astype(float))
    covered = np.mean([low <= 0.7 <= high for _, low, high in estimates])
    assert 0.9 < covered < 0.985


def test_the_interval_of_a_share_is_as_wide_as_the_binomial_says():
    values = np.repeat([1.0, 0.0], [300, 200])[:, None]
    ((value, low, high),) = mean_estimates(values)
    assert value == 0.6
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.24 / 500), rel=0.1)


def test_images_without_the_figure_take_no_part():
    values = np.array([[1.0, np.nan], [0.0, np.nan], [1.0, 4.0]])
    first, second = mean_estimates(values)
    assert first.value == pytest.approx(2 / 3)
    assert second == (4.0, 4.0, 4.0)
    assert np.isnan(mean_estimates(np.full((3, 1), np.nan))[0]).all()
    assert np.isnan(mean_estimates(np.zeros((0, 1)))[0]).all()


def test_columns_are_drawn_together_so_that_differences_are_paired():
    rng = np.random.default_rng(1)
    one = rng.normal(size=(200, 1))
    draws = mean_draws(np.concatenate([one, one + 0.5], axis=1))
    assert np.ptp(draws[:, 1] - draws[:, 0]) < 1e-5


def test_the_sign_test_is_the_exact_binomial_of_images_that_differ():
    first = np.array([1.0] * 9 + [0.0] + [1.0] * 50 + [np.nan])
    second = np.array([0.0] * 9 + [1.0] + [1.0] * 50 + [0.0])
    assert sign_test(first, second) == pytest.approx(2 * (1 + 10) / 2**10)
    assert sign_test(second, first) == sign_test(first, second)
    assert sign_test(first, first) == 1.0
