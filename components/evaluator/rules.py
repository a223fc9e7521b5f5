"""The rules of the blessing, each with its outcome in words. Pure.

A model is blessed when no rule is broken. The score is kNN top-1, or neighbour consistency where labels say nothing
(none, or one class alone).

| rule | it holds when |
|---|---|
| images_passed | there are two eval images and a train image at least |
| finite_passed | every embedding of both splits is finite |
| embedding_std_passed | the spread is at least `min_embedding_std` of a uniform one |
| effective_rank_passed | the effective rank is at least `min_effective_rank`, or half of what is possible |
| gain_passed | the paired interval of score - untrained score is above `min_gain`, and the exact sign test has |
| | p < `gain_significance` (*) |
| not_worse_passed | the paired interval of score - the last blessed model's score, on the same eval images, is above |
| | -`tolerance`; or the change itself is, and the exact sign test does not say that it is a fall (**) |
| leak_passed | the alarm of a leak through batch normalisation does not sound at the end of training |
(*) The interval of a few images is too narrow. The p that is asked for is small, since one of many trainings is enough
to be lucky: of twelve that found nothing, the best passes in less than 1 of 100 cases, on any number of images. With
`min_gain` below 0 no gain is asked for, and no test.
(**) The first is non-inferiority as trials prove it, and what a large eval split decides by. A small one cannot prove
it even of the same model trained again, so there a change within the tolerance will do. A fall beyond the tolerance is
refused whatever p: that noise may explain it is no reason to publish it. The words tell which falls these images show.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from components.evaluator.config import EvaluateConfig
from components.evaluator.resampling import Estimate

RULES = (
    "images_passed",
    "finite_passed",
    "embedding_std_passed",
    "effective_rank_passed",
    "gain_passed",
    "not_worse_passed",
    "leak_passed",
)

_MEASURED = {
    "embedding_std_passed": "the spread",
    "effective_rank_passed": "the effective rank",
    "gain_passed": "the gain over the untrained encoder",
    "not_worse_passed": "the change from the last blessed model",
}
_ROUNDING = 1e-9  # of differences between shares


class Rule(NamedTuple):
    """One rule: whether it holds (None where it does not apply), and what was found, in words."""

    name: str
    holds: bool | None
    text: str


class Findings(NamedTuple):
    """What the rules are judged by.

    Attributes:
        train_images, eval_images: that were measured.
        finite: whether all embeddings are.
        spread: embedding_std_relative.
        rank: effective_rank.
        possible_rank: of so many images and dimensions.
        score_name: what the score is, as a person calls it.
        score, untrained, gain: the score, that of the untrained encoder, and the paired difference.
        gain_p: of the sign test.
        has_baseline: whether there is a last blessed model.
        baseline: its score; NaN where it could not be measured.
        change: the paired difference from it.
        change_p: of the sign test against it.
        leak: what the alarm says, empty if it is silent, None where the export does not say.
    """

    train_images: int
    eval_images: int
    finite: bool
    spread: float
    rank: float
    possible_rank: int
    score_name: str
    score: float
    untrained: float
    gain: Estimate
    gain_p: float
    has_baseline: bool
    baseline: float
    change: Estimate
    change_p: float
    leak: str | None


def judge(found: Findings, config: EvaluateConfig) -> list[Rule]:
    """Applies the rules, in the order of RULES."""
    return list(_judge(found, config))


def _judge(found: Findings, config: EvaluateConfig) -> Iterator[Rule]:
    yield _images(found)
    yield _finite(found)
    hindrance = _hindrance(found)
    if hindrance:
        yield from (Rule(name, None, f"{what} cannot be judged: {hindrance}") for name, what in _MEASURED.items())
    else:
        yield _spread(found, config)
        yield _rank(found, config)
        yield _gain(found, config)
        yield _not_worse(found, config)
    yield _leak(found)


def _finite(found: Findings) -> Rule:
    if not found.train_images + found.eval_images:
        return Rule("finite_passed", None, "there are no embeddings")
    if not found.finite:
        return Rule("finite_passed", False, "some embeddings are NaN or infinite")
    return Rule("finite_passed", True, "all embeddings are finite")


def _hindrance(found: Findings) -> str:
    """Why nothing can be measured, or nothing."""
    if found.eval_images < 2:
        return f"there {'is' if found.eval_images == 1 else 'are'} {_images_of(found.eval_images, 'eval')}"
    return "" if found.finite else "embeddings are not finite"


def _images(found: Findings) -> Rule:
    train, held_out = _images_of(found.train_images, "train"), _images_of(found.eval_images, "eval")
    mend = "add images, or change ingest.eval_fraction"
    if not found.train_images or not found.eval_images:
        empty = "eval" if not found.eval_images else "train"
        return Rule("images_passed", False, f"the {empty} split has no images: {mend}")
    if found.eval_images < 2:
        return Rule("images_passed", False, f"{held_out} is too few to judge an encoder by: {mend}")
    return Rule("images_passed", True, f"judged on {held_out} against {train}")


def _images_of(count: int, split: str) -> str:
    return f"{count:,} {split} image{'' if count == 1 else 's'}"


def _spread(found: Findings, config: EvaluateConfig) -> Rule:
    holds, limit = found.spread >= config.min_embedding_std, config.min_embedding_std
    if holds:
        return Rule(
            "embedding_std_passed", True, f"their spread is {found.spread:.3f} of a uniform one, at least {limit:g}"
        )
    return Rule(
        "embedding_std_passed",
        False,
        f"the embeddings have collapsed: their spread is {found.spread:.4f} of a uniform one, below {limit:g}",
    )


def _rank(found: Findings, config: EvaluateConfig) -> Rule:
    limit = min(config.min_effective_rank, found.possible_rank / 2)
    if found.rank >= limit:
        return Rule("effective_rank_passed", True, f"their effective rank is {found.rank:.1f}, at least {limit:g}")
    text = f"the embeddings have collapsed: their effective rank is {found.rank:.2f}, below {limit:g}"
    return Rule("effective_rank_passed", False, text)


def _gain(found: Findings, config: EvaluateConfig) -> Rule:
    name = found.score_name
    if math.isnan(found.score) or math.isnan(found.untrained):
        what = "untrained encoder's is not finite" if math.isnan(found.untrained) else "images are too few"
        holds = None if config.min_gain < 0 else False
        return Rule("gain_passed", holds, f"{name} cannot be compared with the untrained encoder's: the {what}")
    figures = (
        f"gain {found.gain.value:+.3f}, interval {found.gain.low:+.3f} to {found.gain.high:+.3f}, "
        f"paired p = {_p(found.gain_p, config.gain_significance)}"
    )
    more = f" by more than {config.min_gain:g}" if config.min_gain else ""
    proven = config.min_gain < 0 or found.gain_p < config.gain_significance
    holds = found.gain.low > config.min_gain and proven
    verb = "is above" if holds else "is not proven to be above"
    figures += "" if proven else f", not below evaluate.gain_significance={config.gain_significance:g}"
    return Rule(
        "gain_passed",
        holds,
        f"{name} {found.score:.3f} {verb} the untrained encoder's {found.untrained:.3f}{more}: {figures}",
    )


def _not_worse(found: Findings, config: EvaluateConfig) -> Rule:
    name = found.score_name
    if not found.has_baseline:
        return Rule("not_worse_passed", None, "no blessed model to compare with yet")
    if math.isnan(found.score) or math.isnan(found.baseline):
        text = f"{name} of the last blessed model cannot be measured; evaluate.tolerance=1 goes without the comparison"
        return Rule("not_worse_passed", None if config.tolerance >= 1 else False, text)
    pair = f"the blessed model's {found.baseline:.3f}"
    limit = -config.tolerance - _ROUNDING
    change, p = found.change, f"paired p = {_p(found.change_p, config.significance)}"
    if change.value >= 0:
        text = f"{name} {found.score:.3f} is not below {pair}, {p}; {_power(found, config)}"
        return Rule("not_worse_passed", True, text)
    figures = f"{p}, change {change.value:+.3f}, interval {change.low:+.3f} to {change.high:+.3f}"
    below = f"{name} {found.score:.3f} is below {pair}, {figures}"
    tolerance = f"evaluate.tolerance={config.tolerance:g}"
    if change.value < limit:
        return Rule("not_worse_passed", False, f"{below}, beyond {tolerance}")
    if change.low >= limit:
        return Rule("not_worse_passed", True, f"{below}, proven to be within {tolerance}")
    if found.change_p < config.significance:
        return Rule("not_worse_passed", False, f"{below}, a fall that may be beyond {tolerance}")
    return Rule("not_worse_passed", True, f"{below}, within {tolerance}; {_power(found, config)}")


def _power(found: Findings, config: EvaluateConfig) -> str:
    """The smallest fall that the eval images tell from noise."""
    least = math.floor(math.log2(2 / config.significance)) + 1  # of so many images, all lost: sign test
    seen = max(least / found.eval_images, found.change.value - found.change.low)
    return f"these {found.eval_images:,} images show falls of {min(seen, 1.0):.3f} and more"


def _leak(found: Findings) -> Rule:
    if found.leak is None:
        return Rule("leak_passed", None, "the export says nothing of the leak alarm")
    if found.leak:
        return Rule("leak_passed", False, f"the leak alarm sounded to the end of training: {found.leak}")
    return Rule("leak_passed", True, "no alarm of a leak through batch normalisation")


def _p(value: float, bound: float) -> str:
    """In few digits, but as many as show on which side of a bound it lies."""
    usual = f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"
    texts = (usual, *(f"{value:.{digits}g}" for digits in range(2, 18)))
    return next(text for text in texts if (float(text) < bound) == (value < bound))
