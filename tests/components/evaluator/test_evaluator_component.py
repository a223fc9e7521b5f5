"""The stock Evaluator with our metric, models and examples, run by LocalDagRunner on real images."""

import dataclasses
import hashlib
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from components.evaluator.config import EvaluateConfig
from components.evaluator.scorecard import METRICS, Embedded, score

TARS = sorted((Path(__file__).parents[3] / "configs" / "demo_images").glob("*.tar"))
CONFIG = EvaluateConfig(knn_k=20)
EVERY = 12  # of the sample's images, so about 180


def sample_images() -> list[tuple[str, bytes]]:
    images = []
    for path in TARS:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    images += [(member.name.split("/")[-2], tar.extractfile(member).read())]
    return images[::EVERY]


def write_examples(directory: Path, images: list[tuple[str, bytes]], labelled: bool) -> list[bytes]:
    import tensorflow as tf

    serialised = []
    writers = {}
    for split in ("train", "eval"):
        (directory / f"Split-{split}").mkdir(parents=True)
        path = str(directory / f"Split-{split}" / "examples-00000-of-00001.gz")
        writers[split] = tf.io.TFRecordWriter(path, "GZIP")
    for index, (label, data) in enumerate(images):
        split = "eval" if index % 4 == 0 else "train"
        features = {
            "image/encoded": data,
            "image/sha256": hashlib.sha256(data).hexdigest().encode(),
            "image/split": split.encode(),
        }
        if labelled and index % 10:  # some images of a labelled set have no label
            features["image/label"] = label.encode()
        example = tf.train.Example()
        for name, value in features.items():
            example.features.feature[name].bytes_list.value.append(value)
        serialised.append(example.SerializeToString())
        writers[split].write(serialised[-1])
    for writer in writers.values():
        writer.close()
    return serialised


def save_model(directory: Path, kind: str) -> None:
    """Writes a model artifact whose evaluation export embeds images well, badly, or not at all."""
    import tensorflow as tf

    def pixels_of(example: tf.Tensor) -> tf.Tensor:
        features = tf.io.parse_single_example(example, {"image/encoded": tf.io.FixedLenFeature([], tf.string)})
        image = tf.io.decode_image(features["image/encoded"], channels=3, expand_animations=False)
        return tf.reshape(tf.image.resize(image, [8, 8]), [192]) / 127.5 - 1.0

    def noise_of(example: tf.Tensor) -> tf.Tensor:
        seed = tf.stack([tf.strings.to_hash_bucket_fast(example, 2**30), tf.constant(1, tf.int64)])
        return tf.random.stateless_normal([16], seed)

    def embed(pixels: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        return {
            "good": pixels,
            "noise": noise,
            "collapsed": tf.ones_like(pixels) + 1e-6 * pixels,
            "nan": tf.where(noise[:, :1] > 1.0, np.nan, pixels),
        }[kind]

    class Export(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
        def evaluate(self, examples):
            pixels = tf.map_fn(pixels_of, examples, fn_output_signature=tf.TensorSpec([192], tf.float32))
            noise = tf.map_fn(noise_of, examples, fn_output_signature=tf.TensorSpec([16], tf.float32))
            return {"embedding": embed(pixels, noise), "untrained_embedding": noise, "pixels": pixels}

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
        return sorted(os.listdir(self.uri(node, "blessing"))) == ["BLESSED"]


NODES = {
    "better": ("good", "noise", True, CONFIG),
    "worse": ("noise", "good", True, dataclasses.replace(CONFIG, min_gain=-1.0)),
    "nan": ("nan", "good", True, CONFIG),
    "unlabelled": ("good", None, False, CONFIG),
    "unlabelled_collapsed": ("collapsed", "good", False, CONFIG),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Runs one pipeline in which each Evaluator of NODES judges (candidate, baseline, labelled set or not)."""
    from tfx import v1 as tfx

    from components.evaluator import eval_model
    from components.evaluator.eval_config import make_eval_config

    root = tmp_path_factory.mktemp("evaluator")
    images = write_examples(root / "labelled", sample_images(), labelled=True)
    write_examples(root / "unlabelled", sample_images(), labelled=False)
    nodes = {}
    for name in ("labelled", "unlabelled"):
        nodes[name] = tfx.dsl.Importer(
            str(root / name),
            tfx.types.standard_artifacts.Examples,
            properties={"split_names": '["train", "eval"]'},
            custom_properties={"payload_format": "FORMAT_TF_EXAMPLE"},
        ).with_id(name)
    for kind in ("good", "noise", "collapsed", "nan"):
        save_model(root / kind, kind)
        nodes[kind] = tfx.dsl.Importer(str(root / kind), tfx.types.standard_artifacts.Model).with_id(kind)
    for name, (candidate, baseline, labelled, config) in NODES.items():
        nodes[f"Evaluator.{name}"] = tfx.components.Evaluator(
            examples=nodes["labelled" if labelled else "unlabelled"].outputs["result"],
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
            beam_pipeline_args=["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"],
        )
    )
    return Run(root, images)


def expected(run: Run, kind: str) -> dict[str, float]:
    """Metrics of the labelled set computed outside of TFMA and Beam."""
    import tensorflow as tf

    outputs = tf.saved_model.load(str(run.root / kind / "Format-TFMA")).signatures["evaluate"](tf.constant(run.images))
    labels, in_bank = np.empty(len(run.images), object), []
    for row, serialised in enumerate(run.images):
        feature = tf.train.Example.FromString(serialised).features.feature
        labels[row] = feature["image/label"].bytes_list.value[0] if "image/label" in feature else None
        in_bank.append(feature["image/split"].bytes_list.value[0] == b"train")
    arrays = (outputs[name].numpy() for name in ("embedding", "untrained_embedding", "pixels"))
    return score(Embedded(*arrays, labels, np.array(in_bank)), CONFIG)


def test_metrics_are_those_of_the_scorecard_on_the_evaluation_export(run):
    from components.evaluator.eval_config import read_metrics

    metrics, reference = read_metrics(run.uri("better", "evaluation")), expected(run, "good")
    assert set(metrics) == set(METRICS)
    for name in METRICS:
        if name == "linear_top1":  # its optimiser starts from rounded embeddings
            assert metrics[name] == pytest.approx(reference[name], abs=0.05)
        else:
            assert metrics[name] == pytest.approx(reference[name], abs=2e-3), name
    # The good encoder of this test is the pixels, so the same code on the same images gives the same figure.
    assert metrics["knn_top1"] == metrics["pixel_knn_top1"] > metrics["random_init_knn_top1"]


def test_a_model_that_keeps_the_rules_is_blessed_and_nothing_is_said_against_it(run):
    from components.evaluator.eval_config import read_validation

    assert run.blessed("better")
    assert read_validation(run.uri("better", "evaluation")) == []


def test_baseline_and_candidate_are_measured_on_the_same_examples(run):
    from components.evaluator.eval_config import read_metrics

    better, worse = run.uri("better", "evaluation"), run.uri("worse", "evaluation")
    for name in ("knn_top1", "embedding_std", "bank_images"):
        assert read_metrics(better, "baseline")[name] == read_metrics(worse)[name]


def test_a_model_below_the_last_blessed_one_is_not_blessed_and_the_figures_are_told(run):
    from components.evaluator.eval_config import read_metrics, read_validation

    evaluation = run.uri("worse", "evaluation")
    now, last = read_metrics(evaluation)["knn_top1"], read_metrics(evaluation, "baseline")["knn_top1"]
    assert not run.blessed("worse")
    assert read_validation(evaluation) == [
        f"not blessed: kNN {now:.3f} is below the last blessed model's {last:.3f} by more than 0.02"
    ]


def test_embeddings_with_nan_are_not_blessed_and_the_reason_is_told(run):
    from components.evaluator.eval_config import read_metrics, read_validation

    metrics = read_metrics(run.uri("nan", "evaluation"))
    assert not run.blessed("nan")
    assert metrics["knn_top1"] is None
    assert metrics["pixel_knn_top1"] is not None
    assert read_validation(run.uri("nan", "evaluation")) == ["not blessed: some embeddings are NaN or infinite"]


def test_unlabelled_images_rest_on_the_metrics_that_need_no_label(run):
    from components.evaluator.eval_config import read_metrics

    metrics = read_metrics(run.uri("unlabelled", "evaluation"))
    assert run.blessed("unlabelled")
    assert {name for name, value in metrics.items() if value is None} == {
        "knn_top1",
        "random_init_knn_top1",
        "pixel_knn_top1",
        "linear_top1",
        "majority_top1",
        "knn_gain",
        "knn_gain_passed",
    }
    assert math.isclose(metrics["score"], metrics["effective_rank"] / len(run.images), rel_tol=1e-6)


def test_collapse_is_seen_without_labels_and_told(run):
    from components.evaluator.eval_config import read_validation

    reasons = read_validation(run.uri("unlabelled_collapsed", "evaluation"))
    assert not run.blessed("unlabelled_collapsed")
    assert reasons[0].startswith("not blessed: the embeddings have collapsed: their spread is 0.0000 of a uniform one")
    assert reasons[1].startswith("not blessed: the embeddings have collapsed: their effective rank is 1.0")
    assert reasons[2].startswith("not blessed: effective rank as a share 0.0")


def test_metrics_do_not_depend_on_order_nor_on_how_beam_bundles(run):
    import tensorflow as tf
    from tensorflow_model_analysis.metrics import metric_types

    from components.evaluator.metrics import ScorecardCombineFn

    outputs = tf.saved_model.load(str(run.root / "good" / "Format-TFMA")).signatures["evaluate"](
        tf.constant(run.images)
    )
    elements = []
    for row, serialised in enumerate(run.images):
        feature = tf.train.Example.FromString(serialised).features.feature
        features = {name: np.array(value.bytes_list.value, object) for name, value in feature.items()}
        elements.append({"features": features, "predictions": {name: outputs[name][row].numpy() for name in outputs}})
    keys = [metric_types.MetricKey(name) for name in METRICS]
    # Limits so low that images are dropped in between, by accumulators that have not seen the others.
    combine = ScorecardCombineFn(keys, "", dataclasses.replace(CONFIG, max_bank=20, max_queries=8))
    results = []
    for seed, bundles in ((0, 1), (1, 2), (2, 7)):
        order = np.random.default_rng(seed).permutation(len(elements))
        accumulators = []
        for part in np.array_split(order, bundles):
            accumulator = combine.create_accumulator()
            for row in part:
                accumulator = combine.add_input(accumulator, elements[row])
            accumulators.append(combine.compact(accumulator))
        results.append(combine.extract_output(combine.merge_accumulators(accumulators)))
    assert repr(results[0]) == repr(results[1]) == repr(results[2])
    assert results[0][keys[METRICS.index("bank_images")]] == 20.0


def test_an_example_of_no_known_split_is_refused(run):
    from components.evaluator.metrics import ScorecardCombineFn

    combine = ScorecardCombineFn([], "", CONFIG)
    element = {"features": {"image/split": np.array([b"test"], object)}, "predictions": {}}
    with pytest.raises(ValueError, match="neither train nor eval"):
        combine.add_input(combine.create_accumulator(), element)
