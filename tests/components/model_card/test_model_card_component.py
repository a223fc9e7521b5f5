"""ModelCard between the real ingestion, Evaluator and Pusher, run by LocalDagRunner on real images."""

import dataclasses
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from materials import make_intervals

from components.evaluator.config import EvaluateConfig
from components.image_example_gen.config import IngestConfig
from components.model_card.config import CardConfig
from pipeline.beam import BEAM_ARGUMENTS
from trainer_module import config_json

CONFIG = {
    "encoder.name": "resnet18", "encoder.weights": "", "train.epochs": 3, "train.global_batch": 16,
    "train.key_bn.mode": "cross_replica_sum",
}  # fmt: skip
STATEMENT = CardConfig(license="apache-2.0", intended_use="Sorting clip art.")
TRAINING = {
    "steps": 18, "replicas": 2, "strategy": "MirroredStrategy", "final_loss": 2.5, "pretext_top1": 0.4,
    "alignment": 0.3,
    "alarms": {"collapse": "the queue has collapsed"},
}  # fmt: skip
FILES = ("model_card.html", "model_card.json", "model_card.md")


def save_model(directory: Path) -> None:
    """A model artifact that embeds an image as its pixels, in both exports."""
    import tensorflow as tf

    def pixels_of(example: tf.Tensor) -> tf.Tensor:
        features = tf.io.parse_single_example(example, {"image/encoded": tf.io.FixedLenFeature([], tf.string)})
        image = tf.io.decode_image(features["image/encoded"], channels=3, expand_animations=False)
        return tf.reshape(tf.image.resize(image, [8, 8]), [192]) / 127.5 - 1.0

    class Export(tf.Module):
        def __init__(self):
            super().__init__()
            self.scale = tf.Variable(1.0)

        def _pixels(self, examples):
            return tf.map_fn(pixels_of, examples, fn_output_signature=tf.TensorSpec([192], tf.float32))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
        def examples(self, examples):
            return {"embedding": tf.math.l2_normalize(self.scale * self._pixels(examples), axis=1)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
        def evaluate(self, examples):
            pixels = self._pixels(examples)
            vectors = {"embedding": pixels, "untrained_embedding": pixels[:, :3], "pixels": pixels}
            views = {f"{name}_views": tf.stack([value * 0.9, value], axis=1) for name, value in vectors.items()}
            return vectors | views | {"leak": tf.fill(tf.shape(examples), "")}

    export = Export()
    tf.saved_model.save(export, str(directory / "Format-TFMA"), signatures={"evaluate": export.evaluate})
    serving = directory / "Format-Serving"
    tf.saved_model.save(export, str(serving), signatures={"examples": export.examples})
    (serving / "assets.extra").mkdir()
    (serving / "assets.extra" / "encoder.json").write_text('{"dim": 192, "layer": "backbone", "input_size": 8}')


def save_run(directory: Path) -> None:
    from trainer_module.metrics_file import FILE, MetricsFile

    directory.mkdir()
    (directory / "training.json").write_text(json.dumps(TRAINING))
    file = MetricsFile(str(directory / "train" / FILE), 0)
    for interval in make_intervals(20):
        file.add(interval)
    file.flush()


@dataclasses.dataclass(frozen=True)
class Run:
    root: Path

    @property
    def card(self) -> Path:
        """Folder of the artifact."""
        (folder,) = (self.root / "pipeline" / "ModelCard" / "model_card").iterdir()
        return folder

    @property
    def published(self) -> Path:
        (version,) = (path for path in (self.root / "serving").iterdir() if path.name.isdecimal())
        return version

    def artifacts(self) -> dict[str, Any]:
        """The inputs of ModelCard, as the metadata store has them."""
        from ml_metadata import metadata_store
        from tfx.orchestration import metadata
        from tfx.orchestration.portable.mlmd import execution_lib

        connection = metadata.sqlite_metadata_connection_config(str(self.root / "metadata.sqlite"))
        store = metadata_store.MetadataStore(connection)
        (execution,) = store.get_executions_by_type("components.model_card.component.ModelCard")
        with metadata.Metadata(connection) as handle:
            inputs = execution_lib.get_input_artifacts(handle, execution.id)
        return {"execution": execution.id, "inputs": {key: list(value) for key, value in inputs.items()}}


@pytest.fixture(scope="module")
def run(tmp_path_factory, sample_images) -> Run:
    from tfx import v1 as tfx

    from components.evaluator import eval_model
    from components.evaluator.eval_config import make_eval_config
    from components.image_example_gen.component import ImageExampleGen
    from components.model_card.component import ModelCard
    from components.pusher.component import Pusher

    root = tmp_path_factory.mktemp("card")
    for label in ("food", "flags", "people"):
        (root / "images" / label).mkdir(parents=True)
        for number, data in enumerate(sample_images[label][:40]):
            (root / "images" / label / f"{number}.png").write_bytes(data)
    (root / "images" / "food" / "again.png").write_bytes(sample_images["food"][0])
    save_model(root / "model")
    save_run(root / "run")
    gen = ImageExampleGen(str(root / "images"), IngestConfig(shard_mb=0.05)).with_id("ImageExampleGen")
    types = tfx.types.standard_artifacts
    model = tfx.dsl.Importer(str(root / "model"), types.Model).with_id("model")
    model_run = tfx.dsl.Importer(str(root / "run"), types.ModelRun).with_id("run")
    evaluator = tfx.components.Evaluator(
        examples=gen.outputs["examples"],
        model=model.outputs["result"],
        example_splits=["train", "eval"],
        eval_config=make_eval_config(EvaluateConfig(knn_k=5, min_gain=-1.0), code="test"),
        module_path=eval_model.MODULE_PATH,
    ).with_id("Evaluator")
    card = ModelCard(
        model=model.outputs["result"],
        model_run=model_run.outputs["result"],
        examples=gen.outputs["examples"],
        evaluation=evaluator.outputs["evaluation"],
        blessing=evaluator.outputs["blessing"],
        name="art",
        statement=STATEMENT,
        config=CONFIG,
        code={"Trainer": "0123456789abcdef"},
        project="1.2.3",
    ).with_id("ModelCard")
    pusher = Pusher(
        model=model.outputs["result"],
        model_blessing=evaluator.outputs["blessing"],
        model_card=card.outputs["model_card"],
        push_destination=tfx.proto.PushDestination(
            filesystem=tfx.proto.PushDestination.Filesystem(base_directory=str(root / "serving"))
        ),
    ).with_id("Pusher")
    tfx.orchestration.LocalDagRunner().run(
        tfx.dsl.Pipeline(
            pipeline_name="test",
            pipeline_root=str(root / "pipeline"),
            components=[gen, model, model_run, evaluator, card, pusher],
            enable_cache=False,
            metadata_connection_config=tfx.orchestration.metadata.sqlite_metadata_connection_config(
                str(root / "metadata.sqlite")
            ),
            beam_pipeline_args=[*BEAM_ARGUMENTS],
        )
    )
    return Run(root)


def test_the_card_holds_what_the_stages_before_have_left(run):
    card = json.loads((run.card / "model_card.json").read_text())
    counts = card["data"]["counts"]
    assert (counts["read"], counts["duplicates"], counts["train"] + counts["eval"]) == (121, 1, 120)
    assert card["data"]["span"] == 0
    assert card["data"]["fingerprint"].startswith("files:121,")
    assert set(card["data"]["labels"]) == {"food", "flags", "people"}
    assert card["encoder"] == {"dim": 192, "layer": "backbone", "input_size": 8}
    assert (card["training"]["steps"], card["training"]["epochs"], card["training"]["final_loss"]) == (18, 3, 2.5)
    assert card["training"]["alarms"] == {"collapse": "the queue has collapsed"}
    assert card["versions"]["tensorflow"] == version("tensorflow")
    assert card["versions"]["moco"] == "1.2.3"
    assert card["license"] == "apache-2.0"


def test_metrics_stand_with_intervals_and_what_they_are_compared_with_and_rules_with_words(run):
    evaluation = json.loads((run.card / "model_card.json").read_text())["evaluation"]
    by_name = {metric["name"]: metric for metric in evaluation["metrics"]}
    knn = by_name["knn_top1"]
    assert knn["trained"]["low"] <= knn["trained"]["value"] <= knn["trained"]["high"]
    assert knn["trained"]["value"] == knn["pixels"]["value"] != knn["untrained"]["value"]
    assert knn["baseline"] is None
    assert {"linear_top1", "recall_at_1", "effective_rank", "alignment"} <= set(by_name)
    assert evaluation["blessed"] is True
    assert {"finite_passed": True, "leak_passed": True}.items() <= {
        rule["name"]: rule["holds"] for rule in evaluation["rules"]
    }.items()
    assert all(rule["text"] for rule in evaluation["rules"])
    labels = json.loads((run.card / "model_card.json").read_text())["data"]["labels"]
    held_out = {label: splits["eval"] for label, splits in labels.items()}
    assert {recall["label"]: recall["images"] for recall in evaluation["recall"]} == held_out
    found = sum(recall["images"] * recall["value"] for recall in evaluation["recall"])
    assert found / sum(held_out.values()) == pytest.approx(knn["trained"]["value"])


def test_the_lineage_names_the_artifacts_and_the_execution_in_the_metadata_store(run):
    lineage = json.loads((run.card / "model_card.json").read_text())["lineage"]
    stored = run.artifacts()
    assert {key: artifact["id"] for key, artifact in lineage["artifacts"].items()} == {
        key: artifacts[0].id for key, artifacts in stored["inputs"].items()
    }
    assert lineage["artifacts"]["evaluation"]["type"] == "ModelEvaluation"
    assert lineage["execution"] == str(stored["execution"])
    assert lineage["pipeline"] == "test"
    assert lineage["run"]


def test_people_read_the_same_in_markdown_and_in_pictures(run):
    markdown, page = ((run.card / name).read_text() for name in ("model_card.md", "model_card.html"))
    metadata = yaml.safe_load(markdown.split("---\n")[1])
    assert metadata["license"] == "apache-2.0"
    assert "Sorting clip art." in markdown
    assert "An alarm at the end of its training: the queue has collapsed." in markdown
    counts = json.loads((run.card / "model_card.json").read_text())["pictures"]
    assert (counts["queries"], counts["neighbours"]) == (12, 8)
    assert page.count('<figure class="query">') == 12
    assert page.count('<th scope="row">') == 3
    assert len(re.findall(r"^\| (?:flags|food|people) \| \d+ \| [01]\.\d{3} \(", markdown, re.MULTILINE)) == 3
    assert "<h2>Training</h2>" in page


def test_the_card_lies_beside_the_published_model_and_tells_its_digest(run):
    from components.pusher import publish

    beside = run.published / "assets.extra"
    assert sorted(path.name for path in beside.iterdir()) == sorted(("encoder.json", *FILES))
    document = json.loads((beside / "model_card.json").read_text())
    assert len(document.pop("model_sha256")) == 64
    assert document == json.loads((run.card / "model_card.json").read_text())
    for name in ("model_card.html", "model_card.md"):
        assert (beside / name).read_bytes() == (run.card / name).read_bytes()
    assert publish.resolve(str(run.root / "serving")) == str(run.published)


def test_the_same_inputs_give_the_same_bytes_and_where_it_ran_shows_in_the_lineage_alone(run, tmp_path):
    from components.model_card.artifact import ModelCard
    from components.model_card.executor import Executor

    properties = {
        "name": "art",
        "statement": config_json.dumps(STATEMENT),
        "config": json.dumps(CONFIG, sort_keys=True),
        "code": json.dumps({"Trainer": "0123456789abcdef"}),
        "project": "1.2.3",
    }
    inputs = run.artifacts()["inputs"]
    folders = []
    for name in ("one", "two"):
        artifact = ModelCard()
        artifact.uri = str(tmp_path / name)
        Executor().Do(inputs, {"model_card": [artifact]}, properties)
        folders.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert folders[0] == folders[1]
    assert tuple(sorted(folders[0])) == FILES
    assert folders[0]["model_card.html"] == (run.card / "model_card.html").read_bytes()
    here, there = json.loads(folders[0]["model_card.json"]), json.loads((run.card / "model_card.json").read_text())
    assert here.pop("lineage")["run"] is None
    assert there.pop("lineage")["run"] is not None
    assert here == there
