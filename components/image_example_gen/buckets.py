"""Google Cloud Storage, where Beam's file systems are too slow to answer or read more than is wanted."""

import re
from typing import Any

from trainer_module.errors import UserError

_SCHEME = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_ANSWER_SECONDS = 15.0


def client() -> Any:
    """A google.cloud.storage.Client with the machine's credentials; anonymous where there are none."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud.storage import Client

    try:
        credentials, project = google.auth.default(scopes=("https://www.googleapis.com/auth/devstorage.read_only",))
    except DefaultCredentialsError:
        return Client.create_anonymous_client()
    # Reading needs no project, but the client refuses to be made without one.
    return Client(project or "none", credentials)


def read(made: Any, path: str, offset: int, size: int) -> bytes:
    """Reads a range of an object, and no byte more.

    Args:
        made: of `client`.
        path: gs://bucket/name.
        offset, size: bytes; fewer are returned where the object ends before.

    Raises:
        OSError: it cannot be read.
    """
    from google.api_core.exceptions import GoogleAPIError, RequestRangeNotSatisfiable
    from google.auth.exceptions import GoogleAuthError

    bucket, _, name = path.removeprefix(_SCHEME).partition("/")
    if not size:
        return b""
    try:
        return made.bucket(bucket).blob(name).download_as_bytes(start=offset, end=offset + size - 1, checksum=None)
    except RequestRangeNotSatisfiable:
        return b""
    except (GoogleAPIError, GoogleAuthError) as error:
        raise OSError(f"{path}: {error}") from error


def check(src: str) -> None:
    """Asks once for one name below a gs:// source, so that a wrong name is told in seconds and not after retries.

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
    try:
        found = client().list_blobs(bucket, prefix=prefix, max_results=1, timeout=_ANSWER_SECONDS, retry=None)
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
