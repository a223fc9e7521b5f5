"""Google Cloud Storage as a source: listed and read by its own library, and never taken for what it is not.

Beam's file systems take the end of a broken answer for the end of the file, read 16 MiB ahead for an image of a few
KiB, and are slow to say that a bucket is missing. Here each answer is compared with the length that it must have, or
with the object's checksum; lost connections, 408, 429 and 5xx are tried again; and what stays away ends the run in one
line, so that no image is put into quarantine for the network's fault.
"""

import contextlib
import dataclasses
import functools
import io
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from trainer_module.errors import UserError

if TYPE_CHECKING:
    from google.api_core.retry import Retry
    from google.cloud.storage import Blob, Client

_SCHEME = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_CHECK_SECONDS = 15.0
_READ_AHEAD = 8 << 20


class Object(NamedTuple):
    """One object of a listing.

    Attributes:
        path: gs://BUCKET/NAME.
        size: bytes.
        generation: changes with every change of the content.
    """

    path: str
    size: int
    generation: int


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long an answer is waited for.

    Attributes:
        timeout: seconds until an answer that stays out counts as lost.
        total: seconds until the tries end.
        pause: seconds between the first two tries; the next pauses are longer.
    """

    timeout: float = 60.0
    total: float = 120.0
    pause: float = 1.0

    def retry(self) -> "Retry":
        """The library's rule of what is tried again."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        return DEFAULT_RETRY.with_delay(self.pause).with_timeout(self.total)

    def again(self, error: type[Exception]) -> "Retry":
        """A try again after that error."""
        from google.api_core.retry import Retry, if_exception_type

        return Retry(if_exception_type(error), initial=self.pause, timeout=self.total)


PATIENCE = Patience()


class _ShortAnswerError(Exception):
    """An answer ended before what was asked for."""


def client() -> "Client":
    """With the machine's credentials; anonymous where there are none, and for an emulator."""
    return _client(os.environ.get("STORAGE_EMULATOR_HOST", ""))


@functools.cache
def _client(emulator: str) -> "Client":
    """One for all reads of a process: each would look for credentials anew."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud.storage import Client

    if emulator:
        return Client.create_anonymous_client()
    try:
        credentials, project = google.auth.default(scopes=("https://www.googleapis.com/auth/devstorage.read_only",))
    except DefaultCredentialsError:
        return Client.create_anonymous_client()
    # Reading needs no project, but the client refuses to be made without one.
    return Client(project or "none", credentials)


def find(src: str) -> Iterator[Object]:
    """Lists what a source names: an object, all below a folder, or all that a glob matches, and below its matches.

    Args:
        src: gs://BUCKET/PATH; `*` stops at a slash, `**` does not.

    Raises:
        UserError: no bucket, no right, or no answer.
    """
    from apache_beam.io.filesystem import FileSystem

    bucket, _, pattern = src.rstrip("/").removeprefix(_SCHEME).partition("/")
    wanted = [re.compile(FileSystem.translate_pattern(p)) for p in ([pattern, f"{pattern}/**"] if pattern else ["**"])]
    prefix = re.split(r"[*?\[]", pattern)[0]
    with _missing_bucket_told(bucket), _failure_told(src):
        fields = "items(name,size,generation),nextPageToken"
        blobs = client().list_blobs(
            bucket, prefix=prefix, fields=fields, timeout=PATIENCE.timeout, retry=PATIENCE.retry()
        )
        for blob in blobs:
            if not blob.name.endswith("/") and any(match.match(blob.name) for match in wanted):
                yield Object(f"{_SCHEME}{bucket}/{blob.name}", blob.size or 0, int(blob.generation or 0))


def read_all(path: str) -> bytes:
    """Reads a whole object, compared with its checksum.

    Raises:
        OSError: there is no such object.
        UserError: no right, or no answer.
    """
    from google.resumable_media import DataCorruption

    with _failure_told(path):
        download = functools.partial(
            _blob(path).download_as_bytes, checksum="crc32c", timeout=PATIENCE.timeout, retry=PATIENCE.retry()
        )
        return PATIENCE.again(DataCorruption)(download)()


def read(path: str, offset: int, size: int) -> bytes:
    """Reads a range of an object, and no byte more.

    Args:
        path: gs://bucket/name.
        offset, size: bytes; fewer are returned where the object ends before.

    Raises:
        OSError: there is no such object.
        UserError: no right, or no answer.
    """
    with _failure_told(path):
        return _range(_blob(path), offset, size) if size else b""


def open_object(path: str) -> BinaryIO:
    """Opens an object for reading with seeks, 8 MiB ahead; its content at this moment, whatever becomes of it.

    Raises:
        OSError: there is no such object.
        UserError: no right, or no answer.
    """
    return cast(BinaryIO, io.BufferedReader(_Stream(path), _READ_AHEAD))


class _Stream(io.RawIOBase):
    """An object's bytes; each read is one request."""

    def __init__(self, path: str):
        super().__init__()
        self._path, self._position = path, 0
        self._blob = _blob(path)
        with _failure_told(path):
            self._blob.reload(timeout=PATIENCE.timeout, retry=PATIENCE.retry())

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position; asks nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads as much as fits and is there."""
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """The rest, by one request."""
        return self._next(self._size)

    @property
    def _size(self) -> int:
        return self._blob.size or 0

    def _next(self, wanted: int) -> bytes:
        size = max(0, min(wanted, self._size - self._position))
        if not size:
            return b""
        with _failure_told(self._path):
            data = _range(self._blob, self._position, size)
        self._position += len(data)
        return data


def _range(blob: "Blob", offset: int, size: int) -> bytes:
    """Bytes of a range, all that the object has of it."""
    from google.api_core.exceptions import RequestRangeNotSatisfiable

    def once() -> bytes:
        try:
            data = blob.download_as_bytes(
                start=offset,
                end=offset + size - 1,
                checksum=None,
                timeout=PATIENCE.timeout,
                retry=PATIENCE.retry(),
            )
        except RequestRangeNotSatisfiable:
            data = b""
        if len(data) < size and len(data) < min(size, _size_now(blob) - offset):
            raise _ShortAnswerError
        return data

    return PATIENCE.again(_ShortAnswerError)(once)()


def _size_now(blob: "Blob") -> int:
    if blob.size is None:
        blob.reload(timeout=PATIENCE.timeout, retry=PATIENCE.retry())
    return blob.size or 0


def _blob(path: str) -> "Blob":
    bucket, _, name = path.removeprefix(_SCHEME).partition("/")
    return client().bucket(bucket).blob(name)


@contextlib.contextmanager
def _missing_bucket_told(bucket: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"--images: there is no bucket gs://{bucket}; check the name") from error


@contextlib.contextmanager
def _failure_told(path: str) -> Iterator[None]:
    """Tells what is missing, which is the source's affair, from what cannot be reached, which ends the run.

    Raises:
        OSError: there is no such object, or no longer.
        UserError: no right, or no answer.
    """
    from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, Unauthorized
    from google.auth.exceptions import GoogleAuthError
    from google.resumable_media import DataCorruption
    from requests.exceptions import RequestException

    try:
        yield
    except NotFound as error:
        raise FileNotFoundError(f"{path}: there is no such object, or it was replaced") from error
    except (Forbidden, Unauthorized) as error:
        raise UserError(
            f"--images: {path} may not be read with your credentials; "
            "log in with 'gcloud auth application-default login', or have the right granted"
        ) from error
    except (
        GoogleAPIError,
        GoogleAuthError,
        RequestException,
        ConnectionError,
        DataCorruption,
        _ShortAnswerError,
    ) as error:
        reason = type(error.__cause__ or error).__name__.lstrip("_")
        raise UserError(
            f"--images: no whole answer about {path} ({reason}); check the network, and run again"
        ) from error


def check(src: str) -> None:
    """Asks for one name below a gs:// source, so that a wrong one is told in seconds and not after many retries.

    Raises:
        UserError: no such bucket, no right to list it, or no answer.
    """
    bucket, _, pattern = src.removeprefix(_SCHEME).partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"--images: {src}: {bucket!r} cannot be the name of a bucket; write gs://BUCKET/PATH")
    from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, Unauthorized
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    prefix = re.split(r"[*?\[{]", pattern)[0]
    retry = Patience(total=3.0, pause=0.2).retry()
    try:
        found = client().list_blobs(bucket, prefix=prefix, max_results=1, timeout=_CHECK_SECONDS, retry=retry)
        empty = not list(found)
    except NotFound:
        raise UserError(f"--images: there is no bucket gs://{bucket}; check the name") from None
    except (Forbidden, Unauthorized):
        raise UserError(
            f"--images: gs://{bucket} may not be listed with your credentials; "
            "log in with 'gcloud auth application-default login', or have the right granted"
        ) from None
    except (GoogleAPIError, GoogleAuthError, RequestException, OSError) as error:
        reason = type(error).__name__
        raise UserError(f"--images: no answer about gs://{bucket} ({reason}); check the network") from error
    if empty:
        raise UserError(f"--images: there is nothing at {src}; check the path")
