"""From TFMA's predictions to one small row an eval image: a stage of extraction that runs before slices are made.

Examples of both splits come with what the export says of them. Those of the train split become the bank and the linear
probe's training set, and end here; those of the eval split are looked up in the bank, and leave as outcomes with the
columns that slices are made by. One further row, of the overall slice alone, holds what is known of both splits.

Memory: an image is carried as float16 vectors (4 KB for 2,048 dimensions), and never all of them by one worker; for the
search see components.evaluator.neighbours, 2.8 GB for 50,000 queries whatever the bank. The probe's images come
together on one worker: 10,000 x (3,072 float16 + float64) are 310 MB, a few times that while it is fitted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton
from numpy.typing import NDArray
from tensorflow_model_analysis import constants

from components.evaluator import linear_probe
from components.evaluator.census import LABEL, Census, Image, TakeCensus
from components.evaluator.config import EvaluateConfig
from components.evaluator.neighbours import NearestNeighbours, Neighbours, Rows
from components.evaluator.outcomes import (
    BASELINE,
    EMBEDDING,
    NO_LABEL,
    PREFIXES,
    REPRESENTATIONS,
    RETRIEVED,
    Outcome,
    Views,
    hits_of,
    nothing_asked,
    vote,
)
from trainer_module.knn import unit

OUTCOME_KEY = "embedding_outcome"  # of extracts: an Outcome, or the Facts of both splits
_SHA = "image/sha256"
_SPLIT = "image/split"
_BATCH = (256, 4096)  # images in an element of the search


class JudgeImages(beam.PTransform):
    """Extracts of all examples to extracts of eval images, each with an Outcome, and one with the Facts."""

    def __init__(self, config: EvaluateConfig, candidate: str, baseline: str, columns: Sequence[str]) -> None:
        """Args:
        config: what is measured.
        candidate, baseline: names of the models; empty for the only model, and where there is no baseline.
        columns: features that slices are made by.
        """
        super().__init__()
        self._config, self._candidate, self._baseline, self._columns = config, candidate, baseline, tuple(columns)

    def expand(self, extracts: beam.PCollection) -> beam.PCollection:
        """See the class."""
        config = self._config
        images = extracts | "Embedded" >> beam.Map(embedded, self._candidate, self._baseline, self._columns)
        census = images | "Census" >> beam.CombineGlobally(TakeCensus(config, bool(self._baseline)))
        known = AsSingleton(census)
        kept = images | "Sample" >> beam.Filter(_in_sample, known)
        bank = kept | "Bank" >> beam.Filter(lambda image: image.in_bank and image.label is not None)
        queries = kept | "Queries" >> beam.Filter(lambda image: not image.in_bank)
        parts = {"image": queries | "KeyImages" >> beam.Map(lambda image: (image.key, image))}
        for name in (*PREFIXES, *((BASELINE,) if self._baseline else ())):
            parts[f"neighbours.{name}"] = self._neighbours(name, bank, queries, known)
            if config.linear_probe:
                parts[f"ranked.{name}"] = self._ranked(name, bank, queries, known)
        outcomes = parts | "JoinImages" >> beam.CoGroupByKey() | "Outcomes" >> beam.Map(_outcome, config, known)
        facts = census | "Facts" >> beam.Map(lambda known: {constants.FEATURES_KEY: {}, OUTCOME_KEY: known.facts})
        return (outcomes, facts) | "WithFacts" >> beam.Flatten()

    def _neighbours(
        self, name: str, bank: beam.PCollection, queries: beam.PCollection, known: AsSingleton
    ) -> beam.PCollection:
        """(key, Neighbours) of the labelled queries in one representation."""
        k = max(self._config.knn_k, RETRIEVED)
        labelled = queries | f"Labelled.{name}" >> beam.Filter(lambda image: image.label is not None)
        searched = {
            side: images
            | f"{side.title()}Batches.{name}" >> beam.BatchElements(*_BATCH)
            | f"{side.title()}Rows.{name}" >> beam.Map(_rows, name, known).with_output_types(Rows)
            for side, images in (("bank", bank), ("queries", labelled))
        }
        found = searched | f"Search.{name}" >> NearestNeighbours(k)
        return found | f"KeyNeighbours.{name}" >> beam.Map(lambda one: (one.key, one))

    def _ranked(
        self, name: str, bank: beam.PCollection, queries: beam.PCollection, known: AsSingleton
    ) -> beam.PCollection:
        """(key, classes by the linear probe) of the queries in one representation."""
        probe = (
            bank
            | f"ProbeSample.{name}" >> beam.Filter(lambda image, known: image.rank < known.ends["probe"], known)
            | f"ProbeVectors.{name}" >> beam.Map(_labelled_vector, name, known)
            | f"ProbeImages.{name}" >> beam.combiners.ToList()
            | f"FitProbe.{name}" >> beam.Map(_fit_probe, known)
        )
        return queries | f"Rank.{name}" >> beam.FlatMap(_rank, name, AsSingleton(probe))


def embedded(extracts: dict[str, Any], candidate: str, baseline: str, columns: Sequence[str]) -> Image:
    """What the judgement needs of one example's extracts.

    Raises:
        ValueError: its split is neither train nor eval.
    """
    features, predictions = extracts[constants.FEATURES_KEY], extracts[constants.PREDICTIONS_KEY]
    split = _value(features, _SPLIT)
    if split not in (b"train", b"eval"):
        raise ValueError(f"{_SPLIT} of an evaluated example is {split!r}, neither train nor eval")
    in_bank = split == b"train"
    own = predictions[candidate] if candidate else predictions
    views = {name: _views(own, name, in_bank) for name in PREFIXES}
    if baseline:
        views[BASELINE] = _views(predictions[baseline], EMBEDDING, in_bank)
    label, leak = _value(features, LABEL), _value(own, "leak")
    return Image(
        key=_value(features, _SHA) or b"",
        in_bank=in_bank,
        label=None if label is None else label.decode("utf-8", "replace"),
        features={} if in_bank else {name: features[name] for name in columns if _value(features, name) is not None},
        views=views,
        leak=None if leak is None else leak.decode(),
    )


def _views(predictions: Mapping[str, NDArray], name: str, in_bank: bool) -> Views:
    image = _unit(predictions[name])
    of_views = predictions.get(f"{name}_views")
    if in_bank or of_views is None:
        return Views(image, None, None)
    first, second = np.reshape(of_views, (2, -1))
    return Views(image, _unit(first), _unit(second))


def _unit(vector: NDArray) -> NDArray[np.float16]:
    """Of length 1, in float16, which moves a cosine similarity by less than 1e-3."""
    return unit(np.reshape(vector, (1, -1)))[0].astype(np.float16)


def _value(features: Mapping[str, Any], name: str) -> bytes | None:
    """Returns the one value of a feature, or None when the example has none."""
    values = np.ravel(features[name]) if features.get(name) is not None else np.zeros(0)
    if not values.size or values[0] is None:
        return None
    value = values[0]
    return value if isinstance(value, bytes) else str(value).encode()


def _in_sample(image: Image, known: Census) -> bool:
    return image.rank < known.ends["bank" if image.in_bank else "queries"]


def _rows(images: list[Image], name: str, known: Census) -> Rows:
    vectors = np.stack([image.views[name].image for image in images])
    return Rows.of([image.key for image in images], vectors, np.array([known.label(image) for image in images]))


def _labelled_vector(image: Image, name: str, known: Census) -> tuple[int, int, NDArray[np.float16]]:
    return image.rank, known.label(image), image.views[name].image


def _fit_probe(images: list[tuple[int, int, NDArray[np.float16]]], known: Census) -> linear_probe.Probe | None:
    """Fits the probe of one representation; None where labels say nothing, or a vector is not finite."""
    ordered = sorted(images, key=lambda image: image[0])
    if not ordered or not known.facts.labels_meet:
        return None
    vectors = np.stack([vector for _, _, vector in ordered])
    if not np.isfinite(vectors).all():
        return None
    return linear_probe.fit(vectors, np.array([label for _, label, _ in ordered]))


def _rank(image: Image, name: str, probe: linear_probe.Probe | None) -> Iterator[tuple[bytes, NDArray[np.int64]]]:
    vector = image.views[name].image
    if probe is not None and image.label is not None and np.isfinite(vector).all():
        yield image.key, probe.ranking(vector[None], 5)[0]


def _outcome(joined: tuple[bytes, dict[str, Iterable[Any]]], config: EvaluateConfig, known: Census) -> dict[str, Any]:
    """Extracts of one eval image: its outcome, and the columns that slices are made by."""
    key, parts = joined
    images = list(parts["image"])
    if len(images) != 1:
        raise ValueError(f"{len(images)} examples of the eval split have {_SHA}={key.decode()}")
    (image,) = images
    label, predicted, hits = known.label(image), NO_LABEL, nothing_asked()
    asks = label != NO_LABEL and known.facts.labels_meet
    for number, name in enumerate(REPRESENTATIONS if asks else ()):
        for found in parts.get(f"neighbours.{name}", ()):
            ranked = next(iter(parts.get(f"ranked.{name}", ())), None)
            voted = _voted(found, config)
            hits[number] = hits_of(label, voted, found.labels, ranked)
            if name == EMBEDDING and len(voted):
                predicted = int(voted[0])
    outcome = Outcome(
        rank=image.rank,
        label=label,
        predicted=predicted,
        hits=hits,
        finite=np.array([_finite(image.views.get(name)) for name in REPRESENTATIONS]),
        views=image.views if image.rank < known.ends["geometry"] else None,
    )
    return {constants.FEATURES_KEY: dict(image.features), OUTCOME_KEY: outcome}


def _voted(found: Neighbours, config: EvaluateConfig) -> NDArray[np.int64]:
    return vote(found.similarities, found.labels, config.knn_k, config.knn_temperature, 5)


def _finite(views: Views | None) -> bool:
    return views is None or bool(np.isfinite(views.image).all())
