"""Training in a process of its own, killed at random moments: it ends with the weights of an unbroken run."""

import json
import multiprocessing
import random
import re
import signal
import time

import faulty_storage
import killed_training
import numpy as np
import pytest
from view_files import write_views

pytestmark = pytest.mark.long

EPOCHS, EVERY_LOOP, SOMETIMES, NEVER = 60, 0.0, 0.3, 1e9
KILLS = 2


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    return write_views(
        folder, killed_training.IMAGES, killed_training.SHARDS, killed_training.SEED, killed_training.AUGMENT
    )


@pytest.fixture(scope="module")
def start(split):
    """Starts a training, forked from a process that has imported TensorFlow and run nothing of it: that is quick."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_training"])

    def start_training(folder, where, checkpoint_seconds, **elsewhere):
        training = context.Event()
        arguments = (str(split), str(folder), where, EPOCHS, checkpoint_seconds, training)
        process = context.Process(target=killed_training.main, args=arguments, kwargs=elsewhere)
        process.start()
        return process, training

    return start_training


def run_to_the_end(process, _):
    process.join()
    assert process.exitcode == 0


def newest_step(folder):
    return step_of(file.name for file in folder.glob("checkpoints/*"))


def step_of(names):
    return max((int(found[1]) for name in names if (found := re.search(r"step-(\d+)\.index$", name))), default=0)


def final_state(folder):
    with np.load(folder / "state.npz") as state:
        return dict(state)


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """Final states of runs that nothing stopped, by where the views are made."""
    folders = {where: tmp_path_factory.mktemp(where) for where in ("beam", "trainer")}
    for started in [start(folder, where, NEVER) for where, folder in folders.items()]:
        run_to_the_end(*started)
    return {where: final_state(folder) for where, folder in folders.items()}


def assert_ends_as(folder, expected):
    state = final_state(folder)
    assert state["step"] == EPOCHS * killed_training.STEPS
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


@pytest.mark.parametrize("where", ["beam", "trainer"])
def test_sigkill_at_random_moments_changes_no_bit_of_the_final_state(start, unbroken, tmp_path, where):
    moments, steps = random.Random(where), []
    for _ in range(KILLS):
        process, training = start(tmp_path, where, EVERY_LOOP)
        training.wait()
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.join()
        steps.append(newest_step(tmp_path))
    assert steps[0] < EPOCHS * killed_training.STEPS
    run_to_the_end(*start(tmp_path, where, EVERY_LOOP))
    assert_ends_as(tmp_path, unbroken[where])


def test_sigterm_saves_before_it_ends_the_training_which_then_goes_on_to_the_same_bits(start, unbroken, tmp_path):
    process, training = start(tmp_path, "beam", NEVER)
    training.wait()
    process.terminate()
    process.join()
    assert process.exitcode == 1  # by the KeyboardInterrupt that the command line says in one line
    assert 0 < newest_step(tmp_path) < EPOCHS * killed_training.STEPS
    run_to_the_end(*start(tmp_path, "beam", NEVER))
    assert_ends_as(tmp_path, unbroken["beam"])


def test_on_cloud_storage_that_refuses_at_times_kills_change_no_bit_either(start, unbroken, tmp_path):
    """By TensorFlow's own client of gs://, over TLS, to a server that it takes for the public one."""
    moments, steps = random.Random(0), []
    quick = {"GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "1000", "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "1000"}
    with (
        faulty_storage.storage("runs") as bucket,
        faulty_storage.public(bucket, tmp_path, _every_13th_unavailable) as (server, environment),
    ):
        there = {"checkpoints": "gs://runs/mine/checkpoints", "environment": {**environment, **quick}}
        for _ in range(KILLS):
            last = len(server.requests) + moments.randrange(45, 80)
            process, _ = start(tmp_path, "beam", SOMETIMES, **there)
            while len(server.requests) < last and process.is_alive():
                time.sleep(0.002)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            steps.append(step_of(bucket.objects()))
        run_to_the_end(*start(tmp_path, "beam", SOMETIMES, **there))
        written = bucket.objects()
    curves = [json.loads(line)["step"] for line in written["mine/checkpoints/logs/train/metrics.jsonl"].splitlines()]
    assert curves == sorted(set(curves))
    assert curves[-1] == step_of(written) == EPOCHS * killed_training.STEPS
    assert 0 < steps[-1] < EPOCHS * killed_training.STEPS
    assert_ends_as(tmp_path, unbroken["beam"])


def _every_13th_unavailable(number, _):
    return faulty_storage.Fault.unavailable if number % 13 == 12 else None
