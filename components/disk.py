"""Space on disks: told before the work where it can be known, and in one line where it runs out in the midst of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from trainer_module.errors import UserError


def check_space(path: str, need: float, what: str, mend: str) -> None:
    """Refuses to start where the disk cannot hold what will be written. Buckets have no end.

    Args:
        path: where it will be written; need not exist yet.
        need: bytes.
        what: will be written, as the subject of a sentence, plural.
        mend: what the user can do.

    Raises:
        UserError: names both figures.
    """
    if "://" in path:
        return
    folder = path
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "."
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"{free / 1e9:.3f} GB are free in {folder} and {what} need {need / 1e9:.3f} GB: {mend}")


def is_full(error: BaseException) -> bool:
    """Whether an error, perhaps wrapped by Beam, which keeps only its text, says that the disk is full."""
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


@contextlib.contextmanager
def fullness_told(path: str) -> Iterator[None]:
    """Says of a disk that is full which folder was being written.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise UserError(f"no space left while writing {path}: free some and run again") from error
        raise
