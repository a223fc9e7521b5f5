"""A directory on this machine as a place of publication.

A version is copied into a hidden folder beside the versions and renamed, which is one step on a file system; then
`latest.json` is renamed into place. Changes of `latest.json` take turns by a lock that goes with the process.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from components import disk
from components.pusher import pointer
from components.pusher.pointer import Event, Pointer, Survey, Version
from components.pusher.publisher import is_running
from trainer_module.errors import UserError

_TEMPORARY = ".pushing-"
_LOCK = ".latest.lock"
_TRIES = 5
_STALE_SECONDS = 24 * 3600.0


@dataclasses.dataclass(frozen=True)
class Directory:
    """See the module.

    Attributes:
        base: the path; made when something is published.
    """

    base: str

    def path(self, version: str) -> str:
        """Of a version; of the base itself, where that is a model, as the version "."."""
        return self.base if version == "." else os.path.join(self.base, version)

    def read(self) -> Pointer:
        """The pointer; an empty one where none was written.

        Raises:
            UserError: it is damaged.
        """
        path = os.path.join(self.base, pointer.FILE)
        try:
            with open(path, encoding="utf-8") as file:
                return Pointer.from_json(file.read())
        except (FileNotFoundError, NotADirectoryError):
            return Pointer()
        except ValueError as error:
            raise damaged(path, error) from error

    def update(self, change: Callable[[Pointer], Pointer]) -> Pointer:
        """Changes the pointer in one step, whoever else does so.

        Args:
            change: pure; may raise to leave everything as it is.

        Returns:
            The new pointer.
        """
        with self._locked():
            before = self.read()
            after = change(before)
            if after != before:
                self._write(after)
            return after

    def look(self) -> Survey:
        """What is there."""
        for _ in range(_TRIES):
            now = self.read()
            try:
                names = os.listdir(self.base)
            except (FileNotFoundError, NotADirectoryError):
                names = []
            found = (self._version(number) for number in sorted(filter(pointer.is_number, names), key=int))
            seen = Survey(now, tuple(version for version in found if version))
            # What vanished during the look was given up there first, for another that may not have been there yet.
            if self.read() == now:
                break
        return seen

    def card(self, version: str) -> dict:
        """What a version's card says; empty where it has none."""
        return read_card(self.path(version))

    def sweep(self) -> Survey:
        """Removes what publishers that were killed have left behind, and tells what is there."""
        names = os.listdir(self.base) if os.path.isdir(self.base) else []
        for name in names:
            path = os.path.join(self.base, name)
            with contextlib.suppress(FileNotFoundError):  # another publisher may do the same
                if _is_stale(name, path):
                    shutil.rmtree(path, ignore_errors=True)
        return self.look()

    def stage(self, model_path: str, seen: Survey) -> str:
        """Copies a model to a new version, the highest, which is not in service yet. See `commit`.

        Raises:
            UserError: the directory lies in the model.
        """
        del seen  # others may publish during the copy
        source = os.path.realpath(model_path)
        if os.path.commonpath([source, os.path.realpath(self.base)]) == source:
            raise UserError(f"{self.base} lies in the model {model_path} itself; publish to another place")
        with _made(self.base):
            temporary = self._temporary()
            try:
                shutil.copytree(model_path, temporary)
                os.utime(temporary)  # the copy takes over the model's age, by which it would be taken for stale
                disk.flush(temporary)
                return self._rename_to_version(temporary)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def commit(self, event: Event, seen: Survey) -> None:
        """Puts a staged version in service.

        Args:
            event: that it is.
            seen: when the publication began.

        Raises:
            UserError: somebody else has put a version in service since.
        """
        self.update(pointer.taking_over(self.base, event, seen))

    def discard(self, version: str) -> None:
        """Removes a staged version, unless it is in service, as far as that goes at once."""
        with contextlib.suppress(OSError, UserError):  # not on a full disk
            self.update(lambda now: now if now.was_in_service(version) else now.without([version]))
        with contextlib.suppress(OSError, UserError):
            if not self.read().was_in_service(version):
                self.remove([version])

    def remove(self, versions: Sequence[str]) -> None:
        """Removes versions that are given up in the pointer; each vanishes in one step."""
        for version in versions:
            temporary = self._temporary()
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path(version), temporary)
                shutil.rmtree(temporary)

    @contextlib.contextmanager
    def local_copy(self, version: str) -> Iterator[str]:
        """A folder with the version for the time of the context: the version itself."""
        yield self.path(version)

    @contextlib.contextmanager
    def errors_told(self, writing: bool = False) -> Iterator[None]:
        """Says in one line what keeps the directory from being read or written.

        Args:
            writing: which it is.

        Raises:
            UserError: it is a file, read-only, full, or else.
        """
        try:
            yield
        except (OSError, shutil.Error) as error:
            reason = reason_of(error)
            if not writing:
                raise UserError(f"cannot read {self.base}: {reason}; name a directory that can be read") from error
            raise UserError(
                f"cannot write to push destination {self.base}: {reason}; "
                "name a directory that can be written and has room"
            ) from error

    def _version(self, name: str) -> Version | None:
        """A version; None where it has vanished, or is a link to nowhere."""
        path = self.path(name)
        sizes: dict[str, int] = {}
        for folder, _, files in os.walk(path):
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    inside = os.path.join(folder, file)
                    sizes[os.path.relpath(inside, path)] = os.path.getsize(inside)
        with contextlib.suppress(FileNotFoundError):
            return Version(name, pointer.is_whole(sizes), False, sum(sizes.values()), os.path.getmtime(path))
        return None

    def _temporary(self) -> str:
        return os.path.join(self.base, f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")

    def _rename_to_version(self, temporary: str) -> str:
        while True:
            version = self.look().next_version()
            try:
                os.rename(temporary, self.path(version))
            except OSError as error:
                # Another publisher was first with this version: renaming onto a folder with files fails.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
            else:
                disk.flush_entries(self.base)
                return version

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(os.path.join(self.base, _LOCK), "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, content: Pointer) -> None:
        path = os.path.join(self.base, pointer.FILE)
        temporary = f"{path}.new"  # one is enough: the lock is held
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(content.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        disk.flush_entries(self.base)


def read_card(model_path: str) -> dict:
    """What the card of a model says; empty where it has none, or one that cannot be read."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return pointer.card_of(Path(model_path, pointer.CARD_FILE).read_bytes())
    return {}


@contextlib.contextmanager
def _made(folder: str) -> Iterator[None]:
    """Makes a folder; if the context fails and nothing is in it, it is gone again, with those made above it."""
    missing = []
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        missing.append(above)
        above = os.path.dirname(above)
    try:
        os.makedirs(folder, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for made in missing:
                os.rmdir(made)
        raise


def damaged(path: str, error: ValueError) -> UserError:
    """The refusal of a pointer that cannot be read."""
    return UserError(
        f"{path} is damaged ({error}): restore it, or remove it, and the highest whole version is in service"
    )


def _is_stale(name: str, path: str) -> bool:
    match = re.fullmatch(re.escape(_TEMPORARY) + r"(.+)-(\d+)-[0-9a-f]{32}", name)
    if not match:
        return False
    host, process = match.groups()
    if host != socket.gethostname():
        return time.time() - os.path.getmtime(path) > _STALE_SECONDS
    return not is_running(int(process))


def reason_of(error: OSError) -> str:
    """Why files could not be read or written, in words."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of copytree: (from, to, why)
        why = re.sub(r"^\[Errno \d+\] |: '.*", "", str(error.args[0][0][2]))
    else:
        why = error.strerror or str(error)
    return why[:1].lower() + why[1:]
