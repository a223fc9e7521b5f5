"""Images that look alike on both sides of the split: an eval image of which training has seen a copy proves nothing.

Two images are near duplicates when at most so many of the 64 bits of their perceptual hashes differ: resized,
recompressed or slightly brightened copies differ in 0 to 4, different pictures in about 32. The hash is pHash's (the
low frequencies of a 32 x 32 grey copy against their median), as the ImageHash package has it, which would bring
PyWavelets along for it.

Every image leaves 8 bytes and its SHA-256. The eval split's, the smaller side, go to every worker; the train split's
are looked up there shard by shard. If two hashes differ in at most t bits, they agree in one of any t + 1 pieces of
them (Manku et al., WWW 2007), so only those that share a piece are compared.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft

_SIDE = 32
_LOW = 8
_BITS = 64
_PAIRS_AT_ONCE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Prints:
    """Perceptual hashes of some images.

    Attributes:
        hashes: uint64 [N].
        shas: bytes S64 [N], hex SHA-256 of each.
    """

    hashes: NDArray[np.uint64]
    shas: NDArray[np.bytes_]

    @staticmethod
    def of(pairs: Sequence[tuple[int, str]]) -> "Prints":
        """Hashes with their SHA-256."""
        return Prints(
            np.array([one for one, _ in pairs], np.uint64), np.array([sha.encode() for _, sha in pairs], "S64")
        )

    @staticmethod
    def join(parts: Sequence["Prints"]) -> "Prints":
        """All of them, sorted by SHA-256."""
        none = Prints.of([])
        shas = np.concatenate([part.shas for part in (none, *parts)])
        order = np.argsort(shas, kind="stable")
        return Prints(np.concatenate([part.hashes for part in (none, *parts)])[order], shas[order])


def perceptual_hash(image: Image.Image) -> int:
    """The pHash of an upright image without transparency: 64 bits."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    low = fft.dctn(np.asarray(small, np.float64))[:_LOW, :_LOW]
    # What only rounding tells from the median would be a bit of noise in every flat picture.
    bits = np.round(low - np.median(low), 6) > 0
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class Index:
    """Hashes that are looked for."""

    def __init__(self, prints: Prints, distance: int) -> None:
        """Args:
        prints: of the eval split.
        distance: most bits that may differ.
        """
        self._prints, self._distance = prints, distance
        edges = np.linspace(0, _BITS, distance + 2).astype(int)
        self._pieces = [(int(low), int(high)) for low, high in itertools.pairwise(edges)]
        values = [_piece(prints.hashes, *piece) for piece in self._pieces]
        self._orders = [np.argsort(value, kind="stable") for value in values]
        self._sorted = [value[order] for value, order in zip(values, self._orders, strict=True)]

    def find(self, others: Prints) -> Iterator[tuple[bytes, tuple[int, bytes]]]:
        """Yields (sha of the eval image, (bits that differ, sha of the other)), some pairs more than once."""
        for piece, order, values in zip(self._pieces, self._orders, self._sorted, strict=True):
            wanted = _piece(others.hashes, *piece)
            first, last = np.searchsorted(values, wanted, "left"), np.searchsorted(values, wanted, "right")
            for rows in _parts(last - first):
                counts = (last - first)[rows]
                other = np.repeat(rows, counts)
                offset = np.arange(len(other)) - np.repeat(np.cumsum(counts) - counts, counts)
                own = order[np.repeat(first[rows], counts) + offset]
                distance = _bits_that_differ(self._prints.hashes[own], others.hashes[other])
                for at in np.flatnonzero(distance <= self._distance):
                    yield bytes(self._prints.shas[own[at]]), (int(distance[at]), bytes(others.shas[other[at]]))


def _piece(hashes: NDArray[np.uint64], low: int, high: int) -> NDArray[np.uint64]:
    return (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)


def _parts(counts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Row numbers in parts of about _PAIRS_AT_ONCE pairs."""
    part = np.cumsum(counts) // _PAIRS_AT_ONCE
    for number in np.unique(part[counts > 0]):
        yield np.flatnonzero(part == number)


def _bits_that_differ(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.unpackbits((one ^ other)[:, None].view(np.uint8), axis=1).sum(axis=1, dtype=np.int64)
