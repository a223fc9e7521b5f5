"""The serving check on real exports, whole and spoilt, each loaded by a fresh process with TensorFlow alone."""

import concurrent.futures
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_export
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from components.serving_check import probe
from components.serving_check.config import ServingCheckConfig
from components.serving_check.installed import tensorflow_alone
from components.serving_check.requests import INPUTS, Kind, make_requests, make_warm_up
from components.serving_check.session import ask
from components.serving_check.verdict import judge
from trainer_module.config import Precision

CONFIG = ServingCheckConfig(timeout_s=10.0)
SPOILT = {
    "vectors": {
        "serving_default": small_export.too_long,
        "examples": small_export.swallowing,
        "pixels": small_export.nan_in_large_batches,
    },
    "shapes": {
        "serving_default": small_export.in_double,
        "examples": small_export.shorter,
        "pixels": small_export.refusing_empty,
    },
    "hangs": {
        "serving_default": small_export.depending_on_the_batch,
        "examples": small_export.by_python,
        "pixels": small_export.without_end,
    },
}
OTHER_WEIGHTS = {"examples": None, "pixels": small_export.crashing}


@pytest.fixture(scope="module")
def asked(probes):
    return make_requests(probes)


@pytest.fixture(scope="module")
def spoilt(network, exported, tmp_path_factory):
    """Folders of exports that must not be served, by what is wrong with them."""
    root = tmp_path_factory.mktemp("spoilt")
    module = small_export.make_module(network)
    folders = {name: small_export.save_spoilt(module, root / name, **changed) for name, changed in SPOILT.items()}
    for weights in module._parameters:  # as of another moment of the training
        weights.assign_add(1e-3 * tf.random.stateless_normal(weights.shape, [3, 4]))
    folders["other weights"] = small_export.save_spoilt(module, root / "other", **OTHER_WEIGHTS)
    folders["cut"] = root / "cut"
    shutil.copytree(exported, folders["cut"])
    (folders["cut"] / "variables" / "variables.data-00000-of-00001").write_bytes(b"")
    return folders


@pytest.fixture(scope="module")
def sessions(spoilt, exported, asked):
    """What came of asking each; two at a time, for most of it is the start of TensorFlow.

    With oneDNN, as on most servers: its convolutions are the ones that refuse empty batches.
    """
    folders = {**spoilt, "whole": exported}
    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(2) as pool:
        patch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
        done = [
            pool.submit(ask, str(folder), asked, CONFIG.timeout_s, timed=name == "whole")
            for name, folder in folders.items()
        ]
        return {name: future.result() for name, future in zip(folders, done, strict=True)}


@pytest.fixture(scope="module")
def reasons(sessions, asked):
    """Why each must not be served, in one text."""
    return {name: judge(asked, s, CONFIG, Precision.float32).reasons for name, s in sessions.items()}


def test_a_sound_export_passes_with_figures_of_everything_that_was_asked(sessions, reasons, asked):
    assert reasons["whole"] == ()
    figures = judge(asked, sessions["whole"], CONFIG, Precision.float32).figures
    assert (figures["signatures"], figures["images"], figures["calls"]) == (3, 216, len(asked))
    assert 0 <= figures["off_trainer"] < 1e-5
    assert 0 <= figures["off_batch"] < 1e-5
    assert figures["off_unit_length"] < 1e-5
    assert figures["peak_mib"] > 100
    assert {name: sorted(of) for name, of in figures["latency_ms"].items()} == {
        name: ["1", "64", "7"] for name in INPUTS
    }
    assert all(0 < b["median"] <= b["p95"] for of in figures["latency_ms"].values() for b in of.values())


def test_the_process_has_tensorflow_and_neither_keras_nor_anything_of_ours(sessions):
    modules = set(sessions["whole"].modules)
    assert {"tensorflow", "numpy"} <= modules
    assert not modules & {"keras", "tf_keras", "tfx", "scipy", "pipeline", "components", "trainer_module"}


def test_the_process_could_import_what_tensorflow_requires_and_nothing_else_that_is_installed(tmp_path):
    packages = Path(tf.__file__).parents[1]
    installed = {path.name.partition(".")[0] for path in packages.iterdir() if path.suffix in ("", ".py")}
    tries = sorted(name for name in installed if name.isidentifier() and name != "__pycache__")
    tries += ["google.protobuf", "google.auth", "google.cloud", "pipeline", "components", "trainer_module"]
    lines = Path(probe.__file__).read_text().splitlines()
    at = lines.index('    say(step="starting TensorFlow")')
    seek = [
        "    from importlib.util import find_spec",
        f"    say(found=[name for name in {tries} if find_spec(name)])",
        "    return",
    ]
    script = tmp_path / "probe.py"
    script.write_text("\n".join([*lines[:at], *seek, *lines[at:]]))
    (tmp_path / "plan.json").write_text(json.dumps({"importable": tensorflow_alone(), "calls": []}))
    command = [sys.executable, "-I", "-S", str(script), str(packages), "", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(probe.__file__).parents[2], capture_output=True, text=True, check=True)
    found = set(json.loads(done.stdout)["found"])
    assert {"tensorflow", "numpy", "google", "google.protobuf", "six", "typing_extensions"} <= found
    assert not found & {"keras", "tf_keras", "tfx", "apache_beam", "scipy", "sklearn", "pandas", "PIL", "yaml", "kfp"}
    assert not found & {"google.auth", "google.cloud", "pipeline", "components", "trainer_module"}
    assert len(found) < 50 < len(tries)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vectors", "serving_default with 1 image: lengths of embeddings are up to 1.0e-03 off 1"),
        ("vectors", "examples with bytes that are no image: gives a vector instead of an error"),
        ("vectors", "examples with an image cut in half: gives a vector instead of an error"),
        ("vectors", "pixels with 64 images: gives NaN or infinity"),
        ("shapes", "serving_default with 7 images: gives float64[7, 12] instead of float32[7, D]"),
        ("shapes", "examples with 1 image: gives 11 numbers an image, the trainer's network 12"),
        ("shapes", "pixels with an empty batch: InvalidArgumentError: "),
        ("hangs", "serving_default with 7 images: is up to "),
        ("hangs", "serving_default: an image's embedding depends on its batch, by up to "),
        ("hangs", "examples with 1 image: "),
        ("hangs", "pixels with 1 image: no answer for 10 s (serving_check.timeout_s)"),
        ("other weights", "signature examples is missing; there are: pixels, serving_default"),
        ("other weights", "pixels with 1 image: the process died of SIGABRT"),
        ("other weights", "serving_default with 1 image: is up to "),
        ("other weights", "serving_default with 64 images: is up to "),
        ("cut", "TensorFlow alone cannot load it: "),
    ],
)
def test_what_is_spoilt_is_seen_and_said_in_one_line(reasons, name, reason):
    assert any(said.startswith(reason) for said in reasons[name]), reasons[name]
    assert all("\n" not in said and len(said) < 400 for said in reasons[name])


def test_what_is_not_spoilt_is_not_blamed(reasons):
    assert not [said for said in reasons["vectors"] if said.startswith("pixels with 7")]
    assert not [said for said in reasons["shapes"] if said.startswith("pixels with 1 ")]
    assert all(said.startswith("serving_default with ") for said in reasons["other weights"][2:])


def test_a_limit_of_latency_refuses_a_model_that_is_slower(sessions, asked):
    strict = dataclasses.replace(CONFIG, max_latency_ms=1e-6)
    (first, *_) = judge(asked, sessions["whole"], strict, Precision.float32).reasons
    assert first.startswith("serving_default: one image takes ")
    assert "above serving_check.max_latency_ms=1e-06" in first


def test_bfloat16_is_compared_with_the_digits_that_it_has(sessions, asked):
    reasons = judge(asked, sessions["other weights"], CONFIG, Precision.bfloat16).reasons
    assert len(reasons) == 2, reasons  # the signature that is missing, and the one that crashes


def test_the_warm_up_s_requests_are_of_drawn_pictures_and_the_model_answers_each(exported):
    logs = [prediction_log_pb2.PredictionLog.FromString(log.SerializeToString()) for log in make_warm_up(32)]
    sent = [log.predict_log.request for log in logs]
    assert [request.model_spec.signature_name for request in sent] == [name for name in INPUTS for _ in range(2)]
    signatures = tf.saved_model.load(str(exported)).signatures
    vectors = {}
    for request in sent:
        name = request.model_spec.signature_name
        ((argument, proto),) = request.inputs.items()
        value = tf.constant(tf.make_ndarray(proto))
        vectors[name, len(value)] = signatures[name](**{argument: value})["embedding"].numpy()
    assert {count for _, count in vectors} == {1, 7}
    for name in INPUTS:
        np.testing.assert_allclose(np.linalg.norm(vectors[name, 7], axis=1), 1.0, atol=1e-5)
        assert len(np.unique(vectors[name, 7].round(4), axis=0)) == 7
    np.testing.assert_allclose(vectors["examples", 7], vectors["serving_default", 7], atol=1e-5)


def test_the_warm_up_is_the_same_for_every_model_of_one_size_and_holds_both_jpeg_and_png():
    one, other = ([log.SerializeToString(deterministic=True) for log in make_warm_up(24)] for _ in range(2))
    assert one == other
    assert b"\xff\xd8\xff" in one[1]
    assert b"\x89PNG" in one[1]


def test_each_signature_gets_whole_empty_and_broken_batches(asked):
    kinds = {(request.signature, request.kind) for request in asked}
    assert kinds == {(signature, kind) for signature in INPUTS for kind in Kind}
