"""What is asked of one run besides what its pipeline holds."""

import dataclasses
import datetime
import json
import re
import zoneinfo
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cloud.labels import labelled
from trainer_module.errors import UserError

_NAME = re.compile(r"[a-z][-a-z0-9]{0,127}")
_FIELD = re.compile(r"[0-9*,/?LW#-]+|(?:[0-9*,/?#-]*[A-Za-z]{3}[0-9*,/?#A-Za-z-]*)")
_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
_CRON_FIELDS: Sequence[tuple[str, range, Sequence[str]]] = (
    ("minute", range(60), ()),
    ("hour", range(24), ()),
    ("day of the month", range(1, 32), ()),
    ("month", range(1, 13), _MONTHS),
    ("day of the week", range(8), _DAYS),
)
_KINDS: Mapping[str, Any] = {"INT": int, "NUMBER_INTEGER": int, "DOUBLE": float, "NUMBER_DOUBLE": float}


@dataclasses.dataclass(frozen=True)
class Submission:
    """See the module.

    Attributes:
        name: of the run or the schedule; empty for one of the pipeline's name, and of the time where it is a run.
        labels: on the run.
        parameters: values as typed, by the names of the pipeline's runtime parameters.
        cached: whether stages may be taken from the cache.
        cron: when runs begin, five fields, with CRON_TZ=ZONE before them if it is not UTC; empty for once, now.
        service_account: e-mail of the account that the run acts as on Vertex AI; empty for the default one.
        network: full name, of Vertex AI's; empty for the default one.
    """

    name: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cached: bool = True
    cron: str = ""
    service_account: str = ""
    network: str = ""


def submission(
    *,
    name: str = "",
    labels: Sequence[str] = (),
    parameters: Sequence[str] = (),
    cached: bool = True,
    cron: str = "",
) -> Submission:
    """One of what was typed.

    Args:
        name: see `Submission`.
        labels: KEY=VALUE each.
        parameters: NAME=VALUE each.
        cached, cron: see `Submission`.

    Raises:
        UserError: names the option.
    """
    if name and not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name} may have 128 small letters, digits and '-' and begins with a letter; e.g. --name moco-17"
        )
    for parameter in parameters:
        if "=" not in parameter:
            raise UserError(f"--parameter {parameter} must be NAME=VALUE; e.g. --parameter epochs=50")
    given = [parameter.partition("=")[0] for parameter in parameters]
    if twice := next((one for one in given if given.count(one) > 1), ""):
        raise UserError(f"--parameter {twice}: it is given twice; leave one out, be it --parameter or --{twice}")
    if cron:
        _check_cron(cron)
    values = dict(parameter.split("=", 1) for parameter in parameters)
    return Submission(name, labelled(labels), values, cached, cron)


def run_name(asked: str, pipeline: str, now: datetime.datetime) -> str:
    """The name of a run.

    Args:
        asked: for it; empty for one of the pipeline's name and the time.
        pipeline: its name.
        now: the time.
    """
    return asked or f"{plain(pipeline)}-{now:%Y%m%d-%H%M%S}"


def plain(text: str) -> str:
    """A text as a name on Google Cloud: small letters, digits and '-', the first a letter."""
    dashed = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return dashed if dashed[:1].isalpha() else f"run-{dashed}".rstrip("-")


def typed(parameters: Mapping[str, str], job: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the types that a pipeline declares.

    Args:
        parameters: as typed.
        job: the compiled pipeline, a PipelineJob in JSON's types.

    Raises:
        UserError: there is no such parameter, the value is of another type, or one that must have a value has none.
    """
    definitions = job["pipelineSpec"]["root"].get("inputDefinitions", {}).get("parameters", {})
    compiled = job.get("runtimeConfig", {})
    given = {*parameters, *compiled.get("parameterValues", {}), *compiled.get("parameters", {})}
    for name, definition in definitions.items():
        if name not in given and not definition.get("isOptional"):
            raise UserError(f"the pipeline's parameter {name} has no value; e.g. --parameter {name}=VALUE")
    for name in parameters:
        if name not in definitions:
            known = ", ".join(sorted(definitions)) or "it has none"
            raise UserError(f"--parameter {name}: the pipeline has no such parameter; one of: {known}")
    return {name: _value(name, text, definitions[name]) for name, text in parameters.items()}


def _value(name: str, text: str, definition: Mapping[str, Any]) -> Any:
    kind = str(definition.get("parameterType") or definition.get("type"))
    try:
        if kind in _KINDS:
            return _KINDS[kind](text)
        if kind == "BOOLEAN":
            return {"true": True, "false": False}[text.lower()]
        return json.loads(text) if kind in ("LIST", "STRUCT") else text
    except (ValueError, KeyError) as error:
        raise UserError(f"--parameter {name}={text} must be of type {kind}") from error


def _check_cron(cron: str) -> None:
    zone, fields = "", cron.split()
    if fields and (found := re.fullmatch(r"(?:CRON_)?TZ=(.+)", fields[0])):
        zone, fields = found[1], fields[1:]
    if len(fields) != len(_CRON_FIELDS) or not all(_FIELD.fullmatch(field) for field in fields):
        raise UserError(
            f"--cron {cron!r} must have five fields: minute, hour, day of the month, month, day of the week; e.g. "
            "--cron '0 3 * * *'"
        )
    for field, (what, numbers, names) in zip(fields, _CRON_FIELDS, strict=True):
        if wrong := next((part for part in field.split(",") if not _is_moment(part, numbers, names)), ""):
            known = f"{numbers[0]} to {numbers[-1]}" + (f", {names[0]} to {names[-1]}" if names else "")
            raise UserError(f"--cron {cron!r}: {wrong} is no {what} ({known}); e.g. --cron '0 3 * * *'")
    if zone and zone not in zoneinfo.available_timezones():
        raise UserError(f"--cron {cron!r}: there is no time zone {zone}; e.g. --cron 'CRON_TZ=Europe/Berlin 0 3 * * *'")


def _is_moment(part: str, numbers: range, names: Sequence[str]) -> bool:
    """Whether a part of a field can ever be; the letters and signs that some services know besides are left to them."""
    if re.fullmatch(r"\d*[LW]{1,2}|\w+#\d|L-\d+", part):
        return True
    ends, _, step = part.partition("/")
    if "/" in part and not (step.isdecimal() and int(step)):
        return False
    known = {"*", "?", *names, *map(str, numbers)}
    return all((end.lstrip("0") or "0" if end.isdecimal() else end.upper()) in known for end in ends.split("-"))
