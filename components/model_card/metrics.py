"""Which of the Evaluator's figures are metrics, what they are called, and what stands beside each."""

from collections.abc import Mapping

from components.evaluator.outcomes import PREFIXES
from components.evaluator.scorecard import COUNTS, P_VALUES, PASSED, RULES
from components.model_card.card import Figure, Metric

_UNTRAINED, _PIXELS = PREFIXES["untrained_embedding"], PREFIXES["pixels"]
# What counts, judges or is one of the others under another name; the rules tell of it in words.
_NO_METRICS = frozenset(("score", "score_gain", "score_change", *P_VALUES, *COUNTS, *RULES, PASSED))
_TITLES = {
    "knn_top1": "kNN top-1",
    "knn_top5": "kNN top-5",
    "knn_gain": "kNN top-1 above the untrained network's",
    "linear_top1": "linear probe top-1",
    "linear_top5": "linear probe top-5",
    "recall_at_1": "retrieval recall@1",
    "recall_at_5": "retrieval recall@5",
    "recall_at_10": "retrieval recall@10",
    "majority_top1": "always the most frequent class, top-1",
    "neighbour_consistency": "neighbour consistency of two views",
    "alignment": "alignment of two views",
    "uniformity": "uniformity",
    "effective_rank": "effective rank (RankMe)",
    "embedding_std": "embedding std per dimension",
    "embedding_std_relative": "embedding std as a share of a uniform one",
}


def make_metrics(figures: Mapping[str, Figure], baseline: Mapping[str, Figure]) -> tuple[Metric, ...]:
    """The metrics of a model, each with the same figure of the untrained network, the raw pixels and the last blessed.

    Args:
        figures: by the Evaluator's names; `random_init_…` and `pixel_…` belong to the metric that they end with.
        baseline: of the last blessed model; empty where there was none.
    """
    own = [name for name in figures if name not in _NO_METRICS and not name.startswith((_UNTRAINED, _PIXELS))]
    return tuple(
        Metric(
            name=name,
            title=_TITLES.get(name, name.replace("_", " ")),
            trained=figures[name],
            untrained=figures.get(_UNTRAINED + name),
            pixels=figures.get(_PIXELS + name),
            baseline=baseline.get(name),
        )
        for name in sorted(own, key=_place)
    )


def _place(name: str) -> tuple[int, str]:
    titles = list(_TITLES)
    return (titles.index(name) if name in titles else len(titles), name)
