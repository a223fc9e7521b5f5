"""The record of blessed models, by which Kubeflow finds what a candidate is compared with."""

import pytest
from tfx.types import standard_artifacts

from components.evaluator import record as record_module
from components.evaluator.baseline import NONE
from components.evaluator.record import BlessedModelsExecutor, LatestOtherBlessedModelExecutor, blessed_models


def model(uri):
    artifact = standard_artifacts.Model()
    artifact.uri = str(uri)
    return artifact


@pytest.fixture
def record(tmp_path):
    return str(tmp_path / "blessed")


def bless(record, uri, blessed=1):
    blessing = standard_artifacts.ModelBlessing()
    blessing.set_int_custom_property("blessed", blessed)
    BlessedModelsExecutor().Do({"model": [model(uri)], "blessing": [blessing]}, {}, {"record": record})


def baseline(record, candidate, missing="refuse"):
    found = model("gs://new/place")
    told = {"record": record, "missing": missing}
    LatestOtherBlessedModelExecutor().Do({"candidate": [model(candidate)]}, {"model": [found]}, told)
    return None if found.get_int_custom_property(NONE) else found.uri


def test_the_first_model_has_nothing_to_be_compared_with(record):
    assert baseline(record, "a") is None


def test_a_model_is_compared_with_the_latest_blessed_one_that_is_not_itself(record):
    for uri, blessed in (("a", 1), ("b", 1), ("c", 0)):
        bless(record, uri, blessed)
    assert baseline(record, "d") == "b"
    assert baseline(record, "b") == "a"


def test_a_model_that_is_blessed_again_is_recorded_once(record):
    for uri in ("a", "b", "b"):
        bless(record, uri)
    assert blessed_models(record) == ["b", "a"]


def test_the_latest_is_the_one_that_was_blessed_last_even_if_the_clock_was_put_back_meanwhile(record, monkeypatch):
    for uri, clock in (("a", 5), ("b", 2), ("c", 2), ("d", 9)):
        monkeypatch.setattr(record_module.time, "time_ns", lambda clock=clock: clock)
        bless(record, uri)
    assert blessed_models(record) == ["d", "c", "b", "a"]


def test_with_skip_models_whose_files_are_gone_are_passed_over(record, tmp_path):
    export = tmp_path / "a" / "Format-TFMA"
    export.mkdir(parents=True)
    (export / "saved_model.pb").touch()
    for uri in (tmp_path / "a", tmp_path / "gone"):
        bless(record, uri)
    assert baseline(record, "c") == str(tmp_path / "gone")
    assert baseline(record, "c", missing="skip") == str(tmp_path / "a")
