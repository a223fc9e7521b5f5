"""The one exception that a client gets to see, with TensorFlow Serving's codes."""

import enum
from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)


class Code(enum.Enum):
    """gRPC's status codes by name; the value is the HTTP status that TensorFlow Serving gives for it."""

    OK = 200
    CANCELLED = 499
    INVALID_ARGUMENT = 400
    DEADLINE_EXCEEDED = 504
    NOT_FOUND = 404
    RESOURCE_EXHAUSTED = 429
    UNIMPLEMENTED = 501
    INTERNAL = 500
    UNAVAILABLE = 503


class Refused(Exception):  # noqa: N818  # an answer, not a failure
    """What a request is answered where it cannot be served.

    Attributes:
        code: see `Code`.
        message: for the client; never holds bytes of the request.
        kind: of the error, for the metrics; the code in lower case where none is given.
        http: status in HTTP; the code's where none is given.
    """

    def __init__(self, code: Code, message: str, kind: str = "", http: int = 0):
        super().__init__(message)
        self.code = code
        self.message = message
        self.kind = kind or code.name.lower()
        self.http = http or code.value


def invalid(message: str) -> Refused:
    """An INVALID_ARGUMENT."""
    return Refused(Code.INVALID_ARGUMENT, message)


def alone(error: ErrorT) -> ErrorT:
    """The same without the frames that it came through, which may hold it in turn until Python looks for circles."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
