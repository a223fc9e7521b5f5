"""The ServingCheck component: the stock InfraBlessing, and the stock Pusher's view of it."""

import json
from pathlib import Path

import pytest

from components.serving_check.config import ServingCheckConfig
from trainer_module import config_json


@pytest.fixture(scope="module")
def executor():
    from components.serving_check import executor

    return executor


@pytest.fixture(scope="module")
def trained(exported, network, probes, tmp_path_factory):
    """Artifacts of a Trainer: a sound model, one whose file is cut, and what was noted."""
    from tfx.types import standard_artifacts

    from trainer_module.expected import FILE, write_probes

    root = tmp_path_factory.mktemp("trained")
    (root / "model").mkdir()
    (root / "model" / "Format-Serving").symlink_to(exported)
    (root / "broken" / "Format-Serving").mkdir(parents=True)
    (root / "broken" / "Format-Serving" / "saved_model.pb").write_bytes(b"cut")
    (root / "run").mkdir()
    write_probes(probes, str(root / "run" / FILE))
    artifacts = {}
    for name, kind in (("model", "Model"), ("broken", "Model"), ("run", "ModelRun")):
        artifacts[name] = getattr(standard_artifacts, kind)()
        artifacts[name].uri = str(root / name)
    return artifacts


def check(executor, trained, model: str, folder: Path, **config):
    from tfx.types import standard_artifacts

    blessing = standard_artifacts.InfraBlessing()
    blessing.uri = str(folder / "blessing")
    executor.Executor().Do(
        {"model": [trained[model]], "model_run": [trained["run"]]},
        {"blessing": [blessing]},
        {"config": config_json.dumps(ServingCheckConfig(**config)), "precision": "float32"},
    )
    return blessing


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_blessed_model_is_published_by_the_stock_pusher_s_rule_with_its_warm_up(executor, trained, tmp_path):
    import tensorflow as tf
    from tfx.components.pusher.executor import Executor as StockPusher

    model = Path(trained["model"].uri, "Format-Serving")
    before = tree(model)
    blessing = check(executor, trained, "model", tmp_path)
    assert Path(blessing.uri, "INFRA_BLESSED").exists()
    inputs = {"infra_blessing": [blessing]}
    assert StockPusher().CheckBlessing(inputs)
    stored = Path(StockPusher().GetModelPath(inputs))
    warm_up = "assets.extra/tf_serving_warmup_requests"
    assert set(tree(stored)) - set(before) == {warm_up}
    assert tree(stored).items() >= before.items()
    assert tree(model) == before
    assert 0 < sum(1 for _ in tf.data.TFRecordDataset(str(stored / warm_up))) <= 1000
    assert executor.read_report(blessing.uri).figures["images"] == 216


def test_nothing_that_is_published_holds_an_image_of_the_user_s(executor, trained, probes, tmp_path):
    blessing = check(executor, trained, "model", tmp_path)
    published = tree(Path(blessing.uri)).values()
    for probe in probes:
        for pixels in (probe.encoded, probe.square.tobytes(), probe.square.astype("float32").tobytes()):
            assert not any(pixels in content for content in published)


def test_a_model_that_cannot_be_served_is_no_error_but_not_blessed(executor, trained, tmp_path):
    from tfx.components.pusher.executor import Executor as StockPusher

    blessing = check(executor, trained, "broken", tmp_path)
    assert set(tree(Path(blessing.uri))) == {"INFRA_NOT_BLESSED", "serving_check.json"}
    assert not StockPusher().CheckBlessing({"infra_blessing": [blessing]})
    assert not blessing.get_int_custom_property("has_model")
    (reason,) = json.loads(Path(blessing.uri, "serving_check.json").read_text())["reasons"]
    assert reason.startswith("TensorFlow alone cannot load it: ")


def test_the_component_passes_its_configuration_as_plain_json():
    from tfx.types import channel_utils, standard_artifacts

    from components.serving_check.component import ServingCheck
    from trainer_module.config import Precision

    model, run = (
        channel_utils.as_channel([kind()]) for kind in (standard_artifacts.Model, standard_artifacts.ModelRun)
    )
    config = ServingCheckConfig(timeout_s=3.0)
    node = ServingCheck(model=model, model_run=run, config=config, precision=Precision.bfloat16, code="abc")
    assert config_json.loads(ServingCheckConfig, node.exec_properties["config"]) == config
    assert (node.exec_properties["precision"], node.exec_properties["code"]) == ("bfloat16", "abc")
    assert node.outputs["blessing"].type is standard_artifacts.InfraBlessing
