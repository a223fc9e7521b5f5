"""`latest.json`: which version of a model is in service, and how it came to be.

Below a base, a directory or gs://BUCKET/PATH, lie numbered versions, as TensorFlow Serving wants them, and this
document. It is replaced as a whole or not at all, so whoever reads it finds either the old version or the new one. All
that decides what is served is one change of it: to publish, to roll back, and to give versions up for removal.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Collection
from typing import Any, Literal

from trainer_module.errors import UserError

FILE = "latest.json"
SAVED_MODEL = "saved_model.pb"
CARD_FILE = "assets.extra/model_card.json"
DIGEST = "model_sha256"  # key of the card

_ESSENTIAL = (SAVED_MODEL, "variables/variables.index")
REMEMBERED = 100  # versions that can be given up in one change
_MOST = 2**63 - 1  # TensorFlow Serving's versions are int64

Action = Literal["published", "rolled back"]


def is_number(name: object) -> bool:
    """Whether something is the name of a version: an int64 in decimal digits."""
    return isinstance(name, str) and bool(re.fullmatch(r"[0-9]{1,19}", name)) and int(name) <= _MOST


def card_of(content: bytes) -> dict[str, Any]:
    """What a file says as a model's card; nothing where it is none."""
    try:
        card = json.loads(content)
    except (ValueError, RecursionError):  # no JSON, or not UTF-8
        return {}
    return card if isinstance(card, dict) else {}


@dataclasses.dataclass(frozen=True)
class Event:
    """That a version was put in service.

    Attributes:
        version: its number.
        action: whether it was new then, or had been there before.
        at: seconds since 1970, by the clock of whoever did it.
        by: host and process.
    """

    version: str
    action: Action
    at: float
    by: str

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Event":
        """The event that a document tells; keys of later releases are passed over.

        Raises:
            KeyError, TypeError, ValueError: it tells none.
        """
        event = cls(**{field.name: document[field.name] for field in dataclasses.fields(cls)})
        told = isinstance(event.action, str) and isinstance(event.at, int | float) and isinstance(event.by, str)
        if not (told and is_number(event.version)):
            raise ValueError(f"{document} is no event")
        return event


@dataclasses.dataclass(frozen=True)
class Pointer:
    """The content of the document.

    Attributes:
        version: the one in service; None while there is none.
        history: what was put in service, oldest first; the last hundred.
        removed: versions that are gone or going, and must never be put in service; the last hundred. A publisher that
            was taken for dead finds its version here and gives up.
    """

    version: str | None = None
    history: tuple[Event, ...] = ()
    removed: tuple[str, ...] = ()

    def serving(self, event: Event) -> "Pointer":
        """With another version in service."""
        return dataclasses.replace(self, version=event.version, history=(*self.history, event)[-REMEMBERED:])

    def without(self, versions: Collection[str]) -> "Pointer":
        """With versions given up for removal; the one in service never is."""
        before = [version for version in self.removed if version not in versions]
        now = sorted((version for version in versions if version != self.version), key=int)
        return dataclasses.replace(self, removed=(*before, *now)[-REMEMBERED:])

    def was_in_service(self, version: str) -> bool:
        """Whether a version is or was in service."""
        return version == self.version or any(event.version == version for event in self.history)

    def is_withdrawn(self, version: str) -> bool:
        """Whether somebody went back from a version to a lower one."""
        went_back = bool(self.history) and self.history[-1].action == "rolled back"
        lower = self.version is not None and int(self.version) < int(version)
        return went_back and lower and self.was_in_service(version)

    def to_json(self) -> str:
        """As text that people can read, too."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Pointer":
        """The pointer that was written; keys of later releases are passed over.

        Raises:
            ValueError: it is none.
        """
        try:
            document = json.loads(text)
            version, removed = document["version"], tuple(document.get("removed", ()))
            for number in (*removed, *([] if version is None else [version])):
                if not is_number(number):
                    raise ValueError(f"{number!r} is no version")
            return cls(version, tuple(map(Event.of, document.get("history", ()))), removed)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Version:
    """A numbered version below a base.

    Attributes:
        number: its name.
        whole: whether all of it is there.
        claimed: whether somebody is writing it, or was killed doing so.
        size: bytes.
        created: seconds since 1970.
    """

    number: str
    whole: bool
    claimed: bool
    size: int
    created: float


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was there at one look.

    Attributes:
        pointer: an empty one where none was written.
        versions: all there are, lowest first.
    """

    pointer: Pointer
    versions: tuple[Version, ...]

    @property
    def whole(self) -> list[str]:
        """Versions that could be in service, lowest first."""
        return [version.number for version in self.versions if version.whole and not version.claimed]

    @property
    def serving(self) -> str | None:
        """The version in service: the one that the pointer names.

        Where there is no pointer, or somebody has deleted that version by hand, it is the highest whole one.
        """
        whole = self.whole
        return self.pointer.version if self.pointer.version in whole else next(reversed(whole), None)

    def next_version(self) -> str:
        """The time in seconds, or the number after the highest that was ever there, so it is always the highest.

        Raises:
            UserError: there is none after the highest.
        """
        known = (*(version.number for version in self.versions), *self.pointer.removed, self.pointer.version or "0")
        highest = max(map(int, known))
        if highest == _MOST:
            raise UserError(f"no number is left above version {highest}; publish to another place")
        return str(max(int(time.time()), 1 + highest))


def is_whole(names: Collection[str]) -> bool:
    """Whether files, by their paths within a version, are a whole SavedModel: what is written last is there."""
    return all(essential in names for essential in _ESSENTIAL)


def taking_over(base: str, event: Event, seen: Survey) -> Callable[[Pointer], Pointer]:
    """The change of the pointer by which a staged version comes into service.

    Args:
        base: the place, for the message.
        event: that it is.
        seen: when the publication began; the change raises UserError where somebody has put another version in service
            since, or has removed this one.
    """

    def change(now: Pointer) -> Pointer:
        if event in now.history:  # written by a try whose answer was lost
            return now
        if (now.version, now.history) != (seen.pointer.version, seen.pointer.history):
            who = now.history[-1].by if now.history else "somebody"
            raise UserError(
                f"{base}: {who} has put version {now.version} in service meanwhile, so this model was not published; "
                "publish again if it is to take that one's place"
            )
        if event.version in now.removed:
            raise UserError(
                f"{base}: another publisher took this one for dead and removed version {event.version}; publish again"
            )
        return now.serving(event)

    return change
