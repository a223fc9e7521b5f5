"""TFX's Evaluator with our metric, models and examples, run by LocalDagRunner on real images."""

import dataclasses
import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from judged import judged, trained_so

from components.evaluator.config import EvaluateConfig
from components.evaluator.resampling import Estimate
from components.evaluator.scorecard import COUNTS, METRICS, OF_A_MODEL, RULES, Scorecard, score
from pipeline.beam import BEAM_ARGUMENTS

pytestmark = pytest.mark.long

TARS = sorted((Path(__file__).parents[3] / "configs" / "demo_images").glob("*.tar"))
CONFIG = EvaluateConfig(knn_k=20)
EVERY = 6  # of the sample's images, so about 370


def sample_images() -> list[tuple[str, bytes]]:
    images = []
    for path in TARS:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    images += [(member.name.split("/")[-2], tar.extractfile(member).read())]
    return images[::EVERY]


def write_examples(
    directory: Path,
    images: list[tuple[str, bytes]],
    labelled: bool,
    held_out: Callable[[int, str], bool] = lambda index, _: index % 4 == 0,
) -> list[bytes]:
    import tensorflow as tf

    serialised = []
    writers = {}
    for split in ("train", "eval"):
        (directory / f"Split-{split}").mkdir(parents=True)
        path = str(directory / f"Split-{split}" / "examples-00000-of-00001.gz")
        writers[split] = tf.io.TFRecordWriter(path, "GZIP")
    for index, (label, data) in enumerate(images):
        split = "eval" if held_out(index, label) else "train"
        features = {
            "image/encoded": data,
            "image/sha256": hashlib.sha256(data).hexdigest().encode(),
            "image/split": split.encode(),
            "image/format": b"png" if index % 8 else b"jpeg",
            "image/path": f"{label}/{index}.png".encode(),
        }
        numbers = {"image/height": 48 + 16 * (index % 3), "image/width": 64}
        if labelled and index % 10:  # some images of a labelled set have no label
            features["image/label"] = label.encode()
        example = tf.train.Example()
        for name, value in features.items():
            example.features.feature[name].bytes_list.value.append(value)
        for name, number in numbers.items():
            example.features.feature[name].int64_list.value.append(number)
        serialised.append(example.SerializeToString(deterministic=True))  # the noise goes by the bytes
        writers[split].write(serialised[-1])
    for writer in writers.values():
        writer.close()
    return serialised


def leak_of(kind: str, folder: Path) -> str:
    """What the trainer would write into the export: of a training whose batch statistics betrayed the positive."""
    return trained_so(folder / kind, pretext=0.99, knn=(0.4, 0.2) if kind == "nan" else (0.2, 0.4)).leak


def save_model(directory: Path, kind: str, leak: str) -> None:
    """Writes a model artifact whose evaluation export embeds images well, badly, or not at all."""
    import tensorflow as tf

    def pixels_of(example: tf.Tensor) -> tf.Tensor:
        features = tf.io.parse_single_example(example, {"image/encoded": tf.io.FixedLenFeature([], tf.string)})
        image = tf.io.decode_image(features["image/encoded"], channels=3, expand_animations=False)
        return tf.reshape(tf.image.resize(image, [8, 8]), [192]) / 127.5 - 1.0

    def noise_of(example: tf.Tensor, draw: int) -> tf.Tensor:
        seed = tf.stack([tf.strings.to_hash_bucket_fast(example, 2**30), tf.constant(draw, tf.int64)])
        return tf.random.stateless_normal([16], seed)

    def embed(pixels: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        return {
            "good": pixels,
            "narrow": pixels[:, :96],
            "noise": noise,
            "nan": tf.where(noise[:, :1] > 1.0, np.nan, pixels),
        }[kind]

    class Export(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
        def evaluate(self, examples):
            pixels = tf.map_fn(pixels_of, examples, fn_output_signature=tf.TensorSpec([192], tf.float32))

            def noise(draw):
                return tf.map_fn(
                    functools.partial(noise_of, draw=draw),
                    examples,
                    fn_output_signature=tf.TensorSpec([16], tf.float32),
                )

            outputs = {
                "embedding": embed(pixels, noise(1)),
                "untrained_embedding": noise(2),
                "pixels": pixels,
                "leak": tf.fill(tf.shape(examples), leak),
            }
            # Two views: a darker and a lighter picture; of noise, other noise.
            views = [embed(pixels * f, noise(3 + n)) for n, f in enumerate((0.8, 1.0))]
            return outputs | {
                "embedding_views": tf.stack(views, axis=1),
                "untrained_embedding_views": tf.stack([noise(5), noise(6)], axis=1),
                "pixels_views": tf.stack([pixels * 0.8, pixels], axis=1),
            }

    export = Export()
    tf.saved_model.save(export, str(directory / "Format-TFMA"), signatures={"evaluate": export.evaluate})
    # What is served has no such signature, as in the real export.
    tf.saved_model.save(tf.Module(), str(directory / "Format-Serving"))


@dataclasses.dataclass(frozen=True)
class Run:
    root: Path
    images: list[bytes]

    def uri(self, node: str, output: str) -> str:
        return str(next((self.root / "pipeline" / f"Evaluator.{node}" / output).iterdir()))

    def blessed(self, node: str) -> bool:
        mark, _ = sorted(os.listdir(self.uri(node, "blessing")))
        return mark == "BLESSED"

    def rules(self, node: str) -> list[dict]:
        """What the blessing itself says."""
        return json.loads((Path(self.uri(node, "blessing")) / "rules.json").read_text())


SLICED = dataclasses.replace(
    CONFIG,
    slices=("image/label", "image/format", "image/height", "image/width", "image/path", "image/split"),
    gain_significance=0.01,  # of 93 images
)
UNSLICED = dataclasses.replace(CONFIG, slices=("image/label", "image/camera"))
NO_GAIN = dataclasses.replace(CONFIG, min_gain=-1.0)
# Candidate, baseline, examples, configuration: what TFMA has to carry. What an encoder deserves: test_scorecard.py.
NODES = {
    "better": ("good", "noise", "labelled", SLICED),
    "worse": ("noise", "good", "labelled", NO_GAIN),
    "narrow": ("narrow", "good", "no_food", NO_GAIN),
    "nan": ("nan", "good", "labelled", CONFIG),  # and of a training that leaked
    "unlabelled": ("good", None, "unlabelled", UNSLICED),
    "one_image": ("good", None, "one_image", CONFIG),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Runs one pipeline in which each Evaluator of NODES judges (candidate, baseline, labelled set or not)."""
    from tfx import v1 as tfx

    from components.evaluator import eval_model
    from components.evaluator.component import Evaluator
    from components.evaluator.eval_config import make_eval_config

    root = tmp_path_factory.mktemp("evaluator")
    images = write_examples(root / "labelled", sample_images(), labelled=True)
    write_examples(root / "unlabelled", sample_images(), labelled=False)
    write_examples(root / "one_image", sample_images(), labelled=True, held_out=lambda index, _: index == 1)
    write_examples(
        root / "no_food",
        sample_images(),
        labelled=True,
        held_out=lambda index, label: index % 4 == 0 and label != "food",
    )
    nodes = {}
    for name in sorted({examples for _, _, examples, _ in NODES.values()}):
        nodes[name] = tfx.dsl.Importer(
            str(root / name),
            tfx.types.standard_artifacts.Examples,
            properties={"split_names": '["train", "eval"]'},
            custom_properties={"payload_format": "FORMAT_TF_EXAMPLE"},
        ).with_id(name)
    for kind in sorted({kind for pair in NODES.values() for kind in pair[:2] if kind}):
        save_model(root / kind, kind, leak_of(kind, tmp_path_factory.mktemp("logs")))
        nodes[kind] = tfx.dsl.Importer(str(root / kind), tfx.types.standard_artifacts.Model).with_id(kind)
    for name, (candidate, baseline, examples, config) in NODES.items():
        nodes[f"Evaluator.{name}"] = Evaluator(
            examples=nodes[examples].outputs["result"],
            model=nodes[candidate].outputs["result"],
            baseline_model=nodes[baseline].outputs["result"] if baseline else None,
            example_splits=["train", "eval"],
            eval_config=make_eval_config(config, code="test"),
            module_path=eval_model.MODULE_PATH,
        ).with_id(f"Evaluator.{name}")
    tfx.orchestration.LocalDagRunner().run(
        tfx.dsl.Pipeline(
            pipeline_name="test",
            pipeline_root=str(root / "pipeline"),
            components=list(nodes.values()),
            enable_cache=False,
            metadata_connection_config=tfx.orchestration.metadata.sqlite_metadata_connection_config(
                str(root / "metadata.sqlite")
            ),
            beam_pipeline_args=[*BEAM_ARGUMENTS],
        )
    )
    return Run(root, images)


def expected(run: Run, kind: str, baseline: str) -> Scorecard:
    """Figures of the labelled set computed outside of TFMA and Beam, in the order of the images' ranks."""
    import tensorflow as tf

    def outputs_of(kind: str) -> dict[str, np.ndarray]:
        export = tf.saved_model.load(str(run.root / kind / "Format-TFMA"))
        return {name: value.numpy() for name, value in export.signatures["evaluate"](tf.constant(run.images)).items()}

    features = [tf.train.Example.FromString(image).features.feature for image in run.images]
    keys = [feature["image/sha256"].bytes_list.value[0] for feature in features]
    order = np.argsort([hashlib.sha256(b"scorecard" + key).digest() for key in keys])
    features = [features[row] for row in order]
    labels = [f["image/label"].bytes_list.value[0].decode() if "image/label" in f else None for f in features]
    in_bank = np.array([feature["image/split"].bytes_list.value[0] == b"train" for feature in features])
    own, last = outputs_of(kind), outputs_of(baseline)
    outputs = {name: own[name] for name in ("embedding", "untrained_embedding", "pixels")}
    outputs["baseline"] = last["embedding"]
    views = {name: tuple(np.swapaxes(own[f"{name}_views"][order], 0, 1)) for name in outputs if name != "baseline"}
    views["baseline"] = tuple(np.swapaxes(last["embedding_views"][order], 0, 1))
    vectors = {name: value[order] for name, value in outputs.items()}
    return score(judged(vectors, labels, in_bank, SLICED, views), SLICED)


def test_metrics_and_intervals_are_those_of_the_scorecard_on_the_evaluation_export(run):
    from components.evaluator.eval_config import read_intervals

    evaluation, reference = run.uri("better", "evaluation"), expected(run, "good", "noise")
    for found, wanted, names in (
        (read_intervals(evaluation), reference.candidate, METRICS),
        (read_intervals(evaluation, "baseline"), reference.baseline, (*OF_A_MODEL, *COUNTS)),
    ):
        assert set(found) == set(names)
        for name in names:
            assert found[name] == pytest.approx(wanted[name], abs=2e-3, nan_ok=True), name
    metrics = read_intervals(evaluation)
    # The good encoder of this test is the pixels, so the same code on the same images gives the same figures.
    assert metrics["knn_top1"] == metrics["pixel_knn_top1"]
    assert metrics["knn_top1"].low > metrics["random_init_knn_top1"].high


def test_a_model_that_keeps_the_rules_is_blessed_and_each_rule_says_why(run):
    from components.evaluator.eval_config import read_rules, read_validation

    evaluation = run.uri("better", "evaluation")
    assert run.blessed("better")
    assert read_validation(evaluation) == []
    rules = read_rules(evaluation)
    assert [rule.name for rule in rules] == list(RULES)
    assert all(rule.holds for rule in rules)
    assert "is above the untrained encoder's" in rules[4].text


def test_every_value_of_a_column_has_metrics_of_its_own_and_those_of_a_label_are_its_recall(run):
    from components.evaluator.eval_config import OVERALL, SliceKey, read_confusion, read_slices

    evaluation = run.uri("better", "evaluation")
    slices, confusion = read_slices(evaluation), read_confusion(evaluation)
    of_label = {key.value: metrics for key, metrics in slices.items() if key.column == "image/label"}
    assert {key.value for key in slices if key.column == "image/format"} == {"png", "jpeg"}
    assert set(of_label) == {name for name, row in zip(confusion.classes, confusion.counts, strict=True) if row.any()}
    for name, row in zip(confusion.classes, confusion.counts, strict=True):
        if row.any():
            recall = row[confusion.classes.index(name)] / row.sum()
            assert of_label[name]["knn_top1"].value == pytest.approx(recall), name
    overall = slices[OVERALL]["knn_top1"].value
    assert np.trace(confusion.counts) / confusion.counts.sum() == pytest.approx(overall)
    assert isinstance(slices[SliceKey("image/format", "png")]["uniformity"], Estimate)


def test_images_are_grouped_by_numbers_by_what_they_share_and_one_by_one(run):
    from components.evaluator.eval_config import OVERALL, SliceKey, read_slices

    slices = read_slices(run.uri("better", "evaluation"))
    values = {
        column: {key.value for key in slices if key.column == f"image/{column}"}
        for column in ("height", "width", "path", "split")
    }
    assert values["height"] == {"48", "64", "80"}
    assert (values["width"], values["split"]) == ({"64"}, {"eval"})
    whole = slices[OVERALL]
    assert len(values["path"]) == whole["query_images"].value
    for name in ("knn_top1", "linear_top5", "recall_at_10", "uniformity", "neighbour_consistency"):
        # All eval images are 64 pixels wide, and of the eval split.
        assert slices[SliceKey("image/width", "64")][name] == pytest.approx(whole[name], nan_ok=True), name
        assert slices[SliceKey("image/split", "eval")][name] == pytest.approx(whole[name], nan_ok=True), name
    alone = [slices[SliceKey("image/path", path)]["knn_top1"].value for path in values["path"]]
    assert np.nanmean(alone) == pytest.approx(whole["knn_top1"].value)
    assert set(np.unique(alone)[:2]) == {0.0, 1.0}


def test_a_column_that_no_image_has_is_told_and_that_unlabelled_images_have_no_label_is_not(run):
    from components.evaluator.eval_config import read_notes

    (note,) = read_notes(run.uri("unlabelled", "evaluation"))
    assert note.startswith("no eval image has image/camera: ")


def test_the_words_of_every_evaluation_are_its_blessing(run):
    from components.evaluator.eval_config import read_rules, read_validation

    for node in NODES:
        evaluation = run.uri(node, "evaluation")
        assert run.rules(node) == [rule._asdict() for rule in read_rules(evaluation)], node
        broken = [rule for rule in read_rules(evaluation) if rule.holds is False]
        assert run.blessed(node) == (not broken), node
        assert read_validation(evaluation) == [f"not blessed: {rule.text}" for rule in broken], node
    assert {node for node in NODES if run.blessed(node)} == {"better", "narrow", "unlabelled"}


def test_a_model_that_is_worse_than_the_last_blessed_one_is_told_so_with_p(run):
    from components.evaluator.eval_config import read_metrics, read_validation

    evaluation = run.uri("worse", "evaluation")
    now, last = read_metrics(evaluation)["knn_top1"], read_metrics(evaluation, "baseline")["knn_top1"]
    (reason,) = read_validation(evaluation)
    assert reason.startswith(f"not blessed: kNN {now:.3f} is below the blessed model's {last:.3f}, paired p = ")


def test_a_baseline_of_another_size_is_compared_image_by_image(run):
    from components.evaluator.eval_config import read_intervals

    metrics = read_intervals(run.uri("narrow", "evaluation"))
    baseline = read_intervals(run.uri("narrow", "evaluation"), "baseline")
    change = metrics["score_change"]
    assert change.value == pytest.approx(metrics["knn_top1"].value - baseline["knn_top1"].value)
    # Paired: narrower than two figures that know nothing of each other.
    assert change.high - change.low < metrics["knn_top1"].high - metrics["knn_top1"].low


def test_nan_and_the_trainer_s_leak_alarm_keep_a_model_from_being_blessed_and_both_are_told(run):
    from components.evaluator.eval_config import read_metrics, read_validation

    metrics = read_metrics(run.uri("nan", "evaluation"))
    assert metrics["knn_top1"] is None
    assert metrics["pixel_knn_top1"] is not None
    assert read_validation(run.uri("nan", "evaluation")) == [
        "not blessed: some embeddings are NaN or infinite",
        "not blessed: the leak alarm sounded to the end of training: leak at step 8: pretext top-1 is 0.990 while kNN "
        "fell from 0.400 to 0.200: batch statistics betray the positive (train.key_bn.mode=none); set "
        "train.key_bn.mode=cross_replica_sum with train.replicas=2",
    ]


def test_unlabelled_images_rest_on_the_metrics_that_need_no_label(run):
    from components.evaluator.eval_config import read_metrics, read_rules

    metrics = read_metrics(run.uri("unlabelled", "evaluation"))
    assert all(metrics[name] is None for name in METRICS if "knn" in name or "linear" in name or "recall" in name)
    assert metrics["score"] == metrics["neighbour_consistency"] > metrics["random_init_neighbour_consistency"]
    assert any("neighbour consistency" in rule.text for rule in read_rules(run.uri("unlabelled", "evaluation")))


def test_an_eval_split_of_one_image_is_told_in_one_line(run):
    from components.evaluator.eval_config import read_validation

    assert read_validation(run.uri("one_image", "evaluation")) == [
        "not blessed: 1 eval image is too few to judge an encoder by: add images, or change ingest.eval_fraction"
    ]


def test_an_eval_split_without_one_of_the_classes_is_judged_on_the_others_and_says_so(run):
    from components.evaluator.eval_config import read_metrics, read_notes

    evaluation = run.uri("narrow", "evaluation")
    assert read_metrics(evaluation)["knn_top1"] is not None
    (note,) = read_notes(evaluation)
    assert note.startswith("no eval image of ")
    assert "food" in note


def test_a_model_whose_files_are_gone_is_refused_in_one_line(run, tmp_path):
    import tensorflow_model_analysis as tfma

    from components.evaluator import eval_model
    from components.evaluator.eval_config import make_eval_config
    from trainer_module.errors import UserError

    gone = str(tmp_path / "model" / "Format-Serving")
    with pytest.raises(UserError, match=r"last blessed model .* is gone, .*missing_baseline=skip") as refusal:
        eval_model.custom_eval_shared_model(gone, tfma.BASELINE_KEY, make_eval_config(CONFIG, code="test"))
    assert "\n" not in str(refusal.value)


def extracts_of(label: Callable[[int], bytes]) -> list[dict]:
    """Images of noise, of two classes; those that are held out have labels of the caller's."""
    from tensorflow_model_analysis import constants

    rng = np.random.default_rng(3)
    rows = []
    for number in range(48):
        split = b"eval" if number >= 36 else b"train"
        features = {
            "image/sha256": b"%064x" % number,
            "image/split": split,
            "image/label": label(number) if split == b"eval" else [b"a", b"b"][number % 2],
        }
        vectors = {
            name: rng.normal(size=8).astype(np.float32) for name in ("embedding", "untrained_embedding", "pixels")
        }
        features = {name: np.array([value], object) for name, value in features.items()}
        rows.append({constants.FEATURES_KEY: features, constants.PREDICTIONS_KEY: vectors})
    return rows


def test_labels_of_held_out_images_train_nothing_and_labels_of_their_own_ask_nothing():
    import apache_beam as beam
    from apache_beam.testing.util import assert_that

    from components.evaluator.extractor import OUTCOME_KEY, JudgeImages

    asked = {"a": lambda _: b"a", "b": lambda _: b"b", "own": lambda number: b"image %d" % number}

    def check(found):
        hits = {kind: np.array([hit for _, hit in sorted(rows)]) for kind, rows in dict(found).items()}
        assert hits["a"].shape == (12, 4)
        # One of the two is what probe and neighbours say of an image, whichever of them it is asked for.
        np.testing.assert_array_equal(hits["a"] + hits["b"], 1.0)
        assert 0 < hits["a"][:, 2].sum() < 12
        assert np.isnan(hits["own"]).all()

    with beam.Pipeline(argv=list(BEAM_ARGUMENTS)) as pipeline:
        parts = []
        for kind, label in asked.items():
            parts.append(
                pipeline
                | f"Make.{kind}" >> beam.Create(extracts_of(label))
                | f"Judge.{kind}" >> JudgeImages(EvaluateConfig(knn_k=5), "", "", ())
                | f"Outcome.{kind}" >> beam.Map(lambda extracts: extracts[OUTCOME_KEY])
                | f"Images.{kind}" >> beam.Filter(lambda outcome: hasattr(outcome, "rank"))
                # Top-1 of kNN and of the probe, by the encoder and by the untrained one.
                | f"Hits.{kind}" >> beam.Map(lambda one: (one.rank, [*one.hits[:2, 0], *one.hits[:2, 2]]))
                | f"Key.{kind}" >> beam.Map(lambda row, kind: (kind, row), kind)
            )
        assert_that(parts | beam.Flatten() | beam.GroupByKey(), check)


def test_the_order_in_which_beam_gives_the_images_changes_nothing():
    import apache_beam as beam
    from apache_beam.testing.util import assert_that

    from components.evaluator.extractor import OUTCOME_KEY, JudgeImages

    images = extracts_of(lambda number: [b"a", b"b"][number // 2 % 2])
    orders = [range(48), range(47, -1, -1), np.random.default_rng(1).permutation(48)]

    def check(found):
        first, *others = (sorted(rows) for _, rows in found)
        assert len(others) == 2
        assert len(first) == 12
        assert all(other == first for other in others)
        assert {hit for _, *hits in first for hit in hits} == {0.0, 1.0}

    with beam.Pipeline(argv=list(BEAM_ARGUMENTS)) as pipeline:
        parts = []
        for kind, order in enumerate(orders):
            parts.append(
                pipeline
                | f"Make.{kind}" >> beam.Create([images[row] for row in order], reshuffle=False)
                | f"Judge.{kind}" >> JudgeImages(EvaluateConfig(knn_k=5), "", "", ())
                | f"Outcome.{kind}" >> beam.Map(lambda extracts: extracts[OUTCOME_KEY])
                | f"Images.{kind}" >> beam.Filter(lambda outcome: hasattr(outcome, "rank"))
                | f"Hits.{kind}" >> beam.Map(lambda one: (one.rank, *one.hits[:3].ravel().tolist()))
                | f"Key.{kind}" >> beam.Map(lambda row, kind: (kind, row), kind)
            )
        assert_that(parts | beam.Flatten() | beam.GroupByKey(), check)


def test_result_json_holds_the_evaluators_figures_beside_those_of_pixels_and_of_the_untrained_network(run, tmp_path):
    from tfx.types import standard_artifacts

    from components.evaluator.eval_config import read_intervals
    from components.serving_check.executor import REPORT_FILE
    from pipeline.report import Node, collect
    from trainer_module.run_fn import TRAINING_FILE

    def node(name: str, **uris: str) -> Node:
        outputs = {}
        for key, uri in uris.items():
            artifact = standard_artifacts.ModelBlessing() if key == "blessing" else standard_artifacts.Model()
            artifact.uri = uri
            outputs[key] = [artifact]
        return Node(name, 1.0, 1.0, False, outputs)

    training = {"steps": 9, "images_per_second": 1.0, "final_loss": 2.0, "strategy": "s", "replicas": 1}
    training |= {"pretext_top1": 0.3, "alignment": 0.111}
    counts = dict.fromkeys(("read", "ingested", "quarantined", "duplicates", "train", "eval"), 1)
    for file, content in (
        (TRAINING_FILE, training),
        ("ingest.json", counts),
        (REPORT_FILE, {"reasons": [], "figures": {}}),
    ):
        (tmp_path / file).write_text(json.dumps(content))
    here, evaluation = str(tmp_path), run.uri("better", "evaluation")
    nodes = [
        node("Trainer", model_run=here),
        node("Evaluator", evaluation=evaluation, blessing=here),
        node("ServingCheck", blessing=here),
        node("ImageExampleGen", examples=here),
        node("Pusher", pushed_model=here),
        node("ModelCard", model_card=here),
    ]
    result, figures = collect(nodes, 2.0), read_intervals(evaluation)
    assert result["train"]["alignment"] == 0.111
    assert result["metrics"]["pretext_top1"] == 0.3
    assert result["metrics"]["alignment"] == figures["alignment"].value != 0.111
    assert tuple(result["intervals"]["alignment"].values()) == figures["alignment"]
    for name in ("knn_top5", "linear_top1", "recall_at_10", "effective_rank", "uniformity", "neighbour_consistency"):
        for prefix in ("", "random_init_", "pixel_"):
            assert result["metrics"][prefix + name] == figures[prefix + name].value, prefix + name
            assert result["intervals"][prefix + name]["low"] <= result["metrics"][prefix + name], prefix + name
