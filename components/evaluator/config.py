"""What the evaluation measures and what it asks of a model before it is blessed."""

import dataclasses
import enum


class MissingBaseline(enum.Enum):
    """What is done where the files of the last blessed model are gone."""

    refuse = "refuse"  # the evaluation stops, since nothing could be compared
    skip = "skip"  # the latest blessed model whose files are there is taken, or none


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Metrics of the embeddings and the rules of the blessing.

    Attributes:
        knn_k: neighbours that vote (200 in arXiv 1805.01978); at most as many as the bank holds.
        knn_temperature: T of a neighbour's weight exp(similarity / T) (0.1 in arXiv 1805.01978).
        min_embedding_std: least spread of the unit embeddings, as a share of 1 / sqrt(D), the spread of vectors
            that are uniform on the sphere (arXiv 2011.10566, figure 2). A collapsed encoder has 0.
        min_effective_rank: least effective rank of the embeddings (RankMe, arXiv 2210.02885); at most half of what
            the number of images and of dimensions allows is asked for. One direction alone has 1.
        min_gain: the score must exceed that of the same encoder untrained by more than this, with the whole interval
            of the gain. Below 0 no gain is asked for.
        gain_significance: two-sided p that the paired test of that gain must be below; small, since of many trainings
            one may be lucky.
        tolerance: the score may fall below the last blessed model's by this much, and less than proven to be within it
            only where the paired test does not say that it fell; see components.evaluator.rules. 1 accepts any.
        significance: two-sided p below which the paired test says that a model is worse than the last blessed one.
        missing_baseline: see MissingBaseline.
        slices: features of the examples, each of whose values gets metrics of its own.
        linear_probe: whether a logistic regression is trained on the frozen embeddings (labelled sets).
        linear_probe_images: most images of the train split that the linear probe is trained on, chosen by their hash.
        max_bank: most images of the train split that are kept as the bank, chosen by their hash.
        max_queries: most images of the eval split that are kept, chosen by their hash.
        max_geometry: most images of the eval split on which the metrics that need no labels are measured, chosen by
            their hash.
    """

    knn_k: int = 200
    knn_temperature: float = 0.1
    min_embedding_std: float = 0.02
    min_effective_rank: float = 2.0
    min_gain: float = 0.0
    gain_significance: float = 0.001
    tolerance: float = 0.02
    significance: float = 0.05
    missing_baseline: MissingBaseline = MissingBaseline.refuse
    slices: tuple[str, ...] = ("image/label",)
    linear_probe: bool = True
    linear_probe_images: int = 10_000
    max_bank: int = 2_000_000
    max_queries: int = 50_000
    max_geometry: int = 5_000
