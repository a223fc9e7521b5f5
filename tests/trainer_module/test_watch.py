"""The watch: figures of each interval, curves that survive kills, alarms, and the time spent waiting for the input."""

import dataclasses
import json
import logging
import math
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import plugin_event_accumulator

from trainer_module.config import KeyBnMode, TrainConfig, WatchConfig
from trainer_module.errors import UserError
from trainer_module.geometry import effective_rank
from trainer_module.metrics_file import MetricsFile, read_intervals
from trainer_module.moco import Metrics, MoCo, initial_state
from trainer_module.progress import LOGGER_NAME
from trainer_module.replica import SingleReplica
from trainer_module.shuffle import key_encoding
from trainer_module.strategy import make_strategy
from trainer_module.watch import Watch, finite_parts, newest_rows, timed_next

PER_EPOCH, TOTAL, BATCH = 6, 24, 16
CONFIG = TrainConfig(global_batch=BATCH, log_steps=4, watch=WatchConfig(knn_epochs=2, patience=2))
KEYS = np.eye(8, dtype=np.float32)


def of_step(step: float, **changes: float) -> Metrics:
    values = Metrics(step, 0.5, 0.7, 0.8, 0.1, 0.4, 0.3, 0.01)._replace(**changes)
    return Metrics(*(tf.constant(v, tf.float32) for v in values))


def of_steps(steps: range) -> Metrics:
    """What a compiled loop of several steps gives."""
    return tf.nest.map_structure(lambda *v: tf.stack(v), *(of_step(step) for step in steps))


def make(folder: Path, start: int = 0, total: int = TOTAL, config: TrainConfig = CONFIG, knn=None) -> Watch:
    return Watch(start, total, PER_EPOCH, config, folder, lambda: KEYS, knn)


def drive(watch: Watch, start: int, stop: int, **changes: float) -> None:
    for done in range(start + 1, stop + 1):
        watch.see(done, of_step(done, **changes), tf.constant(0.0))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]


def test_a_line_averages_all_steps_of_its_interval(tmp_path: Path):
    watch = make(tmp_path)
    drive(watch, 0, TOTAL)
    watch.result()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [4, 8, 12, 16, 20, 24]
    assert [line["loss"] for line in found] == [2.5, 6.5, 10.5, 14.5, 18.5, 22.5]
    assert {line["steps"] for line in found} == {4}
    assert found[2]["epoch"] == 2.0
    assert found[0]["effective_rank"] == pytest.approx(effective_rank(KEYS)) == pytest.approx(8.0)
    assert found[0]["embedding_spread"] == pytest.approx(0.3 * math.sqrt(8))


def test_every_line_has_the_same_keys_in_the_same_order(tmp_path: Path):
    watch = make(tmp_path, knn=lambda: 0.5)
    drive(watch, 0, TOTAL)
    watch.result()
    assert {tuple(line) for line in lines(tmp_path)} == {
        (
            *("step", "steps", "epoch", "loss", "pretext_top1", "pretext_top5", "positive_similarity"),
            *("negative_similarity", "alignment", "embedding_std", "embedding_spread", "effective_rank"),
            *("learning_rate", "images_per_second", "step_ms", "input_wait_ms", "input_wait_share", "knn_top1"),
        )
    }


@pytest.mark.parametrize("loop", [2, 3, 4, 12])
def test_several_steps_in_one_loop_give_the_figures_of_single_ones(tmp_path: Path, loop: int):
    watch = make(tmp_path)
    for done in range(loop, TOTAL + 1, loop):
        watch.see(done, of_steps(range(done - loop + 1, done + 1)), 0.0)
    result = watch.result()
    assert result.final_loss == pytest.approx(np.mean(range(TOTAL - PER_EPOCH + 1, TOTAL + 1)))
    found = lines(tmp_path)
    assert sum(line["steps"] for line in found) == TOTAL
    for line in found:
        assert line["loss"] == pytest.approx(np.mean(range(line["step"] - line["steps"] + 1, line["step"] + 1)))


def test_time_is_that_of_steps_without_compilation_checkpoints_and_knn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]

    def pass_time(seconds: float) -> float:
        now[0] += seconds
        return 0.5

    monkeypatch.setattr("trainer_module.watch.time", types.SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    watch = make(tmp_path, knn=lambda: pass_time(40.0))
    for done in range(1, TOTAL + 1):
        pass_time(30.0 if done == 1 else 2.0)
        watch.see(done, of_step(done), 20.0 if done == 1 else 0.5)
        if done % 3 == 0:
            with watch.paused():
                pass_time(7.0)
    assert watch.result().images_per_second == pytest.approx(BATCH / 2)
    for line in lines(tmp_path):
        found = [line[key] for key in ("images_per_second", "step_ms", "input_wait_ms", "input_wait_share")]
        assert found == pytest.approx([BATCH / 2, 2000, 500, 0.25])


def test_the_result_is_the_average_of_the_last_epoch(tmp_path: Path):
    watch = make(tmp_path)
    drive(watch, 0, TOTAL)
    result = watch.result()
    assert (result.steps, result.resumed_from) == (TOTAL, 0)
    assert result.final_loss == pytest.approx(21.5)  # steps 19 to 24
    assert (result.pretext_top1, result.alignment) == (pytest.approx(0.5), pytest.approx(0.4))
    assert result.images_per_second > 0


def test_the_result_of_a_run_that_was_resumed_in_its_last_epoch_is_that_of_all_of_it(tmp_path: Path):
    every_step = dataclasses.replace(CONFIG, log_steps=1)
    watch = make(tmp_path, config=every_step)
    drive(watch, 0, 22)
    watch.check_finite(22, of_step(22))  # killed after the checkpoint
    resumed = make(tmp_path, start=22, config=every_step)
    drive(resumed, 22, TOTAL)
    assert resumed.result().final_loss == pytest.approx(21.5)  # steps 19 to 24


def test_knn_is_measured_each_e_epochs_and_at_the_end_and_ends_an_interval(tmp_path: Path):
    scores = iter([0.3, 0.4, 0.5])
    watch = make(tmp_path, total=27, knn=lambda: next(scores))
    drive(watch, 0, 27)
    watch.result()
    assert {line["step"]: line["knn_top1"] for line in lines(tmp_path)} == {
        **dict.fromkeys([4, 8, 16, 20]),
        **{12: 0.3, 24: 0.4, 27: 0.5},
    }


def test_knn_is_never_measured_with_zero_epochs(tmp_path: Path):
    watch = make(tmp_path, config=TrainConfig(watch=WatchConfig(knn_epochs=0)), knn=lambda: pytest.fail("measured"))
    drive(watch, 0, TOTAL)


def test_the_progress_shows_loss_speed_and_knn(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        drive(make(tmp_path, knn=lambda: 0.52), 0, TOTAL)
    last = [record.progress for record in caplog.records if hasattr(record, "progress")][-1]
    assert (last.task, last.done, last.total) == ("train", TOTAL, TOTAL)
    assert list(last.figures) == ["loss", "images/s", "knn"]
    assert last.figures["knn"] == 0.52


def test_a_resumed_run_tells_each_step_once(tmp_path: Path):
    watch = make(tmp_path)
    drive(watch, 0, 18)  # killed here; the last checkpoint was of step 10
    watch.check_finite(18, of_step(18))
    resumed = make(tmp_path, start=10)
    drive(resumed, 10, TOTAL)
    resumed.result()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [4, 8, 12, 16, 20, 24]
    assert [line["steps"] for line in found] == [4, 4, 2, 4, 4, 4]


@pytest.mark.parametrize("ahead", [0, 86_400, 3_000_000_000])
def test_tensorboard_shows_each_step_of_a_resumed_run_once_even_if_the_clock_was_put_back(tmp_path: Path, ahead: int):
    for start in (0, 10):
        watch = make(tmp_path, start=start)
        drive(watch, start, 18)
        watch.result()  # writes the points out
        for file in (tmp_path / "train").glob("events.*"):  # what they are called where the clock was ahead
            number = file.name.split(".")[3]
            file.rename(file.with_name(file.name.replace(number, f"{int(number) + ahead:010d}", 1)))
    resumed = make(tmp_path, start=10)
    drive(resumed, 10, TOTAL)
    resumed.result()
    all_points = {plugin_event_accumulator.TENSORS: 0}
    shown = plugin_event_accumulator.EventAccumulator(str(tmp_path / "train"), all_points).Reload()
    assert [point.step for point in shown.Tensors("loss")] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_line_that_was_cut_short_is_repaired(tmp_path: Path, cut: int):
    watch = make(tmp_path)
    drive(watch, 0, 12)
    watch.check_finite(12, of_step(12))
    path = tmp_path / "train" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-cut])
    drive(make(tmp_path, start=12), 12, 12)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    assert not list(tmp_path.rglob("*.part"))


def test_intervals_survive_their_way_through_the_file(tmp_path: Path):
    watch = make(tmp_path)
    drive(watch, 0, 8)
    watch.check_finite(8, of_step(8))
    path = str(tmp_path / "train" / "metrics.jsonl")
    before = read_intervals(path)
    assert len(before) == 2
    kept = MetricsFile(path, 8).kept
    np.testing.assert_equal([*map(dataclasses.astuple, kept)], [*map(dataclasses.astuple, before)])  # there are NaNs
    assert read_intervals(str(tmp_path / "none.jsonl")) == ()


def events(folder: Path) -> dict[str, list[int]]:
    """Steps of TensorBoard's points by their name."""
    points: dict[str, list[int]] = {}
    for path in (folder / "train").glob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                points.setdefault(value.tag, []).append(event.step)
    return points


def test_curves_are_written_out_before_each_checkpoint_and_every_ten_seconds_but_not_with_each_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = [100.0]

    def tick() -> float:
        now[0] += 0.001
        return now[0]

    monkeypatch.setattr("trainer_module.watch.time", types.SimpleNamespace(monotonic=tick, time=time.time))
    watch = make(tmp_path, total=400)
    drive(watch, 0, 100)  # 25 intervals of 14 points each
    assert not events(tmp_path).get("loss")
    watch.check_finite(100, of_step(100))
    assert events(tmp_path)["loss"][-1] == lines(tmp_path)[-1]["step"] == 100
    drive(watch, 100, 200)
    assert events(tmp_path)["loss"][-1] == 100
    now[0] += 11
    drive(watch, 200, 212)
    assert events(tmp_path)["loss"][-1] == lines(tmp_path)[-1]["step"] == 204


def test_the_curves_are_tensorboards_too(tmp_path: Path):
    watch = make(tmp_path, knn=lambda: 0.5)
    drive(watch, 0, TOTAL)
    watch.result()
    points = events(tmp_path)
    assert points["loss"] == [4, 8, 12, 16, 20, 24]
    assert points["knn_top1"] == [12, 24]
    assert {"effective_rank", "images_per_second", "step_ms", "input_wait_share", "learning_rate"} <= set(points)


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.note for record in caplog.records if hasattr(record, "note")]


def test_an_alarm_is_a_note_and_a_warning_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        drive(make(tmp_path), 0, TOTAL, embedding_std=0.0)
    assert len(notes(caplog)) == 1
    assert notes(caplog)[0].startswith("collapse at step 12: ")
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == notes(caplog)


def test_a_resumed_run_does_not_repeat_an_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    watch = make(tmp_path / "broken")
    drive(watch, 0, 16, embedding_std=0.0)
    watch.check_finite(16, of_step(16))
    said = []
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        for folder in ("broken", "of_nothing_before"):
            caplog.clear()
            drive(make(tmp_path / folder, start=16), 16, TOTAL, embedding_std=0.0)
            said.append([note.split(" at ")[0] for note in notes(caplog)])
    assert said == [[], ["collapse"]]


def test_a_resumed_run_remembers_the_best_knn(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    watch = make(tmp_path, knn=lambda: 0.6)
    drive(watch, 0, 16)
    watch.check_finite(16, of_step(16))
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        caplog.clear()
        drive(make(tmp_path, start=16, knn=lambda: 0.4), 16, TOTAL, pretext_top1=0.99)
    assert [note.split(" at ")[0] for note in notes(caplog)] == ["leak"]
    assert "fell from 0.600 to 0.400" in notes(caplog)[0]


def test_a_loss_that_is_not_finite_stops_the_run_at_the_end_of_its_interval(tmp_path: Path):
    watch = make(tmp_path)
    drive(watch, 0, 5)
    watch.saved(5)
    watch.see(6, of_step(6, loss=math.nan))
    watch.see(7, of_step(7, loss=math.nan))
    with pytest.raises(UserError, match=r"loss at step 6 is nan; .*the checkpoint of step 5 is kept"):
        watch.see(8, of_step(8, loss=math.nan))
    assert [line["step"] for line in lines(tmp_path)] == [4]


def test_the_first_bad_step_within_a_compiled_loop_is_named(tmp_path: Path):
    metrics = of_steps(range(1, 13))
    losses = np.where(np.arange(12) >= 9, np.inf, 3.0).astype(np.float32)
    with pytest.raises(UserError, match="loss at step 10 is inf"):
        make(tmp_path).see(12, metrics._replace(loss=tf.constant(losses)))


def test_no_checkpoint_is_made_of_what_is_not_finite(tmp_path: Path):
    watch = make(tmp_path)
    drive(watch, 0, 5)
    watch.check_finite(5, of_step(5))
    watch.see(6, of_step(6, loss=math.nan))
    with pytest.raises(UserError, match="loss at step 6 is nan"):
        watch.check_finite(6, of_step(6))
    fresh = make(tmp_path)
    drive(fresh, 0, 5)
    with pytest.raises(UserError, match="after step 5 not all numbers of alignment are finite"):
        fresh.check_finite(5, of_step(5, alignment=math.inf))


@pytest.mark.parametrize(
    ("enqueued", "expected"), [(0, []), (3, [2, 1, 0]), (7, [2, 1, 0, 4, 3]), (5, [2, 1, 0, 4, 3])]
)
def test_the_newest_keys_are_those_that_were_enqueued_last(enqueued: int, expected: list[int]):
    queue = tf.reshape(tf.range(10, dtype=tf.float32), [5, 2])
    found = newest_rows(queue, tf.constant(3), enqueued, limit=9)
    assert found.shape == (len(expected), 2)
    assert found[:, 0].tolist() == [2.0 * row for row in expected]
    assert len(newest_rows(queue, tf.constant(3), 100, limit=2)) == 2


def slow(seconds: float, count: int) -> tf.data.Dataset:
    """Batches that take their time; sleeping takes no processor from the step."""

    def sleep(step: tf.Tensor) -> tf.Tensor:
        time.sleep(seconds)
        return step

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seed = tf.stack([tf.py_function(sleep, [step], tf.int64), 0])
        image = tf.random.stateless_uniform([BATCH, 8, 8, 3], seed, 0, 255, tf.int32)
        return tf.cast(image, tf.uint8), tf.cast(image, tf.uint8)

    return tf.data.Dataset.range(count).map(batch)


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_wait_for_a_batch_is_measured_inside_the_graph(replicas: int):
    strategy = make_strategy(replicas)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    batches = iter(strategy.experimental_distribute_dataset(slow(0.1, 8).with_options(options)))

    @tf.function
    def step(batches):
        batch, waited = timed_next(batches)
        total = strategy.run(lambda views: tf.reduce_sum(tf.cast(views[0], tf.float32)), args=(batch,))
        return tf.reduce_sum(tf.stack(strategy.experimental_local_results(total))), waited

    waits = [float(step(batches)[1]) for _ in range(6)]
    # A batch takes 0.1 s and a step next to nothing, so most batches must be waited for, whatever is made ahead.
    assert sum(waits) > 0.05
    assert min(waits) >= 0


def test_a_run_of_real_steps_is_watched_to_its_end(tiny_encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = TrainConfig(
        replicas=1, global_batch=BATCH, queue=64, log_steps=2, watch=WatchConfig(knn_epochs=1, patience=1)
    )
    encode = key_encoding(KeyBnMode.none)
    moco = MoCo(tiny_encoder, (110.0,) * 3, (60.0,) * 3, encode, lambda _: tf.constant(0.05), 0.9, 0.2, 0.9, 1e-4, 0)
    states = [initial_state(tiny_encoder, config.queue, 0)]

    @tf.function
    def step(state, batches):
        (x_q, x_k), waited = timed_next(batches)
        return *moco.step(state, x_q, x_k, SingleReplica()), waited

    def newest_keys():
        return newest_rows(states[-1].queue, states[-1].pointer, int(states[-1].step) * BATCH)

    batches = iter(slow(0.02, 100))
    watch = Watch(0, 12, 4, config, tmp_path, newest_keys, lambda: 0.25)
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        for done in range(1, 13):
            state, metrics, waited = step(states[-1], batches)
            states.append(state)
            watch.see(done, metrics, waited)
            watch.check_finite(done, state)
    result = watch.result()
    assert result.steps == 12
    assert result.images_per_second > 0
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2, 4, 6, 8, 10, 12]
    assert [line["knn_top1"] for line in found] == [None, 0.25] * 3
    assert all(1 <= line["effective_rank"] <= 16 for line in found)
    for line in found:
        assert 0 <= line["input_wait_ms"] <= line["step_ms"]
        assert line["input_wait_share"] == pytest.approx(line["input_wait_ms"] / line["step_ms"])
    assert all(finite_parts(states[-1]).values())
    broken = states[-1]._replace(slots=[tf.fill(v.shape, math.nan) for v in states[-1].slots])
    assert [name for name, good in finite_parts(broken).items() if not good] == ["slots"]
