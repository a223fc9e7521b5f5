"""Publishing, without TFX: the same protocol for a directory and for a bucket, and what readers see."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import BASE, read, states, tree

from components.pusher import publish
from components.pusher.pointer import Event, Pointer
from trainer_module.errors import UserError


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> publish.Place:
    if request.param == "directory":
        return publish.place(str(tmp_path / "serving" / "birds"))
    return request.getfixturevalue("bucket")


def numbers(at: publish.Place) -> list[str]:
    return [version.number for version in publish.versions(at)]


def one_line(of: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        of()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_published_last_is_in_service_and_read_back_byte_by_byte(place, make_model):
    for word in ("one", "two"):
        model = make_model(word)
        path = publish.publish(str(model), place)
        assert path == place.path(publish.in_service(place))
        assert read(place) == tree(model)
    assert states(place) == ["ready", "in service"]
    assert numbers(place) == sorted(numbers(place), key=int)


def test_a_model_that_is_in_service_is_not_published_again(place, make_model):
    first, model = make_model("first"), make_model("model")
    publish.publish(str(first), place)
    path = publish.publish(str(model), place)
    assert publish.publish(str(model), place) == path
    assert len(numbers(place)) == 2
    publish.publish(str(first), place)  # somebody goes back to it by publishing it
    assert len(numbers(place)) == 3
    assert read(place) == tree(first)


def test_a_rollback_puts_an_older_version_in_service_and_the_same_model_does_not_come_back_by_itself(place, make_model):
    old, new = make_model("old"), make_model("new")
    for model in (old, new):
        publish.publish(str(model), place)
    publish.rollback(place, numbers(place)[0])
    assert read(place) == tree(old)
    assert states(place) == ["in service", "withdrawn"]
    publish.publish(str(new), place)  # what a run that is repeated does
    assert read(place) == tree(old)
    publish.rollback(place, numbers(place)[1])
    assert read(place) == tree(new)
    assert states(place) == ["ready", "in service"]
    newest = make_model("newest")
    publish.rollback(place, numbers(place)[0])
    publish.publish(str(newest), place)
    assert read(place) == tree(newest)


def test_keep_removes_the_oldest_and_never_the_one_in_service(place, make_model):
    for word in ("a", "b", "c", "d"):
        publish.publish(str(make_model(word)), place)
    a, b, c, d = numbers(place)
    publish.rollback(place, a)
    assert publish.keep(place, 2) == [b]
    assert numbers(place) == [a, c, d]
    assert publish.keep(place, 1) == [c]
    assert publish.keep(place, 1) == []
    assert states(place) == ["in service", "withdrawn"]
    assert "there is no version" in one_line(lambda: publish.rollback(place, b))
    publish.publish(str(make_model("e")), place)
    assert numbers(place)[-1] not in (b, c)  # a number is never used twice


def test_what_cannot_be_is_refused_in_one_line(place, make_model):
    assert "no SavedModel there" in one_line(lambda: publish.in_service(place))
    assert "there are: none" in one_line(lambda: publish.rollback(place, "7"))
    publish.publish(str(make_model("x")), place)
    assert numbers(place)[0] in one_line(lambda: publish.rollback(place, "7"))
    assert "--keep 0 must be at least 1" in one_line(lambda: publish.keep(place, 0))


def test_a_place_that_can_be_none_is_refused_in_one_line():
    for base, words in {
        "s3://bucket/x": "to a directory or to gs://BUCKET/PATH",
        "gs://no such/x": "cannot be the name of a bucket",
        "gs://": "cannot be the name of a bucket",
    }.items():
        assert words in one_line(lambda base=base: publish.place(base))


def test_a_damaged_pointer_is_named_and_never_taken_for_none(bucket, storage, make_model, tmp_path):
    publish.publish(str(make_model("x")), bucket)
    local = publish.place(str(tmp_path / "serving"))
    publish.publish(str(tmp_path / "models" / "x"), local)
    for damage in ("{", "[]", '{"version": "../../x"}', '{"version": 7, "history": [{}]}'):
        (tmp_path / "serving" / "latest.json").write_text(damage)
        assert "latest.json is damaged" in one_line(lambda: publish.in_service(local))
        bucket._bucket.blob("encoders/birds/latest.json").upload_from_string(damage)
        assert f"{BASE}/latest.json is damaged" in one_line(lambda: publish.in_service(bucket))


def test_versions_that_others_put_there_by_hand_are_listed_and_left_alone(place, make_model, storage, tmp_path):
    publish.publish(str(make_model("x")), place)
    content = {"saved_model.pb": b"by hand"}
    if isinstance(place, publish.Directory):
        (tmp_path / "serving" / "birds" / "99999999999").mkdir()
        (tmp_path / "serving" / "birds" / "99999999999" / "saved_model.pb").write_bytes(content["saved_model.pb"])
    else:
        place._bucket.blob("encoders/birds/99999999999/saved_model.pb").upload_from_string("by hand")
    assert states(place) == ["in service", "incomplete"]
    publish.publish(str(make_model("y")), place)
    publish.keep(place, 1)
    assert numbers(place) == ["99999999999", "100000000000"]
    assert read(place) == tree(tmp_path / "models" / "y")


def test_without_a_pointer_the_highest_whole_version_is_in_service(tmp_path, make_model):
    base = tmp_path / "serving"
    for number, word in {"3": "three", "20": "twenty"}.items():
        os.renames(make_model(word), base / number)
    (base / "100").mkdir()
    assert publish.resolve(str(base)) == str(base / "20")
    at = publish.place(str(base))
    publish.rollback(at, "3")
    assert publish.resolve(str(base)) == str(base / "3")


def test_a_version_that_was_deleted_by_hand_gives_way_to_the_highest_that_is_left(place, make_model, tmp_path):
    import shutil

    for word in ("old", "new"):
        publish.publish(str(make_model(word)), place)
    if isinstance(place, publish.Directory):
        shutil.rmtree(publish.resolve(place.base))
    else:
        for blob in place._list(publish.in_service(place) + "/"):
            blob.delete()
    assert read(place) == tree(tmp_path / "models" / "old")
    publish.publish(str(tmp_path / "models" / "new"), place)
    assert read(place) == tree(tmp_path / "models" / "new")


def test_the_pointer_remembers_a_hundred_events_and_survives_its_json():
    now = Pointer()
    for number in range(150):
        now = now.serving(Event(str(number), "published", 0.1 * number, "host")).without([str(number - 1)])
    assert now.version == "149"
    assert (len(now.history), now.history[-1].version) == (100, "149")
    assert (len(now.removed), now.removed[-1]) == (100, "148")
    assert now.without(["149"]) == now  # what is in service is never given up
    assert Pointer.from_json(now.to_json()) == now
    later = json.loads(now.to_json()) | {"of a later release": 1}
    assert Pointer.from_json(json.dumps(later)) == now


def test_readers_and_publishers_need_neither_tfx_nor_tensorflow():
    program = "import sys; import components.pusher.publish, components.pusher.bucket; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not {"tfx", "tensorflow", "apache_beam", "numpy"} & set(done.stdout.split())
