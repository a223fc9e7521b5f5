"""Publishing, without TFX: the same protocol for a directory and for a bucket, and what readers see."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faulty_storage
import pytest
from places import BASE, Meanwhile, bucket_behind, read, states, tree

from components.pusher import publish
from components.pusher.pointer import Event, Pointer
from components.pusher.publisher import Publisher, WithdrawnError, this_publisher
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
    with pytest.raises(WithdrawnError, match=f"--rollback {numbers(place)[1]} returns to it"):
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
    event = '{"version": "7", "action": "published", "at": "noon", "by": "me"}'
    for damage in (
        "{",
        "[]",
        '{"version": "../../x"}',
        '{"version": "7", "history": [{}]}',
        f'{{"version": "7", "history": [{event}]}}',
        '{"version": "7", "removed": ["x"]}',
        '{"version": 7}',
        '{"version": "٣"}',
        '{"version": "9223372036854775808"}',
    ):
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
    again = [str(number) for number in range(149)][-100:]
    assert now.without(again[:1] + again[50:]).removed == (*again[1:50], *again[:1], *again[50:])
    assert Pointer.from_json(now.to_json()) == now
    later = json.loads(now.to_json()) | {"of a later release": 1}
    assert Pointer.from_json(json.dumps(later)) == now


def test_readers_and_publishers_need_neither_tfx_nor_tensorflow():
    program = "import sys; import components.pusher.publish, components.pusher.bucket; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not {"tfx", "tensorflow", "apache_beam", "numpy"} & set(done.stdout.split())


# Others at the same time.


@pytest.mark.parametrize("rival", ["publishes", "goes back"])
def test_a_publisher_that_was_overtaken_says_so_and_leaves_what_the_other_did(place, make_model, rival):
    old, new, late, other = (make_model(word) for word in ("old", "new", "late", "other"))
    for model in (old, new):
        publish.publish(str(model), place)
    first = numbers(place)[0]
    happens = {
        "publishes": lambda: publish.publish(str(other), place),
        "goes back": lambda: publish.rollback(place, first),
    }[rival]
    assert "has put version" in one_line(lambda: publish.publish(str(late), Meanwhile(place, happens)))
    assert read(place) == tree(other if rival == "publishes" else old)
    assert (
        states(place)
        == {
            "publishes": ["ready", "ready", "in service"],
            "goes back": ["in service", "withdrawn"],
        }[rival]
    )


def test_a_directory_whose_pointer_cannot_be_written_keeps_no_version_that_was_never_in_service(tmp_path, make_model):
    old, new = make_model("old"), make_model("new")
    at = publish.place(str(tmp_path / "serving"))
    publish.publish(str(old), at)
    blocked = Meanwhile(at, lambda: (tmp_path / "serving" / "latest.json.new").mkdir())
    assert "cannot write to push destination" in one_line(lambda: publish.publish(str(new), blocked))
    assert states(at) == ["in service"]
    assert read(at) == tree(old)


def test_readers_of_a_directory_hear_of_no_error_while_versions_come_and_go(tmp_path, make_model):
    models = [make_model(str(number)) for number in range(20)]
    at = publish.place(str(tmp_path / "serving"))
    publish.publish(str(models[0]), at)
    ended, failures = threading.Event(), []

    def look() -> None:
        try:
            while not ended.is_set():
                publish.in_service(at)
        except UserError as error:
            failures.append(error)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for thread in readers:
        thread.start()
    for model in models[1:]:
        publish.publish(str(model), at)
        publish.keep(at, 1)
    ended.set()
    for thread in readers:
        thread.join()
    assert failures == []


def test_a_link_to_nowhere_is_no_version_and_reading_speaks_of_reading(tmp_path, make_model):
    base = tmp_path / "serving"
    at = publish.place(str(base))
    publish.publish(str(make_model("x")), at)
    (base / "99999999999").symlink_to(tmp_path / "nowhere")
    assert states(at) == ["in service"]
    (base / "latest.json").unlink()
    (base / "latest.json").mkdir()
    assert one_line(lambda: publish.in_service(at)).startswith(f"cannot read {base}: is a directory")


# What others left there.


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"{", b'"card"'])
def test_a_card_that_is_none_does_not_stand_in_the_way_of_publications(place, make_model, content):
    path = publish.publish(str(make_model("old")), place)
    if isinstance(place, publish.Directory):
        Path(path, "assets.extra", "model_card.json").write_bytes(content)
    else:
        name = f"encoders/birds/{publish.in_service(place)}/assets.extra/model_card.json"
        place._bucket.blob(name).upload_from_string(content)
    new = make_model("new")
    (new / "assets.extra" / "model_card.json").write_bytes(content)
    publish.publish(str(new), place)
    assert read(place) == tree(new)


def test_folders_whose_names_are_no_int64_in_ascii_digits_are_no_versions(tmp_path, make_model):
    at = publish.place(str(tmp_path / "serving"))
    for name in ("99999999999999999999999", "٣"):
        os.renames(make_model(name), tmp_path / "serving" / name)
    publish.publish(str(make_model("x")), at)
    assert states(at) == ["in service"]
    os.renames(make_model("last"), tmp_path / "serving" / str(2**63 - 1))
    assert "no number is left" in one_line(lambda: publish.publish(str(make_model("y")), at))


def test_a_claim_that_nobody_can_have_laid_does_not_stand_in_the_way(bucket, make_model):
    mine = json.loads(this_publisher().to_json())
    for number, process in enumerate((10**30, "x", -1, None)):
        claim = json.dumps(mine | {"process": process})
        bucket._bucket.blob(f"encoders/birds/.publishing/{number}.json").upload_from_string(claim)
    bucket._bucket.blob("encoders/birds/.publishing/5.json").upload_from_string("[[]]")
    model = make_model("x")
    publish.publish(str(model), bucket)
    assert read(bucket) == tree(model)
    with pytest.raises(ValueError, match="no process"):
        Publisher.from_json(json.dumps(mine | {"process": 0}))


def test_objects_that_stand_for_folders_are_passed_over_and_names_that_lead_out_refused(bucket, storage, make_model):
    model = make_model("x")
    version = publish.publish(str(model), bucket).rpartition("/")[2]
    bucket._bucket.blob(f"encoders/birds/{version}/variables/").upload_from_string("")
    assert read(bucket) == tree(model)

    def lead_out(number: int, request: faulty_storage.Request) -> faulty_storage.Answer | None:
        if "prefix" not in request.query:
            return None
        answer = storage.serve(request)
        return dataclasses.replace(answer, body=answer.body.replace(b"variables/variables.data", b"../../out"))

    with faulty_storage.proxy(storage, lead_out) as proxy:
        assert "cannot be a file of a model" in one_line(lambda: read(bucket_behind(proxy)))


def test_hundreds_of_old_versions_go_at_once(tmp_path):
    for number in range(1, 231):
        for name in ("saved_model.pb", "variables/variables.index"):
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    at = publish.place(str(tmp_path))
    assert publish.keep(at, 1) == [str(number) for number in range(1, 230)]
    assert numbers(at) == ["230"]


# Models and destinations that cannot be.


def test_a_file_of_the_model_that_cannot_be_read_is_named(place, make_model):
    model = make_model("x")
    (model / "broken").symlink_to("nowhere")
    said = one_line(lambda: publish.publish(str(model), place))
    assert said.startswith(f"{model}/broken: cannot be read (no such file or directory)")
    (model / "broken").unlink()
    os.mkfifo(model / "broken")
    assert f"{model}/broken: is no file" in one_line(lambda: publish.publish(str(model), place))


def test_a_first_publication_that_fails_leaves_no_folder_and_says_why_in_words(tmp_path, make_model):
    model, at = make_model("x"), publish.place(str(tmp_path / "a" / "new" / "place"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # stands for a disk that is full
    try:
        said = one_line(lambda: publish.publish(str(model), at))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write to push destination {at.base}: file too large; " in said
    assert not (tmp_path / "a").exists()


def test_a_place_within_the_model_is_refused(make_model):
    model = make_model("x")
    before = tree(model)
    for below in (model, model / "variables" / "serving"):
        at = publish.place(str(below))
        assert "lies in the model" in one_line(lambda at=at: publish.publish(str(model), at))
    assert tree(model) == before


def test_an_empty_path_is_no_place():
    assert "an empty path is no place" in one_line(lambda: publish.place(""))


def test_the_time_that_is_listed_is_the_publications(place, make_model):
    model = make_model("x")
    os.utime(model, (1e9, 1e9))
    before = time.time() - 2.0
    publish.publish(str(model), place)
    assert before < publish.versions(place)[0].created < time.time() + 2.0
