"""Figures and rules: each kind of encoder gets the outcome that it deserves."""

import dataclasses
import math

import numpy as np
import pytest

from components.evaluator.config import EvaluateConfig
from components.evaluator.scorecard import METRICS, RULES, Embedded, score

CONFIG = EvaluateConfig(knn_k=5)


def make(bank: int = 60, queries: int = 20, classes: int = 3, dim: int = 16) -> Embedded:
    """A set whose embedding tells the classes apart, whose untrained embedding and pixels hold nothing of them."""
    rng = np.random.default_rng(0)
    count = bank + queries
    classes_of = np.arange(count) % classes
    labels = np.array([f"c{c}".encode() for c in classes_of] + [None], dtype=object)[:-1]
    embedding = np.eye(classes, dim)[classes_of] + 0.1 * rng.normal(size=(count, dim))
    noise = rng.normal(size=(2, count, dim))
    return Embedded(embedding, noise[0], noise[1], labels, np.arange(count) < bank)


def unlabelled(images: Embedded) -> Embedded:
    return dataclasses.replace(images, labels=np.full(len(images.labels), None, dtype=object))


def rules(metrics: dict[str, float]) -> dict[str, float]:
    return {rule: metrics[rule] for rule in RULES}


def test_a_good_encoder_passes_every_rule_and_its_score_is_knn():
    metrics = score(make(), CONFIG)
    assert set(metrics) == set(METRICS)
    assert metrics["knn_top1"] == metrics["score"] == metrics["linear_top1"] == 1.0
    assert metrics["random_init_knn_top1"] < 0.8
    assert metrics["pixel_knn_top1"] < 0.8
    assert metrics["knn_gain"] == metrics["knn_top1"] - metrics["random_init_knn_top1"]
    assert metrics["majority_top1"] == pytest.approx(7 / 20)
    assert set(rules(metrics).values()) == {1.0}
    assert metrics["rules_passed"] == 1.0
    assert (metrics["bank_images"], metrics["query_images"]) == (60.0, 20.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_embedding_that_is_not_finite_breaks_the_finite_rule_and_no_other(value):
    images = make()
    images.embedding[17, 3] = value
    metrics = score(images, CONFIG)
    assert metrics["finite_passed"] == metrics["rules_passed"] == metrics["score"] == 0.0
    assert all(math.isnan(metrics[rule]) for rule in RULES[1:])
    assert math.isnan(metrics["knn_top1"])
    assert not math.isnan(metrics["pixel_knn_top1"])


def test_a_collapsed_encoder_breaks_the_rules_of_collapse():
    images = dataclasses.replace(unlabelled(make()), embedding=np.ones((80, 16)))
    metrics = score(images, CONFIG)
    assert metrics["embedding_std_passed"] == metrics["effective_rank_passed"] == metrics["rules_passed"] == 0.0
    assert metrics["effective_rank"] == pytest.approx(1.0, abs=1e-5)


def test_an_encoder_of_zeros_breaks_the_rules_of_collapse():
    metrics = score(dataclasses.replace(unlabelled(make()), embedding=np.zeros((80, 16))), CONFIG)
    assert metrics["embedding_std_passed"] == metrics["effective_rank_passed"] == 0.0


def test_an_encoder_no_better_than_untrained_breaks_the_gain_rule_alone():
    images = make()
    metrics = score(dataclasses.replace(images, embedding=images.untrained), CONFIG)
    assert metrics["knn_gain"] == 0.0
    assert rules(metrics) == {**dict.fromkeys(RULES, 1.0), "knn_gain_passed": 0.0}
    assert metrics["rules_passed"] == 0.0


def test_the_gain_must_exceed_its_limit():
    images = make()
    images.labels[70] = b"c9"  # one query that no encoder can place, so that none is perfect
    gain = score(images, CONFIG)["knn_gain"]
    assert score(images, dataclasses.replace(CONFIG, min_gain=gain))["knn_gain_passed"] == 0.0
    assert score(images, dataclasses.replace(CONFIG, min_gain=gain - 0.01))["knn_gain_passed"] == 1.0


def test_an_unlabelled_set_is_scored_by_its_effective_rank_and_its_label_metrics_are_nan():
    metrics = score(unlabelled(make()), CONFIG)
    assert metrics["score"] == pytest.approx(metrics["effective_rank"] / 16)
    for name in ("knn_top1", "random_init_knn_top1", "pixel_knn_top1", "linear_top1", "majority_top1", "knn_gain"):
        assert math.isnan(metrics[name])
    assert math.isnan(metrics["knn_gain_passed"])
    assert metrics["rules_passed"] == 1.0


def test_images_without_label_take_no_part_in_knn():
    images = make()
    images.labels[::2] = None
    images.embedding[::2] = -1.0
    assert score(images, CONFIG)["knn_top1"] == 1.0


def test_one_class_is_no_reason_to_refuse_a_model():
    metrics = score(make(classes=1), CONFIG)
    assert metrics["knn_top1"] == metrics["random_init_knn_top1"] == metrics["linear_top1"] == 1.0
    assert metrics["knn_gain_passed"] == 1.0


def test_an_eval_split_of_one_image_is_scored():
    metrics = score(make(queries=1), CONFIG)
    assert metrics["knn_top1"] == 1.0
    assert metrics["embedding_std_passed"] == 1.0


@pytest.mark.parametrize(("bank", "queries"), [(3, 0), (0, 3), (2, 1), (1, 0)])
def test_three_images_and_fewer_are_scored_without_error(bank, queries):
    metrics = score(make(bank=bank, queries=queries), CONFIG)
    assert 0.0 <= metrics["score"] <= 1.0
    assert metrics["finite_passed"] == 1.0


def test_an_untrained_encoder_that_is_not_finite_breaks_the_gain_rule():
    images = make()
    images.labels[70] = b"c9"
    images.untrained[0] = np.nan
    metrics = score(images, CONFIG)
    assert math.isnan(metrics["random_init_knn_top1"])
    assert metrics["knn_gain_passed"] == 0.0


def test_the_linear_probe_can_be_left_out():
    assert math.isnan(score(make(), dataclasses.replace(CONFIG, linear_probe=False))["linear_top1"])
