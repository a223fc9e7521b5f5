"""A bucket of Google Cloud Storage as a place of publication.

An object appears as a whole or not at all, and a write can be tied to the generation of what it replaces; a folder has
neither. So a publisher lays a claim on a number, uploads below it, compares every checksum, writes saved_model.pb
last, and then changes `latest.json` on the condition that nobody else has: that one request is the publication. What is
to be deleted is first given up in `latest.json`, on the same condition, so no version that is going can come into
service, not even by a publisher that was only taken for dead.

The library does the transfers: in parallel, with CRC32C, in resumable pieces, with waits between tries after 408, 429,
5xx and lost connections.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import google_crc32c
from google.api_core.exceptions import (
    BadRequest,
    Forbidden,
    GoogleAPICallError,
    GoogleAPIError,
    NotFound,
    PreconditionFailed,
    RetryError,
    ServerError,
    TooManyRequests,
    Unauthorized,
    from_http_status,
)
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import GoogleAuthError
from google.cloud.storage import Blob, Client, transfer_manager
from google.cloud.storage.retry import DEFAULT_RETRY
from google.resumable_media import DataCorruption, InvalidResponse
from requests.exceptions import RequestException

from components.pusher import pointer
from components.pusher.credentials import default
from components.pusher.directory import damaged, reason_of
from components.pusher.pointer import Event, Pointer, Survey, Version
from components.pusher.publisher import OutcomeUnknownError, Publisher, is_dead, this_publisher
from trainer_module import progress
from trainer_module.errors import UserError

_SCHEME = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_CLAIMS = ".publishing/"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_TRIES = 5
_UNANSWERED = (RequestException, ConnectionError, RetryError, ServerError, TooManyRequests)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """How objects are moved.

    Attributes:
        workers: objects at a time.
        timeout: seconds until an answer that stays out counts as lost.
        chunk: bytes of one piece of a resumable upload, a multiple of 256 KiB; objects up to 8 MB go in one request.
        retry: waits between tries; which failures are tried again is the library's rule.
    """

    workers: int = 8
    timeout: float = 60.0
    chunk: int = 16 * 2**20
    retry: Retry = DEFAULT_RETRY


def connect() -> Client:
    """A client with Application Default Credentials, or of the emulator that STORAGE_EMULATOR_HOST names.

    Raises:
        UserError: there are no credentials.
    """
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return Client.create_anonymous_client()
    credentials, project = default(_SCOPE, "gs://")
    # Objects need no project, but the client refuses to be made without one.
    return Client(project or "none", credentials)


def split(base: str) -> tuple[str, str]:
    """Bucket and path of gs://BUCKET/PATH.

    Raises:
        UserError: base cannot be the name of a place in a bucket.
    """
    name, _, path = base.removeprefix(_SCHEME).partition("/")
    if not base.startswith(_SCHEME) or not _BUCKET.fullmatch(name):
        raise UserError(f"{base}: {name!r} cannot be the name of a bucket; write gs://BUCKET/PATH")
    return name, path


class Bucket:
    """See the module."""

    def __init__(self, base: str, client: Client, transfer: Transfer) -> None:
        """Remembers where things are, and asks nothing.

        Args:
            base: gs://BUCKET or gs://BUCKET/PATH.
            client: of `connect`.
            transfer: how objects are moved.
        """
        name, prefix = split(base)
        self.base = base
        self._prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        self._client = client
        self._bucket = client.bucket(name)
        self._transfer = transfer
        self._patience: dict[str, Any] = {"timeout": transfer.timeout, "retry": transfer.retry}

    def path(self, version: str) -> str:
        """Of a version."""
        return f"{self.base.rstrip('/')}/{version}"

    def read(self) -> Pointer:
        """The pointer; an empty one where none was written.

        Raises:
            UserError: it is damaged.
        """
        return self._read_pointer()[0]

    def update(self, change: Callable[[Pointer], Pointer]) -> Pointer:
        """Changes the pointer in one step; where somebody else was faster, on what they left.

        Args:
            change: pure; may raise to leave everything as it is.

        Returns:
            The new pointer.
        """
        for attempt in range(_TRIES):
            before, generation = self._read_pointer()
            after = change(before)
            if after == before:
                return after
            refusal = self._refused(pointer.FILE, after.to_json(), generation)
            if refusal is None:
                return after
            _wait(attempt)
        if refusal and self._read_pointer()[1] == generation:  # nobody else has changed it
            raise refusal
        raise self._restless()

    def look(self) -> Survey:
        """What is there."""
        now = self.read()  # first, so that what it names is in the list, or something newer is
        return self._survey(self._list(), now)

    def card(self, version: str) -> dict:
        """What a version's card says; empty where it has none, or one that cannot be read."""
        with contextlib.suppress(NotFound):
            return pointer.card_of(self._download(f"{version}/{pointer.CARD_FILE}"))
        return {}

    def sweep(self) -> Survey:
        """Removes what killed publishers left and what was given up and not yet deleted, and tells what is there.

        Where the right to delete is lacking that is only noted.
        """
        now = self.read()
        blobs = self._list()
        claims = self._claims(blobs)
        dead = [version for version, blob in claims.items() if self._is_dead(blob)]
        there = {version.number for version in self._survey(blobs, now).versions}
        if not dead and there.isdisjoint(now.removed):
            return self._survey(blobs, now)
        now = self.update(lambda now: now.without([version for version in dead if not now.was_in_service(version)]))
        try:
            self._delete([version for version in now.removed if version in there or version in dead], blobs)
            for version in dead:
                self._delete_object(self._prefix + _claim_name(version))
        except Forbidden as error:
            progress.note(f"{self.base}: what a killed publisher left may not be deleted: {_words(error)}")
        return self.look()

    def stage(self, model_path: str, seen: Survey) -> str:
        """Uploads a model to a new version, the highest, which is not in service yet. See `commit`.

        Raises:
            UserError: somebody else changed it meanwhile, or it arrives damaged again and again.
        """
        version = self._claim(this_publisher(), seen.next_version())
        try:
            self._upload(model_path, version)
        except BaseException as error:
            if not _is_unanswered(error):  # else a request may still be on its way: it is left to the next publisher
                self.discard(version)
            raise
        return version

    def commit(self, event: Event, seen: Survey) -> None:
        """Puts a staged version in service.

        Args:
            event: that it is.
            seen: when the publication began.

        Raises:
            UserError: somebody else has put a version in service since.
            OutcomeUnknownError: no answer.
        """
        try:
            self.update(pointer.taking_over(self.base, event, seen))
        except Exception as error:
            if not _is_unanswered(error):
                raise
            raise OutcomeUnknownError(
                f"{self.base}: no answer whether version {event.version} is in service now ({_words(error)}); "
                f"ask with --list, or publish again"
            ) from error
        with contextlib.suppress(GoogleAPIError, RequestException):  # published it is; the next publisher sweeps
            self._delete_object(self._prefix + _claim_name(event.version))

    def discard(self, version: str) -> None:
        """Removes a staged version, unless it is in service, as far as that goes at once."""
        with contextlib.suppress(GoogleAPIError, GoogleAuthError, RequestException, UserError):
            if not self.read().was_in_service(version):
                self._delete([version], self._list(version + "/"))

    def remove(self, versions: Sequence[str]) -> None:
        """Removes versions that are given up in the pointer."""
        self._delete(versions, self._list())

    @contextlib.contextmanager
    def local_copy(self, version: str) -> Iterator[str]:
        """A folder with the version for the time of the context, every object checked by its CRC32C."""
        with tempfile.TemporaryDirectory() as folder:
            self._fetch(version, folder)
            yield folder

    @contextlib.contextmanager
    def errors_told(self, writing: bool = False) -> Iterator[None]:
        """Says in one line what keeps the bucket from being used.

        Args:
            writing: no matter here.

        Raises:
            UserError: no bucket, no right, a retention policy, no answer, or one that says no.
        """
        del writing
        name = f"{_SCHEME}{self._bucket.name}"
        try:
            yield
        except NotFound as error:
            raise UserError(
                f"{self.base}: there is no bucket {name} ({_words(error)}); check the name, or make it first"
            ) from error
        except (Forbidden, Unauthorized) as error:
            if "retention" in str(error).lower():
                raise UserError(
                    f"{self.base}: a retention policy keeps objects from being replaced or deleted ({_words(error)}); "
                    "publish to a bucket without one, or have it lifted"
                ) from error
            raise UserError(
                f"{self.base}: your credentials do not allow that ({_words(error)}); have the role Storage Object "
                f"User (roles/storage.objectUser) granted on {name}, or log in as somebody who has it"
            ) from error
        except GoogleAuthError as error:
            raise UserError(
                f"{self.base}: your credentials are not accepted ({_words(error)}); log in anew with "
                "'gcloud auth application-default login'"
            ) from error
        except (*_UNANSWERED, GoogleAPICallError) as error:
            if _is_unanswered(error):
                raise UserError(f"{self.base}: no answer from {name} ({_words(error)}); check the network") from error
            raise UserError(
                f"{self.base}: {name} refuses that ({_words(error)}); mend what it names, or use another place"
            ) from error
        except DataCorruption as error:
            raise UserError(f"{self.base}: objects arrive damaged again and again; check the network") from error
        except OSError as error:
            raise UserError(f"{self.base}: {error.filename or 'files on this machine'}: {reason_of(error)}") from error

    # Objects.

    def _list(self, below: str = "") -> list[Blob]:
        with self._understood():
            return list(self._client.list_blobs(self._bucket, prefix=self._prefix + below, **self._patience))

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """Says so where an answer is JSON, but no description of objects, over which the library stumbles.

        Raises:
            UserError: it is.
        """
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, RequestException | GoogleAuthError):
                raise
            raise UserError(
                f"{self.base}: the answer is not Cloud Storage's ({type(error).__name__}: {error}); check whether a "
                "proxy, or STORAGE_EMULATOR_HOST, stands in between"
            ) from error

    def _name(self, blob: Blob) -> str:
        return blob.name.removeprefix(self._prefix)

    def _refused(self, name: str, text: str, generation: int) -> GoogleAPICallError | None:
        """Writes an object; returns the refusal where it is no verdict, None where all is well.

        The answer to a write may be lost and the library's next try be refused by what we wrote ourselves; and a text
        may arrive otherwise than it was sent.
        """
        try:
            self._write(name, text, generation)
        except PreconditionFailed as error:
            return error
        except BadRequest as error:
            if not _is_corruption(error):
                raise
            return error
        return None

    def _write(self, name: str, text: str, generation: int) -> None:
        blob = self._bucket.blob(self._prefix + name)
        blob.cache_control = "no-store"  # what can be read by all is else cached for an hour
        blob.upload_from_string(
            text,
            content_type="application/json",
            if_generation_match=generation,
            checksum="crc32c",
            **self._patience,
        )

    def _download(self, name: str) -> bytes:
        again = Retry(if_exception_type(DataCorruption), initial=0.1, maximum=1.0, timeout=self._transfer.timeout)
        return again(self._bucket.blob(self._prefix + name).download_as_bytes)(checksum="crc32c", **self._patience)

    def _read_pointer(self) -> tuple[Pointer, int]:
        """The pointer, and its generation; 0 where there is none."""
        for _ in range(_TRIES):
            with self._understood():
                blob = self._bucket.get_blob(self._prefix + pointer.FILE, **self._patience)
                if blob is None:
                    return Pointer(), 0
                generation = int(blob.generation)
            # Of the very generation that was named; one that was replaced meanwhile is not found.
            with contextlib.suppress(NotFound, DataCorruption):
                content = blob.download_as_bytes(checksum="crc32c", **self._patience)
                try:
                    return Pointer.from_json(content), generation
                except ValueError as error:
                    raise damaged(f"{self.base}/{pointer.FILE}", error) from error
        raise self._restless()

    def _restless(self) -> UserError:
        return UserError(f"{self.base}/{pointer.FILE} is being changed by others again and again; try again later")

    def _delete_object(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            self._bucket.blob(name).delete(**self._patience)

    def _delete(self, versions: Sequence[str], blobs: Iterable[Blob]) -> None:
        """Deletes versions with their claims; what makes a version whole goes first."""
        doomed = [blob.name for blob in blobs if self._name(blob).split("/")[0] in versions]
        first = [name for name in doomed if name.endswith(f"/{pointer.SAVED_MODEL}")]
        rest = [name for name in doomed if name not in first]
        with concurrent.futures.ThreadPoolExecutor(self._transfer.workers) as pool:
            for names in (first, rest, [self._prefix + _claim_name(version) for version in versions]):
                list(pool.map(self._delete_object, names))

    # Versions and claims.

    def _survey(self, blobs: Sequence[Blob], known: Pointer) -> Survey:
        claims = self._claims(blobs)
        by_version: dict[str, dict[str, Blob]] = {}
        for blob in blobs:
            version, _, name = self._name(blob).partition("/")
            if pointer.is_number(version) and name:
                by_version.setdefault(version, {})[name] = blob
        versions = (
            Version(
                version,
                pointer.is_whole(files) and version not in known.removed,
                version in claims and not known.was_in_service(version),
                sum(blob.size or 0 for blob in files.values()),
                max(blob.time_created.timestamp() for blob in files.values()),
            )
            for version, files in sorted(by_version.items(), key=lambda item: int(item[0]))
        )
        return Survey(known, tuple(versions))

    def _claims(self, blobs: Iterable[Blob]) -> dict[str, Blob]:
        named = ((re.fullmatch(re.escape(_CLAIMS) + r"(\d+)\.json", self._name(blob)), blob) for blob in blobs)
        return {match[1]: blob for match, blob in named if match and pointer.is_number(match[1])}

    def _is_dead(self, claim: Blob) -> bool:
        publisher = None
        with contextlib.suppress(ValueError):
            try:
                publisher = Publisher.from_json(self._download(self._name(claim)))
            except NotFound:  # published, or swept by another, meanwhile
                return False
        return is_dead(publisher, time.time() - claim.updated.timestamp())

    def _claim(self, publisher: Publisher, version: str) -> str:
        """Reserves a number for a publisher: the one given, or the next that is free."""
        while not self._claimed(version, publisher):
            version = str(int(version) + 1)
        return version

    def _claimed(self, version: str, publisher: Publisher) -> bool:
        """Whether a number could be had; if not, it is another's.

        Raises:
            GoogleAPICallError: it is refused again and again, although it is nobody's.
        """
        for attempt in range(_TRIES):
            refusal = self._refused(_claim_name(version), publisher.to_json(), 0)
            if refusal is None:
                return True
            # Another's, or our own by a try whose answer was lost.
            with contextlib.suppress(NotFound):
                return self._download(_claim_name(version)) == publisher.to_json().encode()
            _wait(attempt)
        assert refusal, "there was at least one try"
        raise refusal

    # Models.

    def _upload(self, model_path: str, version: str) -> None:
        files = {f"{version}/{name}": path for name, path in _files(model_path).items()}
        last = f"{version}/{pointer.SAVED_MODEL}"
        self._upload_all({name: path for name, path in files.items() if name != last}, version)
        self._upload_all({name: path for name, path in files.items() if name == last}, version)
        there = {self._name(blob): blob.crc32c for blob in self._list(version + "/")}
        if there != {name: _crc32c(path) for name, path in files.items()}:
            raise UserError(f"{self.path(version)} was changed by somebody else while it was uploaded; publish again")

    def _upload_all(self, files: dict[str, str], version: str) -> None:
        """Uploads files by name, and again what arrives otherwise than it was sent."""
        waiting = files
        for attempt in range(_TRIES):
            outcomes = transfer_manager.upload_many(
                [(path, self._new_blob(name)) for name, path in waiting.items()],
                skip_if_exists=True,
                upload_kwargs={"checksum": "crc32c", **self._patience},
                worker_type=transfer_manager.THREAD,
                max_workers=self._transfer.workers,
            )
            waiting = {
                name: path
                for (name, path), outcome in zip(waiting.items(), outcomes, strict=True)
                if not self._arrived(name, path, outcome)
            }
            if not waiting:
                return
            _wait(attempt)
        if lasting := next(filter(_is_verdict, outcomes), None):
            raise lasting
        raise UserError(f"{self.path(version)}: {len(waiting)} files arrive damaged again and again; check the network")

    def _new_blob(self, name: str) -> Blob:
        return self._bucket.blob(self._prefix + name, chunk_size=self._transfer.chunk)

    def _arrived(self, name: str, path: str, outcome: Exception | None) -> bool:
        """Whether a file is there as it was sent; if not, it can be sent again.

        Raises:
            Exception: an outcome that another try will not mend.
        """
        if outcome is None:
            return True
        if isinstance(outcome, PreconditionFailed):
            # There already: by a try of ours whose answer was lost, for the number is ours alone.
            blob = self._bucket.get_blob(self._prefix + name, **self._patience)
            if blob is None or blob.crc32c == _crc32c(path):
                return blob is not None
            with contextlib.suppress(NotFound, PreconditionFailed):
                blob.delete(if_generation_match=blob.generation, **self._patience)
            return False
        # NotFound: the session of a resumable upload has expired.
        if isinstance(outcome, DataCorruption | NotFound) or _is_corruption(outcome):
            return False
        raise outcome

    def _fetch(self, version: str, folder: str) -> None:
        """Downloads a version.

        Raises:
            UserError: there is none, or it was removed meanwhile.
        """
        pairs = []
        for blob in self._list(version + "/"):
            if blob.name.endswith("/"):  # the console makes such objects for folders
                continue
            parts = self._name(blob).split("/")
            if not {"", ".", ".."}.isdisjoint(parts):
                raise UserError(f"{self.base}: the object {blob.name!r} cannot be a file of a model; remove it")
            path = os.path.join(folder, *parts[1:])
            os.makedirs(os.path.dirname(path), exist_ok=True)
            pairs.append((blob, path))
        if not pairs:
            raise UserError(f"{self.path(version)}: there is nothing; check the path")
        for attempt in range(_TRIES):
            outcomes = transfer_manager.download_many(
                pairs,
                download_kwargs={"checksum": "crc32c", **self._patience},
                worker_type=transfer_manager.THREAD,
                max_workers=self._transfer.workers,
            )
            failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            lasting = [failure for failure in failures if not isinstance(failure, DataCorruption)]
            if any(isinstance(failure, NotFound) for failure in lasting):
                raise UserError(f"{self.path(version)} was removed while it was read; run again")
            if lasting or (failures and attempt == _TRIES - 1):
                raise (lasting or failures)[0]
            pairs = [pair for pair, outcome in zip(pairs, outcomes, strict=True) if isinstance(outcome, DataCorruption)]
            if not pairs:
                return


def _claim_name(version: str) -> str:
    return f"{_CLAIMS}{version}.json"


def _files(model_path: str) -> dict[str, str]:
    """Paths by their names within a model."""
    files = {}
    for folder, _, names in os.walk(model_path):
        for name in names:
            path = os.path.join(folder, name)
            files[os.path.relpath(path, model_path).replace(os.sep, "/")] = path
    return files


def _crc32c(path: str) -> str:
    """As the service tells it."""
    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:
        for _ in checksum.consume(file, 2**20):
            pass
    return base64.b64encode(checksum.digest()).decode()


def _is_corruption(error: Exception) -> bool:
    return isinstance(error, BadRequest) and "crc32c" in str(error).lower()


def _is_verdict(outcome: Exception | None) -> bool:
    """Whether an upload failed by what the service said, and not by damage on the way."""
    return isinstance(outcome, GoogleAPICallError) and not _is_corruption(outcome)


def _is_unanswered(error: BaseException) -> bool:
    """Whether it is not known what became of a request."""
    return isinstance(error, _UNANSWERED) or getattr(error, "code", None) == 408


def _wait(attempt: int) -> None:
    """Between tries of ours, which are numbered from 0; the library waits between its own."""
    time.sleep(0.05 * 2**attempt)


def _words(error: BaseException) -> str:
    """What happened, in one line without the request's address."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, InvalidResponse):  # of an upload, by google-cloud-storage 3
        cause = from_http_status(cause.response.status_code, cause.response.text)
    if not isinstance(cause, GoogleAPICallError):
        return type(cause).__name__
    # Uploads put the whole answer, which is JSON, in place of its message.
    said = re.search(r'"message": ?"([^"]+)"', cause.message)
    text = said[1] if said else re.sub(r"(GET|POST|PUT|DELETE|PATCH) \S+: ", "", cause.message)
    return " ".join(f"{int(cause.code or 0)}: {text}".split())[:200]
