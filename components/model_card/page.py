"""The picture page of a model's card: one HTML file that needs no network, no script and no other file."""

import dataclasses
import html
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from components.model_card import pictures, plots
from components.model_card.card import MARKDOWN_FILE, Card, Pictures, Recall
from components.model_card.markdown import figure
from components.model_card.pictures import Split
from trainer_module.alarms import Interval

THUMBNAIL = 80  # pixels
_MAP_THUMBNAIL = 30
_MAP_GAP = 0.1  # between two of its images, as a share of its side
_MOST_POINTS_OF_A_CURVE = 500


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much the page shows.

    Attributes:
        queries: whose neighbours are shown.
        neighbours: of each.
        points: on the map.
        classes: with a bar.
    """

    queries: int = 12
    neighbours: int = 8
    points: int = 1000
    classes: int = 40


@dataclasses.dataclass(frozen=True)
class Material:
    """What the page is made from.

    Attributes:
        bank: sample of the train split.
        queries: sample of the eval split, in an order that tells nothing of how well they are embedded.
        recall: of the classes, in the evaluation.
        intervals: of the training.
    """

    bank: Split
    queries: Split
    recall: Sequence[Recall]
    intervals: Sequence[Interval]


def to_html(card: Card, material: Material, limits: Limits = Limits()) -> str:
    """The content of model_card.html; equal arguments give equal texts.

    Args:
        card: of the same model.
        material: what is shown.
        limits: how much of it.
    """
    body = [
        *_head(card, material),
        *_neighbours(material, limits),
        *_map(material, limits),
        *_bars(material, limits),
        *_curves(material),
    ]
    title = html.escape(f"{card.name}: model card in pictures")
    return "\n".join((_BEFORE.replace("TITLE", title), *body, _AFTER))


def shown(material: Material, limits: Limits = Limits()) -> Pictures:
    """How much of the material the page shows, for the card."""
    bank, queries = len(material.bank.embedding), len(material.queries.embedding)
    asked = min(len(material.queries.thumbnails), limits.queries) if bank else 0
    neighbours = min(bank, limits.neighbours) if asked else 0
    return Pictures(bank, queries, asked, neighbours, min(queries + bank, limits.points))


def _head(card: Card, material: Material) -> Iterator[str]:
    evaluation, counts = card.evaluation, card.data.counts
    measured = [metric for metric in evaluation.metrics if metric.trained.measured]
    verdict = "Blessed" if evaluation.blessed else "Not blessed: " + ("; ".join(evaluation.reasons) or "see the card")
    facts = [
        ("network", f"{card.config.get('encoder.name', '')}, {card.encoder.get('dim', '?')} numbers an image"),
        ("images", f"{counts.get('train', 0):,} to train, {counts.get('eval', 0):,} held out"),
        *((metric.title, figure(metric.trained)) for metric in measured[:1]),
        ("licence", card.statement.license or "not stated"),
    ]
    yield f"<h1>{html.escape(card.name)}</h1>"
    yield f"<p><strong>{html.escape(verdict)}.</strong></p>"
    yield "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts) + "</dl>"
    yield f'<p>All figures, limits and lineage: <a href="{MARKDOWN_FILE}">{MARKDOWN_FILE}</a>.</p>'
    if dropped := material.bank.dropped + material.queries.dropped:
        yield f"<p><strong>{dropped:,} embeddings are NaN or infinite</strong>, and are left out below.</p>"


def _neighbours(material: Material, limits: Limits) -> Iterator[str]:
    yield "<h2>Nearest neighbours</h2>"
    bank, queries = material.bank, material.queries
    if not len(queries.embedding) or not len(bank.embedding):
        yield "<p>There are no images to compare.</p>"
        return
    if not queries.thumbnails:
        yield "<p>Images are not shown (<code>card.pictures=false</code>).</p>"
        return
    asked = len(queries.embedding[: limits.queries])
    labelled = any(queries.labels[:asked])
    yield (
        f"<p>{asked:,} of the held-out images, chosen by a hash of their content and not by their result, each with "
        f"the most similar of {len(bank.embedding):,} training images. Below an image: cosine similarity"
        + (", ✓ or ✗ for the same or another class, and the class.</p>" if labelled else ".</p>")
    )
    first = dataclasses.replace(queries, embedding=queries.embedding[:asked])
    rows, similarity = pictures.nearest(bank, first, limits.neighbours)
    yield '<div class="neighbours">'
    for query in range(asked):
        label = queries.labels[query]
        yield '<div class="row">' + _tile(queries.thumbnails[query], "query", "held out", label, "query")
        for row, value in zip(rows[query], similarity[query], strict=True):
            yield _neighbour(bank, int(row), float(value), label)
        yield "</div>"
    yield "</div>"


def _neighbour(bank: Split, row: int, similarity: float, wanted: str | None) -> str:
    label = bank.labels[row]
    if wanted is None or label is None:
        return _tile(bank.thumbnails[row], "", f"{similarity:.2f}", label, "neighbour")
    same = label == wanted
    words = "same class" if same else "another class"
    mark = f'<span class="mark" role="img" aria-label="{words}" title="{words}">{"✓" if same else "✗"}</span>'
    return _tile(bank.thumbnails[row], "same" if same else "other", f"{similarity:.2f}", label, "neighbour", mark)


def _tile(small: Image.Image, kind: str, text: str, label: str | None, alt: str, mark: str = "") -> str:
    name = html.escape(label) if label is not None else ""
    return (
        f'<figure class="{kind}"><div class="frame"><img src="{pictures.data_uri(small)}" width="{small.width}" '
        f'height="{small.height}" alt="{alt}{f", {name}" if name else ""}"></div>'
        f'<figcaption>{mark} {text}<br><span class="label" title="{name}">{name}</span></figcaption></figure>'
    )


def _map(material: Material, limits: Limits) -> Iterator[str]:
    yield "<h2>Map of the embeddings</h2>"
    bank, queries = material.bank, material.queries
    held_out = len(queries.embedding[: limits.points])
    trained = len(bank.embedding[: limits.points - held_out])
    if not held_out + trained:
        yield "<p>There are no images to show.</p>"
        return
    points, method = pictures.project(np.concatenate([queries.embedding[:held_out], bank.embedding[:trained]]))
    labels = [*queries.labels[:held_out], *bank.labels[:trained]]
    thumbnails = [*queries.thumbnails[:held_out], *bank.thumbnails[:trained]]
    shown = pictures.spread(points, _MAP_GAP) if thumbnails else []
    yield (
        f"<p>{held_out + trained:,} images ({held_out:,} held out, {trained:,} of the training images) by {method}: "
        "what lies together looks alike to the encoder; directions and distances across the map mean nothing.</p>"
    )
    small = [(row, pictures.smaller(thumbnails[row], _MAP_THUMBNAIL)) for row in shown]
    yield _plot(plots.draw_map(points, labels, small), f"map of {held_out + trained} embeddings")


def _bars(material: Material, limits: Limits) -> Iterator[str]:
    yield "<h2>Recall of each class</h2>"
    if not material.recall:
        yield "<p>There are no labels in both splits to measure it by.</p>"
        return
    yield (
        "<p>The share of a class's held-out images that weighted kNN among the training images finds; the thin line is "
        "the 95 % interval.</p>"
    )
    bars = sorted(material.recall, key=lambda recall: (-recall.value, recall.label))
    best = bars if len(bars) <= limits.classes else bars[: (limits.classes + 1) // 2]
    worst = [] if len(bars) <= limits.classes else bars[len(bars) - limits.classes // 2 :]
    hidden = len(bars) - len(best) - len(worst)
    yield '<table class="bars"><thead><tr><th scope="col">class</th><th scope="col">images</th>'
    yield '<th scope="col">recall</th><th scope="col" class="wide"></th>'
    yield '<th scope="col">others mostly taken for</th></tr></thead><tbody>'
    yield from map(_bar, best)
    if hidden:
        yield f'<tr><td colspan="5">{hidden:,} of {len(bars):,} classes in between are not shown</td></tr>'
    yield from map(_bar, worst)
    yield "</tbody></table>"


def _bar(recall: Recall) -> str:
    return (
        f'<tr><th scope="row">{html.escape(recall.label)}</th><td>{recall.images:,}</td><td>{recall.value:.2f}</td>'
        f'<td class="wide"><div class="bar" title="{recall.low:.2f} to {recall.high:.2f}">'
        f'<div class="value" style="width:{100 * recall.value:.1f}%"></div>'
        f'<div class="interval" style="left:{100 * recall.low:.1f}%;width:{100 * (recall.high - recall.low):.1f}%">'
        f'</div></div></td><td class="name">{html.escape(recall.taken_for or "")}</td></tr>'
    )


def _curves(material: Material) -> Iterator[str]:
    if not material.intervals:
        return
    every = -(-len(material.intervals) // _MOST_POINTS_OF_A_CURVE)
    # kNN is measured at few of them, which must not fall out.
    kept = [i for n, i in enumerate(material.intervals) if n % every == 0 or np.isfinite(i.knn_top1)]
    yield "<h2>Training</h2>"
    yield _plot(plots.draw_curves(kept), "loss and accuracy over the epochs of the training")


def _plot(svg: str, title: str) -> str:
    return f'<div class="plot" role="img" aria-label="{html.escape(title)}">{svg}</div>'


_BEFORE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>TITLE</title>
<style>
:root { --ink: #1c1e21; --paper: #ffffff; --soft: #5c6470; --line: #d5d9e0; --bar: #3b82c4; --good: #11704f;
  --bad: #b3282d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181d; --soft: #a3abb8; --line: #3a404b; --bar: #4f93d2; --good: #4cc79a;
    --bad: #ff8a80; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: inherit; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; }
dt { color: var(--soft); }
dd { margin: 0; }
.neighbours { overflow-x: auto; }
.row { display: flex; gap: 0.5rem; padding: 0.6rem 0; border-bottom: 1px solid var(--line); }
figure { margin: 0; flex: 0 0 5.6rem; font-size: 0.75rem; line-height: 1.25; }
figure.query { padding-right: 0.7rem; border-right: 2px solid var(--ink); }
.frame { width: 88px; height: 88px; display: flex; align-items: center; justify-content: center; }
figure.same img { outline: 2px solid var(--good); outline-offset: 2px; }
figure.other img { outline: 2px dashed var(--bad); outline-offset: 2px; }
figcaption { margin-top: 0.3rem; color: var(--soft); }
.label { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  color: var(--ink); }
.mark { font-weight: bold; }
figure.same .mark { color: var(--good); }
figure.other .mark { color: var(--bad); }
.plot svg { width: 100%; height: auto; }
table.bars { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
.bars th { text-align: left; font-weight: normal; padding: 0.15rem 0.6rem 0.15rem 0; }
.bars thead th { color: var(--soft); }
.bars td { padding: 0.15rem 0.6rem 0.15rem 0; }
.bars td, .bars thead th { white-space: nowrap; }
.bars td.name { white-space: normal; }
.bars .wide { width: 40%; }
.bar { position: relative; height: 1rem; background: color-mix(in srgb, var(--line) 45%, transparent); }
.value { height: 100%; background: var(--bar); }
.interval { position: absolute; top: 50%; height: 1px; background: var(--ink); }
.interval::before, .interval::after { content: ""; position: absolute; top: -4px; width: 1px; height: 9px;
  background: var(--ink); }
.interval::before { left: 0; }
.interval::after { right: 0; }
</style>
</head>
<body>"""
_AFTER = """</body>
</html>
"""
