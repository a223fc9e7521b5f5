"""Which version of a model is in service, and how the next one takes over.

A new version is loaded and warmed up beside the old one; then one assignment puts it in service. The old one goes when
its last request is done. A version that cannot be loaded or warmed up is refused with one line, and the old one
stays; it is tried again when its files have changed, for it may have been seen while it was copied.
"""

import asyncio
import dataclasses
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from components.pusher import publish
from components.pusher.pointer import is_number
from pipeline.serving import faults
from pipeline.serving.model import Model
from pipeline.serving.refusal import Code, Refused, invalid
from trainer_module import progress
from trainer_module.errors import UserError

LABEL = "stable"  # of the version in service
_REMEMBERED = 20

Load = Callable[[str, int], Model]


@dataclasses.dataclass
class State:
    """What is told about a version.

    Attributes:
        version: its number.
        name: a state of TensorFlow Serving's ModelVersionStatus.
        error: why it ended; empty where all is well.
    """

    version: int
    name: str
    error: str = ""


@dataclasses.dataclass
class _Loaded:
    model: Model
    state: State
    users: int = 0


class Versions:
    """See the module. All but the loading happens on the event loop's thread."""

    def __init__(self, path: str, name: str, load: Load, in_service: Callable[[int], None]) -> None:
        """Looks at nothing yet.

        Args:
            path: a SavedModel, or a place of publication; may be gs://.
            name: the model's, in requests.
            load: a folder on this machine, a version's number -> the model, ready to compute.
            in_service: is told each version that takes over.
        """
        self._path, self._name, self._load, self._in_service = path, name, load, in_service
        self._current: _Loaded | None = None
        self._refused: dict[int, Hashable] = {}  # what its files were
        self._said = ""
        self._states: dict[int, State] = {}

    async def start(self) -> Model:
        """Loads the version in service.

        Raises:
            UserError: there is none, or it cannot be loaded.
        """
        number, where = await asyncio.to_thread(_find, self._path)
        await self._take_over(number, where)
        assert self._current is not None
        return self._current.model

    async def watch(self, seconds: float) -> None:
        """Looks for another version now and then, for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.look()
            except Exception as error:  # whatever it is, the next version may be sound
                faults.log(error)

    async def look(self) -> None:
        """Looks for another version once, and puts it in service if it is sound."""
        assert self._current is not None
        try:
            number, where = await asyncio.to_thread(_find, self._path)
            if number == self._current.model.version:
                return
            files = await asyncio.to_thread(_files, where)  # before it is loaded: what comes later is a change
        except UserError as error:  # it may be there again at the next look
            self._say(f"cannot look for new versions: {error}")
            return
        if self._refused.get(number) == files:
            return
        try:
            await self._take_over(number, where)
        except UserError as error:
            self._refused[number] = files
            self._say(f"version {number} is refused, {self._current.model.version} stays in service: {error}")

    @contextmanager
    def lease(self, name: str, version: int | None = None, label: str = "") -> Iterator[Model]:
        """The model that a request asks for, which stays loaded for the time of the context.

        Args:
            name: of the model.
            version: its number; None for the one in service.
            label: of a version, in place of the number.

        Raises:
            Refused: NOT_FOUND, INVALID_ARGUMENT for an unknown label, or UNAVAILABLE before the first is loaded.
        """
        loaded = self._current
        if loaded is None:
            raise Refused(Code.UNAVAILABLE, "the model is being loaded")
        if name != self._name or version not in (None, loaded.model.version):
            what = f"Latest({name[:100]})" if version is None else f"Specific({name[:100]}, {version})"
            raise Refused(Code.NOT_FOUND, f"Servable not found for request: {what}")
        if label and label != LABEL:
            raise invalid(f"Unrecognized servable version label: {label[:100]}; there is: {LABEL}")
        loaded.users += 1
        try:
            yield loaded.model
        finally:
            loaded.users -= 1
            self._unload_if_unused(loaded)

    def states(self, name: str, version: int | None = None) -> list[State]:
        """What there is to be said about a version, or all of them, highest first.

        Raises:
            Refused: NOT_FOUND.
        """
        if name != self._name or not self._states:
            raise Refused(Code.NOT_FOUND, f"Could not find any versions of model {name[:100]}")
        if version is None:
            return sorted(self._states.values(), key=lambda state: -state.version)
        if version not in self._states:
            raise Refused(Code.NOT_FOUND, f"Could not find version {version} of model {name[:100]}")
        return [self._states[version]]

    async def _take_over(self, number: int, where: str) -> None:
        state = self._states[number] = State(number, "LOADING")
        try:
            model = await asyncio.to_thread(self._load_copy, where, number)
        except UserError as error:
            state.name, state.error = "END", str(error)
            raise
        before, self._current = self._current, _Loaded(model, state)
        state.name = "AVAILABLE"
        self._refused.pop(number, None)
        self._in_service(number)
        self._forget_old_states()
        if before:
            before.state.name = "UNLOADING"
            progress.note(f"version {number} is in service, after {before.model.version}")
            self._unload_if_unused(before)

    def _load_copy(self, where: str, number: int) -> Model:
        try:
            with publish.local_copy(where) as folder:
                return self._load(folder, number)
        except UserError:
            raise
        except Exception as error:
            faults.log(error)
            raise UserError(f"cannot be taken over: {type(error).__name__}: {faults.words(error)}") from error

    def _unload_if_unused(self, loaded: _Loaded) -> None:
        if loaded.state.name == "UNLOADING" and not loaded.users:
            loaded.state.name = "END"
            loaded.model.close()

    def _forget_old_states(self) -> None:
        ended = sorted(number for number, state in self._states.items() if state.name == "END")
        for number in ended[:-_REMEMBERED]:
            del self._states[number]

    def _say(self, line: str) -> None:
        if line != self._said:  # once, not at every look
            self._said = line
            progress.note(line)


def _find(path: str) -> tuple[int, str]:
    """The number of the version in service and its path; a model that has none in its path is version 1."""
    at, version = publish.model_at(path)
    where = at.path(version)
    name = version if is_number(version) else os.path.basename(os.path.abspath(where))
    return int(name) if is_number(name) else 1, where


def _files(where: str) -> Hashable:
    """What tells whether a version has changed: names, sizes and times of its files."""
    if "://" in where:
        at, number = publish.model_at(where)
        return tuple((seen.size, seen.created) for seen in at.look().versions if seen.number == number)
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(where) for name in names)
    return tuple(sorted((path, *_size_and_time(path)) for path in paths))


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # it has gone meanwhile, or a link leads nowhere
        return -1, 0
    return status.st_size, status.st_mtime_ns
