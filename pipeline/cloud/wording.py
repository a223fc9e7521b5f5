"""What others say, in a form that fits into one of our lines."""


def one_line(text: str, longest: int = 400) -> str:
    """A text on one line, without its full stop, cut where it is too long.

    Args:
        text: of any form.
        longest: characters that it may have.
    """
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
