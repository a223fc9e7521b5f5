"""What TFDV is asked about the ingested images, and what it found, in sentences."""

import os

import tensorflow_data_validation as tfdv
from tensorflow_metadata.proto.v0 import anomalies_pb2, schema_pb2, statistics_pb2
from tfx.dsl.io import fileio

_LABEL = "image/label"
# Contents, identities and bookkeeping: values that a later split may lack or add without anything being wrong.
_OPAQUE = ("image/encoded", "image/sha256", "image/path", "image/format", "image/split")
_SPLIT_PREFIX = "Split-"


def stats_options() -> tfdv.StatsOptions:
    """Returns options for StatisticsGen that keep image bytes and identities out of the statistics.

    TFDV counts unique values and keeps the most frequent ones of every string feature, which for images means
    shuffling their bytes. A feature with an image_domain gets lengths only (BytesStatistics). That mark is the one
    way that survives the JSON through which TFX passes options, so the identities carry it too. It also spares
    SchemaGen from making a domain of them, so only labels have one: a label unknown to the schema is an anomaly.
    """
    schema = schema_pb2.Schema()
    for name in _OPAQUE:
        schema.feature.add(name=name, type=schema_pb2.BYTES).image_domain.SetInParent()
    return tfdv.StatsOptions(schema=schema)


def read_anomalies(artifact_uri: str) -> list[str]:
    """Returns what ExampleValidator found, one short sentence an anomaly, sorted by split and feature.

    Args:
        artifact_uri: of ExampleValidator's `anomalies` output.
    """
    sentences = []
    for split in _splits(artifact_uri):
        anomalies = anomalies_pb2.Anomalies()
        anomalies.ParseFromString(_read(os.path.join(artifact_uri, _SPLIT_PREFIX + split, "SchemaDiff.pb")))
        for name, info in sorted(anomalies.anomaly_info.items()):
            sentences.append(f"{split} split, {name}: {_one_line(info.description or info.short_description)}")
        if anomalies.HasField("dataset_anomaly_info"):
            sentences.append(f"{split} split: {_one_line(anomalies.dataset_anomaly_info.description)}")
    return sentences


def read_missing_labels(artifact_uri: str) -> list[str]:
    """Returns a sentence for each split in which some images have a label and some have none.

    SchemaGen takes gaps in the train split for normal, so ExampleValidator does not speak of them.

    Args:
        artifact_uri: of StatisticsGen's `statistics` output.
    """
    sentences = []
    for split in _splits(artifact_uri):
        statistics = statistics_pb2.DatasetFeatureStatisticsList()
        statistics.ParseFromString(_read(os.path.join(artifact_uri, _SPLIT_PREFIX + split, "FeatureStats.pb")))
        dataset = statistics.datasets[0]
        labelled = [f.string_stats.common_stats.num_non_missing for f in dataset.features if _name(f) == _LABEL]
        if labelled and labelled[0] < dataset.num_examples:
            missing = dataset.num_examples - labelled[0]
            sentences.append(f"{split} split, {_LABEL}: {missing} of {dataset.num_examples} images have no label")
    return sentences


def _splits(artifact_uri: str) -> list[str]:
    names = (str(name).rstrip("/") for name in fileio.listdir(artifact_uri))
    return sorted(name.removeprefix(_SPLIT_PREFIX) for name in names if name.startswith(_SPLIT_PREFIX))


def _read(path: str) -> bytes:
    with fileio.open(path, "rb") as file:
        return file.read()


def _name(feature: statistics_pb2.FeatureNameStatistics) -> str:
    return feature.name or ".".join(feature.path.step)


def _one_line(text: str) -> str:
    return " ".join(text.split())
