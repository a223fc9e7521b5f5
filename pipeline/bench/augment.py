"""Pairs of views per second at 224 px from JPEGs of a megapixel: ViewAugmenter under Beam against a Pillow loop.

Both are measured on one core in one fresh process: `python -m pipeline.bench.augment FOLDER PAIRS_PER_IMAGE`.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import pathlib
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from trainer_module import progress
from trainer_module.config import AugmentConfig, ImageConfig, Where

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "configs" / "demo_images"
_RUNNER = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_WIDTH, _HEIGHT = 1152, 896  # 1.03 megapixels
_SHARD_BYTES = 64 << 20  # ingest.shard_mb by default
_WARM_UP = 0.1  # share of the pairs that passes before the clock starts
_SEED = 0


def measure() -> Mapping[str, float]:
    """See `augment`."""
    return augment()


def augment(images: int = 300, pairs_per_image: int = 1, sample: str = str(SAMPLE)) -> dict[str, float]:
    """Measures the making of views from stored images, MoCo v2's recipe, against a plain Pillow loop.

    Both sides decode each image once and make `pairs_per_image` pairs of it. ViewAugmenter cuts them from the stored
    image (256 px) and writes them to disk; the loop cuts them from the whole image, as torchvision does, and writes
    nothing. Warm-up and tracing are left out on both sides.

    Args:
        images: JPEGs, mosaics of the sample pictures.
        pairs_per_image: pairs of each.
        sample: folder of tar files with pictures.

    Returns:
        pairs_per_second, pillow_pairs_per_second: by seconds of processor time of the one core.
        ratio: of the two.
        wall_ratio: the same by the clock on the wall, which whatever else runs on the machine disturbs.
        images, jpeg_kilobytes: how many and how large on average.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work)
        size = make_files(pathlib.Path(sample), folder / "images", images)
        command = [sys.executable, "-m", "pipeline.bench.augment", work, str(pairs_per_image)]
        root = pathlib.Path(__file__).resolve().parents[2]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR"}
        output = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    return {**json.loads(output.splitlines()[-1]), "images": images, "jpeg_kilobytes": size / images / 1000}


def make_files(sample: pathlib.Path, folder: pathlib.Path, count: int) -> int:
    """Writes JPEG mosaics of sample pictures, and returns their size in bytes."""
    folder.mkdir()
    pictures = _pictures(sample)
    draw = random.Random(_SEED)
    for number in range(count):
        side = draw.choice((64, 128, 256))
        mosaic = Image.new("RGB", (_WIDTH, _HEIGHT))
        for top in range(0, _HEIGHT, side):
            for left in range(0, _WIDTH, side):
                picture = draw.choice(pictures)
                mosaic.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        mosaic.save(folder / f"{number:05d}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir())


def _pictures(sample: pathlib.Path) -> list[Image.Image]:
    with tarfile.open(sorted(sample.glob("*.tar"))[0]) as tar:
        files = [tar.extractfile(member) for member in tar.getmembers() if member.isfile()]
        return [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file]


class Clock(NamedTuple):
    """Seconds of processor time and on the wall."""

    processor: float
    wall: float

    @staticmethod
    def now() -> "Clock":
        """Reads both."""
        return Clock(time.process_time(), time.perf_counter())


def _compare(folder: pathlib.Path, pairs_per_image: int) -> dict[str, float]:
    """Runs in the fresh process: half of the Pillow loop, ViewAugmenter, the other half."""
    config = AugmentConfig(pairs_per_image=pairs_per_image, where=Where.beam)
    encoded = [path.read_bytes() for path in sorted((folder / "images").iterdir())]
    half = len(encoded) // 2
    for data in encoded[: max(1, round(len(encoded) * _WARM_UP))]:
        _pillow_pairs(data, config, random.Random(_SEED))
    first = _time(lambda: _pillow_loop(encoded[:half], config))
    beam_rate = _augmenter_rate(folder, encoded, config)
    second = _time(lambda: _pillow_loop(encoded[half:], config))
    pillow_rate = [len(encoded) * pairs_per_image / (a + b) for a, b in zip(first, second, strict=True)]
    return {
        "pairs_per_second": round(beam_rate[0], 1),
        "pillow_pairs_per_second": round(pillow_rate[0], 1),
        "ratio": round(beam_rate[0] / pillow_rate[0], 2),
        "wall_ratio": round(beam_rate[1] / pillow_rate[1], 2),
    }


def _time(work: Callable[[], None]) -> Clock:
    start = Clock.now()
    work()
    end = Clock.now()
    return Clock(end.processor - start.processor, end.wall - start.wall)


def _augmenter_rate(folder: pathlib.Path, encoded: list[bytes], config: AugmentConfig) -> tuple[float, float]:
    """Pairs per second of processor time and on the wall, from the end of the warm-up to the end of the pipeline."""
    import apache_beam as beam

    from components.view_augmenter import executor

    _write_examples(folder / "examples", encoded)
    job = executor.Job(str(folder / "views"), ImageConfig(), config, _SEED, len(encoded))
    pathlib.Path(job.split_folder).mkdir(parents=True)
    reports = _Reports()
    with beam.Pipeline(argv=[_RUNNER]) as pipeline:
        _ = pipeline | beam.Create(executor.find_shards(str(folder / "examples"))) | executor.MakeViews(job)
    end = Clock.now()
    total = len(encoded) * config.pairs_per_image
    done, start = next((done, clock) for done, clock in reports.seen if done >= _WARM_UP * total)
    return (total - done) / (end.processor - start.processor), (total - done) / (end.wall - start.wall)


class _Reports(logging.Handler):
    """Notes when how much was done."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Clock]] = []
        logger = logging.getLogger(progress.LOGGER_NAME)
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one report."""
        self.seen.append((record.__dict__["progress"].done, Clock.now()))


def _write_examples(folder: pathlib.Path, encoded: list[bytes]) -> None:
    """Writes the images as ImageExampleGen does."""
    import tensorflow as tf

    folder.mkdir()
    shards = math.ceil(sum(map(len, encoded)) / _SHARD_BYTES)
    for shard in range(shards):
        with tf.io.TFRecordWriter(str(folder / f"images-{shard:05d}-of-{shards:05d}.tfrecord")) as writer:
            for data in encoded[shard::shards]:
                values = {"image/encoded": data, "image/sha256": hashlib.sha256(data).hexdigest().encode()}
                lists = {name: tf.train.BytesList(value=[value]) for name, value in values.items()}
                features = {name: tf.train.Feature(bytes_list=value) for name, value in lists.items()}
                writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def _pillow_loop(encoded: list[bytes], config: AugmentConfig) -> None:
    draw = random.Random(_SEED)
    for data in encoded:
        _pillow_pairs(data, config, draw)


def _pillow_pairs(data: bytes, config: AugmentConfig, draw: random.Random) -> list[np.ndarray]:
    """uint8 [size, size, 3] of both views of each pair, as torchvision makes them of a PIL image."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return [np.asarray(_pillow_view(image, config, draw)) for _ in range(2 * config.pairs_per_image)]


def _pillow_view(image: Image.Image, config: AugmentConfig, draw: random.Random) -> Image.Image:
    view = _pillow_crop(image, config, draw)
    if draw.random() < config.jitter_probability:
        view = _pillow_jitter(view, config, draw)
    if draw.random() < config.gray_probability:
        view = view.convert("L").convert("RGB")
    if draw.random() < config.blur_probability:
        view = view.filter(ImageFilter.GaussianBlur(draw.uniform(config.blur_sigma_min, config.blur_sigma_max)))
    if draw.random() < config.flip_probability:
        view = ImageOps.mirror(view)
    return view


def _pillow_crop(image: Image.Image, config: AugmentConfig, draw: random.Random) -> Image.Image:
    width, height, left, top = image.width, image.height, 0, 0
    log_ratios = math.log(config.crop_ratio_min), math.log(config.crop_ratio_max)
    for _ in range(10):
        area = image.width * image.height * draw.uniform(config.crop_scale_min, config.crop_scale_max)
        ratio = math.exp(draw.uniform(*log_ratios))
        tried = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < tried[0] <= image.width and 0 < tried[1] <= image.height:
            width, height = tried
            left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
            break
    box = (left, top, left + width, top + height)
    return image.crop(box).resize((config.size, config.size), Image.Resampling.BILINEAR)


def _pillow_jitter(view: Image.Image, config: AugmentConfig, draw: random.Random) -> Image.Image:
    def factor(strength: float) -> float:
        return draw.uniform(1 - strength, 1 + strength)

    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda v: ImageEnhance.Brightness(v).enhance(factor(config.brightness)),
        lambda v: ImageEnhance.Contrast(v).enhance(factor(config.contrast)),
        lambda v: ImageEnhance.Color(v).enhance(factor(config.saturation)),
        lambda v: _pillow_hue(v, draw.uniform(-config.hue, config.hue)),
    ]
    draw.shuffle(steps)
    for step in steps:
        view = step(view)
    return view


def _pillow_hue(view: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = view.convert("HSV").split()
    shifted = np.asarray(hue) + np.uint8(int(turns * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("pairs_per_image", type=int)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    sys.stdout.write(json.dumps(_compare(options.folder, options.pairs_per_image)) + "\n")


if __name__ == "__main__":
    _main()
