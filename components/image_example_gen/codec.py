"""Proves that bytes are a usable image and brings them into canonical form, with Pillow alone.

Everything here is a pure function of its arguments and safe to call from many threads.
"""

import contextlib
import dataclasses
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Iterator

# Importing the plugins registers them, so Pillow needs not load its forty others to find these five.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from components.image_example_gen.near_duplicates import perceptual_hash

# What is opened at all; Pillow's other decoders are rarer, and each is a further way in for hostile bytes.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = b"\xff\xda"
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of those that end a scan's data
# Encoders make ten or so. Each goes over all pixels, 40 ms for 50 million, and may take a few bytes of the file.
_MAX_SCANS = 100
# Bit depth and colour type in a PNG's IHDR: 8-bit grey, 8-bit RGB.
_PNG_PLAIN = (b"\x08\x00", b"\x08\x02")
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# What brings an image of that EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):  # noqa: N818  # it says what the bytes are, not that something failed
    """Bytes that cannot be used as an image.

    Attributes:
        reason: one of empty, not_an_image, too_many_pixels, too_small, truncated, damaged.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Limits:
    """The sizes that are accepted, in pixels: see IngestConfig."""

    max_pixels: int
    min_side: int


@dataclasses.dataclass(frozen=True)
class Canonical:
    """An image that every decoder here reads alike: 8-bit RGB or grey, opaque, upright.

    Attributes:
        encoded: JPEG or PNG bytes.
        format: `jpeg` or `png`.
        height, width: pixels.
        perceptual: 64 bits, see components.image_example_gen.near_duplicates; None where it was not asked for.
    """

    encoded: bytes
    format: str
    height: int
    width: int
    perceptual: int | None = None


def sha256(data: bytes) -> str:
    """Hex SHA-256 of the original bytes: an image's identity."""
    return hashlib.sha256(data).hexdigest()


def looks_like_image(head: bytes) -> bool:
    """Whether the first bytes (16 suffice) are those of a format in FORMATS."""
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM"))


def recognise(data: bytes) -> None:
    """Checks the first bytes alone, at next to no cost.

    Raises:
        BadImage: empty or not_an_image.
    """
    if not data:
        raise BadImage("empty", "zero bytes")
    if not looks_like_image(data[:16]):
        raise BadImage("not_an_image", f"its {len(data)} bytes are no JPEG, PNG, GIF, BMP or WebP")


def inspect(data: bytes, limits: Limits) -> Image.Image:
    """Checks what the header tells, without decoding a pixel.

    Returns:
        The opened, not yet decoded image.

    Raises:
        BadImage: empty, not_an_image, too_many_pixels or too_small, tested in this order.
    """
    recognise(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadImage("damaged", "its header cannot be read") from error
    except Exception as error:  # a hostile header makes Pillow's plugins raise nearly anything
        raise BadImage("damaged", _describe(error)) from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise BadImage("too_many_pixels", f"{width}x{height} is over {limits.max_pixels} pixels")
    if min(width, height) < limits.min_side:
        raise BadImage("too_small", f"{width}x{height} has a side under {limits.min_side} pixels")
    if "progressive" in image.info and data.count(_JPEG_SCAN) > _MAX_SCANS and _scans(data) > _MAX_SCANS:
        raise BadImage("damaged", f"the JPEG has more than {_MAX_SCANS} scans")
    return image


def is_plain(data: bytes, image: Image.Image) -> bool:
    """Whether bytes are canonical already, by what stands before the pixels; decodes nothing and proves nothing.

    Args:
        data: a whole file.
        image: of `inspect`.

    Returns:
        False also where the pixels come first: a PNG may tell its orientation behind them.
    """
    return not (_kind(image) == "png" and _says_more_behind_pixels(data)) and _is_plain(image, data)


def grown_size(data: bytes, limits: Limits) -> int:
    """About how many bytes `canonical` makes of an image that it encodes anew; 0 where it keeps or refuses the bytes.

    Told by the header alone. A PNG of a photograph takes some half of its pixels' bytes.
    """
    try:
        image = inspect(data, limits)
    except BadImage:
        return 0
    return 0 if is_plain(data, image) else max(len(data), 3 * image.width * image.height // 2)


def canonical(data: bytes, limits: Limits, *, hashed: bool = False, compress_level: int = 1) -> Canonical:
    """Decodes an image fully, to prove it, and returns it in canonical form.

    A plain 8-bit RGB or grey JPEG or PNG that needs no rotation keeps its bytes. Everything else becomes an RGB PNG:
    EXIF rotation applied, transparency laid on white, 16 bits reduced to 8 by their high byte (as libpng and
    TensorFlow do), CMYK converted, the first frame of an animation.

    Args:
        data: the original bytes.
        limits: accepted sizes.
        hashed: whether the perceptual hash is wanted, too.
        compress_level: of that PNG. 1 takes half the time of zlib's default for a tenth more bytes; 0, for bytes
            that are decoded at once and forgotten, a tenth of it.

    Raises:
        BadImage: see there; the header is checked before anything is decoded.
    """
    with _damage_told():
        image = _loaded(data, limits)
        if _is_plain(image, data):
            return Canonical(data, _kind(image), image.height, image.width, _hash(image, hashed))
        rgb = _upright(image)
        encoded = io.BytesIO()
        rgb.save(encoded, "PNG", compress_level=compress_level)
    return Canonical(encoded.getvalue(), "png", rgb.height, rgb.width, _hash(rgb, hashed))


def upright(data: bytes, limits: Limits) -> Image.Image:
    """An image's pixels as `canonical` has them: RGB, opaque, upright.

    Raises:
        BadImage: see there.
    """
    with _damage_told():
        return _upright(_loaded(data, limits))


def _loaded(data: bytes, limits: Limits) -> Image.Image:
    image = inspect(data, limits)
    _check_end(image, data)
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    rgb = _to_rgb(image)
    turn = _TURNS.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # see inspect()
        text = _describe(error)
        raise BadImage("truncated" if "truncated" in text.lower() else "damaged", text) from error


def _hash(image: Image.Image, hashed: bool) -> int | None:
    return perceptual_hash(image) if hashed else None


def _describe(error: Exception) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def _kind(image: Image.Image) -> str:
    """`jpeg`, `png`, or Pillow's own name in lower case; a phone's MPO file begins with a whole JPEG."""
    name = (image.format or "").lower()
    return "jpeg" if name == "mpo" else name


def _scans(data: bytes) -> int:
    """The scans of a JPEG's first picture, one after another, as far as there are not too many.

    Counting the marks alone would blame photographs with a film behind them.
    """
    scans, at = 0, 2
    while scans <= _MAX_SCANS and (found := _JPEG_MARKER.search(data, at)) and found[0] != _JPEG_END:
        scans += found[0] == _JPEG_SCAN
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether the bytes are already canonical."""
    if _orientation(image) != 1 or image.mode not in ("RGB", "L") or "transparency" in image.info:
        return False
    return _kind(image) == "jpeg" or (_kind(image) == "png" and data[24:26] in _PNG_PLAIN)


def _check_end(image: Image.Image, data: bytes) -> None:
    """Refuses what Pillow forgives and libjpeg or libpng, and so TensorFlow, does not: a missing end, wrong checksums.

    The image has been opened and not yet loaded: its file stands where a JPEG's first scan begins.
    """
    if _kind(image) == "jpeg" and data.find(_JPEG_END, image.fp.tell()) < 0:  # type: ignore[attr-defined]
        raise BadImage("truncated", "the JPEG has no end mark")
    if _kind(image) == "png":
        _check_png_chunks(memoryview(data))


def _check_png_chunks(data: memoryview) -> None:
    """Goes through length, name, body and checksum of every chunk; a third of the time of Pillow's verify()."""
    at, name = 8, b""
    while name != b"IEND":
        try:
            length, name = struct.unpack_from(">I4s", data, at)
            (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        except struct.error as error:
            raise BadImage("truncated", "the PNG has no end chunk") from error
        if zlib.crc32(data[at + 4 : at + 8 + length]) != checksum:
            raise BadImage("damaged", f"the PNG's chunk at byte {at} has a wrong checksum")
        at += 12 + length


def _says_more_behind_pixels(data: bytes) -> bool:
    """Whether another chunk than IEND follows a PNG's pixels, or its end is missing."""
    at, seen = 8, False
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"IEND":
            return False
        if seen and name != b"IDAT":
            return True
        seen = seen or name == b"IDAT"
        at += 12 + length
    return True


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or where the EXIF block cannot be read."""
    try:
        # The base's: that of PNG decodes the image first, which whoever wants what stands behind the pixels has done.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not spoil the picture
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB, transparency laid on white; the result carries no metadata."""
    if image.mode in _WIDE_MODES:
        image = _high_byte(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    image = image.convert("RGB")
    image.info.clear()
    return image


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey. Pillow's own conversion clips at 255 instead of scaling."""
    wide = image.convert("I")
    wide.info.clear()  # a transparent level would be one of 16 bits
    return wide.point(lambda value: value * (1 / 256)).convert("L")
