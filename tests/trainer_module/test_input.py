"""The trainer's input: epochs of pairs, the order by seed, and going on from any step."""

import dataclasses
import functools
import json
import re
import shutil

import faulty_storage
import numpy as np
import pytest
import tensorflow as tf
from view_files import write_views

from trainer_module import input as trainer_input
from trainer_module.config import AugmentConfig, Where
from trainer_module.errors import UserError
from trainer_module.input import damage_named, dataset_from, open_source, steps_per_epoch
from trainer_module.replica import own_rows
from trainer_module.shuffle import Memory, host
from trainer_module.strategy import make_strategy
from trainer_module.views import view_pair

SIZE, IMAGES, PAIRS, SHARDS, SEED = 8, 22, 2, 3, 4
BEAM = AugmentConfig(size=SIZE, pairs_per_image=PAIRS, where=Where.beam)
BOTH = AugmentConfig(size=SIZE, pairs_per_image=PAIRS, where=Where.both)
TRAINER = AugmentConfig(size=SIZE, pairs_per_image=PAIRS, where=Where.trainer)
# Views whose graph is small, where it does not matter what is done to the images.
PLAIN_BOTH, PLAIN_TRAINER = (
    dataclasses.replace(augment, jitter_probability=0, gray_probability=0, blur_probability=0)
    for augment in (BOTH, TRAINER)
)


@pytest.fixture(scope="module")
def split_dir(tmp_path_factory):
    """What ViewAugmenter writes for `both`: stored images, and their first pairs."""
    return write_views(tmp_path_factory.mktemp("views"), IMAGES, SHARDS, SEED, BEAM)


def batches(split_dir, augment, epochs=3, start=0, batch=5, seed=SEED, pipeline=None, **kwargs):
    source = open_source(str(split_dir), augment)
    data = dataset_from(source, augment, seed, epochs, batch, start, pipeline or tf.distribute.InputContext(), **kwargs)
    return [(q.numpy(), k.numpy()) for q, k in data]


@pytest.fixture(scope="module")
def epochs_of(split_dir):
    """Three epochs of pairs of a recipe, each one batch of all images: the order within an epoch does not matter."""

    @functools.cache
    def of(augment):
        return batches(split_dir, augment, batch=IMAGES)

    return of


def test_an_epoch_holds_every_image_at_most_once_and_drops_the_rest(split_dir):
    assert steps_per_epoch(open_source(str(split_dir), BEAM), 5) == 4
    queries = np.concatenate([q for q, _ in batches(split_dir, BEAM, epochs=1)])
    assert len(queries) == 20
    assert len(np.unique(queries.reshape(20, -1), axis=0)) == 20


def test_going_on_from_a_step_gives_the_batches_that_would_have_come(split_dir):
    whole = batches(split_dir, PLAIN_BOTH)
    for start in (5, 9):  # within the stored pairs, and within those made anew
        rest = batches(split_dir, PLAIN_BOTH, start=start)
        assert len(rest) == len(whole) - start
        for (q, k), (expected_q, expected_k) in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(q, expected_q)
            np.testing.assert_array_equal(k, expected_k)


@pytest.mark.parametrize(
    ("augment", "hosts", "replicas", "start"),
    [(BEAM, 1, 2, 0), (BEAM, 2, 2, 0), (BEAM, 2, 4, 6), (PLAIN_TRAINER, 1, 2, 6), (PLAIN_TRAINER, 2, 4, 6)],
    ids=lambda value: value.where.name if isinstance(value, AugmentConfig) else None,
)
def test_the_rows_of_all_hosts_and_replicas_together_are_the_global_batches(split_dir, augment, hosts, replicas, start):
    whole = batches(split_dir, augment, batch=4, start=start)
    contexts = [tf.distribute.InputContext(hosts, host, replicas) for host in range(hosts)]
    parts = [batches(split_dir, augment, batch=4, start=start, pipeline=context) for context in contexts]
    each = replicas // hosts  # replicas of one host, each with an element of its own in every step
    assert {len(part) for part in parts} == {len(whole) * each}
    for step, views in enumerate(whole):
        elements = [element for part in parts for element in part[step * each : (step + 1) * each]]
        for which in (0, 1):
            np.testing.assert_array_equal(np.concatenate([e[which] for e in elements]), views[which])


def test_key_views_that_two_hosts_shuffled_find_their_queries_again_from_any_step_on(split_dir, in_lockstep):
    hosts, replicas, batch, start = 2, 4, 8, 3
    whole = batches(split_dir, BEAM, batch=batch, start=start)
    contexts = [tf.distribute.InputContext(hosts, host, replicas) for host in range(hosts)]
    parts = [
        batches(split_dir, BEAM, batch=batch, start=start, pipeline=context, shuffled_keys=True) for context in contexts
    ]
    each = replicas // hosts

    def f_k(x, stats):
        return tf.reshape(tf.cast(x, tf.float32), [batch // replicas, -1]), stats

    for step, (queries, keys) in enumerate(whole):
        elements = [element for part in parts for element in part[step * each : (step + 1) * each]]
        np.testing.assert_array_equal(np.concatenate([query for query, _ in elements]), queries)
        arriving = np.concatenate([key for _, key in elements])
        assert np.any(arriving != keys)

        def encode(replica, arriving=arriving, seed=(SEED, start + step)):
            own = own_rows(replica, tf.constant(arriving))
            return host(hosts)(f_k, own, replica, tf.constant(seed), Memory([], [], [])).own

        np.testing.assert_array_equal(np.concatenate(in_lockstep(replicas, encode)), keys.reshape(batch, -1))


def test_a_strategy_s_replicas_get_their_rows_of_the_global_batch_in_order(split_dir):
    strategy = make_strategy(2)
    source = open_source(str(split_dir), BEAM)
    data = strategy.distribute_datasets_from_function(
        lambda pipeline: dataset_from(source, BEAM, SEED, 3, 4, 0, pipeline)
    )
    whole = batches(split_dir, BEAM, batch=4)
    for (query, _), (expected, _) in zip(data, whole, strict=True):
        rows = strategy.experimental_local_results(query)
        assert [r.shape[0] for r in rows] == [2, 2]
        np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_going_on_makes_no_views_of_the_steps_that_are_done(split_dir, monkeypatch):
    made = []

    def counted(image, identity, *rest):
        tf.py_function(made.append, [identity], [])
        return view_pair(image, identity, *rest)

    monkeypatch.setattr(trainer_input, "view_pair", counted)
    rest = batches(split_dir, PLAIN_TRAINER, epochs=1, start=3)
    assert len(rest) == 1
    assert len(made) == 5


def test_views_on_cloud_storage_are_read_as_those_on_disk(split_dir, tmp_path, monkeypatch):
    """By TensorFlow's own client of gs://, over TLS, to a server that it takes for the public one."""
    with (
        faulty_storage.storage("runs") as bucket,
        faulty_storage.public(bucket, tmp_path) as (_, environment),
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for file in (file for file in split_dir.parent.rglob("*") if file.is_file()):
            name, content = file.relative_to(split_dir.parent), file.read_bytes()
            bucket.put(f"views/1/{name}", content)
            bucket.put(f"views/3/{name}", content[:-1] if "p0001-00001" in file.name else content)
        there = batches(f"gs://runs/views/1/{split_dir.name}", BEAM, epochs=2)
        refused = refusal(lambda: open_source(f"gs://runs/views/3/{split_dir.name}", BEAM))
    np.testing.assert_array_equal(there, batches(split_dir, BEAM, epochs=2))
    assert re.match(rf"gs://runs/views/3/{split_dir.name}/views-p0001-00001-\S+ has \d+ bytes instead of", refused)


def test_views_made_by_the_trainer_are_those_that_beam_stored(epochs_of):
    as_sets = []
    for augment in (BEAM, BOTH, TRAINER):
        pairs = [np.concatenate([q, k], axis=1) for q, k in epochs_of(augment)[:PAIRS]]
        as_sets.append([{p.tobytes() for p in epoch} for epoch in pairs])
    assert as_sets[0] == as_sets[1] == as_sets[2]
    assert as_sets[0][0].isdisjoint(as_sets[0][1])


def test_stored_pairs_come_round_again_where_only_beam_makes_them(epochs_of):
    epochs = [{q.tobytes() for q in b[0]} for b in epochs_of(BEAM)]
    assert epochs[0] == epochs[2] != epochs[1]


def test_new_pairs_come_once_the_stored_ones_are_used_up_in_both(epochs_of):
    epochs = [{q.tobytes() for q in b[0]} for b in epochs_of(BOTH)]
    assert epochs[2].isdisjoint(epochs[0])


def test_the_order_changes_with_epoch_and_seed(split_dir):
    same = batches(split_dir, BEAM, epochs=3)
    again = batches(split_dir, BEAM, epochs=3)
    other = batches(split_dir, BEAM, epochs=3, seed=SEED + 1)
    np.testing.assert_array_equal(same[0][0], again[0][0])
    assert np.any(same[0][0] != other[0][0])
    assert np.any(same[0][0] != same[8][0])


def test_fewer_images_than_a_batch_are_refused_with_the_largest_batch(split_dir):
    with pytest.raises(UserError, match=f"at most {IMAGES}"):
        steps_per_epoch(open_source(str(split_dir), BEAM), IMAGES + 1)


@pytest.fixture
def copy(split_dir, tmp_path):
    """Of the whole artifact; its train split."""
    return shutil.copytree(split_dir.parent, tmp_path / "views" / "3") / split_dir.name


def refusal(act):
    """One line that names the artifact's folder as what has to go: only then is its stage run again."""
    with pytest.raises(UserError) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(r"delete (\S+) and run again to make the views again$", text)[1].endswith("/views/3")
    return text


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_named_and_refused(copy, harm):
    victim = copy / "views-p0001-00001-of-00003.tfrecord"
    if harm == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-7])
    assert str(victim) in refusal(lambda: open_source(str(copy), BEAM))


def read_all(copy, augment):
    source = open_source(str(copy), augment)
    with damage_named(source):
        list(dataset_from(source, augment, SEED, 2, 5, 0, tf.distribute.InputContext()))


def flipped(victim):
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def zeroed(victim):
    """Whole records of the same size with nothing in them."""
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(victim))]
    with tf.io.TFRecordWriter(str(victim)) as writer:
        for record in records:
            writer.write(bytes(len(record)))


def of_other_pixels(victim):
    """Sound examples, but of views of another size in a file that is as long."""
    records = [tf.train.Example.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(victim))]
    with tf.io.TFRecordWriter(str(victim)) as writer:
        for record in records:
            query, key = (record.features.feature[name].bytes_list.value for name in ("query", "key"))
            query[0], key[0] = query[0][:-3], key[0] + bytes(3)
            writer.write(record.SerializeToString())


@pytest.mark.parametrize(
    ("harm", "augment", "name"),
    [
        (flipped, BEAM, "views-p0001-00001-of-00003.tfrecord"),
        (zeroed, BEAM, "views-p0001-00001-of-00003.tfrecord"),
        (of_other_pixels, BEAM, "views-p0001-00001-of-00003.tfrecord"),
        (zeroed, PLAIN_TRAINER, "images-00001-of-00003.tfrecord"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_that_only_reading_finds_names_its_shard(copy, harm, augment, name):
    harm(copy / name)
    assert f"{copy / name} is damaged" in refusal(lambda: read_all(copy, augment))


def without(start):
    """Of the manifest, the entries whose names start otherwise."""
    return lambda content: {**content, "files": [f for f in content["files"] if not f["name"].startswith(start)]}


def text_of(change):
    return lambda content: json.dumps(change(content)).encode()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: b"\xff\xfe\x00", "damaged"),
        (lambda _: b"", "damaged"),
        (text_of(lambda _: {}), "damaged"),
        (text_of(lambda _: [1]), "damaged"),
        (text_of(lambda _: "views"), "damaged"),
        (text_of(lambda content: {**content, "images": -1}), "damaged"),
        (text_of(lambda content: {**content, "pairs_per_image": 10**15}), "damaged"),
        (text_of(lambda content: {**content, "files": [1]}), "damaged"),
        (text_of(lambda content: {**content, "files": [{**f, "name": "../x"} for f in content["files"]]}), "damaged"),
        (text_of(lambda content: {**content, "files": content["files"] * 2}), "damaged"),
        (text_of(lambda content: {**content, "files": []}), "damaged"),
        (text_of(without("views-p0001-00000")), "lists 14 records of pair 1 for 22 images"),
        (text_of(without("views-p0001")), "lists 0 records of pair 1 for 22 images"),
        (text_of(without("images-00000")), "lists 14 records of the stored images for 22 images"),
        (text_of(without("images")), "lists nothing for augment.where=both"),
    ],
)
def test_a_damaged_manifest_is_refused_in_one_line(copy, damage, words):
    manifest = copy.parent / "views.json"
    manifest.write_bytes(damage(json.loads(manifest.read_text())))
    text = refusal(lambda: open_source(str(copy), BOTH))
    assert text.startswith(str(manifest))
    assert words in text


def test_a_folder_in_the_manifests_place_is_refused_in_one_line(copy):
    manifest = copy.parent / "views.json"
    manifest.unlink()
    manifest.mkdir()
    assert refusal(lambda: open_source(str(copy), BOTH)).startswith(f"{manifest} is missing or damaged")


def test_damage_that_is_not_in_the_views_keeps_its_traceback(split_dir):
    damage = tf.errors.DataLossError(None, None, "elsewhere")
    with pytest.raises(tf.errors.DataLossError, match="elsewhere"), damage_named(open_source(str(split_dir), BEAM)):
        raise damage


def test_views_of_another_size_are_refused(split_dir):
    with pytest.raises(UserError, match=r"augment\.size is 16"):
        open_source(str(split_dir), AugmentConfig(size=16))
