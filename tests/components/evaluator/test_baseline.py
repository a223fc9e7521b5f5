"""Which model a candidate is compared with, where files of earlier ones are gone."""

import shutil

import pytest
from tfx.components.evaluator import constants
from tfx.types import standard_artifacts

from components.evaluator.baseline import LatestOtherBlessedModelStrategy


@pytest.fixture
def artifacts(tmp_path):
    """Four models with their exports, of which the first three were blessed."""
    models, blessings = [], []
    for number in range(1, 5):
        model = standard_artifacts.Model()
        model.id, model.uri = number, str(tmp_path / str(number))
        (tmp_path / str(number) / "Format-TFMA").mkdir(parents=True)
        (tmp_path / str(number) / "Format-TFMA" / "saved_model.pb").write_bytes(b"")
        blessing = standard_artifacts.ModelBlessing()
        blessing.set_int_custom_property(constants.ARTIFACT_PROPERTY_CURRENT_MODEL_ID_KEY, number)
        blessing.set_int_custom_property(constants.ARTIFACT_PROPERTY_BLESSED_KEY, int(number < 4))
        models.append(model)
        blessings.append(blessing)
    return models, blessings


def resolved(artifacts, candidate: int, missing: str) -> list[int]:
    models, blessings = artifacts
    channels = {"candidate": [models[candidate - 1]], "model": list(models), "model_blessing": list(blessings)}
    found = LatestOtherBlessedModelStrategy(missing).resolve_artifacts(None, channels)
    return [model.id for model in found["model"]]


@pytest.mark.parametrize("missing", ["refuse", "skip"])
def test_the_latest_blessed_model_but_the_candidate_is_compared_with(artifacts, missing):
    assert resolved(artifacts, 4, missing) == [3]
    assert resolved(artifacts, 3, missing) == [2]


def test_one_whose_files_are_gone_is_kept_to_be_refused_or_passed_over_on_request(artifacts):
    shutil.rmtree(artifacts[0][2].uri)
    assert resolved(artifacts, 4, "refuse") == [3]
    assert resolved(artifacts, 4, "skip") == [2]
    for model in artifacts[0][:2]:
        shutil.rmtree(model.uri)
    assert resolved(artifacts, 4, "skip") == []
