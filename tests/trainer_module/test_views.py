"""The augmentation recipe: each operation against Pillow or NumPy on real images, seeds, and distributions."""

import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage, stats

from trainer_module import views
from trainer_module.config import AugmentConfig, RecipeOrder

SAMPLES = Path(__file__).resolve().parents[2] / "configs" / "demo_images"
SIZE = 96
PLAIN = AugmentConfig(size=48, jitter_probability=0.0, gray_probability=0.0, blur_probability=0.0, flip_probability=0.0)
RECIPE = AugmentConfig(size=48)


def sample_images(size: int) -> list[Image.Image]:
    with tarfile.open(sorted(SAMPLES.glob("*.tar"))[0]) as tar:
        files = [tar.extractfile(member) for member in tar.getmembers()[:500:60]]
        pictures = [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file]
    return [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return sample_images(SIZE)


@pytest.fixture(scope="module")
def image() -> tf.Tensor:
    """A stored image, 64 x 80."""
    return tf.constant(np.asarray(sample_images(80)[1])[8:72])


def to_float(picture: Image.Image) -> tf.Tensor:
    return tf.constant(np.asarray(picture), tf.float32)


def difference(result: tf.Tensor, expected: Image.Image | np.ndarray) -> np.ndarray:
    return np.abs(np.asarray(result, np.float64) - np.asarray(expected, np.float64))


def sha(text: object) -> str:
    return hashlib.sha256(repr(text).encode()).hexdigest()


@pytest.fixture(scope="module")
def traced() -> tf.types.experimental.PolymorphicFunction:
    """view_pair of RECIPE as a graph, traced once: (image, id, pair, seed)."""
    spec = tf.TensorSpec

    @tf.function(
        input_signature=[spec([None, None, 3], tf.uint8), spec([], tf.string), spec([], tf.int64), spec([], tf.int64)],
        autograph=False,
    )
    def function(image: tf.Tensor, identity: tf.Tensor, pair: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return views.view_pair(image, identity, pair, seed, RECIPE)

    return function


def make(image: tf.Tensor, identity: str, pair: int, seed: int, config: AugmentConfig) -> np.ndarray:
    return views.view_pair(image, tf.constant(identity), tf.constant(pair, tf.int64), seed, config).numpy()


def draw_many(count: int, config: AugmentConfig, size: tuple[int, int] = (256, 320)) -> views.ViewParameters:
    """Both views of `count` images, stacked to [2 * count]."""

    def one(identity: tf.Tensor) -> views.ViewParameters:
        return views.draw_parameters(tf.constant(size), identity, tf.constant(3, tf.int64), 7, config)

    parts = list(tf.data.Dataset.from_tensor_slices([sha(n) for n in range(count)]).map(one).as_numpy_iterator())
    return views.ViewParameters(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@pytest.fixture(scope="module")
def drawn() -> views.ViewParameters:
    return draw_many(2000, AugmentConfig())


# Operations


@pytest.mark.parametrize("box", [(0, 0, 96, 96), (10, 20, 70, 50), (3, 5, 30, 40), (90, 90, 5, 6)])
@pytest.mark.parametrize("size", [32, 48, 224])
def test_crop_and_resize_match_pillow(pictures: list[Image.Image], box: tuple[int, int, int, int], size: int) -> None:
    top, left = box[0], box[1]
    height, width = min(box[2], SIZE - top), min(box[3], SIZE - left)
    for picture in pictures[:3]:
        view = views.resized_crop(
            tf.constant(np.asarray(picture)), *map(tf.constant, (top, left, height, width)), size=size
        )
        crop = picture.crop((left, top, left + width, top + height))
        assert difference(view, crop.resize((size, size), Image.Resampling.BILINEAR)).max() <= 1.01


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.93, 1.0, 1.4])
def test_brightness_contrast_and_saturation_match_pillow(pictures: list[Image.Image], factor: float) -> None:
    operations = {
        views.adjust_brightness: ImageEnhance.Brightness,
        views.adjust_contrast: ImageEnhance.Contrast,
        views.adjust_saturation: ImageEnhance.Color,
    }
    for picture in pictures:
        for operation, pillow in operations.items():
            off = difference(operation(to_float(picture), tf.constant(factor)), pillow(picture).enhance(factor))
            assert off.max() <= 1.5, operation.__name__


def test_grayscale_matches_pillow(pictures: list[Image.Image]) -> None:
    for picture in pictures:
        assert difference(views.to_gray(to_float(picture)), picture.convert("L").convert("RGB")).max() <= 0.5


@pytest.mark.parametrize("turns", [-0.4, -0.1, 0.0, 0.03, 0.1])
def test_hue_matches_the_standard_librarys_hsv(pictures: list[Image.Image], turns: float) -> None:
    import colorsys

    for picture in pictures[:2]:
        small = np.asarray(picture.resize((24, 24)), np.float64)
        expected = np.array(
            [
                colorsys.hsv_to_rgb((h + turns) % 1.0, s, v)
                for h, s, v in (colorsys.rgb_to_hsv(*p) for p in small.reshape(-1, 3) / 255)
            ]
        )
        result = views.adjust_hue(tf.constant(small, tf.float32), tf.constant(turns))
        assert difference(result, expected.reshape(small.shape) * 255).max() < 0.01


@pytest.mark.parametrize("turns", [-0.1, 0.05, 0.1])
def test_hue_is_near_pillows_which_keeps_it_in_8_bits(pictures: list[Image.Image], turns: float) -> None:
    for picture in pictures:
        hue, saturation, value = picture.convert("HSV").split()
        shifted = ((np.asarray(hue, np.int64) + int(turns * 255)) % 256).astype(np.uint8)
        expected = Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
        off = difference(views.adjust_hue(to_float(picture), tf.constant(turns)), expected)
        assert off.mean() < 2
        assert off.max() <= 12


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.7, 2.0])
def test_blur_matches_a_true_gaussian(pictures: list[Image.Image], sigma: float) -> None:
    for picture in pictures:
        result = views.gaussian_blur(to_float(picture), tf.constant(sigma), 2.0)
        expected = ndimage.gaussian_filter(np.asarray(picture, np.float64), (sigma, sigma, 0), mode="nearest")
        assert difference(result, expected).max() < 1.0


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_near_pillows_which_adds_up_boxes(pictures: list[Image.Image], sigma: float) -> None:
    for picture in pictures:
        off = difference(
            views.gaussian_blur(to_float(picture), tf.constant(sigma), 2.0),
            picture.filter(ImageFilter.GaussianBlur(sigma)),
        )
        assert off.mean() < 1
        assert off[8:-8, 8:-8].max() <= 5  # at the border, each of Pillow's three passes repeats the pixels anew


@pytest.mark.parametrize("size", [32, 37, 48, 100, 224])
def test_blur_works_for_any_size(size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, [size, size, 3]).astype(np.float32)
    expected = ndimage.gaussian_filter(noise.astype(np.float64), (1.5, 1.5, 0), mode="nearest")
    assert difference(views.gaussian_blur(tf.constant(noise), tf.constant(1.5), 2.0), expected).max() < 1.0


def test_blur_and_colour_keep_flat_views_flat() -> None:
    for level in (0.0, 100.0, 255.0):
        view = tf.fill([32, 32, 3], level)
        for result in (
            views.gaussian_blur(view, tf.constant(2.0), 2.0),
            views.to_gray(view),
            views.adjust_saturation(view, tf.constant(1.4)),
            views.adjust_contrast(view, tf.constant(0.6)),
        ):
            np.testing.assert_allclose(result, view, atol=0.1)


# Whole views


def given_parameters(**changes: object) -> views.ViewParameters:
    plain = views.ViewParameters(
        *(tf.constant(n) for n in (4, 6, 40, 60)),
        jitter=tf.constant(False),
        order=tf.constant([0, 1, 2, 3]),
        brightness=tf.constant(1.3),
        contrast=tf.constant(0.7),
        saturation=tf.constant(1.4),
        hue=tf.constant(0.0),
        gray=tf.constant(False),
        blur=tf.constant(False),
        flip=tf.constant(False),
        sigma=tf.constant(1.0),
    )
    return plain._replace(**{name: tf.constant(value) for name, value in changes.items()})


def test_flip_mirrors_the_finished_view(image: tf.Tensor) -> None:
    plain = views.make_view(image, given_parameters(jitter=True, blur=True), RECIPE)
    flipped = views.make_view(image, given_parameters(jitter=True, blur=True, flip=True), RECIPE)
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 1, 0, 3], [3, 1, 2, 0]])
def test_a_whole_view_matches_pillows_in_the_drawn_order(pictures: list[Image.Image], order: list[int]) -> None:
    parameters = given_parameters(jitter=True, order=order)
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for picture in pictures:
        expected = picture.crop((6, 4, 66, 44)).resize((48, 48), Image.Resampling.BILINEAR)
        for step in order:
            if step < 3:
                expected = enhancers[step](expected).enhance([1.3, 0.7, 1.4][step])
        off = difference(views.make_view(tf.constant(np.asarray(picture)), parameters, RECIPE), expected)
        assert off.max() <= 5
        assert off.mean() < 1.5


def test_the_order_of_the_jitter_matters(image: tf.Tensor) -> None:
    first = views.make_view(image, given_parameters(jitter=True, order=[0, 1, 2, 3]), RECIPE).numpy()
    second = views.make_view(image, given_parameters(jitter=True, order=[1, 0, 2, 3]), RECIPE).numpy()
    assert (first != second).any()


def test_v1_turns_gray_before_the_jitter_and_v2_after(image: tf.Tensor) -> None:
    parameters = given_parameters(jitter=True, gray=True)
    for order in RecipeOrder:
        recipe = dataclasses.replace(RECIPE, order=order)
        view = tf.cast(views.resized_crop(image, *parameters[:4], size=48), tf.float32)
        jitter = [
            lambda v: views.adjust_brightness(v, parameters.brightness),
            lambda v: views.adjust_contrast(v, parameters.contrast),
            lambda v: views.adjust_saturation(v, parameters.saturation),
            lambda v: views.adjust_hue(v, parameters.hue),
        ]
        for operation in [views.to_gray, *jitter] if order is RecipeOrder.v1 else [*jitter, views.to_gray]:
            view = operation(view)
        assert difference(views.make_view(image, parameters, recipe), view).max() <= 0.5 + 1e-3


def operations(function: tf.types.experimental.ConcreteFunction) -> set[str]:
    graph = function.graph.as_graph_def()
    return {node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes}


def test_operations_of_probability_0_are_absent_from_the_graph(
    image: tf.Tensor, traced: tf.types.experimental.PolymorphicFunction
) -> None:
    costly = {"AdjustHue", "Conv2D", "BatchMatMulV2", "ReverseV2", "If", "Case"}
    plain = tf.function(lambda identity: views.view_pair(image, identity, tf.constant(0, tf.int64), 0, PLAIN))
    spec = tf.TensorSpec([], tf.string)
    found = {op.removeprefix("Stateless") for op in operations(traced.get_concrete_function())}
    assert costly <= found
    left = {op.removeprefix("Stateless") for op in operations(plain.get_concrete_function(spec))}
    assert costly & left == {"If"}  # it chooses the kernel of the resize


@pytest.mark.parametrize("height_width", [(32, 32), (33, 200), (500, 40), (1, 1), (3, 64)])
def test_any_image_gives_views_of_the_size(height_width: tuple[int, int]) -> None:
    noise = tf.constant(np.random.default_rng(0).integers(0, 256, [*height_width, 3]), tf.uint8)
    for size in (32, 50):
        pair = make(noise, sha("x"), 0, 0, AugmentConfig(size=size))
        assert pair.shape == (2, size, size, 3)
        assert pair.dtype == np.uint8


# Seeds

SEEDS = st.integers(-(2**63), 2**63 - 1)
PAIRS = st.integers(0, 2**40)
IDS = st.binary(max_size=8).map(sha)


@given(identity=IDS, pair=PAIRS, seed=SEEDS)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_same_seed_gives_the_same_bytes_and_query_differs_from_key(
    image: tf.Tensor, traced: tf.types.experimental.PolymorphicFunction, identity: str, pair: int, seed: int
) -> None:
    first = traced(image, identity, pair, seed).numpy()
    np.testing.assert_array_equal(first, traced(image, identity, pair, seed))
    assert (first[0] != first[1]).any()


def test_eager_views_have_the_bytes_of_the_graphs(
    image: tf.Tensor, traced: tf.types.experimental.PolymorphicFunction
) -> None:
    for n in range(8):  # together they use every operation
        np.testing.assert_array_equal(make(image, sha(n), n, n, RECIPE), traced(image, sha(n), n, n))


@given(identity=IDS, pair=PAIRS, seed=SEEDS, change=st.sampled_from(["identity", "pair", "seed"]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_another_seed_id_or_pair_gives_other_views(
    image: tf.Tensor,
    traced: tf.types.experimental.PolymorphicFunction,
    identity: str,
    pair: int,
    seed: int,
    change: str,
) -> None:
    other = {
        "identity": (sha(identity), pair, seed),
        "pair": (identity, pair + 1, seed),
        "seed": (identity, pair, seed ^ 1),
    }[change]
    first, second = traced(image, identity, pair, seed).numpy(), traced(image, *other).numpy()
    assert all((a != b).any() for a in first for b in second)


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_id_is_read_as_its_first_8_bytes(digest: bytes) -> None:
    read = int(views._first_8_bytes(tf.constant(digest.hex())))
    assert read == int.from_bytes(digest[:8], "big", signed=True)


@given(st.permutations(range(6)), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_views_do_not_depend_on_order_neighbours_or_threads(
    traced: tf.types.experimental.PolymorphicFunction,
    pictures: list[Image.Image],
    order: list[int],
    count: int,
    threads: int,
) -> None:
    stored = np.stack([np.asarray(picture) for picture in pictures[:6]])
    names = [sha(n) for n in range(6)]
    chosen = order[:count]
    dataset = tf.data.Dataset.from_tensor_slices((stored[chosen], [names[n] for n in chosen]))
    mapped = dataset.map(
        lambda i, n: traced(i, n, tf.constant(5, tf.int64), tf.constant(1, tf.int64)), num_parallel_calls=threads
    )
    for n, pair in zip(chosen, mapped.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(pair, traced(stored[n], names[n], 5, 1))


def test_sums_are_exact_so_bytes_do_not_depend_on_the_order_of_additions() -> None:
    noise = np.random.default_rng(1).integers(0, 256, [64, 64, 3]).astype(np.float32)
    kernel = views._gaussian(tf.constant(1.3), 6).numpy().astype(np.float64)
    assert kernel.sum() == 1.0
    assert (kernel * 4096 == np.round(kernel * 4096)).all()
    padded = np.pad(noise.astype(np.float64), ((6, 6), (0, 0), (0, 0)), mode="edge")
    down = np.floor(16 * sum(w * padded[i : i + 64] for i, w in enumerate(kernel)) + 0.5) / 16
    padded = np.pad(down, ((0, 0), (6, 6), (0, 0)), mode="edge")
    expected = sum(w * padded[:, i : i + 64] for i, w in enumerate(kernel))
    blurred = views.gaussian_blur(tf.constant(noise), tf.constant(1.3), 2.0)
    np.testing.assert_array_equal(blurred.numpy().astype(np.float64), expected)
    gray = noise.astype(np.float64) @ np.array([19595, 38470, 7471]) / 65536
    np.testing.assert_array_equal(views.to_gray(tf.constant(noise)).numpy()[..., 1].astype(np.float64), gray)


# Distributions


def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
    assert values.min() >= low
    assert values.max() <= high
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 0.001


def test_factors_and_sigma_are_uniform(drawn: views.ViewParameters) -> None:
    for factor in (drawn.brightness, drawn.contrast, drawn.saturation):
        assert is_uniform(factor, 0.6, 1.4)
    assert is_uniform(drawn.hue, -0.1, 0.1)
    assert is_uniform(drawn.sigma, 0.1, 2.0)


def test_each_operation_has_its_probability(drawn: views.ViewParameters) -> None:
    for happened, probability in ((drawn.jitter, 0.8), (drawn.gray, 0.2), (drawn.blur, 0.5), (drawn.flip, 0.5)):
        assert stats.binomtest(int(happened.sum()), len(happened), probability).pvalue > 0.001


def test_all_24_orders_are_equally_likely(drawn: views.ViewParameters) -> None:
    assert (np.sort(drawn.order, axis=1) == np.arange(4)).all()
    _, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001


def test_draws_are_independent_of_each_other(drawn: views.ViewParameters) -> None:
    columns = (drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue, drawn.sigma, drawn.flip, drawn.top)
    correlation = np.corrcoef(np.stack(columns)) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.06
    assert abs(np.corrcoef(drawn.brightness[::2], drawn.brightness[1::2])[0, 1]) < 0.08


def test_crops_have_torchvisions_area_and_ratio() -> None:
    config = AugmentConfig(crop_scale_min=0.2, crop_scale_max=0.5)  # so small that the first box always fits
    crops = draw_many(2000, config, (400, 400))
    area, ratio = crops.height * crops.width / 400**2, crops.width / crops.height
    assert stats.kstest(area, stats.uniform(0.2, 0.3).cdf).pvalue > 0.001
    log_range = stats.uniform(np.log(3 / 4), 2 * np.log(4 / 3))
    assert stats.kstest(np.log(ratio), log_range.cdf).pvalue > 0.001
    assert is_uniform(crops.top / (400 - crops.height), 0, 1)
    assert is_uniform(crops.left / (400 - crops.width), 0, 1)


def test_crops_lie_within_the_image(drawn: views.ViewParameters) -> None:
    assert (drawn.top >= 0).all()
    assert (drawn.left >= 0).all()
    assert (drawn.top + drawn.height <= 256).all()
    assert (drawn.left + drawn.width <= 320).all()


@pytest.mark.parametrize(("size", "box"), [((40, 400), (40, 53)), ((400, 40), (53, 40)), ((40, 45), (40, 45))])
def test_where_no_box_fits_the_centre_is_cropped_as_in_torchvision(size: tuple[int, int], box: tuple[int, int]) -> None:
    config = AugmentConfig(crop_scale_min=1.9, crop_scale_max=2.0)  # larger than the image
    crops = draw_many(2, config, size)
    assert set(zip(crops.height, crops.width, strict=True)) == {box}
    assert set(crops.top) == {(size[0] - box[0]) // 2}
    assert set(crops.left) == {(size[1] - box[1]) // 2}
