"""What is told of an exception: its words where they are our own or a model's, else its place alone."""

import logging
import traceback

_LOG = logging.getLogger("moco.serve")
_HEADLINES = ("Graph execution error:",)  # of TensorFlow, above what it has to say


def words(error: Exception) -> str:
    """The first line of an exception that says something; its type where none does."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and line not in _HEADLINES), type(error).__name__)[:200]


def log(error: Exception) -> None:
    """Where a fault of ours was, without its message, which may hold bytes of a request."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in frames)
    _LOG.error("%s at %s", type(error).__name__, places)
