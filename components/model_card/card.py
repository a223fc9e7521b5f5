"""A model's card: all that is known of it, as one document for programs. Needs neither TFX nor TensorFlow.

The keys of model_card.json are the fields of `Card`, nested; they are stable within a `schema_version`, and more may be
added. What could not be measured is null.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from components.model_card.config import CardConfig

JSON_FILE = "model_card.json"
MARKDOWN_FILE = "model_card.md"
PAGE_FILE = "model_card.html"
SCHEMA_VERSION = "1.0"

_FEW_OF_A_CLASS = 20


@dataclasses.dataclass(frozen=True)
class Data:
    """The images.

    Attributes:
        span, version: of the source, as TFX counts them; None where it has none.
        fingerprint: of the source's listing.
        manifest: names the ingested images by content, split and label, see
            components.image_example_gen.stages.identity; None where the ingestion was another's.
        counts: images read, ingested, quarantined, duplicates, train, eval, …, as in ingest.json.
        labels: images of each label by split.
    """

    span: int | None
    version: int | None
    fingerprint: str | None
    manifest: str | None
    counts: Mapping[str, int]
    labels: Mapping[str, Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class Training:
    """What the Trainer did.

    Attributes:
        steps: in all.
        epochs: passes over the images.
        global_batch: images in a step.
        replicas, strategy: what it ran on.
        key_bn: how batch normalisation of the keys is kept from leaking, see train.key_bn.mode.
        final_loss, pretext_top1, alignment: means over the last epoch.
        alarms: what was wrong and still so at the end, as kind and text; None where it was not noted.
    """

    steps: int
    epochs: int
    global_batch: int
    replicas: int
    strategy: str
    key_bn: str
    final_loss: float | None
    pretext_top1: float | None
    alignment: float | None
    alarms: Mapping[str, str] | None


def is_number(value: float | None) -> bool:
    """Whether a figure is there and finite."""
    return value is not None and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number with the ends of its 95 % interval, each None or NaN where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def measured(self) -> bool:
        """Whether there is a number."""
        return is_number(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether the interval has two ends."""
        return is_number(self.low) and is_number(self.high)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric of the evaluation.

    Attributes:
        name: as the Evaluator calls it.
        title: in words.
        trained: of this model.
        untrained, pixels: the same of the network before training and of the raw pixels; None where it has no sense.
        baseline: the same of the last blessed model; None where there was none.
    """

    name: str
    title: str
    trained: Figure
    untrained: Figure | None = None
    pixels: Figure | None = None
    baseline: Figure | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of the blessing: whether it holds (None where it does not apply), and what was found, in words."""

    name: str
    holds: bool | None
    text: str


@dataclasses.dataclass(frozen=True)
class Recall:
    """Of one class: how well kNN finds its eval images.

    Attributes:
        label: the class.
        images: of it in the eval split.
        value: share of them that is found.
        low, high: ends of the 95 % interval.
        taken_for: the class that the others are taken for most often; None where all are found.
    """

    label: str
    images: int
    value: float
    low: float
    high: float
    taken_for: str | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the Evaluator found.

    Attributes:
        blessed: its verdict.
        reasons: why not, in words.
        rules: that were applied.
        notes: sentences on the images that it judged on.
        metrics: on the eval split.
        recall: of each class that has eval images; empty where labels say nothing.
    """

    blessed: bool
    reasons: tuple[str, ...]
    rules: tuple[Rule, ...]
    notes: tuple[str, ...]
    metrics: tuple[Metric, ...]
    recall: tuple[Recall, ...]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact in the metadata store: its number there, and its name where the store names artifacts."""

    type: str
    id: int | None
    name: str | None


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Where the card comes from.

    Attributes:
        pipeline, run, execution: of the component that wrote the card; None outside of a pipeline.
        artifacts: that it was made from.
    """

    pipeline: str | None
    run: str | None
    execution: str | None
    artifacts: Mapping[str, Artifact]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What the picture page shows: the sample of images, and how many of them stand there."""

    bank_images: int
    query_images: int
    queries: int
    neighbours: int
    points: int


@dataclasses.dataclass(frozen=True)
class Card:
    """See the module.

    Attributes:
        name: of the experiment.
        statement: the publisher's words.
        encoder: name, embedding size (`dim`), layer, input size, signatures.
        config: all settings, {"train.queue": 65536, …}.
        data, training, evaluation, lineage, pictures: see their classes.
        versions: of Python and packages.
        code: fingerprints of the sources by stage.
    """

    name: str
    statement: CardConfig
    encoder: Mapping[str, Any]
    config: Mapping[str, Any]
    data: Data
    training: Training
    evaluation: Evaluation
    versions: Mapping[str, str]
    code: Mapping[str, str]
    lineage: Lineage
    pictures: Pictures

    @property
    def limits(self) -> tuple[str, ...]:
        """The publisher's, then those that follow from data, training and evaluation."""
        return (
            *self.statement.limits,
            *computed_limits(self.data, self.training, self.evaluation, self.encoder, self.config),
        )


def to_json(card: Card) -> str:
    """The content of model_card.json; keys in a fixed order, so equal cards give equal texts."""
    document = dataclasses.asdict(card)
    statement = document.pop("statement")
    statement.pop("pictures")
    document |= statement | {"schema_version": SCHEMA_VERSION, "limits": list(card.limits)}
    return json.dumps(_finite(document), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def computed_limits(
    data: Data, training: Training, evaluation: Evaluation, encoder: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[str]:
    """Yields what is known to be unknown or weak of a model, a sentence each."""
    train, held_out = data.counts.get("train", 0), data.counts.get("eval", 0)
    if not evaluation.blessed:
        yield "This model is not blessed: " + ("; ".join(evaluation.reasons) or "see the evaluation") + "."
    for alarm in (training.alarms or {}).values():
        yield f"An alarm at the end of its training: {alarm}."
    yield (
        f"Its domain is that of its {train:,} training images. All figures are of {held_out:,} held-out images of the "
        "same source; how it does on others was not measured."
    )
    yield from (f"{note[:1].upper()}{note[1:]}." for note in evaluation.notes)
    near = data.counts.get("near_duplicates", 0) - data.counts.get("near_duplicates_dropped", 0)
    if near:
        yield f"Near duplicates across the split: {near:,}, by which the figures may be flattered."
    yield from _label_limits(data, held_out)
    if size := encoder.get("input_size"):
        yield (
            f"It sees the central square of an image, scaled to {size} by {size} pixels: what lies outside of it, or "
            "is finer, is lost."
        )
    if config.get("encoder.weights"):
        yield "Its training began with given weights: what those have learned, and from what, holds for it, too."
    yield "Not tested: bias towards groups of people, privacy of the training images, robustness to attacks."


def _label_limits(data: Data, held_out: int) -> Iterator[str]:
    if not data.labels:
        yield "The images have no labels: how well it tells classes apart was not measured."
        return
    if held_out:
        half = 100 * 1.96 * 0.5 / math.sqrt(held_out)
        yield (
            f"Of {held_out:,} images, a share such as top-1 is known to within ±{half:.1f} percentage points at the "
            "worst (95 %)."
        )
    few = [label for label, splits in data.labels.items() if 0 < splits.get("eval", 0) < _FEW_OF_A_CLASS]
    if few:
        shown = ", ".join(few[:5]) + (", …" if len(few) > 5 else "")
        which = "1 class has" if len(few) == 1 else f"{len(few)} classes have"
        yield f"{which} fewer than {_FEW_OF_A_CLASS} held-out images, so recall of it says little ({shown})."
    if unlabelled := data.counts.get("unlabelled"):
        yield f"{unlabelled:,} images have no label, and take no part in figures that need one."
    if conflicts := data.counts.get("label_conflicts"):
        yield f"{conflicts:,} images stood under more than one label; the first path's is used."
