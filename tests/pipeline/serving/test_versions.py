"""New versions: they take over with no failed request, and a broken one does not."""

import base64
import os
import shutil
import threading
import time
from pathlib import Path

import faulty_storage
import numpy as np
import pytest
import requests
import tensorflow as tf
from running_server import Running, running
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from components.pusher import publish
from pipeline.serving import versions
from pipeline.serving.model import WARMUP_FILE
from trainer_module.errors import UserError


@pytest.fixture
def base(encoders, tmp_path) -> publish.Place:
    """A place of publication with one version, of the encoder with seed 0."""
    at = publish.place(str(tmp_path / "serving"))
    publish.publish(str(encoders(0)), at)
    return at


def version(server: Running) -> int:
    return server.wait(current(server))


async def current(server: Running) -> int:
    with server.app._versions.lease("encoder") as model:
        return model.version


def states(server: Running) -> dict[int, str]:
    told = server.get("/v1/models/encoder").json()["model_version_status"]
    return {int(one["version"]): one["state"] for one in told}


def look(server: Running) -> None:
    server.wait(server.app._versions.look())


def test_a_new_version_takes_over_with_no_failed_request(base, encoders, png):
    body = {"instances": [{"b64": base64.b64encode(png(0)).decode()}]}
    with running(base.base, poll=0.05) as server:
        first, answers, stop = version(server), [], threading.Event()

        def ask() -> None:
            with requests.Session() as session:
                while not stop.is_set():
                    answers.append(session.post(f"{server.rest}/v1/models/encoder:predict", json=body, timeout=30))

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        second = int(os.path.basename(publish.publish(str(encoders(1)), base)))
        while states(server).get(first) != "END":
            threading.Event().wait(0.02)
        before = len(answers)
        while len(answers) < before + 10:
            threading.Event().wait(0.02)
        stop.set()
        for client in clients:
            client.join()
        assert {answer.status_code for answer in answers} == {200}
        embeddings = {tuple(np.round(answer.json()["predictions"][0], 4)) for answer in answers}
        assert len(embeddings) == 2
        assert states(server) == {first: "END", second: "AVAILABLE"}
        assert server.metric("version ") == second
        assert server.post(f"/v1/models/encoder/versions/{first}:predict", json=body).status_code == 404


def test_going_back_by_the_pointer_is_followed(base, encoders):
    publish.publish(str(encoders(1)), base)
    first, second = publish.versions(base)
    with running(base.base) as server:
        assert version(server) == int(second.number)
        publish.rollback(base, first.number)
        look(server)
        assert version(server) == int(first.number)


def test_versions_in_a_bucket_are_followed_and_refused_as_in_a_directory(encoders, tmp_path, monkeypatch, caplog, png):
    body = {"instances": [{"b64": base64.b64encode(png(0)).decode()}]}
    closed = threading.Event()

    def plan(_: int, __: faulty_storage.Request) -> faulty_storage.Answer | None:
        return faulty_storage.refusal(403, "forbidden", "no") if closed.is_set() else None

    with faulty_storage.storage() as storage, faulty_storage.proxy(storage, plan) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
        at = publish.place("gs://models/encoder")
        first = int(os.path.basename(publish.publish(str(encoders(0)), at)))
        with running(encoders(0)) as local, running("gs://models/encoder") as server:
            answers = [one.post("/v1/models/encoder:predict", json=body).json() for one in (local, server)]
            assert answers[0] == answers[1]

            shutil.copytree(encoders(1), tmp_path / "broken")
            break_variables(tmp_path / "broken")
            broken = int(os.path.basename(publish.publish(str(tmp_path / "broken"), at)))
            for _ in range(2):
                look(server)
            assert states(server) == {first: "AVAILABLE", broken: "END"}
            assert sum(f"version {broken} is refused" in record.getMessage() for record in caplog.records) == 1

            closed.set()  # the bucket can no longer be read
            for _ in range(2):
                look(server)
            (line,) = [message for message in caplog.messages if "cannot look for new versions" in message]
            assert "gs://models/encoder" in line
            assert server.post("/v1/models/encoder:predict", json=body).json() == answers[1]
            closed.clear()

            third = int(os.path.basename(publish.publish(str(encoders(1)), at)))
            look(server)
            assert version(server) == third
            assert server.post("/v1/models/encoder:predict", json=body).json() != answers[1]
            publish.rollback(at, str(first))
            look(server)
            assert server.post("/v1/models/encoder:predict", json=body).json() == answers[1]
            assert states(server) == {first: "AVAILABLE", broken: "END", third: "END"}


def break_graph(folder: Path) -> None:
    (folder / "saved_model.pb").write_bytes(b"\xff\xff no graph")


def break_variables(folder: Path) -> None:
    (folder / "variables" / "variables.data-00000-of-00001").write_bytes(b"")


def break_computation(folder: Path) -> None:
    class Failing(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
        def serving_default(self, image_bytes):
            with tf.control_dependencies([tf.debugging.assert_less(tf.size(image_bytes), 0, "it never works")]):
                return {"embedding": tf.zeros([tf.size(image_bytes), 3])}

    shutil.rmtree(folder)
    module = Failing()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serving_default})


def break_warm_up(folder: Path) -> None:
    (folder / WARMUP_FILE).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / WARMUP_FILE)) as writer:
        writer.write(b"\xff\xff no PredictionLog")


def break_warm_up_tensor(folder: Path) -> None:
    request = predict_pb2.PredictRequest()
    request.inputs["image_bytes"].dtype = 99
    log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
    break_warm_up(folder)
    with tf.io.TFRecordWriter(str(folder / WARMUP_FILE)) as writer:
        writer.write(log.SerializeToString())


def break_signature(folder: Path) -> None:
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    saved.meta_graphs[0].signature_def["pixels"].outputs["embedding"].name = "NoSuchTensor:0"
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())


BREAKINGS = [break_graph, break_variables, break_computation, break_warm_up, break_warm_up_tensor, break_signature]


@pytest.mark.parametrize("breaking", BREAKINGS)
def test_a_broken_version_is_refused_with_one_line_and_the_old_one_stays(base, encoders, tmp_path, caplog, breaking):
    with running(base.base) as server:
        first = version(server)
        shutil.copytree(encoders(1), tmp_path / "broken")
        breaking(tmp_path / "broken")
        second = int(os.path.basename(publish.publish(str(tmp_path / "broken"), base)))
        caplog.clear()
        for _ in range(3):
            look(server)
        (line,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
        assert line.startswith(f"version {second} is refused, {first} stays in service: ")
        assert "\n" not in line
        assert not line.endswith("error:")
        (told,) = server.get(f"/v1/models/encoder/versions/{second}").json()["model_version_status"]
        assert line.endswith(told["status"]["error_message"])
        assert version(server) == first
        assert states(server) == {first: "AVAILABLE", second: "END"}
        third = int(os.path.basename(publish.publish(str(encoders(2)), base)))
        look(server)
        assert version(server) == third


def test_a_version_that_was_seen_half_copied_is_taken_when_it_is_whole(base, encoders, caplog):
    with running(base.base) as server:
        second = version(server) + 1
        folder = Path(base.base) / str(second)
        shutil.copytree(encoders(1), folder)
        (Path(base.base) / "latest.json").unlink()
        variables = folder / "variables" / "variables.data-00000-of-00001"
        whole = variables.read_bytes()
        variables.write_bytes(whole[: len(whole) // 2])
        for _ in range(2):
            look(server)
        assert states(server)[second] == "END"
        assert sum("is refused" in record.getMessage() for record in caplog.records) == 1
        variables.write_bytes(whole)
        look(server)
        assert version(server) == second
        assert states(server)[second] == "AVAILABLE"


def test_a_fault_of_a_look_does_not_end_the_watching(base, encoders, monkeypatch, caplog):
    found, failed = versions._find, threading.Event()

    def find(path: str) -> tuple[int, str]:
        if failed.is_set():
            return found(path)
        failed.set()
        raise RuntimeError("secret")

    with running(base.base, poll=0.05) as server:
        monkeypatch.setattr(versions, "_find", find)
        assert failed.wait(10)
        second = int(os.path.basename(publish.publish(str(encoders(1)), base)))
        end = time.monotonic() + 20
        while version(server) != second and time.monotonic() < end:
            time.sleep(0.05)
        assert version(server) == second
    (line,) = [record.getMessage() for record in caplog.records if record.name == "moco.serve"]
    assert line.startswith("RuntimeError at ")
    assert "secret" not in line


@pytest.mark.parametrize("what", [RuntimeError("it\nbroke"), KeyError("x")])
def test_whatever_a_load_raises_is_a_refusal_in_one_line(base, encoders, monkeypatch, what):
    def fail(*_) -> None:
        raise what

    with running(base.base) as server:
        first = version(server)
        second = int(os.path.basename(publish.publish(str(encoders(1)), base)))
        monkeypatch.setattr(server.app._versions, "_load", fail)
        look(server)
        assert version(server) == first
        assert states(server) == {first: "AVAILABLE", second: "END"}


def test_a_place_that_cannot_be_read_changes_nothing_and_is_told_once(base, caplog):
    with running(base.base) as server:
        first = version(server)
        (Path(base.base) / "latest.json").write_text("{")
        for _ in range(3):
            look(server)
        assert version(server) == first
        assert sum("cannot look for new versions" in record.getMessage() for record in caplog.records) == 1


def test_the_old_version_goes_when_its_last_request_is_done(base, encoders):
    with running(base.base) as server:
        first = version(server)
        watched = server.app._versions

        async def hold_while_another_takes_over() -> list[str]:
            with watched.lease("encoder") as model:
                publish.publish(str(encoders(1)), base)
                await watched.look()
                during = watched.states("encoder", first)[0].name
                row = model.signatures["pixels"]({"image": np.zeros((1, 20, 20, 3), np.float32)})
            return [during, row.errors, watched.states("encoder", first)[0].name]

        assert server.wait(hold_while_another_takes_over()) == ["UNLOADING", {}, "END"]


def test_a_model_that_is_named_itself_is_served_by_its_number_or_as_1(base, encoders):
    with running(encoders(0)) as server:
        look(server)
        assert version(server) == 1
    path = publish.resolve(base.base)
    with running(path) as server:
        publish.publish(str(encoders(1)), base)
        look(server)
        assert version(server) == int(os.path.basename(path))


@pytest.mark.parametrize("breaking", [break_warm_up, break_signature])
def test_a_broken_model_ends_the_start_with_one_line(encoders, tmp_path, breaking):
    shutil.copytree(encoders(0), tmp_path / "model")
    breaking(tmp_path / "model")
    with (
        pytest.raises(UserError, match=r"cannot be (warmed up|loaded as a SavedModel): \S"),
        running(tmp_path / "model"),
    ):
        pass


@pytest.mark.parametrize("what", ["missing", "empty", "broken"])
def test_where_there_is_nothing_to_serve_the_start_is_refused(encoders, tmp_path, what):
    if what != "missing":
        (tmp_path / "model").mkdir()
    if what == "broken":
        shutil.copytree(encoders(0), tmp_path / "model", dirs_exist_ok=True)
        break_graph(tmp_path / "model")
    with pytest.raises(UserError, match=r"folder|SavedModel"), running(tmp_path / "model"):
        pass


def test_the_warm_up_requests_that_lie_with_a_model_are_played(encoders, tmp_path, png):
    folder = tmp_path / "model"
    shutil.copytree(encoders(0), folder)
    request = predict_pb2.PredictRequest()
    request.model_spec.signature_name = "serving_default"
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([png(0), png(1)]))
    log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
    (folder / WARMUP_FILE).parent.mkdir(exist_ok=True)

    def write() -> None:
        with tf.io.TFRecordWriter(str(folder / WARMUP_FILE)) as writer:
            writer.write(log.SerializeToString())

    write()
    with running(folder):
        pass
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([b"no image"]))
    log.predict_log.request.CopyFrom(request)
    write()
    with pytest.raises(UserError, match="cannot be warmed up: not_an_image"), running(folder):
        pass
