"""What must be known of all images before any is judged: how many, of which labels, where the samples end. On Beam."""

import bisect
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import apache_beam as beam
import numpy as np
from numpy.typing import NDArray

from components.evaluator.config import EvaluateConfig
from components.evaluator.outcomes import NO_LABEL, REPRESENTATIONS, Views
from components.evaluator.scorecard import Facts

_RANK_BITS = 63  # what Beam encodes as an integer
_BITS = 16  # of a rank that samples are cut by
_GROUPS = ("train", "eval", "labelled_train")
LABEL = "image/label"


class Image(NamedTuple):
    """One embedded image.

    Attributes:
        key: its SHA-256 in hexadecimal.
        in_bank: whether it is of the train split.
        label: None without.
        features: those that slices are made by and that it has; none of an image in the bank.
        views: of each representation; vectors of length 1, NaN if they were not finite.
        leak: what the export says of the alarm, None if nothing.
    """

    key: bytes
    in_bank: bool
    label: str | None
    features: Mapping[str, NDArray]
    views: Mapping[str, Views]
    leak: str | None

    @property
    def rank(self) -> int:
        """Orders images by a hash of 63 bits: another than the image's own, whose first bits make the split."""
        return int.from_bytes(hashlib.sha256(b"scorecard" + self.key).digest()[:8], "big") >> 1


@dataclasses.dataclass
class Tally:
    """Counts of images.

    Attributes:
        ranks: of each of _GROUPS, how many images have a rank with these first bits: int64 [2 ** _BITS].
        bank, queries: images of each label.
        broken: representations with a vector that is not finite.
        widths: dimensions of each representation.
        leaks: what exports say.
        columns: of those that slices are made by, which eval images have.
    """

    ranks: dict[str, NDArray[np.int64]] = dataclasses.field(
        default_factory=lambda: {group: np.zeros(1 << _BITS, np.int64) for group in _GROUPS}
    )
    bank: Counter[str] = dataclasses.field(default_factory=Counter)
    queries: Counter[str] = dataclasses.field(default_factory=Counter)
    broken: set[str] = dataclasses.field(default_factory=set)
    widths: dict[str, int] = dataclasses.field(default_factory=dict)
    leaks: set[str | None] = dataclasses.field(default_factory=set)
    columns: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Census:
    """What is known of all images.

    Attributes:
        facts: for the rules.
        ends: rank below which an image belongs to the sample: of the bank, the queries, the linear probe's images and
            those that geometry is measured on.
    """

    facts: Facts
    ends: Mapping[str, int]

    def label(self, image: Image) -> int:
        """The index of an image's label, NO_LABEL without."""
        return NO_LABEL if image.label is None else bisect.bisect_left(self.facts.classes, image.label)


class TakeCensus(beam.CombineFn):
    """Images to a Census. Samples are cut by the first bits of a rank, so that they are the same in any order."""

    def __init__(self, config: EvaluateConfig, has_baseline: bool) -> None:
        """Args:
        config: its limits.
        has_baseline: whether there is a last blessed model.
        """
        self._config, self._has_baseline = config, has_baseline

    def create_accumulator(self) -> Tally:
        """Of no images."""
        return Tally()

    def add_input(self, accumulator: Tally, element: Image) -> Tally:
        """Counts an image."""
        split = "train" if element.in_bank else "eval"
        groups = (split, "labelled_train") if element.in_bank and element.label is not None else (split,)
        for group in groups:
            accumulator.ranks[group][element.rank >> (_RANK_BITS - _BITS)] += 1
        if element.label is not None:
            (accumulator.bank if element.in_bank else accumulator.queries)[element.label] += 1
        for name, views in element.views.items():
            accumulator.widths[name] = len(views.image)
            if not all(vector is None or np.isfinite(vector).all() for vector in views):
                accumulator.broken.add(name)
        accumulator.leaks.add(element.leak)
        accumulator.columns |= element.features.keys()
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[Tally]) -> Tally:
        """Adds counts up."""
        total = Tally()
        for one in accumulators:
            for group in _GROUPS:
                total.ranks[group] += one.ranks[group]
            total.bank += one.bank
            total.queries += one.queries
            total.broken |= one.broken
            total.widths |= one.widths
            total.leaks |= one.leaks
            total.columns |= one.columns
        return total

    def extract_output(self, accumulator: Tally) -> Census:
        """The census."""
        config, ranks = self._config, accumulator.ranks
        ends = {
            "bank": _end(ranks["train"], config.max_bank),
            "queries": _end(ranks["eval"], config.max_queries),
            "probe": _end(ranks["labelled_train"], config.linear_probe_images),
            "geometry": _end(ranks["eval"], min(config.max_geometry, config.max_queries)),
        }
        classes = tuple(sorted(accumulator.bank.keys() | accumulator.queries.keys()))
        # Of unlabelled images it is told elsewhere that they are.
        expected = {LABEL} if not accumulator.bank and not accumulator.queries else set()
        facts = Facts(
            classes=classes,
            bank_counts=np.array([accumulator.bank[name] for name in classes], np.int64),
            query_counts=np.array([accumulator.queries[name] for name in classes], np.int64),
            bank_images=_below(ranks["train"], ends["bank"]),
            query_images=_below(ranks["eval"], ends["queries"]),
            finite=np.array([name not in accumulator.broken for name in REPRESENTATIONS]),
            widths=np.array([accumulator.widths.get(name, 0) for name in REPRESENTATIONS]),
            leak=" ".join(sorted(filter(None, accumulator.leaks))) if accumulator.leaks - {None} else None,
            has_baseline=self._has_baseline,
            unsliced=tuple(name for name in config.slices if name not in accumulator.columns | expected),
        )
        return Census(facts, ends)


def _end(histogram: NDArray[np.int64], limit: int) -> int:
    """The rank below which at most `limit` images lie."""
    bins = int(np.searchsorted(np.cumsum(histogram), limit, side="right"))
    return bins << (_RANK_BITS - _BITS)


def _below(histogram: NDArray[np.int64], end: int) -> int:
    return int(histogram[: end >> (_RANK_BITS - _BITS)].sum())
