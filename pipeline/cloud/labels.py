"""Labels as Google Cloud takes them."""

import re
from collections.abc import Sequence

from trainer_module.errors import UserError


def labelled(labels: Sequence[str], option: str = "--label") -> dict[str, str]:
    """Labels by their keys.

    Args:
        labels: KEY=VALUE each.
        option: that they were typed behind.

    Raises:
        UserError: one has another form than Google Cloud takes, or the key of another one.
    """
    for label in labels:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}", label):
            raise UserError(
                f"{option} {label} must be KEY=VALUE of small letters, digits, '_' and '-', 63 at most each; e.g. "
                f"{option} team=vision"
            )
    made = dict(label.split("=") for label in labels)
    if len(made) < len(labels):
        raise UserError(f"{option} {' '.join(labels)}: a key is there twice; leave one out")
    return made
