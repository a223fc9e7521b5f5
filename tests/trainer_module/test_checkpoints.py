"""Checkpoints: whole or not at all, checked when read, and never of another run."""

import logging
import random
import shutil

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from trainer_module.checkpoints import Checkpoints, _reason, clear, make_folder, refuse_other_run
from trainer_module.errors import UserError
from trainer_module.progress import LOGGER_NAME

IDENTITY = {"seed": 0, "train.learning_rate": 0.03, "train.milestones": [120, 160], "augment.where": "beam"}


def tensors(step):
    noise = np.random.default_rng(step)
    return {
        "step": np.int32(step),
        "query/0": noise.normal(size=(40, 30)).astype("float32"),
        "query/1": np.zeros([0, 3], np.float32),
        "queue": noise.normal(size=(64, 8)).astype(ml_dtypes.bfloat16),
    }


def write(directory, steps, keep=2, identity=IDENTITY):
    checkpoints = Checkpoints(str(directory), keep, identity)
    for step in steps:
        checkpoints.save(step, tensors(step))
    checkpoints.wait()


def newest(directory, identity=IDENTITY):
    return Checkpoints(str(directory), 2, identity).newest()


def assert_holds(saved, step):
    assert saved.step == step
    assert saved.tensors.keys() == tensors(step).keys()
    for name, value in tensors(step).items():
        assert saved.tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(saved.tensors[name], value)


def test_the_newest_comes_back_to_the_bit_and_no_more_than_asked_for_are_kept(tmp_path):
    write(tmp_path / "c", [5, 90, 1000])
    assert_holds(newest(tmp_path / "c"), 1000)
    assert sorted({file.name.split(".")[0] for file in (tmp_path / "c").iterdir()}) == [
        "step-00000090",
        "step-00001000",
    ]


def test_on_a_file_system_that_is_no_local_one_checkpoints_come_and_go_likewise():
    """TensorFlow's file system in memory is reached as gs:// is: by its scheme, and by tf.io.gfile alone."""
    folder = "ram://bucket/run/checkpoints"
    assert newest(folder) is None
    write(folder, [5, 90, 1000])
    assert_holds(newest(folder), 1000)
    names = {name.split(".")[0] for name in tf.io.gfile.listdir(folder)}
    assert {name for name in names if name.startswith("step")} == {"step-00000090", "step-00001000"}
    tf.io.gfile.remove(f"{folder}/step-00001000.data-00000-of-00001")
    assert_holds(newest(folder), 90)


@pytest.mark.parametrize("folder", ["local", "ram://bucket/of-a-finished-run"])
def test_a_finished_run_takes_its_checkpoints_and_curves_away_and_nothing_else(tmp_path, folder):
    folder = folder if "://" in folder else str(tmp_path / folder)
    for others in (True, False):
        make_folder(folder)
        write(folder, [5, 90])
        tf.io.gfile.makedirs(f"{folder}/logs/train")
        for name in ("logs/train/metrics.jsonl", "result.json", *(["notes.txt"] if others else [])):
            with tf.io.gfile.GFile(f"{folder}/{name}", "w") as file:
                file.write("x")
        clear(folder, "logs", "result.json")
        assert tf.io.gfile.isdir(folder) == others
        if others:
            assert [name.rstrip("/") for name in tf.io.gfile.listdir(folder)] == ["notes.txt"]
            tf.io.gfile.remove(f"{folder}/notes.txt")
    clear(folder, "logs", "result.json")  # where there is none, nothing is to be done


def test_a_place_that_cannot_hold_checkpoints_is_named_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"file/c: checkpoints cannot be written there \(.*\); check path and permission"
    ):
        make_folder(str(tmp_path / "file" / "c"))


def test_a_checkpoint_counts_as_whole_only_once_it_is_written(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), 2, IDENTITY)
    assert checkpoints.whole is None
    checkpoints.save(5, tensors(5))
    checkpoints.wait()
    assert checkpoints.whole == 5


def test_a_folder_that_is_missing_or_empty_holds_no_checkpoint(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "none") is None
    refuse_other_run(str(tmp_path / "none"), IDENTITY)


def test_a_checkpoint_without_its_index_does_not_count_and_is_cleared_away(tmp_path):
    write(tmp_path, [10, 20])
    (tmp_path / "step-00000020.index").unlink()
    (tmp_path / "step-00000030.data-00000-of-00001.tempstate123").write_bytes(b"begun")
    (tmp_path / "step-00000030.index.tempstate123").write_bytes(b"begun")
    assert_holds(newest(tmp_path), 10)
    write(tmp_path, [25])
    assert {file.name.split(".")[0] for file in tmp_path.iterdir()} == {"step-00000010", "step-00000025"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write(folder, [10, 20])
    return folder


def damage(folder, harm, seed):
    index, data = folder / "step-00000020.index", folder / "step-00000020.data-00000-of-00001"
    if harm == "missing data":
        data.unlink()
    elif harm.startswith("truncated"):
        file = index if harm.endswith("index") else data
        file.write_bytes(file.read_bytes()[: random.Random(seed).randrange(file.stat().st_size)])
    else:
        file = index if harm.endswith("index") else data
        content = bytearray(file.read_bytes())
        content[random.Random(seed).randrange(len(content))] ^= 1 << random.Random(seed).randrange(8)
        file.write_bytes(content)


HARMS = ["missing data", "truncated data", "truncated index", "flipped bit in data", "flipped bit in index"]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(written, tmp_path, caplog, harm):
    caplog.set_level(logging.WARNING, LOGGER_NAME)
    for seed in range(25):
        folder = tmp_path / str(seed)
        shutil.copytree(written, folder)
        damage(folder, harm, seed)
        caplog.clear()
        saved = newest(folder)
        if saved.step == 20:  # a bit that nothing reads, such as padding
            assert harm == "flipped bit in index"
            assert_holds(saved, 20)
            continue
        assert_holds(saved, 10)
        (said,) = caplog.records
        assert "step-00000020 is damaged" in said.note
        assert said.note.endswith("training goes on from step 10")
        assert "\n" not in said.note
        assert "{{" not in said.note


@pytest.mark.parametrize(("count", "whole"), [(30, True), (100, False)])
def test_the_reason_of_a_fall_back_is_told_whole_or_cut_between_words_and_marked(count, whole):
    said = " ".join(f"word{i}" for i in range(count))
    told = _reason(tf.errors.DataLossError(None, None, f"{{{{function_node f}}}} {said}\n\t [[trace]]"))
    assert (told == said) == whole
    assert whole or said.startswith(f"{told.removesuffix(' …')} word")


def test_after_a_fall_back_the_damaged_one_is_the_first_to_go(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    damage(tmp_path, "flipped bit in data", 1)
    write(tmp_path, [15])
    assert {file.name.split(".")[0] for file in tmp_path.iterdir()} == {"step-00000010", "step-00000015"}


def test_only_damaged_checkpoints_stop_the_run_instead_of_starting_anew(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    for data in tmp_path.glob("*.data*"):
        data.write_bytes(b"")
    with pytest.raises(UserError, match=r"^\S*step-00000020 is damaged .*no other is left; remove .* to start anew$"):
        newest(tmp_path)


def test_a_checkpoint_of_another_run_is_refused_with_the_differing_keys_and_both_values(written):
    other = IDENTITY | {"seed": 1, "train.learning_rate": 0.06, "train.milestones": [100], "augment.where": "both"}
    line = (
        f"{written} is of a run with seed=0, now 1, train.learning_rate=0.03, now 0.06, "
        "train.milestones=[120, 160], now [100], augment.where=beam, now both; "
        "finish it with the former settings, or remove the folder to start anew"
    )
    for refuse in (lambda: newest(written, other), lambda: refuse_other_run(str(written), other)):
        with pytest.raises(UserError) as refusal:
            refuse()
        assert str(refusal.value) == line


def test_many_differing_keys_still_make_one_readable_line(tmp_path):
    write(tmp_path, [1], identity={f"key{i}": 0 for i in range(30)})
    with pytest.raises(UserError, match=r"and 24 more; finish") as refusal:
        newest(tmp_path, {f"key{i}": 1 for i in range(30)})
    assert str(refusal.value).count("now 1") == 6


def test_keys_that_only_one_of_both_knows_are_not_compared(written):
    assert newest(written, {"seed": 0, "images": "17"}).step == 20
    refuse_other_run(str(written), {"seed": 0})


def test_other_code_goes_on_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING, LOGGER_NAME)
    write(tmp_path, [7], identity={"seed": 0, "code": "old"})
    assert newest(tmp_path, {"seed": 0, "code": "new"}).step == 7
    assert [record.note for record in caplog.records] == ["training goes on from step 7 with other code than began it"]


def test_a_failure_to_write_is_raised_at_the_latest_when_waiting(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(str(tmp_path / "file" / "folder"), 2, IDENTITY)
    checkpoints.save(1, tensors(1))
    with pytest.raises(tf.errors.OpError):
        checkpoints.wait()
