"""The Pusher: whole versions or none, whatever is there already."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from components.pusher import publish
from trainer_module.errors import UserError


@pytest.fixture(scope="module")
def pusher():
    from components.pusher import executor

    return executor


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model artifact with a real export."""
    import tensorflow as tf

    class Double(tf.Module):
        def __init__(self):
            super().__init__()
            self.factor = tf.Variable(2.0)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
        def serve(self, x):
            return {"y": self.factor * x}

    root = tmp_path_factory.mktemp("model")
    module = Double()
    tf.saved_model.save(module, str(root / "Format-Serving"), signatures={"serving_default": module.serve})
    return root


def run_executor(
    pusher, model: Path, base: Path, tmp_path: Path, blessed: bool, card: Path | None = None, **custom_config
):
    from tfx.proto import pusher_pb2
    from tfx.types import standard_artifacts
    from tfx.utils import proto_utils

    blessing = standard_artifacts.ModelBlessing()
    blessing.uri = str(tmp_path / "blessing")
    blessing.set_int_custom_property("blessed", int(blessed))
    candidate = standard_artifacts.Model()
    candidate.uri = str(model)
    pushed = standard_artifacts.PushedModel()
    pushed.uri = str(tmp_path / "pushed")
    destination = pusher_pb2.PushDestination(filesystem=pusher_pb2.PushDestination.Filesystem(base_directory=str(base)))
    inputs = {"model": [candidate], "model_blessing": [blessing]}
    if card is not None:
        from components.model_card.artifact import ModelCard

        artifact = ModelCard()
        artifact.uri = str(card)
        inputs["model_card"] = [artifact]
    pusher.Executor().Do(
        inputs,
        {"pushed_model": [pushed]},
        {"push_destination": proto_utils.proto_to_json(destination), "custom_config": json.dumps(custom_config)},
    )
    return pushed


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def versions(base: Path) -> list[str]:
    return sorted((name for name in os.listdir(base) if name.isdecimal()), key=int)


def test_a_blessed_model_is_published_and_archived_with_the_stock_properties(pusher, model, tmp_path):
    base = tmp_path / "serving" / "moco"
    before = int(time.time())
    pushed = run_executor(pusher, model, base, tmp_path, blessed=True)
    (version,) = versions(base)
    assert before <= int(version) <= time.time()
    assert tree(base / version) == tree(Path(pushed.uri))
    assert tree(base / version).items() >= tree(model / "Format-Serving").items()
    assert set(tree(base / version)) - set(tree(model / "Format-Serving")) == {pusher.CARD_FILE}
    assert publish.resolve(str(base)) == str(base / version)
    assert pushed.get_int_custom_property("pushed") == 1
    assert pushed.get_string_custom_property("pushed_destination") == str(base / version)
    assert pushed.get_string_custom_property("pushed_version") == version


def test_a_model_that_is_the_newest_version_already_is_not_published_twice(pusher, model, tmp_path):
    base = tmp_path / "serving"
    first = run_executor(pusher, model, base, tmp_path / "1", blessed=True)
    again = run_executor(pusher, model, base, tmp_path / "2", blessed=True)
    destination = "pushed_destination"
    assert again.get_string_custom_property(destination) == first.get_string_custom_property(destination)
    assert len(versions(base)) == 1
    # Once another model is served, the same one is a new version: somebody goes back to it.
    other = base / str(int(versions(base)[0]) + 5)
    shutil.copytree(base / versions(base)[0], other)
    (other / pusher.CARD_FILE).write_text("{}")
    run_executor(pusher, model, base, tmp_path / "3", blessed=True)
    assert len(versions(base)) == 3


def make_card(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_card.json").write_text(json.dumps({"name": name}))
    (folder / "model_card.md").write_text(f"# {name}")
    (folder / "model_card.html").write_text(f"<h1>{name}</h1>")
    return folder


def test_a_card_is_published_beside_the_model_and_says_which_bytes_it_is_of(pusher, model, tmp_path):
    base = tmp_path / "serving"
    run_executor(pusher, model, base, tmp_path, blessed=True, card=make_card(tmp_path / "card", "birds"))
    (version,) = versions(base)
    files = tree(base / version / "assets.extra")
    assert files["model_card.md"] == b"# birds"
    assert files["model_card.html"] == b"<h1>birds</h1>"
    document = json.loads(files["model_card.json"])
    assert document["name"] == "birds"
    assert len(document["model_sha256"]) == 64


def test_another_card_alone_makes_no_new_version(pusher, model, tmp_path):
    base = tmp_path / "serving"
    for name in ("birds", "frogs"):
        run_executor(pusher, model, base, tmp_path / name, blessed=True, card=make_card(tmp_path / name / "c", name))
    (version,) = versions(base)
    assert (base / version / "assets.extra" / "model_card.md").read_bytes() == b"# birds"


def test_only_as_many_versions_stay_as_are_asked_for(pusher, model, tmp_path):
    base = tmp_path / "serving"
    for number in range(3):
        pusher.push(str(model / "Format-Serving"), str(base))
        assert len(versions(base)) == number + 1
    pushed = run_executor(pusher, model, base, tmp_path, blessed=True, keep=2)
    assert len(versions(base)) == 2
    assert versions(base)[-1] == pushed.get_string_custom_property("pushed_version")


def test_the_published_model_loads_and_answers(pusher, model, tmp_path):
    import tensorflow as tf

    destination = pusher.push(str(model / "Format-Serving"), str(tmp_path / "serving"))
    served = tf.saved_model.load(destination).signatures["serving_default"]
    assert served(tf.constant([1.5]))["y"].numpy().tolist() == [3.0]


def test_a_model_that_is_not_blessed_leaves_no_trace(pusher, model, tmp_path):
    pushed = run_executor(pusher, model, tmp_path / "serving", tmp_path, blessed=False)
    assert not (tmp_path / "serving").exists()
    assert pushed.get_int_custom_property("pushed") == 0


def test_the_component_takes_what_the_stock_one_takes_and_a_card():
    from tfx import v1 as tfx

    from components.model_card.artifact import ModelCard
    from components.pusher.component import Pusher

    def channel(kind):
        return tfx.dsl.Channel(kind).set_artifacts([kind()])

    destination = tfx.proto.PushDestination(filesystem=tfx.proto.PushDestination.Filesystem(base_directory="/serving"))
    types = tfx.types.standard_artifacts
    blessing = channel(types.InfraBlessing)
    component = Pusher(infra_blessing=blessing, model_card=channel(ModelCard), push_destination=destination)
    assert component.executor_spec.class_path == "components.pusher.executor.Executor"
    assert set(component.inputs) == {"infra_blessing", "model_card"}
    assert component.outputs["pushed_model"].type is types.PushedModel


def test_a_version_is_never_used_twice_and_a_new_one_is_always_the_highest(pusher, model, tmp_path):
    source, base = str(model / "Format-Serving"), tmp_path / "serving"
    first = int(Path(pusher.push(source, str(base))).name)
    second = int(Path(pusher.push(source, str(base))).name)
    assert second > first
    # A version from a clock that runs ahead, empty as a failed copy by hand would leave it.
    (base / "99999999999").mkdir()
    assert Path(pusher.push(source, str(base))).name == "100000000000"
    assert os.listdir(base / "99999999999") == []


def test_of_pushers_that_run_at_once_each_has_its_version_in_service_or_says_who_was_faster(pusher, model, tmp_path):
    import threading
    from concurrent.futures import ThreadPoolExecutor

    source, base, start = str(model / "Format-Serving"), tmp_path / "serving", threading.Barrier(6)

    def push() -> str:
        try:
            return pusher.push(source, str(base))
        except UserError as refusal:
            return str(refusal)

    def push_some(_: int) -> list[str]:
        start.wait()
        return [push() for _ in range(4)]

    with ThreadPoolExecutor(6) as pool:
        outcomes = [outcome for some in pool.map(push_some, range(6)) for outcome in some]
    published = {outcome for outcome in outcomes if "has put version" not in outcome}
    assert published == {str(base / name) for name in versions(base)}
    assert len(published) == sum("has put version" not in outcome for outcome in outcomes) > 0
    put_in_service = {event.version for event in publish.place(str(base)).read().history}
    assert put_in_service == set(versions(base))
    assert all(tree(base / name) == tree(model / "Format-Serving") for name in versions(base))


def test_a_model_that_somebody_went_back_from_counts_as_not_pushed(pusher, model, tmp_path):
    base = tmp_path / "serving"
    shutil.copytree(model / "Format-Serving", base / "1")
    assert run_executor(pusher, model, base, tmp_path / "a", blessed=True).get_int_custom_property("pushed") == 1
    publish.rollback(publish.place(str(base)), "1")
    again = run_executor(pusher, model, base, tmp_path / "b", blessed=True)
    assert again.get_int_custom_property("pushed") == 0
    assert publish.resolve(str(base)) == str(base / "1")


def test_what_a_killed_push_left_is_hidden_from_servers_and_removed_by_the_next_push(pusher, model, tmp_path):
    base = tmp_path / "serving"
    base.mkdir()
    # A process that has died by a kill, and one that lives: this one.
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    left = base / f".pushing-{socket.gethostname()}-{dead.pid}-{uuid.uuid4().hex}"
    live = base / f".pushing-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    fresh, old = (base / f".pushing-other-host-7-{uuid.uuid4().hex}" for _ in range(2))
    mine = base / ".pushing-notes"
    for folder in (left, live, fresh, old, mine):
        folder.mkdir()
        (folder / "variables").touch()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    version = Path(pusher.push(str(model / "Format-Serving"), str(base))).name
    assert set(os.listdir(base)) == {version, live.name, fresh.name, mine.name, "latest.json", ".latest.lock"}


def test_a_copy_that_fails_halfway_publishes_nothing_and_leaves_nothing(pusher, tmp_path):
    base = tmp_path / "serving"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a").write_bytes(b"x")
    (broken / "saved_model.pb").symlink_to(tmp_path / "missing")
    with pytest.raises(UserError, match=f"{broken}/saved_model.pb: cannot be read"):
        pusher.push(str(broken), str(base))
    assert not base.exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
def test_a_destination_that_cannot_be_written_is_said_in_one_line(pusher, model, tmp_path, kind):
    file = tmp_path / "file"
    file.touch()
    base = {"file": file, "below a file": file / "serving", "read-only": Path("/proc/serving")}[kind]
    with pytest.raises(UserError) as caught:
        pusher.push(str(model / "Format-Serving"), str(base))
    assert str(caught.value).startswith(f"cannot write to push destination {base}: ")
    assert "\n" not in str(caught.value)
