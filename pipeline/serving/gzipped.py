"""A compressed body or message unfolded piece by piece, so that no more of it is held than may be.

Tornado unfolds bodies itself, but cuts the connection of a damaged one, with no status; gRPC unfolds all of a message.
"""

import zlib
from collections.abc import Iterator

from pipeline.serving.refusal import Refused, invalid

_GZIP = 16 + zlib.MAX_WBITS
_PIECE = 2**18


class Unfolder:
    """One body."""

    def __init__(self, wbits: int = _GZIP) -> None:
        """Nothing has come yet.

        Args:
            wbits: which kinds of compression are taken, as zlib has it.
        """
        self._gzip = zlib.decompressobj(wbits)

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
                raise invalid("the body goes on after its compressed data")
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
    return invalid("the body is damaged: it is not compressed as it says, or not all of it is there")
