"""The working directory of a run; light, so that what cannot be one is refused before anything heavy is imported."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline import source
from trainer_module.errors import UserError

_OWN = ("artifacts", "checkpoints", "serving")  # what a run makes there
_GLOB = re.compile(r"[][*?\\]")  # TensorFlow and Beam take the names of a run's files for patterns


def check(workdir: str) -> None:
    """Refuses a folder that cannot be written, or whose name some library of a run cannot bear.

    Raises:
        UserError: it is remote, a file, not writable, or has a name that is no UTF-8 or a pattern.
    """
    if not workdir.strip():
        raise UserError("--workdir is empty; name a folder, e.g. --workdir ./run")
    if "://" in workdir:
        raise UserError(f"--workdir {workdir}: must be a folder on this machine, e.g. --workdir ./run")
    try:
        path = Path(workdir).expanduser().absolute()
        path.resolve()
    except RuntimeError as error:  # no such user, or links that go round in a circle
        raise UserError(f"--workdir {workdir}: {error}; name another folder") from error
    _check_name(workdir, str(path))
    if path.is_symlink() and not path.exists():
        raise UserError(f"--workdir {workdir}: is a link to a folder that is missing; make it, or name another")
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir {workdir}: is a file; name a folder")
    existing = _existing(path)
    if not existing.is_dir():
        raise UserError(f"--workdir {workdir}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir {workdir}: {existing} is not writable; choose another folder or change its rights")


def check_apart(workdir: str, images: str) -> None:
    """Refuses a folder that a run would take for images.

    Args:
        workdir: see `check`, which comes first.
        images: a source that is there, as `--images` names it.

    Raises:
        UserError: the source reads what lies in the folder, directly or by links.
    """
    if "://" in images:
        return
    folder = Path(workdir).expanduser().resolve()
    if _is_named(folder, images):
        raise UserError(
            f"--workdir {workdir}: lies inside --images {images}, so a run would read its own files as images; "
            "choose a folder outside"
        )
    if link := _way_to(folder, images):
        raise UserError(
            f"--workdir {workdir}: {link} in --images {images} leads there, so a run would read its own files as "
            "images; remove that link, or choose another folder"
        )


@contextlib.contextmanager
def opened(workdir: str, option: str = "--workdir") -> Iterator[Path]:
    """Makes a working directory if it is missing, and keeps other runs out of it for the time of the context.

    The lock goes with the process, so a killed run leaves none behind.

    Args:
        workdir: its path.
        option: by which the user names it.

    Raises:
        UserError: another run uses it, or it cannot be made.
    """
    home = Path(workdir).expanduser().absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # what /proc and its like say of a folder that they will not have
        raise UserError(f"{option} {workdir}: no folder can be made there; name another") from error
    with (home / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run uses {home}; wait for it, or give another {option}") from None
        yield home


def _check_name(workdir: str, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise UserError(f"--workdir {shown}: its name is not valid UTF-8; name another folder") from None
    if found := _GLOB.search(path):
        raise UserError(
            f"--workdir {workdir}: {found[0]} in {path} makes it a pattern to the libraries that read there; name a "
            f"folder without {found[0]}"
        )


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above that there is."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _is_named(folder: Path, images: str) -> bool:
    """Whether a source, by its words, takes in a folder, which need not exist yet."""
    src = Path(os.path.expanduser(images)).absolute()
    if src.exists():
        return folder.is_relative_to(src.resolve())
    depth = next((at for at, part in enumerate(src.parts) if re.search(r"[*?\[{]", part)), len(src.parts))
    base = Path(*src.parts[:depth]).resolve()
    if not folder.is_relative_to(base):
        return False
    # A glob's matches that are folders are read whole, so a match above the folder counts.
    pattern = re.sub(r"\{.*?\}", "*", str(base.joinpath(*src.parts[depth:])))
    return "**" in pattern or any(above.match(pattern) for above in (folder, *folder.parents))


def _way_to(folder: Path, images: str) -> str | None:
    """How a walk through a source's folders comes to a working folder, or to what a run makes in it; links followed."""
    there, own = str(_existing(folder)), [str(folder / name) for name in _OWN]
    waiting = [(os.path.realpath(start), start) for start in source.folders(images)]
    seen: set[str] = set()
    while waiting:
        place, way = waiting.pop()
        if place == there or any(place == made or place.startswith(f"{made}/") for made in own):
            return way
        if place not in seen:
            seen.add(place)
            waiting += _below(place, way)
    return None


def _below(place: str, way: str) -> Iterator[tuple[str, str]]:
    """The folders in a folder, hidden ones left out as ingestion leaves them out, and how a user calls them."""
    try:
        entries = os.scandir(place)
    except OSError:  # ingestion refuses it in its own words
        return
    with entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                yield (os.path.realpath(entry.path) if entry.is_symlink() else entry.path), f"{way}/{entry.name}"
