"""Training in a process of its own, killed at random moments: it ends with the weights of an unbroken run."""

import multiprocessing
import random
import time

import killed_training
import numpy as np
import pytest
from view_files import write_views

pytestmark = pytest.mark.long

EPOCHS, EVERY_LOOP, NEVER = 60, 0.0, 1e9
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

    def start_training(folder, where, checkpoint_seconds):
        training = context.Event()
        arguments = (str(split), str(folder), where, EPOCHS, checkpoint_seconds, training)
        process = context.Process(target=killed_training.main, args=arguments)
        process.start()
        return process, training

    return start_training


def run_to_the_end(process, _):
    process.join()
    assert process.exitcode == 0


def newest_step(folder):
    return max((int(file.stem.removeprefix("step-")) for file in folder.glob("checkpoints/*.index")), default=0)


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
