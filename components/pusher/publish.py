"""Publishing models and finding the one in service: below a directory or gs://, without TFX.

A place of publication holds numbered versions, as TensorFlow Serving wants them, and `latest.json`, which names the
one in service; see `components.pusher.pointer`. Readers ask `resolve` or `local_copy`.
"""

import contextlib
import dataclasses
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from components.pusher import pointer
from components.pusher.directory import Directory, read_card, reason_of
from components.pusher.pointer import Event, Pointer, Survey, Version
from components.pusher.publisher import OutcomeUnknownError, WithdrawnError, this_publisher
from trainer_module.errors import UserError


class Place(Protocol):
    """What `Directory` and `Bucket` have in common; see there."""

    @property
    def base(self) -> str:
        """The directory, or gs://BUCKET/PATH."""

    def path(self, version: str) -> str:
        """Of a version."""

    def read(self) -> Pointer:
        """The pointer; an empty one where none was written."""

    def update(self, change: Callable[[Pointer], Pointer]) -> Pointer:
        """Changes the pointer in one step, and returns the new one."""

    def look(self) -> Survey:
        """What is there."""

    def card(self, version: str) -> dict:
        """What a version's card says."""

    def sweep(self) -> Survey:
        """Removes what killed publishers left, and tells what is there."""

    def stage(self, model_path: str, seen: Survey) -> str:
        """Copies a model to a new version, which is not in service yet."""

    def commit(self, event: Event, seen: Survey) -> None:
        """Puts a staged version in service."""

    def discard(self, version: str) -> None:
        """Gives a staged version up."""

    def remove(self, versions: Sequence[str]) -> None:
        """Removes versions that are given up in the pointer."""

    def local_copy(self, version: str) -> contextlib.AbstractContextManager[str]:
        """A folder on this machine with a version, for the time of the context."""

    def errors_told(self, writing: bool = False) -> contextlib.AbstractContextManager[None]:
        """Says in one line what keeps the place from being used."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """A version as `--list` tells it.

    Attributes:
        number: of the version.
        state: "in service", "ready" to be gone back to, "withdrawn" by going back, "being published", "removed" but
            not yet deleted, or "incomplete".
        size: bytes.
        created: seconds since 1970.
    """

    number: str
    state: str
    size: int
    created: float


def place(base: str, transfer: Any = None) -> Place:
    """The place of publication that a path means.

    Args:
        base: a directory, or gs://BUCKET/PATH.
        transfer: a `components.pusher.bucket.Transfer`; None for the usual one.

    Raises:
        UserError: it can be none, or there are no credentials.
    """
    if not base:
        raise UserError("an empty path is no place of models; name a directory or gs://BUCKET/PATH")
    base = base.rstrip("/") or "/"
    if base.startswith("gs:"):
        from components.pusher import bucket

        bucket.split(base)  # before credentials are looked for, which can take seconds
        return bucket.Bucket(base, bucket.connect(), transfer or bucket.Transfer())
    if "://" in base:
        raise UserError(f"{base}: models are published to a directory or to gs://BUCKET/PATH; name one of these")
    return Directory(base)


def check(base: str, what: str, transfer: Any = None) -> None:
    """Refuses a place to which nothing can be published, as far as that can be told without publishing.

    Args:
        base: a directory, or gs://BUCKET/PATH, which is asked once.
        what: how a message begins.
        transfer: as of `place`.

    Raises:
        UserError: it is of another kind, a file, read-only, or a bucket that is missing or may not be listed.
    """
    try:
        at = place(base, transfer)
        if not isinstance(at, Directory):
            versions(at)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    if isinstance(at, Directory):
        there = os.path.abspath(at.base)
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        if not os.path.isdir(there):
            raise UserError(f"{what}: {there} is a file; name a directory")
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".moco-", dir=there))
        except OSError as error:
            raise UserError(f"{what}: {there} cannot be written ({error.strerror}); name another directory") from error


def publish(model_path: str, to: Place) -> str:
    """Copies a model to a new version and puts it in service; whole or not at all.

    Does nothing if it is in service already, as its card says.

    Args:
        model_path: of a SavedModel on this machine.
        to: where.

    Returns:
        The path of the version, which is in service.

    Raises:
        UserError: the model cannot be read, the place cannot be written, or another publisher was faster.
        WithdrawnError: it is there, and somebody has gone back from it.
    """
    _check_readable(model_path)
    with to.errors_told(writing=True):
        seen = to.sweep()
        if version := _published_already(model_path, to, seen):
            return to.path(version)
        version = to.stage(model_path, seen)
        try:
            to.commit(_event(version, "published"), seen)
        except OutcomeUnknownError:
            raise  # it may be in service
        except Exception:
            to.discard(version)
            raise
        return to.path(version)


def in_service(at: Place) -> str:
    """The number of the version in service, see `pointer.Survey.serving`.

    Raises:
        UserError: there is none.
    """
    with at.errors_told():
        seen = at.look()
        if seen.serving is None:
            incomplete = ", ".join(version.number for version in seen.versions)
            what = f"its versions {incomplete} are incomplete" if incomplete else "neither latest.json nor versions"
            raise UserError(f"{at.base}: no SavedModel there ({what}); name a folder that './moco run' pushed to")
        return seen.serving


def resolve(base: str) -> str:
    """The path of the version in service; base itself where it is a SavedModel.

    Raises:
        UserError: there is none, or the place cannot be read.
    """
    at, version = model_at(base)
    return at.path(version)


def whole(at: Place) -> list[str]:
    """The numbers of the versions that could be in service, lowest first.

    Raises:
        UserError: the place cannot be read.
    """
    with at.errors_told():
        return at.look().whole


def versions(at: Place) -> list[Listed]:
    """All versions with their states, lowest first.

    Raises:
        UserError: the place cannot be read.
    """
    with at.errors_told():
        seen = at.look()
        return [
            Listed(version.number, _state(version, seen), version.size, version.created) for version in seen.versions
        ]


def rollback(at: Place, version: str) -> None:
    """Puts a version that is there already in service.

    Raises:
        UserError: there is no such version, it is not whole, or the place cannot be written.
    """
    with at.errors_told(writing=True):
        found = {candidate.number: candidate for candidate in at.look().versions}
        if version not in found:
            raise UserError(f"{at.base}: there is no version {version}; there are: {', '.join(found) or 'none'}")
        if not found[version].whole or found[version].claimed:
            raise UserError(f"{at.base}: version {version} is not whole; choose another with --list")
        event = _event(version, "rolled back")

        def change(now: Pointer) -> Pointer:
            if version in now.removed:
                raise UserError(f"{at.base}: version {version} is being removed; choose another with --list")
            return now if now.version == version else now.serving(event)

        at.update(change)


def keep(at: Place, count: int) -> list[str]:
    """Removes all but the newest whole versions and the one in service. Leaves what is being written.

    Args:
        at: where.
        count: how many versions stay, at least 1.

    Returns:
        The versions that are gone.

    Raises:
        UserError: count is too small, or the place cannot be written.
    """
    if count < 1:
        raise UserError(f"--keep {count} must be at least 1; e.g. --keep 3")
    with at.errors_told(writing=True):
        doomed = at.sweep().whole[:-count]
        gone: list[str] = []
        for start in range(0, len(doomed), pointer.REMEMBERED):
            gone += _remove(at, doomed[start : start + pointer.REMEMBERED])
        return gone


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A folder on this machine with a model, for the time of the context.

    Args:
        path: of a SavedModel, or of a place of publication, of which the version in service is taken.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    at, version = model_at(path)
    with contextlib.ExitStack() as stack:
        with at.errors_told():
            folder = stack.enter_context(at.local_copy(version))
        yield folder


def model_at(path: str) -> tuple[Place, str]:
    """A place and the version there that is in service.

    Args:
        path: of a place of publication, or of a model itself, whose version is "." where its place is a directory.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    at = place(path)
    if isinstance(at, Directory):
        check_folder(at.base)
        if os.path.isfile(os.path.join(at.base, pointer.SAVED_MODEL)):
            return at, "."
    else:
        above, _, name = at.base.rpartition("/")
        if pointer.is_number(name) and above != "gs:/":
            return place(above), name
    return at, in_service(at)


def check_folder(path: str) -> None:
    """Refuses what is no folder to read from.

    Raises:
        UserError: it is missing, a file, or may not be read.
    """
    if os.path.isfile(path):
        raise UserError(f"{path}: is a file; name its folder")
    if not os.path.isdir(path):
        raise UserError(
            f"{path}: there is no such folder; where a model was not blessed nothing is published, see result.json"
        )
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path}: may not be read; change its rights")


def _remove(at: Place, doomed: Sequence[str]) -> list[str]:
    now = at.update(lambda now: now.without(doomed))
    gone = [version for version in doomed if version in now.removed]
    at.remove(gone)
    return gone


def _check_readable(model_path: str) -> None:
    try:
        for folder, _, files in os.walk(model_path):
            for path in (os.path.join(folder, file) for file in files):
                if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
                    raise UserError(f"{path}: is no file; remove it")
                with open(path, "rb"):
                    pass
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({reason_of(error)}); mend or remove it") from error


def _published_already(model_path: str, to: Place, seen: Survey) -> str | None:
    """The version that is this very model, which is in service then; None if there is none.

    Raises:
        WithdrawnError: somebody has gone back from it.
    """
    digest = read_card(model_path).get(pointer.DIGEST)
    if digest is None:
        return None
    now, newest = seen.pointer, next(reversed(seen.whole), None)
    # One that is higher than the version in service, and was not gone back from, is what TensorFlow Serving serves.
    candidates = [newest, now.version] if newest and now.is_withdrawn(newest) else [newest]
    here = [version for version in candidates if version in seen.whole]
    same = next((version for version in here if to.card(version).get(pointer.DIGEST) == digest), None)
    if same is None or same == now.version:
        return same
    if now.is_withdrawn(same):
        raise WithdrawnError(
            f"{to.base}: this model is version {same}, from which somebody went back to {now.version}, which stays in "
            f"service; --rollback {same} returns to it"
        )
    to.commit(_event(same, "published"), seen)
    return same


def _event(version: str, action: pointer.Action) -> Event:
    return Event(version, action, time.time(), str(this_publisher()))


def _state(version: Version, seen: Survey) -> str:
    if version.number == seen.serving:
        return "in service"
    if version.number in seen.pointer.removed:
        return "removed"
    if version.claimed:
        return "being published"
    if not version.whole:
        return "incomplete"
    return "withdrawn" if seen.pointer.is_withdrawn(version.number) else "ready"
