"""Small files that a command writes where the user says."""

import os
from pathlib import Path

from trainer_module.errors import UserError


def check(option: str, path: str | None, example: str) -> None:
    """Refuses a place that cannot be written to before anything is computed.

    Args:
        option: that names it.
        path: what was typed; None where nothing was.
        example: a file's name.

    Raises:
        UserError: it is a folder, or its folder is missing or not writable.
    """
    if not path:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: the folder {Path(path).parent} does not exist; make it first")
    if Path(path).is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file, e.g. {option} {Path(path) / example}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: the folder {Path(path).parent} is not writable; choose another")


def write(path: str, text: str) -> None:
    """Writes a file as a whole or not at all."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
