"""Names of places on Google Cloud; light, so that a wrong one is refused at once."""

import json
import re

from trainer_module.errors import UserError


def check_place(project: str, region: str, prefix: str = "--", sign: str = " ") -> None:
    """Refuses names that no project or region can have.

    Args:
        project: an id.
        region: such as europe-west4.
        prefix: of the options' names.
        sign: between an option and its value.

    Raises:
        UserError: names the option.
    """
    for option, value, pattern, example in (
        ("project", project, r"(?:[a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]|\d+", "my-project-1"),
        ("region", region, r"[a-z]+-[a-z]+\d{1,2}", "europe-west4"),
    ):
        if not value:
            raise UserError(f"{prefix}{option} is missing; e.g. {prefix}{option}{sign}{example}")
        if not re.fullmatch(pattern, value):
            raise UserError(f"{prefix}{option}{sign}{json.dumps(value)} is none; e.g. {prefix}{option}{sign}{example}")
