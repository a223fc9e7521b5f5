"""Frozen dataclasses as JSON text, for the plain parameters of components."""

import dataclasses
import enum
import json
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def dumps(config: Any) -> str:
    """A dataclass as JSON: enums by name, nested dataclasses as objects, keys sorted.

    Equal configurations give equal texts, so the text can take part in a cache key.
    """
    return json.dumps(_plain(config), sort_keys=True)


def loads(cls: type[T], text: str) -> T:
    """The inverse of `dumps`.

    Args:
        cls: the dataclass; its fields are dataclasses, enums, homogeneous tuples, or JSON's own types.
        text: what `dumps` returned. A field that is absent takes its default.

    Raises:
        TypeError: the text has a field that the dataclass has not, or lacks one without default.
        KeyError: an enum has no member of that name.
    """
    return _typed(cls, json.loads(text))


def loads_foreign(cls: type[T], text: str | bytes) -> T:
    """A dataclass of JSON's own types from text that need not be one's own, such as a file's.

    Raises:
        ValueError: the text is no JSON, or has other fields than the dataclass.
    """
    try:
        return cls(**json.loads(text))
    except TypeError as error:
        raise ValueError(str(error)) from error


def flatten(config: Any) -> dict[str, Any]:
    """A dataclass as {"section.key": value} with JSON's types only: enums by name, tuples as lists."""
    return dict(_leaves(_plain(config), ""))


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{name: _typed(hints.get(name), item) for name, item in value.items()})  # type: ignore[operator]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint[value]
    if typing.get_origin(hint) is tuple:
        item_hint = typing.get_args(hint)[0]
        return tuple(_typed(item_hint, item) for item in value)
    return value
