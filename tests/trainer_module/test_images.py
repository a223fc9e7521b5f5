"""Decoding, stored images and centre views, against Pillow on real images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer_module import images
from trainer_module.config import AugmentConfig, ImageConfig
from trainer_module.errors import UserError

SAMPLES = Path(__file__).resolve().parents[2] / "configs" / "demo_images"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Eight sample pictures, 64 px."""
    with tarfile.open(sorted(SAMPLES.glob("*.tar"))[0]) as tar:
        files = [tar.extractfile(member) for member in tar.getmembers()[:400:50]]
        return [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file]


@pytest.fixture(scope="module")
def scene(pictures: list[Image.Image]) -> Image.Image:
    """A mosaic of samples, 800 x 400."""
    canvas = Image.new("RGB", (800, 400))
    for place in range(8):
        canvas.paste(pictures[place].resize((200, 200), Image.Resampling.BICUBIC), (place % 4 * 200, place // 4 * 200))
    return canvas


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def difference(a: np.ndarray | tf.Tensor, b: np.ndarray | Image.Image) -> np.ndarray:
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_decoded_as_pillow_does(scene: Image.Image, options: dict[str, object]) -> None:
    data = encode(scene, "JPEG", quality=90, **options)
    off = difference(images.decode(tf.constant(data)), Image.open(io.BytesIO(data)))
    assert off.max() <= 1


def test_gray_jpeg_and_gray_png_get_three_equal_channels(scene: Image.Image) -> None:
    for file_format in ("JPEG", "PNG"):
        decoded = images.decode(tf.constant(encode(scene.convert("L"), file_format))).numpy()
        assert decoded.shape == (400, 800, 3)
        assert (decoded == decoded[..., :1]).all()


@pytest.mark.parametrize(
    ("mode", "file_format"),
    # TensorFlow reads no BMP with a palette; ingestion makes a PNG of it.
    [(m, f) for m in ("RGB", "L", "P") for f in ("PNG", "GIF", "BMP") if (m, f) != ("P", "BMP")],
)
def test_lossless_formats_are_decoded_exactly(pictures: list[Image.Image], mode: str, file_format: str) -> None:
    data = encode(pictures[0].convert(mode), file_format)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(images.decode(tf.constant(data)), expected)


def test_only_the_first_frame_of_a_gif_is_taken(pictures: list[Image.Image]) -> None:
    data = encode(pictures[0], "GIF", save_all=True, append_images=pictures[1:3])
    np.testing.assert_array_equal(images.decode(tf.constant(data)), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_png_is_laid_on_white(pictures: list[Image.Image], mode: str) -> None:
    picture = pictures[0].convert(mode)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
    picture.putalpha(alpha)
    white = Image.new("RGBA", picture.size, "white")
    expected = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    off = difference(images.decode(tf.constant(encode(picture, "PNG"))), expected)
    assert off.max() <= 1


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        images.decode(tf.constant(data))


@pytest.mark.parametrize(
    ("side", "height"), [(400, 400), (201, 400), (200, 200), (101, 200), (100, 100), (50, 50), (9, 50)]
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_suffices(scene: Image.Image, side: int, height: int) -> None:
    data = encode(scene, "JPEG", quality=95)
    assert images.decode_at_least(tf.constant(data), side).shape == (height, 2 * height, 3)


def test_odd_sizes_never_fall_below_the_side(scene: Image.Image) -> None:
    data = encode(scene.crop((0, 0, 799, 399)), "JPEG")
    assert images.decode_at_least(tf.constant(data), 200).shape == (200, 400, 3)


def test_a_png_is_never_decoded_smaller(scene: Image.Image) -> None:
    assert images.decode_at_least(tf.constant(encode(scene, "PNG")), 10).shape == (400, 800, 3)


@pytest.mark.parametrize(
    ("size", "expected"), [((800, 400), (96, 192)), ((300, 401), (128, 96)), ((50, 25), (96, 192))]
)
def test_stored_image_has_the_storage_size_and_keeps_its_aspect(
    scene: Image.Image, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    stored = images.stored_image(tf.constant(encode(scene.resize(size), "PNG")), ImageConfig(storage_size=96))
    assert stored.dtype == tf.uint8
    assert stored.shape == (*expected, 3)


@pytest.mark.parametrize(("side", "kernel"), [(96, "BOX"), (250, "BOX"), (500, "BILINEAR")])
def test_stored_image_is_resized_as_pillow_does(scene: Image.Image, side: int, kernel: str) -> None:
    stored = images.stored_image(tf.constant(encode(scene, "PNG")), ImageConfig(storage_size=side))
    size = (2 * side, side)
    if kernel == "BOX":  # Pillow's BOX takes whole pixels only; with 2000 % of them it comes near to areas
        expected = scene.resize((8000, 4000), Image.Resampling.NEAREST).resize(size, Image.Resampling.BOX)
    else:
        expected = scene.resize(size, Image.Resampling.BILINEAR)
    off = difference(stored, expected)
    assert off.mean() < 0.3
    assert np.quantile(off, 0.999) <= 2


def test_shrinking_within_the_dct_hardly_changes_a_stored_image(scene: Image.Image) -> None:
    data = encode(scene, "JPEG", quality=95)
    full = images.stored_image(tf.constant(encode(Image.open(io.BytesIO(data)), "PNG")), ImageConfig(storage_size=120))
    off = difference(images.stored_image(tf.constant(data), ImageConfig(storage_size=120)), full)
    assert off.mean() < 1.5


def test_an_image_of_the_right_size_is_stored_untouched(pictures: list[Image.Image]) -> None:
    for picture in pictures:
        stored = images.stored_image(tf.constant(encode(picture, "PNG")), ImageConfig(storage_size=64))
        np.testing.assert_array_equal(stored, picture)


def test_a_long_image_is_cropped_at_its_centre(scene: Image.Image) -> None:
    strip = scene.crop((0, 0, 800, 50))
    stored = images.stored_image(tf.constant(encode(strip, "PNG")), ImageConfig(storage_size=50, max_aspect=4.0))
    np.testing.assert_array_equal(stored, strip.crop((300, 0, 500, 50)))


def test_centre_view_is_pillow_resize_and_centre_crop(scene: Image.Image) -> None:
    view = images.centre_view(tf.constant(np.asarray(scene)), 100, 88)
    expected = scene.resize((200, 100), Image.Resampling.BILINEAR).crop((56, 6, 144, 94))
    assert view.dtype == tf.float32
    off = difference(view, expected)
    assert off.max() <= 2
    assert off.mean() < 0.5


def test_a_batch_gives_the_same_views_as_its_images(pictures: list[Image.Image]) -> None:
    batch = tf.constant(np.stack([np.asarray(picture) for picture in pictures]), tf.float32)
    views = images.centre_views(batch, 48, 40)
    assert views.shape == (8, 40, 40, 3)
    for image, view in zip(batch, views, strict=True):
        np.testing.assert_array_equal(images.centre_view(image, 48, 40), view)


def test_a_crop_larger_than_the_resized_image_is_refused() -> None:
    with pytest.raises(ValueError, match="below the crop"):
        images.centre_view(tf.zeros([64, 64, 3]), 40, 48)


def test_eval_resize_is_the_usual_ratio_unless_it_is_given() -> None:
    assert images.eval_resize(ImageConfig(), AugmentConfig(size=224)) == 256
    assert images.eval_resize(ImageConfig(), AugmentConfig(size=32)) == 37
    assert images.eval_resize(ImageConfig(eval_resize=40), AugmentConfig(size=32)) == 40


def test_the_code_runs_in_tf_data_and_in_an_exported_graph(pictures: list[Image.Image], tmp_path: Path) -> None:
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
        def __call__(self, encoded: tf.Tensor) -> tf.Tensor:
            return images.centre_view(images.stored_image(encoded, ImageConfig(storage_size=48)), 40, 32)

    tf.saved_model.save(Module(), str(tmp_path))
    loaded, data = tf.saved_model.load(str(tmp_path)), [encode(picture, "PNG") for picture in pictures]
    eager = [
        images.centre_view(images.stored_image(tf.constant(d), ImageConfig(storage_size=48)), 40, 32) for d in data
    ]
    mapped = tf.data.Dataset.from_tensor_slices(data).map(Module(), num_parallel_calls=2)
    for expected, streamed, encoded in zip(eager, mapped, data, strict=True):
        np.testing.assert_array_equal(streamed, expected)
        np.testing.assert_array_equal(loaded(tf.constant(encoded)), expected)


@pytest.mark.parametrize(
    ("mean", "variance"),
    [
        ((np.nan, 1.0, 1.0), (1.0, 1.0, 1.0)),
        ((1.0, 1.0, 1.0), (1.0, np.inf, 1.0)),
        ((1.0, 1.0, 1.0), (1.0, 1.0, -0.5)),
        ((1.0, 1.0, 1.0), (1.0, np.nan, 1.0)),
    ],
)
def test_channel_statistics_that_would_make_pixels_nan_are_refused_in_one_line(mean, variance):
    images.check_channel_statistics((120.5, 99.0, 80.0), (0.0, 10.0, 3000.0), "run/graph/4")
    words = r"channel statistics are no use: mean .*, variance .*; delete run/graph/4 and run again$"
    with pytest.raises(UserError, match=words) as caught:
        images.check_channel_statistics(mean, variance, "run/graph/4")
    assert "\n" not in str(caught.value)
