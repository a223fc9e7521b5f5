"""The rules on findings made by hand: each half of a rule counts by itself, and each limit is the stated one."""

import dataclasses

import pytest

from components.evaluator.config import EvaluateConfig
from components.evaluator.resampling import Estimate
from components.evaluator.rules import RULES, Findings, Rule, judge

CONFIG = EvaluateConfig()
FOUND = Findings(
    train_images=1000,
    eval_images=400,
    finite=True,
    spread=0.6,
    rank=20.0,
    possible_rank=64,
    score_name="kNN",
    score=0.5,
    untrained=0.4,
    gain=Estimate(0.1, 0.05, 0.15),
    gain_p=1e-6,
    has_baseline=True,
    baseline=0.5,
    change=Estimate(0.0, -0.01, 0.01),
    change_p=1.0,
    leak="",
)


def outcome(name: str, config: EvaluateConfig = CONFIG, **changes) -> Rule:
    """Of one rule, where all others hold."""
    rules = judge(FOUND._replace(**changes), config)
    assert [rule.name for rule in rules] == list(RULES)
    assert all(rule.holds for rule in rules if rule.name != name)
    return next(rule for rule in rules if rule.name == name)


@pytest.mark.parametrize(
    ("gain", "p", "min_gain", "holds"),
    [
        ((0.1, 0.05, 0.15), 1e-6, 0.0, True),
        ((0.1, -0.001, 0.2), 1e-6, 0.0, False),  # the interval touches zero, whatever the test says
        ((0.1, 0.05, 0.15), 0.0011, 0.0, False),  # the test is not sure, whatever the interval says
        ((0.1, 0.05, 0.15), 0.0009, 0.0, True),
        ((0.1, 0.05, 0.15), 1e-6, 0.06, False),
        ((0.1, 0.05, 0.15), 1e-6, 0.04, True),
        ((-0.2, -0.3, -0.1), 1.0, -1.0, True),  # no gain is asked for
        ((-0.2, -0.3, -0.1), 1.0, -0.2, False),
    ],
)
def test_a_gain_needs_its_interval_above_the_limit_and_the_paired_test_as_well(gain, p, min_gain, holds):
    config = dataclasses.replace(CONFIG, min_gain=min_gain)
    assert outcome("gain_passed", config, gain=Estimate(*gain), gain_p=p).holds is holds


@pytest.mark.parametrize(
    ("change", "p", "holds"),
    [
        ((0.01, -0.05, 0.07), 0.9, True),
        ((-0.01, -0.05, 0.03), 0.5, True),  # within the tolerance, and nothing says that it fell
        ((-0.02, -0.06, 0.02), 0.5, True),
        ((-0.021, -0.06, 0.02), 0.9, False),  # beyond the tolerance, however well noise explains it
        ((-0.2, -0.4, 0.0), 0.3, False),
        ((-0.01, -0.015, -0.005), 1e-6, True),  # a fall for certain, but for certain a tolerated one
        ((-0.015, -0.03, -0.001), 0.049, False),  # a fall for certain, and perhaps not a tolerated one
        ((-0.015, -0.03, 0.001), 0.051, True),
    ],
)
def test_a_model_is_not_worse_within_the_tolerance_alone_and_where_it_fell_that_must_be_proven(change, p, holds):
    changes = {"score": 0.5 + change[0], "change": Estimate(*change), "change_p": p}
    assert outcome("not_worse_passed", **changes).holds is holds
    assert outcome("not_worse_passed", dataclasses.replace(CONFIG, tolerance=1.0), **changes).holds


def test_a_tolerance_of_one_accepts_any_model():
    changes = {"score": 0.0, "baseline": 1.0, "change": Estimate(-1.0, -1.0, -1.0), "change_p": 1e-9}
    assert outcome("not_worse_passed", dataclasses.replace(CONFIG, tolerance=1.0), **changes).holds
    assert outcome("not_worse_passed", dataclasses.replace(CONFIG, tolerance=0.99), **changes).holds is False


def test_a_worse_model_is_told_so_with_p_and_interval():
    changes = {"score": 0.412, "baseline": 0.447, "change": Estimate(-0.035, -0.06, -0.01), "change_p": 0.003}
    assert outcome("not_worse_passed", **changes).text == (
        "kNN 0.412 is below the blessed model's 0.447, paired p = 0.003, change -0.035, interval -0.060 to -0.010, "
        "beyond evaluate.tolerance=0.02"
    )


def test_the_falls_that_the_eval_images_can_show_are_told():
    same = {
        "eval_images": 20,
        "change": Estimate(0.0, 0.0, 0.0),
    }  # six of twenty lost images give p < 0.05, five do not
    assert outcome("not_worse_passed", **same).text.endswith("these 20 images show falls of 0.300 and more")
    wide = {"eval_images": 400, "change": Estimate(0.01, -0.04, 0.06), "score": 0.51}
    assert outcome("not_worse_passed", **wide).text.endswith("these 400 images show falls of 0.050 and more")


@pytest.mark.parametrize(
    ("rank", "possible", "holds"), [(2.0, 64, True), (1.9, 64, False), (1.6, 3, True), (1.4, 3, False)]
)
def test_the_effective_rank_that_is_asked_for_is_the_limit_or_half_of_what_is_possible(rank, possible, holds):
    assert outcome("effective_rank_passed", rank=rank, possible_rank=possible).holds is holds


@pytest.mark.parametrize(("spread", "holds"), [(0.02, True), (0.0199, False)])
def test_the_spread_must_reach_its_limit(spread, holds):
    assert outcome("embedding_std_passed", spread=spread).holds is holds


@pytest.mark.parametrize(
    ("changes", "broken", "why"),
    [
        ({"finite": False}, {"finite_passed"}, "embeddings are not finite"),
        ({"eval_images": 1}, {"images_passed"}, "there is 1 eval image"),
        ({"eval_images": 0}, {"images_passed"}, "there are 0 eval images"),
        ({"eval_images": 0, "train_images": 0}, {"images_passed"}, "there are 0 eval images"),
    ],
)
def test_every_rule_has_an_outcome_in_words_even_where_nothing_can_be_measured(changes, broken, why):
    rules = {rule.name: rule for rule in judge(FOUND._replace(**changes), CONFIG)}
    assert tuple(rules) == RULES
    assert {name for name, rule in rules.items() if rule.holds is False} == broken
    assert [(rules[name].holds, rules[name].text.endswith(f": {why}")) for name in RULES[2:6]] == [(None, True)] * 4


def test_a_leak_alarm_is_broken_silence_holds_and_not_knowing_is_neither():
    assert outcome("leak_passed", leak="leak at step 3").holds is False
    assert outcome("leak_passed", leak="").holds is True
    rules = judge(FOUND._replace(leak=None), CONFIG)
    assert rules[-1].holds is None


def test_p_reads_on_the_side_of_its_bound_on_which_it_lies():
    for p, shown in ((0.00062, "0.00062"), (0.0009999, "0.0009999"), (0.001, "0.001"), (7e-6, "7e-06")):
        text = outcome("gain_passed", score=0.5, untrained=0.4, gain=Estimate(0.1, 0.05, 0.15), gain_p=p).text
        assert f"paired p = {shown}" in text
    worse = {"score": 0.4, "baseline": 0.41, "change": Estimate(-0.01, -0.05, 0.03), "change_p": 0.04996}
    assert "paired p = 0.04996, change" in outcome("not_worse_passed", **worse).text
