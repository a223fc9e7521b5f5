"""What needs no label: intervals of geometry around its own definitions, and what two views share."""

import numpy as np
import pytest

from components.evaluator.label_free import geometry_estimates, shared_neighbours, view_estimates
from trainer_module import geometry
from trainer_module.knn import unit

FIGURES = {
    "embedding_std": geometry.embedding_std,
    "effective_rank": geometry.effective_rank,
    "uniformity": geometry.uniformity,
}


def vectors(count: int, width: int = 12, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, width)) * np.linspace(1.0, 0.2, width))


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("count", [8, 400])
def test_the_interval_is_about_as_wide_as_the_figure_varies_from_set_to_set(name, count):
    value, low, high = geometry_estimates(vectors(count))[name]
    assert value == FIGURES[name](vectors(count))
    assert low <= value <= high
    if count > 100:  # of few images any interval is a rough one
        others = [FIGURES[name](vectors(count, seed=seed)) for seed in range(1, 41)]
        assert 0.6 < (high - low) / (4 * np.std(others)) < 1.6


def test_more_dimensions_than_images_are_measured_too():
    estimate = geometry_estimates(vectors(30, 200))["effective_rank"]
    assert estimate.low <= estimate.value <= estimate.high <= 30


def test_one_image_has_no_geometry():
    assert geometry_estimates(vectors(1)) == {}


def test_views_that_change_nothing_share_all_and_unrelated_ones_what_chance_gives():
    images = vectors(200)
    same, _ = view_estimates(images, images, images)
    assert same["neighbour_consistency"] == (1.0, 1.0, 1.0)
    assert same["alignment"].value == 0.0
    other, shared = view_estimates(images, vectors(200, seed=1), vectors(200, seed=2))
    assert other["neighbour_consistency"].value == pytest.approx(10 / 199, abs=0.02)
    assert shared.shape == (200,)


def test_the_shared_neighbours_are_those_of_a_plain_reading():
    images, first, second = vectors(45, seed=1), vectors(45, seed=2), vectors(45, seed=3)
    wanted = []
    for row in range(45):
        near = [
            set([other for other in np.argsort(-(view[row] @ images.T), kind="stable") if other != row][:4])
            for view in (first, second)
        ]
        wanted.append(len(near[0] & near[1]) / 4)
    assert shared_neighbours(images, first, second) == pytest.approx(wanted)


def test_fewer_than_three_images_share_nothing_to_speak_of():
    images = vectors(2)
    assert np.isnan(shared_neighbours(images, images, images)).all()
