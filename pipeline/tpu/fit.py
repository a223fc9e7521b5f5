"""The largest batch per core that fits a chip's memory, by few compilations: each takes minutes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pipeline.tpu.analysis import Compiled, Refused

_MOST_TRIES = 10  # 8 were too few where memory did not grow in a line
_FINE_ENOUGH = 1 / 16  # of the batch


@dataclasses.dataclass(frozen=True)
class Try:
    """One compilation.

    Attributes:
        batch: images per core.
        needed: bytes of HBM.
        fits: whether it compiled.
    """

    batch: int
    needed: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a search found.

    Attributes:
        tried: in order.
        highest: batch beyond which the queue is too short.
        has: bytes of HBM of a chip.
        stopped: why the search ended early, or "".
    """

    tried: tuple[Try, ...]
    highest: int
    has: int
    stopped: str = ""

    @property
    def largest(self) -> int | None:
        """Batch per core that compiled; None if none did."""
        return max((t.batch for t in self.tried if t.fits), default=None)

    def words(self) -> str:
        """One line: what fits, what does not, what was tried."""
        tried = ", ".join(
            f"{t.batch} {'fits' if t.fits else 'does not'} ({t.needed / 2**30:.1f} GiB)" for t in self.tried
        )
        end = f"; {self.stopped}" if self.stopped else ""
        if self.largest is None:
            return f"no batch fits; tried {tried}{end}"
        limit = "; a larger one needs a longer queue" if self.largest == self.highest else ""
        return f"largest batch per core: {self.largest}{limit}; tried {tried}{end}"

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"largest": self.largest, "tried": [vars(t) for t in self.tried], "stopped": self.stopped}


def largest_batch(
    compile_for: Callable[[int], Compiled | Refused], start: int, step: int, highest: int, has: int
) -> Fit:
    """Searches by the line through the two nearest tries, since memory grows almost linearly with the batch.

    Args:
        compile_for: compiles for a batch per core.
        start: batch to begin with.
        step: batches are multiples of it.
        highest: batch at most.
        has: bytes of HBM of a chip.

    Returns:
        The tries, until the largest that fits and the smallest that does not are a sixteenth of the batch apart.
    """
    tried: list[Try] = []
    highest = highest // step * step
    batch: int | None = min(start, highest)
    while batch and len(tried) < _MOST_TRIES:
        result = compile_for(batch)
        if isinstance(result, Refused) and not result.needed:
            return Fit(tuple(tried), highest, has, f"{batch} does not compile: {result.reason}")
        fits = isinstance(result, Compiled)
        tried.append(Try(batch, result.memory.total if isinstance(result, Compiled) else result.needed, fits))
        if isinstance(result, Refused):
            has = result.available
        batch = _next(tried, step, highest, has)
    return Fit(tuple(tried), highest, has, f"stopped after {_MOST_TRIES} tries" if batch else "")


def _next(tried: list[Try], step: int, highest: int, has: int) -> int | None:
    """The batch to try next; None when it is known well enough."""
    good = max((t.batch for t in tried if t.fits), default=0)
    bad = min((t.batch for t in tried if not t.fits), default=highest + step)
    fine = max(step, int(good * _FINE_ENOUGH) // step * step)
    if bad - good <= fine:
        return None
    guess = _on_the_line(tried, has) // step * step
    if bad > highest:  # nothing has failed yet: do not leap further than the line can be believed
        return max(good + step, min(guess, 8 * good, highest))
    if bad - good < 2 * fine:
        return good + max(1, (bad - good) // step // 2) * step
    return max(good + fine, min(guess, bad - fine))


def _on_the_line(tried: list[Try], has: int) -> int:
    """The batch whose need would be what there is."""
    points = sorted({t.batch: t.needed for t in tried}.items(), key=lambda point: abs(point[1] - has))[:2]
    if len(points) == 1:
        (batch, needed), (other, base) = points[0], (0, 0)
    else:
        (batch, needed), (other, base) = points
    slope = (needed - base) / (batch - other)
    return batch + int((has - needed) / slope) if slope > 0 else batch
