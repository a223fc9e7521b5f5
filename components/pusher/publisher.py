"""Who publishes: known by machine and process, so that what the dead left is told from the work of the living."""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import uuid

from trainer_module import config_json
from trainer_module.errors import UserError

_STALE_SECONDS = 24 * 3600.0


class OutcomeUnknownError(UserError):
    """No answer came whether a version is in service now."""


class WithdrawnError(UserError):
    """The model is there already, and somebody has gone back from it to another."""


@dataclasses.dataclass(frozen=True)
class Publisher:
    """One publication under way.

    Attributes:
        host: name of the machine.
        machine: what tells machines and containers of one name apart.
        process: its number there.
        id: unlike every other publication's.
    """

    host: str
    machine: str
    process: int
    id: str

    def __str__(self) -> str:
        """For people: the machine and the process."""
        return f"{self.host}, process {self.process}"

    def to_json(self) -> str:
        """For the claim that a publisher lays on a version."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Publisher":
        """The publisher that was written.

        Raises:
            ValueError: it is none.
        """
        found = config_json.loads_foreign(cls, text)
        if not isinstance(found.process, int) or found.process < 1:
            raise ValueError(f"{found.process!r} is no process")
        return found


def this_publisher() -> Publisher:
    """A publisher of this process."""
    return Publisher(socket.gethostname(), _machine(), os.getpid(), uuid.uuid4().hex)


def is_dead(publisher: Publisher | None, age: float) -> bool:
    """Whether a publication was given up: its process has ended, or it is of another machine and a day old.

    Args:
        publisher: None where it cannot be told who it was.
        age: seconds since the publication began.
    """
    if publisher is None or (publisher.host, publisher.machine) != (socket.gethostname(), _machine()):
        return age > _STALE_SECONDS
    return not is_running(publisher.process)


def is_running(process: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _machine() -> str:
    """Differs between machines, between starts of one, and between containers, whose processes are numbered apart."""
    parts = []
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        parts.append(file.read().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
