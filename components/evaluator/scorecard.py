"""From the outcomes of eval images to figures with intervals, and from those to the rules. Pure NumPy.

Of every representation (the encoder's embedding; `random_init_`: of the same network untrained; `pixel_`: of the pixels
themselves) and of the last blessed model's embedding:

| metric | what it is | source |
|---|---|---|
| knn_top1, knn_top5 | share of eval images whose class has the most votes, or is among the five with the most, of | |
| | the k nearest train images, each weighted exp(cosine similarity / T) | arXiv 1805.01978, 3.4 |
| linear_top1, linear_top5 | the same of a linear classifier fitted to the frozen train embeddings | 1911.05722, 4.1 |
| recall_at_1, _5, _10 | share of eval images one of whose k nearest train images has their label | 1511.06452, 6 |
| the rest | see components.evaluator.label_free | |

Besides: majority_top1, the share that the train split's most frequent label would find; knn_gain, the paired difference
of knn_top1 and random_init_knn_top1; score, by which models are compared (see components.evaluator.rules), with its
paired differences score_gain from the untrained encoder's and score_change from the last blessed model's, and the p of
both. In a slice of one label knn_top1 is that class's recall.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from components.evaluator import label_free, rules
from components.evaluator.config import EvaluateConfig
from components.evaluator.outcomes import BASELINE, EMBEDDING, HITS, NO_LABEL, PREFIXES, REPRESENTATIONS
from components.evaluator.resampling import NOTHING, Estimate, mean_estimates, sign_test
from components.evaluator.rules import RULES, Findings, Rule

OF_A_MODEL = (*HITS, *label_free.NAMES, "score")
OF_THE_CANDIDATE = (
    *(f"{prefix}{name}" for prefix in PREFIXES.values() for name in (*HITS, *label_free.NAMES)),
    "majority_top1",
    "knn_gain",
    "score",
    "score_gain",
    "score_change",
)
WITH_INTERVAL = frozenset(OF_THE_CANDIDATE)
COUNTS = ("bank_images", "query_images")
P_VALUES = ("score_gain_p", "score_change_p")
PASSED = "rules_passed"
METRICS = (*OF_THE_CANDIDATE, *P_VALUES, *COUNTS, *RULES, PASSED)
_NAN = float("nan")
_KNN, _CONSISTENCY = "knn_top1", "neighbour_consistency"
_WORDS = {_KNN: "kNN", _CONSISTENCY: "neighbour consistency"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Vectors on which the label-free metrics are measured.

    Attributes:
        rows: int64 [n], which of the slice's images they are of.
        image: float32 [n, D], of length 1.
        first, second: float32 [n, D], of two views of each; None where the export has none.
    """

    rows: NDArray[np.int64]
    image: NDArray[np.float32]
    first: NDArray[np.float32] | None
    second: NDArray[np.float32] | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of both splits as a whole.

    Attributes:
        classes: labels, sorted; an image's label is an index into them.
        bank_counts, query_counts: int64 [C], images of each class in the train and in the eval split.
        bank_images, query_images: that were measured.
        finite: bool [representations], whether all vectors of both splits are.
        widths: int64 [representations], dimensions.
        leak: what the alarm says, empty if it is silent, None where the export does not say.
        has_baseline: whether there is a last blessed model.
        unsliced: columns that slices should be made by, and that no eval image has.
    """

    classes: tuple[str, ...]
    bank_counts: NDArray[np.int64]
    query_counts: NDArray[np.int64]
    bank_images: int
    query_images: int
    finite: NDArray[np.bool_]
    widths: NDArray[np.int64]
    leak: str | None
    has_baseline: bool
    unsliced: tuple[str, ...]

    @property
    def labels_meet(self) -> bool:
        """Whether an eval image has a label of the train split: else none could be found, by whatever encoder."""
        return bool(np.any((self.bank_counts > 0) & (self.query_counts > 0)))


@dataclasses.dataclass(frozen=True)
class Slice:
    """Eval images, in an order that tells nothing.

    Attributes:
        labels: int64 [N].
        predicted: int64 [N], by kNN of the candidate's embedding.
        hits: float32 [N, representations, len(HITS)], see components.evaluator.outcomes.
        finite: bool [N, representations].
        samples: by representation.
        facts: of both splits; None for a slice that is not the whole.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    hits: NDArray[np.float32]
    finite: NDArray[np.bool_]
    samples: Mapping[str, Sample]
    facts: Facts | None


@dataclasses.dataclass(frozen=True)
class Scorecard:
    """Figures of a slice.

    Attributes:
        candidate: an estimate for each of METRICS; p, counts and rules have no interval.
        baseline: for each of OF_A_MODEL.
        rules: with their words; empty for a slice that is not the whole.
        notes: what else should be known of the data.
    """

    candidate: Mapping[str, Estimate]
    baseline: Mapping[str, Estimate]
    rules: tuple[Rule, ...]
    notes: tuple[str, ...]


def score(images: Slice, config: EvaluateConfig) -> Scorecard:
    """Measures a slice and, if it is the whole, applies the rules."""
    finite = np.all(images.finite, axis=0) if images.facts is None else images.facts.finite
    by_name: dict[str, dict[str, Estimate]] = {}
    shared: dict[str, NDArray[np.float64]] = {}
    for number, name in enumerate(REPRESENTATIONS):
        figures = dict(zip(HITS, mean_estimates(images.hits[:, number]), strict=True))
        of_sample, shared[name] = _label_free(images.samples.get(name), len(images.labels))
        by_name[name] = figures | of_sample if finite[number] else {}
    basis = _KNN if _labels_tell(images) else _CONSISTENCY
    scores = {
        name: (images.hits[:, number, HITS.index(_KNN)].astype(np.float64) if basis == _KNN else shared[name])
        if finite[number]
        else np.full(len(images.labels), np.nan)
        for number, name in enumerate(REPRESENTATIONS)
    }
    candidate = {
        f"{prefix}{name}": estimate for key, prefix in PREFIXES.items() for name, estimate in by_name[key].items()
    }
    candidate |= _comparisons(scores, basis)
    baseline = by_name[BASELINE] | _mean("score", scores[BASELINE])
    judged: tuple[Rule, ...] = ()
    notes: tuple[str, ...] = ()
    if images.facts is not None:
        candidate |= _of_the_whole(images, images.facts)
        baseline |= {name: candidate[name] for name in COUNTS}
        measured = len(images.samples[EMBEDDING].rows) if EMBEDDING in images.samples else 0
        judged = tuple(rules.judge(_findings(candidate, baseline, images.facts, basis, measured), config))
        notes = tuple(_notes(images.facts))
    candidate |= {rule.name: _figure(_NAN if rule.holds is None else float(rule.holds)) for rule in judged}
    if judged:
        candidate[PASSED] = _figure(float(all(rule.holds is not False for rule in judged)))
    return Scorecard(
        {name: candidate.get(name, NOTHING) for name in METRICS},
        {name: baseline.get(name, NOTHING) for name in (*OF_A_MODEL, *COUNTS)},
        judged,
        notes,
    )


def confusion(images: Slice) -> NDArray[np.int64]:
    """How many eval images of each class kNN takes for which: int64 [C actual, C predicted]; only for the whole."""
    assert images.facts is not None
    count = len(images.facts.classes)
    asked = (images.labels != NO_LABEL) & (images.predicted != NO_LABEL)
    cells = images.labels[asked] * count + images.predicted[asked]
    return np.bincount(cells, minlength=count * count).reshape(count, count)


def _figure(value: float) -> Estimate:
    return Estimate(value, _NAN, _NAN)


def _labels_tell(images: Slice) -> bool:
    """Whether kNN was asked, and could have been wrong."""
    asked = bool(np.isfinite(images.hits[:, :, 0]).any())
    return asked and (images.facts is None or int(np.count_nonzero(images.facts.bank_counts)) > 1)


def _label_free(sample: Sample | None, images: int) -> tuple[dict[str, Estimate], NDArray[np.float64]]:
    """The label-free figures of one representation, and the shared neighbours of each of the slice's images."""
    shared = np.full(images, np.nan)
    if sample is None or not np.isfinite(sample.image).all():
        return {}, shared
    figures = label_free.geometry_estimates(sample.image)
    if sample.first is None or sample.second is None:
        return figures, shared
    of_views, shared[sample.rows] = label_free.view_estimates(sample.image, sample.first, sample.second)
    return figures | of_views, shared


def _mean(name: str, values: NDArray[np.float64]) -> dict[str, Estimate]:
    return dict(zip((name,), mean_estimates(values[:, None]), strict=True))


def _comparisons(scores: Mapping[str, NDArray[np.float64]], basis: str) -> dict[str, Estimate]:
    own, untrained, baseline = scores[EMBEDDING], scores["untrained_embedding"], scores[BASELINE]
    columns = np.stack([own, own - untrained, own - baseline], axis=1)
    figures = dict(zip(("score", "score_gain", "score_change"), mean_estimates(columns), strict=True))
    figures["score_gain_p"] = _figure(sign_test(own, untrained))
    if np.isfinite(baseline).any():
        figures["score_change_p"] = _figure(sign_test(own, baseline))
    if basis == _KNN:
        figures["knn_gain"] = figures["score_gain"]
    return figures


def _of_the_whole(images: Slice, facts: Facts) -> dict[str, Estimate]:
    figures = {"bank_images": _figure(facts.bank_images), "query_images": _figure(facts.query_images)}
    labelled = images.labels[images.labels != NO_LABEL]
    if facts.bank_counts.any() and len(labelled):
        right = (labelled == int(np.argmax(facts.bank_counts))).astype(np.float64)
        figures |= _mean("majority_top1", right)
    return figures


def _findings(
    candidate: Mapping[str, Estimate], baseline: Mapping[str, Estimate], facts: Facts, basis: str, measured: int
) -> Findings:
    def value(name: str) -> float:
        return candidate.get(name, NOTHING).value

    own = REPRESENTATIONS.index(EMBEDDING)
    return Findings(
        train_images=facts.bank_images,
        eval_images=facts.query_images,
        finite=bool(facts.finite[own]),
        spread=value("embedding_std_relative"),
        rank=value("effective_rank"),
        possible_rank=min(measured, int(facts.widths[own])),
        score_name=_WORDS[basis],
        score=value("score"),
        untrained=value(f"{PREFIXES['untrained_embedding']}{basis}"),
        gain=candidate["score_gain"],
        gain_p=value("score_gain_p"),
        has_baseline=facts.has_baseline,
        baseline=baseline["score"].value,
        change=candidate["score_change"],
        change_p=value("score_change_p"),
        leak=facts.leak,
    )


def _notes(facts: Facts) -> list[str]:
    notes = [
        f"no eval image has {column}: evaluate.slices asks for figures of its values, and there are none"
        for column in (facts.unsliced if facts.query_images else ())
    ]
    if facts.bank_counts.any() and facts.query_counts.any() and not facts.labels_meet:
        told = "no eval image has a label of the train split: labels say nothing, and two views are compared instead"
        return [*notes, told]
    for here, there, split, text in (
        (facts.bank_counts, facts.query_counts, "eval", "nothing is known of how well they are found"),
        (facts.query_counts, facts.bank_counts, "train", "they count as not found"),
    ):
        missing = [name for name, count, other in zip(facts.classes, here, there, strict=True) if count and not other]
        if missing and there.any():
            notes.append(f"no {split} image of {_listed(missing)}: {text}")
    return notes


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5:,} more labels"
