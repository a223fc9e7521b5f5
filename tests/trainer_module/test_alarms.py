"""Alarms as a function of the history: each is raised for its reason, once, and clears."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_module.alarms import Alarm, History, Interval, Kind, check_losses, check_weights, judge, sounding
from trainer_module.config import KeyBnConfig, KeyBnMode, TrainConfig, WatchConfig
from trainer_module.errors import UserError

CONFIG = TrainConfig(watch=WatchConfig(patience=3))
HEALTHY = Interval(
    step=0,
    steps=10,
    epoch=2.0,
    loss=5.0,
    pretext_top1=0.5,
    pretext_top5=0.7,
    positive_similarity=0.8,
    negative_similarity=0.1,
    alignment=0.4,
    embedding_std=0.08,
    embedding_spread=0.9,
    effective_rank=30.0,
    learning_rate=0.03,
    images_per_second=700.0,
    step_ms=90.0,
    input_wait_ms=1.0,
    input_wait_share=0.01,
    knn_top1=math.nan,
)


def run(*changes: dict, config: TrainConfig = CONFIG, start: History | None = None) -> list[tuple[Alarm, ...]]:
    """The alarms after each of the intervals, which differ from a healthy one."""
    history, said = start or History(), []
    for n, change in enumerate(changes, 1):
        history, alarms = judge(history, dataclasses.replace(HEALTHY, step=10 * n, **change), config)
        said.append(alarms)
    return said


def kinds(said: list[tuple[Alarm, ...]]) -> list[list[Kind]]:
    return [[alarm.kind for alarm in alarms] for alarms in said]


def test_a_healthy_run_is_silent():
    assert kinds(run(*[{}, {"knn_top1": 0.4}, {"knn_top1": 0.41}] * 5)) == [[]] * 15


@pytest.mark.parametrize("change", [{"embedding_spread": 0.001}, {"effective_rank": 1.2}])
def test_collapse_is_said_after_some_intervals_in_a_row_with_figures_and_mend(change):
    said = run(*[change] * 4)
    assert kinds(said) == [[], [], [Kind.collapse], []]
    text = said[2][0].text
    assert "\n" not in text
    for words in ("step 30", "limit 0.02", "limit 2", "train.learning_rate", "train.momentum"):
        assert words in text


def test_the_first_epoch_may_look_collapsed():
    assert kinds(run(*[{"effective_rank": 1.1, "epoch": 0.5}] * 9)) == [[]] * 9


def test_what_could_not_be_measured_raises_no_alarm():
    unknown = dict.fromkeys(("embedding_spread", "effective_rank", "input_wait_share", "knn_top1"), math.nan)
    assert kinds(run(*[unknown] * 9)) == [[]] * 9


def test_one_good_interval_breaks_a_row():
    slow = {"input_wait_share": 0.5}
    assert kinds(run(slow, slow, {}, slow, slow, {})) == [[]] * 6


def test_a_slow_input_is_said_with_share_step_time_and_mend():
    said = run(*[{"input_wait_share": 0.42, "step_ms": 120.0}] * 3)
    assert [alarm.text for alarm in said[2]] == [
        "input-bound at step 30: 42% of a step's 120 ms are spent waiting for views; set augment.where=beam "
        "(with augment.pairs_per_image as disk allows), or use a host with more cores"
    ]


def test_an_alarm_that_cleared_is_said_again():
    slow = {"input_wait_share": 0.5}
    assert kinds(run(*[slow] * 4, {}, *[slow] * 3)) == [[], [], [Kind.input], [], [], [], [], [Kind.input]]


def test_the_leak_is_pretext_near_one_while_knn_has_fallen():
    said = run(
        {"knn_top1": 0.5}, {"pretext_top1": 0.99}, {"pretext_top1": 0.99, "knn_top1": 0.4}, {"pretext_top1": 0.99}
    )
    assert kinds(said) == [[], [], [Kind.leak], []]
    assert "pretext top-1 is 0.990 while kNN fell from 0.500 to 0.400" in said[2][0].text


def test_what_sounds_at_the_end_is_what_was_said_and_has_not_cleared():
    leaking, slow = {"pretext_top1": 0.99, "knn_top1": 0.3}, {"input_wait_share": 0.5}
    changes = [{"knn_top1": 0.5}, *[slow] * 3, leaking]
    intervals = [dataclasses.replace(HEALTHY, step=10 * n, **change) for n, change in enumerate(changes, 1)]
    texts = sounding(intervals, CONFIG)
    assert list(texts) == [Kind.leak]
    assert texts[Kind.leak].startswith("leak at step 50: ")
    cleared = dataclasses.replace(HEALTHY, step=60, knn_top1=0.5)
    assert sounding([*intervals, cleared], CONFIG) == {}


@pytest.mark.parametrize("change", [{"embedding_spread": 0.0}, {"effective_rank": 1.0}])
def test_a_collapsed_network_is_not_said_to_leak(change):
    said = run({"knn_top1": 0.5}, *[{"pretext_top1": 1.0, "knn_top1": 0.1, **change}] * 3)
    assert kinds(said) == [[], [], [], [Kind.collapse]]


@pytest.mark.parametrize("pretext", [0.5, 0.95])
def test_a_fall_of_knn_alone_is_no_leak(pretext):
    assert kinds(run({"knn_top1": 0.5}, {"pretext_top1": pretext, "knn_top1": 0.3})) == [[], []]


@pytest.mark.parametrize(
    ("mode", "replicas", "words"),
    [
        (KeyBnMode.none, 1, ["train.key_bn.mode=none", "train.key_bn.mode=cross_replica_sum", "train.replicas=2"]),
        (KeyBnMode.none, 8, ["train.key_bn.mode=cross_replica_sum", "train.replicas=8"]),
        (KeyBnMode.cross_replica_sum, 1, ["nothing to shuffle on one replica", "set train.replicas=2"]),
        (KeyBnMode.cross_replica_sum, 8, ["too easy", "augment.crop_scale_min"]),
    ],
)
def test_the_mend_of_a_leak_goes_by_mode_and_replicas(mode, replicas, words):
    config = dataclasses.replace(CONFIG, key_bn=KeyBnConfig(mode), replicas=replicas)
    text = run({"knn_top1": 0.5}, {"pretext_top1": 0.99, "knn_top1": 0.4}, config=config)[1][0].text
    for word in words:
        assert word in text


interval = st.fixed_dictionaries(
    {
        "embedding_spread": st.sampled_from([0.001, 0.9, math.nan]),
        "effective_rank": st.sampled_from([1.0, 30.0, math.nan]),
        "input_wait_share": st.sampled_from([0.0, 0.9, math.nan]),
        "pretext_top1": st.sampled_from([0.3, 0.99]),
        "knn_top1": st.sampled_from([math.nan, 0.3, 0.5]),
    }
)


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(interval, min_size=1, max_size=15), cut=st.integers(0, 15))
def test_a_history_that_is_replayed_goes_on_as_if_it_had_never_stopped(changes, cut):
    whole = run(*changes)
    history = History()
    for n, change in enumerate(changes[:cut], 1):
        history, _ = judge(history, dataclasses.replace(HEALTHY, step=10 * n, **change), CONFIG)
    rest = run(*changes[cut:], start=history)
    assert kinds(rest) == kinds(whole)[cut:]


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(interval, min_size=1, max_size=15))
def test_no_kind_is_said_twice_without_having_cleared(changes):
    history = History()
    for change in changes:
        before = history.sounding
        history, alarms = judge(history, dataclasses.replace(HEALTHY, **change), CONFIG)
        assert not before & {alarm.kind for alarm in alarms}
        assert {alarm.kind for alarm in alarms} <= history.sounding


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step_the_mend_and_the_checkpoint(bad):
    check_losses(np.array([5.0, 4.0]), 41, 40, CONFIG)
    with pytest.raises(UserError) as caught:
        check_losses(np.array([5.0, 4.0, bad, math.nan]), 41, 40, CONFIG)
    text = str(caught.value)
    assert f"the loss at step 43 is {bad}" in text
    assert "lower train.learning_rate (now 0.03)" in text
    assert text.endswith("the checkpoint of step 40 is kept")
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        check_losses(np.array([bad]), 1, None, CONFIG)


def test_weights_that_are_not_finite_are_refused_by_name():
    check_weights({"query": True, "queue": True}, 7, None, CONFIG)
    with pytest.raises(UserError, match=r"after step 7 not all numbers of query, slots are finite; .* step 5 is kept"):
        check_weights({"query": False, "queue": True, "slots": False}, 7, 5, CONFIG)


def test_alarms_need_no_tensorflow():
    code = "import sys, trainer_module.alarms; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
