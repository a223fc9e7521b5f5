"""Space on disks: told before the work where it can be known, and in one line where it runs out in the midst of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from trainer_module.errors import UserError

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


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
        raise UserError(f"{_size(free)} are free in {folder} and {what} need {_size(need)}: {mend}")


def _size(count: float) -> str:
    """Bytes in the largest unit of which there is one at least."""
    unit, name = next(((unit, name) for unit, name in _UNITS if count >= unit), (1.0, "bytes"))
    figure = count / unit
    return f"{figure:,.0f} {name}" if figure >= 100 else f"{figure:.3g} {name}"


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


def flush(folder: str) -> None:
    """Waits until everything in a folder is on the disk, so that not even a power cut leaves empty files there.

    Args:
        folder: on this machine; elsewhere writing is the storage's own business.
    """
    if "://" in folder:
        return
    for inside, _, files in os.walk(folder):
        for file in files:
            with open(os.path.join(inside, file), "rb") as handle:
                os.fsync(handle.fileno())
        flush_entries(inside)


def flush_entries(folder: str) -> None:
    """Waits until what is in a local folder, by name, is on the disk: new files, and what was renamed or removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
