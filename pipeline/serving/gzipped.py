"""A gzip body unfolded piece by piece, so that no more of it is held than may be.

Tornado unfolds bodies itself, but cuts the connection of a damaged one, with no status.
"""

import zlib
from collections.abc import Iterator

from pipeline.serving.refusal import Refused, invalid

_GZIP = 16 + zlib.MAX_WBITS
_PIECE = 2**18


class Unfolder:
    """One body."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._gzip = zlib.decompressobj(_GZIP)

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """What the next chunk unfolds to.

        Raises:
            Refused: INVALID_ARGUMENT, it is damaged.
        """
        while chunk:
            try:
                piece = self._gzip.decompress(chunk, _PIECE)
            except zlib.error:
                raise _damaged() from None
            if self._gzip.unused_data:
                raise invalid("the body goes on after its gzip data")
            yield piece
            chunk = self._gzip.unconsumed_tail

    def end(self) -> None:
        """Checks that all of it has come.

        Raises:
            Refused: INVALID_ARGUMENT, it is cut off.
        """
        if not self._gzip.eof:
            raise _damaged()


def _damaged() -> Refused:
    return invalid("the body is damaged: it is no gzip data, as its Content-Encoding says, or not all of it")
