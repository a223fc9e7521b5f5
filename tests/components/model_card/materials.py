"""Cards and material for pages, as the executor makes them, without a pipeline."""

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from components.model_card import pictures
from components.model_card.card import (
    Artifact,
    Card,
    Data,
    Evaluation,
    Figure,
    Lineage,
    Metric,
    Pictures,
    Recall,
    Rule,
    Training,
)
from components.model_card.config import CardConfig
from components.model_card.page import THUMBNAIL, Material
from components.model_card.pictures import Split
from trainer_module.alarms import Interval

COUNTS = {"read": 130, "quarantined": 3, "duplicates": 2, "train": 100, "eval": 25, "unlabelled": 0}
LABELS = {"birds": {"train": 60, "eval": 21}, "frogs": {"train": 40, "eval": 4}}


def make_card(**changes: Any) -> Card:
    card = Card(
        name="ponds",
        statement=CardConfig(license="apache-2.0", limits=("Not for night pictures.",)),
        encoder={"dim": 32, "layer": "backbone", "input_size": 48},
        config={"encoder.name": "resnet18", "encoder.weights": "", "train.queue": 512},
        data=Data(span=7, version=2, fingerprint="files:1", manifest="ab12", counts=COUNTS, labels=LABELS),
        training=Training(60, 4, 16, 2, "MirroredStrategy", "cross_replica_sum", 2.5, 0.4, 0.3, {}),
        evaluation=Evaluation(
            blessed=True,
            reasons=(),
            rules=(Rule("finite_passed", True, "all embeddings are finite"),),
            notes=(),
            metrics=(
                Metric("knn_top1", "kNN top-1", Figure(0.54, 0.49, 0.59), Figure(0.43), Figure(0.45), Figure(None)),
                Metric("linear_top1", "linear probe top-1", Figure(float("nan"))),
            ),
            recall=(Recall("birds", 21, 20 / 21, 0.77, 0.99, "frogs"), Recall("frogs", 4, 1.0, 0.51, 1.0, None)),
        ),
        versions={"python": "3.10.1"},
        code={"Trainer": "0123456789abcdef"},
        lineage=Lineage("moco", "2026-01-01", "9", {"model": Artifact("Model", 8, None)}),
        pictures=Pictures(100, 25, 12, 8, 125),
    )
    return dataclasses.replace(card, **changes)


def make_split(labels: list[str | None], seed: int, size: int = 24, dim: int = 16) -> Split:
    """Images of one class point about one way, and look like noise, which compresses worst."""
    generator = np.random.default_rng(seed)
    ways = {label: np.random.default_rng(len(str(label)) + 7 * n).normal(size=dim) for n, label in _numbered(labels)}
    vectors = np.array([ways[label] + 0.4 * generator.normal(size=dim) for label in labels]).reshape(len(labels), dim)
    embedding = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    thumbnails = []
    for _ in labels:
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
        thumbnails.append(pictures.thumbnail(file.getvalue(), THUMBNAIL))
    return Split(embedding.astype(np.float32), tuple(labels), tuple(thumbnails))


def _numbered(labels: list[str | None]) -> list[tuple[int, str | None]]:
    return list(enumerate(sorted(set(labels), key=str)))


def make_intervals(count: int) -> list[Interval]:
    values = {field.name: 0.5 for field in dataclasses.fields(Interval)}
    return [Interval(**{**values, "step": n, "epoch": n / 10, "knn_top1": float("nan")}) for n in range(count)]


def make_material(train: list[str | None], held_out: list[str | None], size: int = 24, intervals: int = 30) -> Material:
    bank, queries = make_split(train, 1, size), make_split(held_out, 2, size)
    classes = sorted({label for label in held_out if label is not None})
    counts = np.diag(np.array([held_out.count(label) for label in classes], np.int64))
    return Material(bank, queries, pictures.recall(classes, counts), make_intervals(intervals))
