"""Progress of long work, said once and drawn by whoever listens.

The rooms below the command line never print. They report progress as log records on one logger; the command line
attaches a handler that draws a bar (or, where the output is no terminal, plain lines). With no handler, for instance
on a Dataflow worker, the reports are ordinary INFO records. A note is a line of text that stays.
"""

import dataclasses
import logging
from collections.abc import Mapping

LOGGER_NAME = "moco.progress"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where one piece of long work stands.

    Attributes:
        task: what is being done, in the words of the user ("read images", "make views", "train").
        done: units finished so far.
        total: units in all, or None while that is not known.
        unit: plural noun of what is counted ("images", "pairs", "steps").
        figures: further figures to show beside the bar, such as {"loss": 6.31, "images/s": 512.0}.
    """

    task: str
    done: int
    total: int | None
    unit: str
    figures: Mapping[str, float]


def report(task: str, done: int, total: int | None, unit: str, **figures: float) -> None:
    """Reports progress to whoever listens on the logger `moco.progress`.

    Args:
        task: what is being done, see `Progress`.
        done: units finished so far.
        total: units in all, or None while that is not known.
        unit: plural noun of what is counted.
        **figures: further figures to show.
    """
    progress = Progress(task, done, total, unit, figures)
    logging.getLogger(LOGGER_NAME).info("%s: %d of %s %s", task, done, total, unit, extra={"progress": progress})


def begun(task: str) -> None:
    """Tells whoever listens that work has begun of which nothing is counted yet.

    Args:
        task: what is being done.
    """
    logging.getLogger(LOGGER_NAME).info("%s has begun", task, extra={"begun": task})


def note(text: str) -> None:
    """Tells the user one line that matters but stops nothing, as a warning on the same logger.

    Args:
        text: one line, such as "checkpoints/step-00000120 is damaged; training goes on from step 80".
    """
    logging.getLogger(LOGGER_NAME).warning("%s", text, extra={"note": text})
