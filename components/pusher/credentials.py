"""Application Default Credentials, or one line that says how to get them."""

from typing import Any

import google.auth
from google.auth.exceptions import DefaultCredentialsError

from trainer_module.errors import UserError


def default(scope: str, what: str) -> tuple[Any, str | None]:
    """The credentials that this machine's user or service account has.

    Args:
        scope: an OAuth scope's address.
        what: that they are for, in words.

    Returns:
        The credentials, and the project that goes with them, if one does.

    Raises:
        UserError: there are none.
    """
    try:
        return google.auth.default(scopes=(scope,))
    except DefaultCredentialsError as error:
        reason = str(error).splitlines()[0][:150]
        raise UserError(
            f"there are no credentials for {what} ({reason}): log in with 'gcloud auth application-default login', or "
            "set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        ) from error
