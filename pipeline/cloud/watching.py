"""A run elsewhere, followed until it ends: a line for each change of state, and the failing stage's own error."""

import dataclasses
import enum
import time
from collections.abc import Callable, Sequence


class State(enum.Enum):
    """Of a run or one of its stages, in the words of the user."""

    waiting = "waiting"
    running = "running"
    paused = "paused"
    cancelling = "cancelling"
    succeeded = "succeeded"
    cached = "cached"
    skipped = "skipped"
    cancelled = "cancelled"
    failed = "failed"

    @property
    def ends(self) -> bool:
        """Whether a run stays in it."""
        return self in (State.succeeded, State.cached, State.skipped, State.cancelled, State.failed)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Of a run.

    Attributes:
        name: of the component.
        state: see there.
        seconds: that it took; None while it is not at its end.
        errors: what went wrong, one line each; empty unless it failed.
    """

    name: str
    state: State
    seconds: float | None = None
    errors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Look:
    """A run as it is at one moment.

    Attributes:
        name: of the run.
        state: see there.
        stages: those that have begun or are about to, in the order of their beginning.
        error: of the run itself; empty where there is none.
    """

    name: str
    state: State
    stages: Sequence[Stage] = ()
    error: str = ""


def follow(look: Callable[[], Look], poll: float, say: Callable[[str], None]) -> State:
    """Looks until the run ends.

    Args:
        look: asks for the run.
        poll: seconds between two looks.
        say: is told each line.

    Returns:
        The state in which it ended.
    """
    known: dict[str, State] = {}
    while True:
        now = look()
        for stage in now.stages:
            if known.get(stage.name) != stage.state:
                known[stage.name] = stage.state
                _say_stage(stage, say)
        if known.get("") != now.state:
            known[""] = now.state
            own = f": {now.error}" if now.error and now.state is State.failed else ""
            say(f"{now.name} {now.state.value}{own}")
        if now.state.ends:
            return now.state
        time.sleep(poll)


def _say_stage(stage: Stage, say: Callable[[str], None]) -> None:
    took = "" if stage.seconds is None else f"{stage.seconds:>12,.1f} s"
    say(f"  {stage.name:<17} {stage.state.value:<10}{took}".rstrip())
    for error in stage.errors:
        say(f"    {error}")
