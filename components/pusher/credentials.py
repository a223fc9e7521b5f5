"""Application Default Credentials, or one line that says how to get them."""

import textwrap
from typing import Any

import google.auth
from google.auth.exceptions import GoogleAuthError

from trainer_module.errors import UserError


def default(scope: str, what: str) -> tuple[Any, str | None]:
    """The credentials that this machine's user or service account has.

    Args:
        scope: an OAuth scope's address.
        what: that they are for, in words.

    Returns:
        The credentials, and the project that goes with them, if one does.

    Raises:
        UserError: there are none, or none that can be read.
    """
    try:
        return google.auth.default(scopes=(scope,))
    # The library reads whatever GOOGLE_APPLICATION_CREDENTIALS names as if it were a key file.
    except (GoogleAuthError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"there are no credentials for {what} ({_reason(error)}): log in with 'gcloud auth application-default "
            "login', or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, GoogleAuthError) and error.args:  # the cause is its second argument
        return textwrap.shorten(str(error.args[0]), 300, placeholder=" …")
    return "the file that GOOGLE_APPLICATION_CREDENTIALS names is no key file"
