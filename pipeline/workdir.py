"""The working directory of a run; light, so that a second run on it is refused before anything heavy is imported."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from trainer_module.errors import UserError


@contextlib.contextmanager
def opened(workdir: str, option: str = "--workdir") -> Iterator[Path]:
    """Makes a working directory if it is missing, and keeps other runs out of it for the time of the context.

    The lock goes with the process, so a killed run leaves none behind.

    Args:
        workdir: its path.
        option: by which the user names it.

    Raises:
        UserError: another run uses it.
    """
    home = Path(workdir).expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run uses {home}; wait for it, or give another {option}") from None
        yield home
