"""Files for TensorFlow Serving by docker and under KServe: each is read by what reads it there, where that is here."""

import csv
import importlib.metadata
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import faulty_storage
import pytest
import yaml
from google.protobuf import descriptor_pb2, message_factory, text_format, wrappers_pb2
from tensorflow_serving.config import model_server_config_pb2

from components.pusher import publish
from pipeline import cli
from pipeline.cloud.vertex import Connection
from pipeline.deploying import docker, kserve, tf_serving, vertex
from pipeline.deploying.config import FilesConfig, VertexConfig
from pipeline.deploying.located import Located, locate
from trainer_module import lines
from trainer_module.errors import UserError

# Of tensorflow_model_server 2, read in its tensorflow_serving/model_servers/main.cc.
FLAGS = {
    "model_config_file",
    "enable_batching",
    "batching_parameters_file",
    "enable_model_warmup",
    "rest_api_timeout_in_ms",
}
IN_BUCKET = Located("gs://bucket/encoder", "17", followed=False)


def batching_parameters(text: str):
    """Text as tensorflow.serving.BatchingParameters.

    Its proto is in no package, so the message is built here, field by field, from
    tensorflow_serving/servables/tensorflow/session_bundle_config.proto of TensorFlow Serving.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name="session_bundle_config.proto", package="tensorflow.serving", syntax="proto3"
    )
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    message = file.message_type.add(name="BatchingParameters")
    kinds = descriptor_pb2.FieldDescriptorProto
    for number, name in enumerate(
        ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads"), start=1
    ):
        message.field.add(
            name=name,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=".google.protobuf.Int64Value",
            label=kinds.LABEL_OPTIONAL,
        )
    message.field.add(name="thread_pool_name", number=5, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    message.field.add(name="allowed_batch_sizes", number=6, type=kinds.TYPE_INT64, label=kinds.LABEL_REPEATED)
    message.field.add(name="pad_variable_length_inputs", number=7, type=kinds.TYPE_BOOL, label=kinds.LABEL_OPTIONAL)
    wrappers = descriptor_pb2.FileDescriptorProto.FromString(wrappers_pb2.DESCRIPTOR.serialized_pb)
    made = message_factory.GetMessages([wrappers, file])["tensorflow.serving.BatchingParameters"]
    return text_format.Parse(text, made())


def served_model(text: str):
    """The one model of a tensorflow.serving.ModelServerConfig."""
    parsed = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    [model] = parsed.model_config_list.config
    return model


# Batches.


def test_batches_are_of_the_size_and_patience_that_were_asked():
    parsed = batching_parameters(tf_serving.batching(FilesConfig(max_batch=48, max_wait_ms=2.5, max_queue=1000)))
    assert parsed.max_batch_size.value == 48
    assert parsed.batch_timeout_micros.value == 2500
    assert parsed.max_enqueued_batches.value == 21
    assert parsed.num_batch_threads.value == FilesConfig().threads


@pytest.mark.parametrize("largest", [1, 2, 3, 64, 100])
def test_allowed_sizes_rise_and_end_with_the_largest_batch(largest):
    sizes = list(batching_parameters(tf_serving.batching(FilesConfig(max_batch=largest))).allowed_batch_sizes)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == largest


def test_flags_are_those_that_the_server_has_and_the_image_is_of_the_same_release():
    flags = tf_serving.flags("/config")
    assert {flag.removeprefix("--").partition("=")[0] for flag in flags} == FLAGS
    release = tf_serving.image(FilesConfig()).removeprefix("tensorflow/serving:")
    assert release.split(".")[:2] == importlib.metadata.version("tensorflow").split(".")[:2]
    # tfx-bsl 1.21 keeps the protos at an older release than its TensorFlow.
    assert lines.NEWER or release == importlib.metadata.version("tensorflow-serving-api")


# Docker.


def docker_arguments(folder: Path, tmp_path: Path) -> list[str]:
    """What serve.sh calls docker with, by a docker that writes it down."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "docker"
    stub.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "HOME": "/home/me"}
    done = subprocess.run([folder / docker.COMMAND], env=environment, text=True, capture_output=True, check=True)
    return done.stdout.splitlines()


def mounts(arguments: list[str]) -> dict[str, str]:
    """Sources by targets."""
    found = {}
    for before, word in itertools.pairwise(arguments):
        if before == "--mount":
            [row] = csv.reader([word])
            parts = dict(part.partition("=")[::2] for part in row)
            assert {"readonly", "type"} <= set(parts)
            found[parts["target"]] = parts["source"]
    return found


def test_the_command_starts_a_server_that_finds_the_model_and_its_files(pushed, tmp_path: Path):
    out = tmp_path / "out of here"
    assert cli.main(["deploy", "--target", "docker", "--model", str(pushed), "--out", str(out)]) == 0
    arguments = docker_arguments(out, tmp_path)
    assert arguments[:2] == ["run", "--rm"]
    assert "127.0.0.1:8501:8501" in arguments
    assert mounts(arguments) == {"/config": str(out), "/models/encoder": str(pushed)}
    image = arguments.index(lines.SERVING_IMAGE)
    assert arguments[image + 1 :] == tf_serving.flags("/config")
    for flag in ("--model_config_file", "--batching_parameters_file"):
        path = next(word.partition("=")[2] for word in arguments if word.startswith(flag))
        assert (out / Path(path).relative_to("/config")).is_file()
    model = served_model((out / tf_serving.MODELS).read_text())
    assert (model.name, model.base_path, model.model_platform) == ("encoder", "/models/encoder", "tensorflow")


def test_an_odd_path_comes_through(pushed, tmp_path: Path):
    odd = tmp_path / "it's, $HOME (odd)"
    odd.symlink_to(pushed)
    assert cli.main(["deploy", "--target", "docker", "--model", str(odd), "--out", str(odd.parent / "o ut")]) == 0
    assert mounts(docker_arguments(odd.parent / "o ut", tmp_path))["/models/encoder"] == str(odd)


def test_a_model_that_is_no_version_of_a_folder_is_mounted_as_one(pushed, tmp_path: Path):
    export = tmp_path / "export"
    export.symlink_to(pushed / "7")
    files = docker.files(FilesConfig(), locate(str(export)))
    assert f"source={export},target=/models/encoder/1," in files[docker.COMMAND]
    assert list(served_model(files[tf_serving.MODELS]).model_version_policy.specific.versions) == [1]


def test_a_model_in_a_bucket_is_read_with_the_users_credentials(tmp_path: Path):
    out = tmp_path / "out"
    assert cli.main(["deploy", "--target", "docker", "--model", "gs://bucket/encoder/17", "--out", str(out)]) == 0
    arguments = docker_arguments(out, tmp_path)
    assert mounts(arguments)["/root/.config/gcloud"] == "/home/me/.config/gcloud"
    model = served_model((out / tf_serving.MODELS).read_text())
    assert model.base_path == "gs://bucket/encoder"
    assert list(model.model_version_policy.specific.versions) == [17]


# Which version.


def test_later_versions_are_followed_unless_one_was_named_or_gone_back_to(pushed):
    highest = locate(str(pushed))
    assert (highest.version, highest.followed) == ("7", True)
    assert served_model(docker.files(FilesConfig(), highest)[tf_serving.MODELS]).model_version_policy.HasField("latest")
    named = locate(str(pushed / "3"))
    assert (named.base, named.version, named.followed) == (str(pushed), "3", False)
    policy = served_model(docker.files(FilesConfig(), named)[tf_serving.MODELS]).model_version_policy
    assert list(policy.specific.versions) == [3]


def test_a_version_in_a_bucket_that_is_named_is_taken_without_asking():
    assert locate("gs://bucket/a/b/17/") == Located("gs://bucket/a/b", "17", followed=False)


@pytest.fixture
def two_versions(tmp_path: Path, monkeypatch) -> Iterator[list[str]]:
    """Their numbers, in gs://models/encoder."""
    with faulty_storage.storage() as storage, faulty_storage.proxy(storage) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
        at, numbers = publish.place("gs://models/encoder"), []
        for word in ("one", "two"):
            for name in ("saved_model.pb", "variables/variables.index"):
                (tmp_path / word / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word / name).write_text(word)
            numbers.append(publish.publish(str(tmp_path / word), at).rpartition("/")[2])
        yield numbers


def test_in_a_bucket_the_version_in_service_is_taken_and_not_the_highest(two_versions):
    first, second = two_versions
    assert locate("gs://models/encoder") == Located("gs://models/encoder", second, followed=True)
    publish.rollback(publish.place("gs://models/encoder"), first)
    gone_back = locate("gs://models/encoder")
    assert gone_back == Located("gs://models/encoder", first, followed=False)
    own = VertexConfig(image="r-docker.pkg.dev/p/serving/tensorflow:1")
    with pytest.raises(UserError, match=f"the highest version of gs://models/encoder is served, which is {second}"):
        list(vertex.deploy(own, gone_back, Connection("my-project", "europe-west4", "127.0.0.1:1")))


# KServe.


def documents(**options) -> list[dict]:
    return list(yaml.safe_load_all(kserve.files(FilesConfig(**options), IN_BUCKET)[kserve.FILE]))


def test_the_inference_service_has_the_names_and_types_of_kserves_own_models():
    import jsonschema  # reads grammars for seconds

    schema = json.loads((Path(__file__).parent / "kserve_0.21.schema.json").read_text())
    checker = jsonschema.Draft202012Validator(schema)
    shown = documents(min_replicas=0, max_replicas=8, cpus=0.5)
    assert [document["kind"] for document in shown] == ["ConfigMap", "InferenceService"]
    for document in shown:
        assert list(checker.iter_errors(document)) == []
    del shown[1]["spec"]["predictor"]["model"]["modelFormat"]
    shown[0]["dta"] = {}
    for document in shown:
        assert list(checker.iter_errors(document))  # so it would be seen


def test_the_inference_service_serves_the_version_with_batches():
    config_map, service = documents(min_replicas=2, max_replicas=8, cpus=4, memory_gb=8)
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert service["metadata"]["name"] == "encoder"
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (2, 8)
    assert model["storageUri"] == "gs://bucket/encoder"
    assert model["resources"]["limits"] == {"cpu": "4", "memory": "8G"}
    assert predictor["annotations"] == {"moco/model-version": "17"}
    [mount], [volume] = model["volumeMounts"], predictor["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert model["args"] == tf_serving.flags(mount["mountPath"])
    assert batching_parameters(config_map["data"][tf_serving.BATCHING]).max_batch_size.value == 64
    served = served_model(config_map["data"][tf_serving.MODELS])
    assert (served.base_path, list(served.model_version_policy.specific.versions)) == ("/mnt/models", [17])


def test_a_dry_run_prints_what_kubectl_takes_and_writes_nothing(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["deploy", "--target", "kserve", "--model", "gs://bucket/encoder/17", "--dry-run"]) == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == documents()
    assert list(tmp_path.iterdir()) == []


# Refusals.

VERTEX = ["--target", "vertex", "--model", "gs://b-u-c/encoder/17", "--project", "my-project"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "docker", "--model", "/nowhere", "--out", "x"], ["--model /nowhere", "no such folder"]),
        (["--target", "docker", "--model", "gs://b-u-c/encoder/17"], ["--out is missing", "--dry-run"]),
        (["--target", "podman", "--model", "x"], ["--target", "podman", "docker"]),
        (["--target", "docker", "--model", "x", "--project", "p"], ["--project", "--target vertex"]),
        (["--target", "kserve", "--model", "x", "--rest-port", "1"], ["--rest-port", "goes with --target docker"]),
        ([*VERTEX, "--region", "europe-west4", "--cpus", "4"], ["--cpus", "goes with --target kserve"]),
        (VERTEX, ["--region is missing", "europe-west4"]),
        ([*VERTEX, "--region", "Belgium"], ["--region", "Belgium", "europe-west4"]),
        ([*VERTEX, "--region", "europe-west4", "--traffic", "101"], ["--traffic 101", "0 to 100"]),
        ([*VERTEX, "--region", "europe-west4", "--min-replicas", "0"], ["--min-replicas 0", "--min-replicas 1"]),
        ([*VERTEX, "--region", "europe-west4", "--min-replicas", "3"], ["--min-replicas 3", "--max-replicas 3"]),
        ([*VERTEX, "--region", "europe-west4", "--label", "Team=A"], ["--label Team=A", "team=vision"]),
        ([*VERTEX, "--region", "europe-west4", "--name", "Encoder"], ["--name 'Encoder'", "--name encoder"]),
        (
            ["--target", "docker", "--model", "x", "--out", "y", "--rest-port", "8500"],
            ["--rest-port and --grpc-port", "8500"],
        ),
    ],
)
def test_what_cannot_be_deployed_is_refused_in_one_line(capsys, arguments, words):
    assert cli.main(["deploy", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


@pytest.mark.parametrize("target", ["kserve", "vertex"])
def test_a_model_on_this_machine_is_refused_with_the_command_that_brings_it_to_a_bucket(capsys, pushed, target):
    place = ["--project", "my-project", "--region", "europe-west4"] if target == "vertex" else []
    assert cli.main(["deploy", "--target", target, "--model", str(pushed), "--dry-run", *place]) == 2
    assert f"./moco publish --to gs://BUCKET/encoder --model {pushed}/7" in capsys.readouterr().err
