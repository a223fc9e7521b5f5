"""From bytes as users have them to bytes that the model reads, with the limits checked before anything is decoded.

The codec is ingestion's, so that an image has the same pixels here, in `./moco embed` and in the pipeline. What is
plain already goes on as it is, undecoded: the model decodes it, and so proves it, once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future

from components.image_example_gen import codec
from components.image_example_gen.codec import BadImage
from pipeline.serving.config import MIB, ServeConfig


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What one image may be.

    Attributes:
        max_bytes: of the encoded image.
        pixels: see `codec.Limits`.
        group_pixels: that are decoded in one call of the model.
    """

    max_bytes: int
    pixels: codec.Limits
    group_pixels: int

    @classmethod
    def of(cls, config: ServeConfig) -> "ImageLimits":
        """Those of a configuration."""
        limits = codec.Limits(config.max_pixels, config.min_side)
        return cls(int(config.max_image_mb * MIB), limits, 2 * config.max_pixels)


@dataclasses.dataclass(frozen=True)
class Container:
    """How an encoded image lies in a row of a signature's input.

    Attributes:
        unwrap: a row -> the encoded image; raises BadImage where it holds none.
        wrap: a row, another encoded image -> the row with that one.
    """

    unwrap: Callable[[bytes], bytes]
    wrap: Callable[[bytes, bytes], bytes]


BARE = Container(unwrap=lambda row: row, wrap=lambda _, image: image)


@dataclasses.dataclass(frozen=True)
class _Row:
    index: int
    row: bytes
    image: bytes
    pixels: int
    plain: bool


def prepared(
    rows: Sequence[bytes], container: Container, limits: ImageLimits, pool: Executor, errors: dict[int, str]
) -> Iterator[tuple[list[int], list[bytes]]]:
    """Yields rows in canonical form with their indices, in groups whose pixels fit into memory at once.

    Args:
        rows: as they came.
        container: how images lie in them.
        limits: of each image, and of a group.
        pool: decodes what is not plain.
        errors: is given the error of each row that is not yielded, by index.
    """
    for group in _grouped(_inspected(rows, container, limits, errors), limits.group_pixels):
        futures = {row.index: pool.submit(_canonical, row, container, limits) for row in group if not row.plain}
        errors.update({index: str(error) for index, future in futures.items() if (error := _bad(future))})
        good = {row.index: row for row in group if row.index not in errors}
        if good:
            yield list(good), [row.row if row.plain else futures[index].result() for index, row in good.items()]


def explain(row: bytes, container: Container, limits: ImageLimits) -> str | None:
    """What is wrong with a row that the model refused, in the words of `./moco embed`; None where it finds nothing."""
    try:
        codec.canonical(container.unwrap(row), limits.pixels)
    except BadImage as error:
        return str(error)
    return None


def reason(error: str) -> str:
    """The kind of an image's error, for the metrics: a `BadImage.reason`, or `model`."""
    return error.partition(":")[0]


def _inspected(
    rows: Sequence[bytes], container: Container, limits: ImageLimits, errors: dict[int, str]
) -> Iterator[_Row]:
    for index, row in enumerate(rows):
        looked = _inspect(index, row, container, limits)
        if isinstance(looked, BadImage):
            errors[index] = str(looked)
        else:
            yield looked


def _inspect(index: int, row: bytes, container: Container, limits: ImageLimits) -> _Row | BadImage:
    try:
        image = container.unwrap(row)
        if len(image) > limits.max_bytes:
            return BadImage("too_many_bytes", f"{len(image)} are over {limits.max_bytes} bytes")
        opened = codec.inspect(image, limits.pixels)
    except BadImage as error:
        return error
    return _Row(index, row, image, opened.width * opened.height, codec.is_plain(image, opened))


def _bad(future: Future[bytes]) -> BadImage | None:
    error = future.exception()
    if error is None or isinstance(error, BadImage):
        return error
    raise error


def _grouped(rows: Iterator[_Row], pixels: int) -> Iterator[list[_Row]]:
    group: list[_Row] = []
    total = 0
    for row in rows:
        if group and total + row.pixels > pixels:
            yield group
            group, total = [], 0
        group.append(row)
        total += row.pixels
    if group:
        yield group


def _canonical(row: _Row, container: Container, limits: ImageLimits) -> bytes:
    image = codec.canonical(row.image, limits.pixels, compress_level=0).encoded
    return row.row if image == row.image else container.wrap(row.row, image)
