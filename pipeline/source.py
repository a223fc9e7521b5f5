"""What `--images` says, refused as far as names tell, before anything heavy is imported."""

import glob
import os
import re
from collections.abc import Iterator

from components.image_example_gen import sources
from trainer_module.errors import UserError

_SPEC = re.compile(r"\{(SPAN|VERSION|YYYY|MM|DD)(?::(\d+))?\}")
_DATE_WIDTHS = {"YYYY": 4, "MM": 2, "DD": 2}
_UNREAD = re.compile(r"(https?|ftp|file)://", re.IGNORECASE)
_WILD = re.compile(r"\*+|\?|\[[^]]*\]")


def check(images: str) -> None:
    """Refuses a source that no run could read.

    Raises:
        UserError: nothing there, no image, a scheme or a name that cannot be read, or spans that are not numbered so.
    """
    if found := _UNREAD.match(images):
        raise UserError(
            f"--images {images}: {found[0]} is not read; name a folder, a glob, tar files or TFRecords on this machine "
            "or on gs://"
        )
    if "://" not in images:
        _check_name(images)
    sources.check(images)
    for path, values in _spans(images):
        _check_span(images, path, values)


def without_span(images: str) -> None:
    """Refuses {SPAN} and its like, of which a run takes the newest, where one folder is wanted.

    Raises:
        UserError: names the newest one.
    """
    if not os.path.exists(images) and (spec := _SPEC.search(images)):
        spans = [(tuple(int(value) for value in values if value.isdecimal()), path) for path, values in _spans(images)]
        example = f"; e.g. --images {max(spans)[1]}" if spans else ""
        raise UserError(f"--images {images}: {spec[0]} is for './moco run'; name the folder or files of one{example}")


def folders(images: str) -> list[str]:
    """The folders of this machine that a source reads whole."""
    src = _absolute(images)
    found = [src] if os.path.exists(src) else glob.glob(_SPEC.sub("*", src), recursive=True)
    return [path for path in found if os.path.isdir(path)]


def _absolute(images: str) -> str:
    return sources.join_pattern(*sources.split_pattern(images))


def _check_name(images: str) -> None:
    try:
        os.path.abspath(images).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(os.path.abspath(images)).decode("utf-8", "backslashreplace")
        raise UserError(
            f"--images {shown}: its name is not valid UTF-8; rename it, or name a link to it whose name is"
        ) from None


def _spans(images: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What of this machine a source with {SPAN} or its like matches: path, and what stands in each one's place."""
    src = "" if "://" in images else _absolute(images)
    if not _SPEC.search(src) or os.path.exists(src):
        return
    pattern = re.compile(_regex(src))
    for path in sorted(glob.glob(_SPEC.sub("*", src), recursive=True)):
        if found := pattern.fullmatch(path):
            yield path, found.groups()


def _regex(src: str) -> str:
    parts, at = [], 0
    for spec in _SPEC.finditer(src):
        width = _DATE_WIDTHS.get(spec[1])
        parts += [_literal(src[at : spec.start()]), f"([^/]{{{width}}})" if width else "([^/]*)"]
        at = spec.end()
    return "".join([*parts, _literal(src[at:])])


def _literal(text: str) -> str:
    parts, at = [], 0
    for wild in _WILD.finditer(text):
        parts += [re.escape(text[at : wild.start()]), ".*" if wild[0] == "**" else "[^/]*"]
        at = wild.end()
    return "".join([*parts, re.escape(text[at:])])


def _check_span(images: str, path: str, values: tuple[str, ...]) -> None:
    for spec, value in zip(_SPEC.finditer(_absolute(images)), values, strict=True):
        if not value.isdecimal():
            raise UserError(
                f"--images {images}: {path} has {value!r} where {spec[0]} stands for a number; rename or move it"
            )
        if spec[1] in _DATE_WIDTHS:
            continue
        if spec[2] is None and value != str(int(value)):
            wider = images.replace(spec[0], f"{{{spec[1]}:{len(value)}}}")
            raise UserError(
                f"--images {images}: {path} has {len(value)} digits, zeros before the number; e.g. --images '{wider}'"
            )
        if spec[2] is not None and len(value) != int(spec[2]):
            raise UserError(f"--images {images}: {path} has {value}, which has not the {spec[2]} digits of {spec[0]}")
