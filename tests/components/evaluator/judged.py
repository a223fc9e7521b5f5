"""Embeddings to a slice by plain NumPy: an independent reading of what the extractor does on Beam."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from components.evaluator import linear_probe
from components.evaluator.config import EvaluateConfig
from components.evaluator.outcomes import HITS, NO_LABEL, REPRESENTATIONS, hits_of, vote
from components.evaluator.scorecard import Facts, Sample, Slice
from trainer_module.config import KeyBnConfig, KeyBnMode, TrainConfig, WatchConfig
from trainer_module.knn import unit
from trainer_module.moco import Metrics
from trainer_module.watch import Result, Watch


def judged(
    vectors: dict[str, np.ndarray],
    labels: list[str | None],
    in_bank: np.ndarray,
    config: EvaluateConfig,
    views: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
    leak: str | None = "",
    unsliced: tuple[str, ...] = (),
) -> Slice:
    """The whole eval split: vectors [N, .] and views of them by representation, both splits together."""
    vectors = {name: half(value) for name, value in vectors.items()}
    views = {name: (half(first), half(second)) for name, (first, second) in (views or {}).items()}
    classes = sorted({label for label in labels if label is not None})
    coded = np.array([NO_LABEL if label is None else classes.index(label) for label in labels], np.int64)
    bank, queries = in_bank & (coded >= 0), ~in_bank
    count = int(queries.sum())
    hits = np.full((count, len(REPRESENTATIONS), len(HITS)), np.nan, np.float32)
    predicted = np.full(count, NO_LABEL)
    for number, name in enumerate(REPRESENTATIONS):
        if name in vectors and bank.any() and np.isfinite(vectors[name]).all():
            found = _found(vectors[name], coded, bank, queries, config)
            hits[coded[queries] >= 0, number] = found[0][coded[queries] >= 0]
            predicted = found[1] if name == "embedding" else predicted
    if not set(coded[bank]) & set(coded[queries]):
        hits[:] = np.nan
    samples = {
        name: Sample(np.arange(count), value[queries], *(view[queries] for view in views.get(name, ())))
        if name in views
        else Sample(np.arange(count), value[queries], None, None)
        for name, value in vectors.items()
    }
    finite = np.array([name not in vectors or bool(np.isfinite(vectors[name]).all()) for name in REPRESENTATIONS])
    facts = Facts(
        classes=tuple(classes),
        bank_counts=np.bincount(coded[bank], minlength=len(classes)).astype(np.int64),
        query_counts=np.bincount(coded[queries & (coded >= 0)], minlength=len(classes)).astype(np.int64),
        bank_images=int(in_bank.sum()),
        query_images=count,
        finite=finite,
        widths=np.array([vectors[name].shape[1] if name in vectors else 0 for name in REPRESENTATIONS]),
        leak=leak,
        has_baseline="baseline" in vectors,
        unsliced=unsliced,
    )
    return Slice(coded[queries], predicted, hits, np.tile(finite, (count, 1)), samples, facts)


def trained_so(folder: Path, pretext: float, knn: Sequence[float]) -> Result:
    """What the trainer's own watch says of a training with this pretext accuracy and these kNN measurements."""
    epochs, measured = len(knn), iter(knn)
    watching = WatchConfig(knn_epochs=1)
    config = TrainConfig(global_batch=8, log_steps=2, key_bn=KeyBnConfig(KeyBnMode.none), watch=watching)
    watch = Watch(0, 4 * epochs, 4, config, folder, knn=lambda: next(measured))
    for done in range(1, 4 * epochs + 1):
        watch.see(done, Metrics(*(0.5 for _ in Metrics._fields))._replace(pretext_top1=pretext))
    return watch.result()


def half(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, rounded to float16."""
    return unit(vectors).astype(np.float16).astype(np.float32)


def _found(
    vectors: np.ndarray, coded: np.ndarray, bank: np.ndarray, queries: np.ndarray, config: EvaluateConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Hits and predictions of every query by brute force."""
    similarity = vectors[queries].astype(np.float64) @ vectors[bank].T.astype(np.float64)
    order = np.argsort(-similarity, axis=1, kind="stable")
    probe = linear_probe.fit(vectors[bank], coded[bank]) if config.linear_probe else None
    hits, predicted = [], []
    for row, near in enumerate(order):
        labels = coded[bank][near]
        voted = vote(similarity[row, near], labels, config.knn_k, config.knn_temperature, 5)
        ranked = None if probe is None else probe.ranking(vectors[queries][row][None], 5)[0]
        hits.append(hits_of(coded[queries][row], voted, labels, ranked))
        predicted.append(voted[0])
    return np.array(hits).reshape(-1, len(HITS)), np.array(predicted)
