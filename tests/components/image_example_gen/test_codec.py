"""Every image format and every broken file of the ingestion's promise, made here with Pillow, without TFX."""

import concurrent.futures
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from components.image_example_gen.codec import BadImage, Limits, canonical, inspect, looks_like_image

LIMITS = Limits(max_pixels=100_000_000, min_side=8)


def picture(height: int = 24, width: int = 40, seed: int = 0) -> Image.Image:
    """A smooth RGB picture without symmetries."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


def reason(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(BadImage) as caught:
        canonical(data, limits)
    return caught.value.reason


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved(picture(), "JPEG"), "jpeg"),
        (saved(picture(), "JPEG", progressive=True), "jpeg"),
        (saved(picture().convert("L"), "JPEG"), "jpeg"),
        (saved(picture(), "PNG"), "png"),
        (saved(picture().convert("L"), "PNG"), "png"),
    ],
    ids=["jpeg", "progressive jpeg", "grey jpeg", "png", "grey png"],
)
def test_plain_images_keep_their_bytes(data: bytes, kind: str) -> None:
    result = canonical(data, LIMITS)
    assert (result.encoded, result.format, result.height, result.width) == (data, kind, 24, 40)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (saved(picture(), "BMP"), 0),
        (saved(picture(), "WEBP", lossless=True), 0),
        (saved(picture(), "GIF"), 40),
        (saved(picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=256), "PNG"), 40),
        (saved(picture().convert("CMYK"), "JPEG", quality=98), 12),
        (saved(picture().convert("RGBA"), "PNG"), 0),
    ],
    ids=["bmp", "webp", "gif", "palette png", "cmyk jpeg", "opaque rgba png"],
)
def test_every_other_kind_becomes_an_rgb_png_of_the_same_picture(data: bytes, tolerance: int) -> None:
    result = canonical(data, LIMITS)
    found = Image.open(io.BytesIO(result.encoded))
    assert (result.format, found.format, found.mode, found.size) == ("png", "PNG", "RGB", (40, 24))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(picture()).astype(int)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    # The EXIF standard's table: how the upright picture lies in the file.
    upright = np.asarray(picture(32, 48)).astype(int)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    data = saved(Image.fromarray(stored.astype(np.uint8)), kind, exif=exif, **options)
    result = canonical(data, LIMITS)
    assert (result.height, result.width) == (32, 48)
    assert np.abs(pixels(result.encoded).astype(int) - upright).max() <= (6 if kind == "JPEG" else 0)
    kept = orientation == 1 and kind != "WEBP"
    assert (result.encoded == data) is kept
    if not kept:
        assert Image.open(io.BytesIO(result.encoded)).getexif().get(0x0112) is None


@pytest.mark.parametrize("value", [0, 9, 77])
def test_a_senseless_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    data = saved(picture(), "JPEG", exif=exif)
    assert canonical(data, LIMITS).encoded == data


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    wide = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    result = pixels(canonical(saved(Image.fromarray(wide), "PNG"), LIMITS).encoded)
    np.testing.assert_array_equal(result, np.repeat((wide >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4)], ids=["rgb", "rgba"])
def test_16_bit_colour_keeps_its_high_bytes(colour: int, channels: int) -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (9, 11, channels)).astype(np.uint16)
    wide[..., 3:] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    result = canonical(png(11, 9, 16, colour, rows), LIMITS)
    assert result.format == "png"
    np.testing.assert_array_equal(pixels(result.encoded), wide[..., :3] >> 8)


def test_1_bit_becomes_black_and_white() -> None:
    bits = Image.fromarray((np.arange(64 * 64).reshape(64, 64) % 3 == 0).astype(np.uint8) * 255).convert("1")
    result = pixels(canonical(saved(bits, "PNG"), LIMITS).encoded)
    np.testing.assert_array_equal(result[..., 0], np.asarray(bits.convert("L")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(mode: str, kind: str) -> None:
    image = picture().convert(mode)
    alpha = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1))
    image.putalpha(Image.fromarray(alpha))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    result = pixels(canonical(saved(image, kind, **options), LIMITS).encoded).astype(float)
    colour = np.asarray(image.convert("RGBA"))[..., :3].astype(float)
    share = alpha[..., None] / 255.0
    assert np.abs(result - (share * colour + (1 - share) * 255.0)).max() <= 1.0


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 8, 16))
    for kind in ("PNG", "GIF"):
        result = pixels(canonical(saved(image, kind, transparency=0), LIMITS).encoded)
        assert (result[:, :8] == 255).all(), kind
        assert (result[:, 8:] == (200, 100, 50)).all(), kind


def test_a_transparent_colour_of_an_rgb_png_becomes_white() -> None:
    image = Image.new("RGB", (16, 16), (1, 2, 3))
    image.paste((200, 100, 50), (8, 0, 16, 16))
    result = canonical(saved(image, "PNG", transparency=(1, 2, 3)), LIMITS)
    assert (pixels(result.encoded)[:, :8] == 255).all()
    assert (pixels(result.encoded)[:, 8:] == (200, 100, 50)).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    result = canonical(data, LIMITS)
    assert (pixels(result.encoded) == (255, 0, 0)).all()


def test_a_phones_multi_picture_file_is_read_as_its_first_jpeg() -> None:
    data = saved(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert canonical(data, LIMITS).format == "jpeg"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_cut_files_are_refused_wherever_they_are_cut(kind: str) -> None:
    whole = saved(picture(64, 96), kind)
    if kind == "GIF":
        whole = whole[:-8]  # the end code and the trailer may be missing, for every pixel is there
    cuts = sorted({1, 3, 10, 20, 40, *range(60, len(whole), max(1, len(whole) // 40)), len(whole) - 1})
    for cut in cuts:
        assert reason(whole[:cut]) in ("truncated", "damaged", "not_an_image"), cut
    assert reason(whole[: len(whole) // 2]) in ("truncated", "damaged")


def test_a_png_whose_checksum_is_wrong_is_refused() -> None:
    whole = bytearray(saved(picture(), "PNG"))
    whole[-13] ^= 1  # the last byte of the checksum of the last picture data
    assert reason(bytes(whole)) == "damaged"
    assert reason(saved(picture(), "PNG")[:-12]) == "truncated"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"this is a text that somebody called broken.jpg", "not_an_image"),
        (b"\0" * 4096, "not_an_image"),
        (saved(picture(), "TIFF"), "not_an_image"),
        (saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "not_an_image"),
        (b"\xff\xd8\xff", "damaged"),
        (saved(picture(7, 40), "PNG"), "too_small"),
        (saved(picture(40, 7), "JPEG"), "too_small"),
    ],
    ids=["zero bytes", "text", "zeros", "tiff", "tiff of NaN", "jpeg mark alone", "too flat", "too narrow"],
)
def test_what_cannot_be_used_is_refused_with_its_reason(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize("side", [10_001, 20_000, 1_000_000])
def test_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    assert reason(png(side, side, 8, 0, b"")) == "too_many_pixels"


def with_scans(scans: int, between: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan is repeated until there are so many."""
    data = saved(picture(), "JPEG", progressive=True)
    begin, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + between + data[begin:end] * (scans - data.count(b"\xff\xda")) + data[end:]


@pytest.mark.parametrize("between", [b"", b"\xff\xfe\x00\x04\xff\xd9"], ids=["at once", "behind an end in a comment"])
def test_a_jpeg_that_would_be_decoded_over_and_over_is_refused_from_its_marks(between: bytes) -> None:
    with pytest.raises(BadImage, match="damaged: the JPEG has more than 100 scans"):
        inspect(with_scans(101, between), LIMITS)
    kept = with_scans(100, between)
    assert canonical(kept, LIMITS).encoded == kept


def test_what_looks_like_scans_behind_a_jpeg_is_none() -> None:
    film = saved(picture(), "JPEG", progressive=True) + b"\xff\xda\x00\x02" * 500
    assert canonical(film, LIMITS).encoded == film


def test_the_limit_of_pixels_is_inclusive() -> None:
    data = saved(picture(), "PNG")
    assert canonical(data, Limits(24 * 40, 8)).height == 24
    assert reason(data, Limits(24 * 40 - 1, 8)) == "too_many_pixels"


def test_size_is_checked_before_pixels_are_decoded() -> None:
    whole = saved(picture(64, 96), "PNG")
    assert inspect(whole[:80], LIMITS).size == (96, 64)
    assert reason(whole[:80], Limits(100, 8)) == "too_many_pixels"
    assert reason(whole[:80], Limits(10_000, 65)) == "too_small"


def test_many_threads_get_what_one_gets() -> None:
    images = [saved(picture(seed=seed), kind) for seed in range(12) for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP")]
    alone = [canonical(data, LIMITS) for data in images]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda data: canonical(data, LIMITS), images)) == alone


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_first_bytes_tell_images_from_other_files(kind: str) -> None:
    assert looks_like_image(saved(picture(), kind)[:16])
    assert not looks_like_image(b"path,label\n")
