"""TFDV and TFT, as TFX's stock components run them, on real images."""

import dataclasses
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beam import BEAM_ARGUMENTS
from trainer_module.config import ImageConfig

TARS = sorted((Path(__file__).parents[3] / "configs" / "demo_images").glob("*.tar"))
IMAGE = ImageConfig(storage_size=24, max_aspect=2.0)
UNKNOWN = "nür / ein Etikett"


def sample_images() -> list[tuple[str, bytes]]:
    """Some of the sample's images; of every second one only a strip, so that sizes and aspects differ."""
    images = []
    for path in TARS:
        with tarfile.open(path) as tar:
            for member in tar.getmembers()[1::60]:
                if member.name.endswith(".png"):
                    data = tar.extractfile(member).read()
                    images.append((member.name.split("/")[-2], _strip(data) if len(images) % 2 else data))
    return images


def _strip(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    buffer = io.BytesIO()
    image.crop((0, 10, image.width, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Ingested:
    data: bytes
    label: str | None
    split: str


def ingest(labelled: bool) -> list[Ingested]:
    """A labelled set has a label in eval that train lacks, and one image in each split without a label."""
    images = [
        Ingested(data, label, "eval" if i % 4 == 0 else "train") for i, (label, data) in enumerate(sample_images())
    ]
    if not labelled:
        return [dataclasses.replace(image, label=None) for image in images]
    replaced = {4: UNKNOWN, 8: None, 9: None}
    return [dataclasses.replace(image, label=replaced.get(i, image.label)) for i, image in enumerate(images)]


def write_examples(directory: Path, images: list[Ingested]) -> None:
    import tensorflow as tf

    for split in ("train", "eval"):
        (directory / f"Split-{split}").mkdir(parents=True)
        with tf.io.TFRecordWriter(str(directory / f"Split-{split}" / "examples.gz"), "GZIP") as writer:
            for image in images:
                if image.split == split:
                    writer.write(serialise(image))


def serialise(image: Ingested) -> bytes:
    import tensorflow as tf

    sha256 = hashlib.sha256(image.data).hexdigest()
    features = {
        "image/encoded": image.data,
        "image/format": b"png",
        "image/sha256": sha256.encode(),
        "image/path": f"folder/{sha256[:8]}.png".encode(),
        "image/split": image.split.encode(),
    }
    if image.label is not None:
        features["image/label"] = image.label.encode()
    example = tf.train.Example()
    for name, value in features.items():
        example.features.feature[name].bytes_list.value.append(value)
    example.features.feature["image/height"].int64_list.value.append(Image.open(io.BytesIO(image.data)).height)
    return example.SerializeToString()


@dataclasses.dataclass(frozen=True)
class Run:
    root: Path
    images: dict[str, list[Ingested]]

    def uri(self, node: str, output: str) -> str:
        return str(next((self.root / "pipeline" / node / output).iterdir()))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    from tfx import v1 as tfx

    from components.transform import preprocessing
    from components.transform.statistics import stats_options

    root = tmp_path_factory.mktemp("transform")
    images = {"labelled": ingest(True), "unlabelled": ingest(False)}
    nodes = []
    for name, ingested in images.items():
        write_examples(root / name, ingested)
        examples = tfx.dsl.Importer(
            str(root / name),
            tfx.types.standard_artifacts.Examples,
            properties={"split_names": '["train", "eval"]'},
            custom_properties={"payload_format": "FORMAT_TF_EXAMPLE"},
        ).with_id(name)
        statistics = tfx.components.StatisticsGen(
            examples=examples.outputs["result"], stats_options=stats_options()
        ).with_id(f"StatisticsGen.{name}")
        schema = tfx.components.SchemaGen(statistics=statistics.outputs["statistics"], exclude_splits=["eval"]).with_id(
            f"SchemaGen.{name}"
        )
        validator = tfx.components.ExampleValidator(
            statistics=statistics.outputs["statistics"], schema=schema.outputs["schema"]
        ).with_id(f"ExampleValidator.{name}")
        transform = tfx.components.Transform(
            examples=examples.outputs["result"],
            schema=schema.outputs["schema"],
            preprocessing_fn=f"{preprocessing.__name__}.preprocessing_fn",
            custom_config=preprocessing.make_custom_config(IMAGE, code="test"),
            materialize=False,
            disable_statistics=True,
        ).with_id(f"Transform.{name}")
        nodes += [examples, statistics, schema, validator, transform]
    tfx.orchestration.LocalDagRunner().run(
        tfx.dsl.Pipeline(
            pipeline_name="test",
            pipeline_root=str(root / "pipeline"),
            components=nodes,
            enable_cache=False,
            metadata_connection_config=tfx.orchestration.metadata.sqlite_metadata_connection_config(
                str(root / "metadata.sqlite")
            ),
            beam_pipeline_args=[*BEAM_ARGUMENTS],
        )
    )
    return Run(root, images)


def transformed(run: Run, name: str, split: str) -> dict[str, np.ndarray]:
    """Applies the transform graph to the examples of a split, parsed by the inferred schema."""
    import tensorflow as tf
    import tensorflow_transform as tft

    output = tft.TFTransformOutput(run.uri(f"Transform.{name}", "transform_graph"))
    serialised = [serialise(image) for image in run.images[name] if image.split == split]
    parsed = tf.io.parse_example(serialised, output.raw_feature_spec())
    return {key: value.numpy() for key, value in output.transform_features_layer()(parsed).items()}


def stored(run: Run, name: str, split: str) -> list[np.ndarray]:
    from trainer_module.images import stored_image

    return [stored_image(i.data, IMAGE).numpy() for i in run.images[name] if i.split == split]


@pytest.mark.parametrize("name", ["labelled", "unlabelled"])
def test_channel_statistics_are_those_of_every_stored_pixel_of_the_train_split(run, name):
    pixels = np.concatenate([image.reshape(-1, 3) for image in stored(run, name, "train")]).astype(np.float64)
    for split in ("train", "eval"):
        out = transformed(run, name, split)
        rows = len(out["image"])
        np.testing.assert_array_equal(out["channel_mean"], np.tile(np.float32(pixels.mean(axis=0)), (rows, 1)))
        np.testing.assert_allclose(out["channel_variance"], np.tile(pixels.var(axis=0), (rows, 1)), rtol=1e-7)
        assert out["channel_mean"].dtype == out["channel_variance"].dtype == np.float32


def test_image_is_an_uncompressed_png_of_the_stored_image_and_id_its_hash(run):
    out = transformed(run, "labelled", "eval")
    images = [image for image in run.images["labelled"] if image.split == "eval"]
    for png, reference in zip(out["image"], stored(run, "labelled", "eval"), strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(png)))
        np.testing.assert_array_equal(decoded, reference)
        assert len(png) > decoded.size
        assert Image.open(io.BytesIO(png)).format == "PNG"
    assert out["id"].tolist() == [hashlib.sha256(image.data).hexdigest().encode() for image in images]


def test_label_is_the_place_in_the_vocabulary_and_minus_one_without_one(run):
    import tensorflow_transform as tft

    vocabulary = tft.TFTransformOutput(run.uri("Transform.labelled", "transform_graph")).vocabulary_by_name("label")
    in_train = {i.label.encode() for i in run.images["labelled"] if i.split == "train" and i.label}
    assert set(vocabulary) == in_train
    for split in ("train", "eval"):
        out = transformed(run, "labelled", split)
        labels = [i.label for i in run.images["labelled"] if i.split == split]
        places = [vocabulary.index(label.encode()) if label and label != UNKNOWN else -1 for label in labels]
        assert out["label"].tolist() == places
        assert -1 in places
        assert out["label"].dtype == np.int64


def test_unlabelled_images_are_transformed_without_a_label(run):
    out = transformed(run, "unlabelled", "train")
    assert set(out) == {"image", "id", "channel_mean", "channel_variance"}


def test_the_graph_serves_images_alone_inside_a_saved_model_that_bare_tensorflow_loads(run, tmp_path):
    import tensorflow as tf
    import tensorflow_transform as tft

    class Export(tf.Module):
        def __init__(self, graph: str) -> None:
            super().__init__()
            self.transform = tft.TFTransformOutput(graph).transform_features_layer()

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def serve(self, image_bytes):
            out = self.transform({"image/encoded": image_bytes[:, tf.newaxis]})
            return {key: out[key] for key in ("image", "channel_mean", "channel_variance")}

    export = Export(run.uri("Transform.labelled", "transform_graph"))
    tf.saved_model.save(export, str(tmp_path / "model"), signatures={"serving_default": export.serve})
    image = run.images["labelled"][0]
    (tmp_path / "image.png").write_bytes(image.data)
    program = """
import sys
import numpy as np
import tensorflow as tf
serve = tf.saved_model.load(sys.argv[1] + "/model").signatures["serving_default"]
out = serve(tf.constant([open(sys.argv[1] + "/image.png", "rb").read()] * 2))
np.savez(sys.argv[1] + "/out.npz", image=[tf.io.decode_png(i) for i in out["image"]], mean=out["channel_mean"])
assert not {"tensorflow_transform", "tfx", "components", "trainer_module"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=tmp_path, timeout=120)
    out = np.load(tmp_path / "out.npz")
    reference = stored(run, "labelled", image.split)[0]
    np.testing.assert_array_equal(out["image"], np.stack([reference, reference]))
    np.testing.assert_array_equal(out["mean"], transformed(run, "labelled", "train")["channel_mean"][:2])


def statistics_of(run: Run, name: str, split: str):
    import tensorflow_data_validation as tfdv

    path = f"{run.uri(f'StatisticsGen.{name}', 'statistics')}/Split-{split}/FeatureStats.pb"
    statistics = tfdv.load_stats_binary(path)
    return {feature.path.step[0]: feature for feature in statistics.datasets[0].features}, statistics


@pytest.mark.parametrize("split", ["train", "eval"])
def test_neither_image_bytes_nor_identities_are_in_the_statistics(run, split):
    features, whole = statistics_of(run, "labelled", split)
    for name in ("image/encoded", "image/sha256", "image/path", "image/split", "image/format"):
        assert features[name].WhichOneof("stats") == "bytes_stats", name
    serialised = whole.SerializeToString()
    for image in run.images["labelled"]:
        assert image.data not in serialised
        assert hashlib.sha256(image.data).hexdigest().encode() not in serialised
    assert len(serialised) < 20_000
    labels = {bucket.label for bucket in features["image/label"].string_stats.rank_histogram.buckets}
    assert labels == {i.label for i in run.images["labelled"] if i.split == split and i.label}


def test_the_inferred_schema_requires_the_image_and_knows_the_labels_of_train(run):
    import tensorflow_data_validation as tfdv
    from tensorflow_metadata.proto.v0 import schema_pb2

    schema = tfdv.load_schema_text(run.uri("SchemaGen.labelled", "schema") + "/schema.pbtxt")
    features = {feature.name: feature for feature in schema.feature}
    assert features["image/encoded"].type == schema_pb2.BYTES
    assert features["image/encoded"].presence.min_fraction == 1.0
    assert [dim.size for dim in features["image/encoded"].shape.dim] == [1]
    domains = {domain.name: set(domain.value) for domain in schema.string_domain}
    assert domains == {"image/label": {i.label for i in run.images["labelled"] if i.split == "train" and i.label}}


def test_a_label_that_train_lacks_is_the_one_anomaly_and_is_said_in_one_line(run):
    from components.transform.statistics import read_anomalies

    (sentence,) = read_anomalies(run.uri("ExampleValidator.labelled", "anomalies"))
    assert sentence.startswith("eval split, image/label: Examples contain values missing from the schema: ")
    assert UNKNOWN in sentence
    assert "\n" not in sentence


def test_unlabelled_images_raise_no_anomaly(run):
    from components.transform.statistics import read_anomalies, read_missing_labels

    assert read_anomalies(run.uri("ExampleValidator.unlabelled", "anomalies")) == []
    assert read_missing_labels(run.uri("StatisticsGen.unlabelled", "statistics")) == []


def test_missing_labels_are_counted_in_each_split(run):
    from components.transform.statistics import read_missing_labels

    counts = {split: sum(i.split == split for i in run.images["labelled"]) for split in ("eval", "train")}
    assert read_missing_labels(run.uri("StatisticsGen.labelled", "statistics")) == [
        f"{split} split, image/label: 1 of {count} images have no label" for split, count in counts.items()
    ]
