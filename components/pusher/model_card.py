"""The model's card for people: Markdown beside the JSON that programs read."""

from collections.abc import Iterator, Mapping
from typing import Any

FILE = "assets.extra/model_card.md"


def to_markdown(card: Mapping[str, Any]) -> str:
    """A card as Markdown: what stands alone first, then a table for each group.

    Args:
        card: as in model_card.json.
    """
    return "\n".join(["# Model card", "", *_section(card, 2)]).rstrip() + "\n"


def _section(entries: Mapping[str, Any], level: int) -> Iterator[str]:
    plain = {key: value for key, value in entries.items() if not isinstance(value, Mapping)}
    if plain:
        yield from ("| | |", "|---|---|")
        yield from (f"| {_cell(key)} | {_cell(value)} |" for key, value in sorted(plain.items()))
        yield ""
    for key, value in sorted(entries.items()):
        if isinstance(value, Mapping):
            yield from (f"{'#' * min(level, 6)} {_cell(key)}", "")
            yield from _section(value, level + 1)


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
