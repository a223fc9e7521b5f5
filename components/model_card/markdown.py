"""A model's card to be read: Markdown, in the order of Hugging Face's template, with its metadata on top."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from components.model_card.card import PAGE_FILE, Artifact, Card, Figure, Metric, Recall, is_number

NOT_STATED = "not stated"
NOTHING = "—"  # where there is no figure

_SIGNATURES = (
    ("serving_default", "image_bytes: string[N]", "encoded JPEG, PNG, GIF or BMP"),
    ("examples", "examples: string[N]", "serialised tf.Example with `image/encoded`"),
    ("pixels", "image: float32[N, H, W, 3]", "values in 0 to 255"),
)
_PACKAGES = "Python and packages"


def to_markdown(card: Card) -> str:
    """The content of model_card.md.

    Args:
        card: of any model, blessed or not.
    """
    parts = (
        _metadata(card),
        [f"# {_text(card.name)}", ""],
        _summary(card),
        _details(card),
        _uses(card),
        _start(card),
        _data(card),
        _training(card),
        _evaluation(card),
        _technical(card),
    )
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def figure(value: Figure | None) -> str:
    """A number with its interval, such as "0.540 (0.494 to 0.586)"."""
    if value is None or not value.has_interval:
        return number(value.value if value else None)
    return f"{number(value.value)} ({number(value.low)} to {number(value.high)})"


def number(value: float | None) -> str:
    """A number in few digits: three after the point below 10, one from there on."""
    if value is None or not is_number(value):
        return NOTHING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _metadata(card: Card) -> Iterator[str]:
    """YAML that Hugging Face's hub reads; a licence that is no identifier of theirs is theirs to refuse."""
    facts: dict[str, Any] = {"license": card.statement.license} if card.statement.license else {}
    facts |= {
        "library_name": "tensorflow",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["moco", "self-supervised-learning", "tfx"],
    }
    measured = [metric for metric in card.evaluation.metrics if metric.trained.measured]
    if measured:
        result = {
            "task": {"type": "image-feature-extraction"},
            "dataset": {
                "name": " ".join(card.statement.dataset.split()) or f"{card.name}, held-out images",
                "type": "image-folder",
            },
            "metrics": [{"type": m.name, "name": m.title, "value": round(m.trained.value or 0.0, 4)} for m in measured],
        }
        facts["model-index"] = [{"name": card.name, "results": [result]}]
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=1000)
    yield from ("---", *text.rstrip().split("\n"), "---", "")


def _summary(card: Card) -> Iterator[str]:
    encoder, counts = card.encoder, card.data.counts
    yield (
        f"A visual encoder, trained by Momentum Contrast without labels on {counts.get('train', 0):,} images: an image "
        f"in, a vector of {encoder.get('dim', '?')} numbers of length 1 out, so that images that look alike lie near "
        "each other."
    )
    yield ""
    yield f"**{'Blessed' if card.evaluation.blessed else 'Not blessed'}**" + (
        "." if card.evaluation.blessed else ": " + _plain("; ".join(card.evaluation.reasons) or "see below") + "."
    )
    yield from ("", f"Pictures: [{PAGE_FILE}]({PAGE_FILE}).", "")


def _details(card: Card) -> Iterator[str]:
    encoder, config, statement = card.encoder, card.config, card.statement
    dim, side = encoder.get("dim", NOTHING), encoder.get("input_size", NOTHING)
    yield from ("## Model details", "")
    yield from _table(
        ("", ""),
        [
            ("Network", config.get("encoder.name")),
            ("Embedding", f"{dim} numbers of length 1, from the {encoder.get('layer', NOTHING)}"),
            ("Input", f"{side} by {side} pixels, RGB"),
            ("Method", "Momentum Contrast (arXiv 1911.05722, 2003.04297)"),
            ("Licence", statement.license or NOT_STATED),
            ("Owner", statement.owner or NOT_STATED),
            ("Contact", statement.contact or NOT_STATED),
        ],
    )


def _uses(card: Card) -> Iterator[str]:
    yield from ("## Uses", "", _text(card.statement.intended_use) or f"Intended use: {NOT_STATED}.", "")
    own, found = card.statement.limits, card.limits[len(card.statement.limits) :]
    yield from (
        "## Limits",
        "",
        *(f"- {_text(limit)}" for limit in own),
        *(f"- {_plain(limit)}" for limit in found),
        "",
    )


def _start(card: Card) -> Iterator[str]:
    dim = card.encoder.get("dim", "D")
    yield from (
        "## How to get started",
        "",
        "```python",
        "import tensorflow as tf",
        "",
        'model = tf.saved_model.load("path/to/this/version")',
        'image = tf.io.read_file("photo.jpg")',
        f'model.signatures["serving_default"](image_bytes=image[tf.newaxis])["embedding"]  # float32[1, {dim}]',
        "```",
        "",
    )
    rows = [(f"`{name}`", f"`{takes}`", what) for name, takes, what in _SIGNATURES]
    yield from _table(("Signature", "Takes", ""), rows)
    yield from (f"All return `embedding`, float32[N, {dim}]. Preprocessing is inside.", "")


def _data(card: Card) -> Iterator[str]:
    data, counts = card.data, card.data.counts
    yield from ("## Training data", "", _text(card.statement.dataset) or f"What the images are: {NOT_STATED}.", "")
    yield from _table(
        ("", "images"),
        [
            ("read", counts.get("read")),
            ("quarantined, since they cannot be used", counts.get("quarantined")),
            ("exact duplicates, dropped", counts.get("duplicates")),
            ("near duplicates across the split", counts.get("near_duplicates")),
            ("of which dropped", counts.get("near_duplicates_dropped")),
            ("train split", counts.get("train")),
            ("eval split, held out", counts.get("eval")),
            ("without label", counts.get("unlabelled")),
        ],
    )
    span = NOTHING if data.span is None else str(data.span)
    version = "" if data.version is None else f", version {data.version}"
    yield from (f"Span {span}{version}; source fingerprint `{data.fingerprint or NOTHING}`.", "")
    yield from (f"Manifest of the images, by content, split and label: `{data.manifest or NOTHING}`.", "")
    if data.labels:
        rows = [(_literal(label), n.get("train", 0), n.get("eval", 0)) for label, n in sorted(data.labels.items())]
        yield from ("Labels are used to evaluate, never to train.", "")
        yield from _table(("Label", "train", "eval"), rows)


def _training(card: Card) -> Iterator[str]:
    training, config = card.training, card.config
    alarms = NOTHING if training.alarms is None else "; ".join(training.alarms.values()) or "none"
    yield from ("## Training procedure", "")
    yield from _table(
        ("", ""),
        [
            ("Steps", f"{training.steps:,} of {training.global_batch:,} images, {training.epochs:,} epochs"),
            ("Initial weights", config.get("encoder.weights") or "random"),
            ("Ran on", f"{training.replicas} replicas, {training.strategy}"),
            ("Key batch normalisation", training.key_bn),
            ("Queue, momentum, temperature", " · ".join(str(config.get(f"train.{k}", NOTHING)) for k in _MOCO)),
            ("Learning rate, weight decay", " · ".join(str(config.get(f"train.{k}", NOTHING)) for k in _SGD)),
            ("Final loss", number(training.final_loss)),
            ("Pretext top-1", number(training.pretext_top1)),
            ("Alignment", number(training.alignment)),
            ("Alarms at the end", alarms),
        ],
    )


_MOCO = ("queue", "momentum", "temperature")
_SGD = ("learning_rate", "weight_decay")


def _evaluation(card: Card) -> Iterator[str]:
    evaluation = card.evaluation
    held_out = card.data.counts.get("eval", 0)
    yield from ("## Evaluation", "")
    yield f"On {held_out:,} held-out images; in brackets 95 % intervals, where there are any. {NOTHING}: not measured."
    yield ""
    columns: Sequence[tuple[str, str]] = (
        ("untrained", "untrained network"),
        ("pixels", "raw pixels"),
        ("baseline", "last blessed"),
    )
    used = [(key, title) for key, title in columns if any(getattr(m, key) is not None for m in evaluation.metrics)]
    yield from _table(
        ("Metric", "this model", *(title for _, title in used)),
        [_metric_row(metric, [key for key, _ in used]) for metric in evaluation.metrics],
    )
    yield from _table(
        ("Class", "eval images", "recall by kNN", "the others mostly taken for"), map(_recall_row, evaluation.recall)
    )
    outcome = {True: "holds", False: "**broken**", None: "does not apply"}
    rules = [(_literal(rule.text), outcome[rule.holds]) for rule in evaluation.rules]
    yield from _table(("Rule of the blessing", ""), rules)
    if evaluation.notes:
        yield from (*(f"- {_plain(note)}" for note in evaluation.notes), "")


def _metric_row(metric: Metric, columns: Sequence[str]) -> tuple[str, ...]:
    return (metric.title, figure(metric.trained), *(figure(getattr(metric, column)) for column in columns))


def _recall_row(recall: Recall) -> tuple[Any, ...]:
    share = figure(Figure(recall.value, recall.low, recall.high))
    return (
        _literal(recall.label),
        recall.images,
        share,
        None if recall.taken_for is None else _literal(recall.taken_for),
    )


def _technical(card: Card) -> Iterator[str]:
    lineage = card.lineage
    yield from ("## Versions, code and lineage", "")
    yield from _table((_PACKAGES, ""), sorted(card.versions.items()))
    yield from _table(("Sources of", "fingerprint"), [(name, f"`{code}`") for name, code in sorted(card.code.items())])
    ids = [(key, _identity(artifact)) for key, artifact in sorted(lineage.artifacts.items())]
    yield from _table(
        ("ML Metadata", ""),
        [
            ("pipeline", lineage.pipeline),
            ("run", lineage.run),
            ("execution that wrote this card", lineage.execution),
            *ids,
        ],
    )
    yield from ("<details><summary>All settings</summary>", "")
    rows = [(f"`{key}`", _literal(json.dumps(value, ensure_ascii=False))) for key, value in sorted(card.config.items())]
    yield from _table(("Setting", ""), rows)
    yield "</details>"


def _identity(artifact: Artifact) -> str:
    number_of = NOTHING if artifact.id is None else f"{artifact.type} {artifact.id}"
    return f"{number_of} ({artifact.name})" if artifact.name else number_of


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    if lines:
        yield from (f"| {' | '.join(map(_cell, head))} |", "|---" * len(head) + "|", *lines, "")


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return NOTHING if value is None else _text(str(value)).replace("|", "\\|")


def _literal(text: str) -> str:
    """What is to be read as it stands, whatever Markdown has in mind with it; a cell escapes its own bars."""
    return re.sub(r"([\\`*_\[\]~#])", r"\\\1", text)


def _text(text: str) -> str:
    """On one line, and without what Markdown would take for HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


def _plain(text: str) -> str:
    """Words that hold names from elsewhere, such as labels: on one line, and as they stand."""
    return _text(_literal(text))
