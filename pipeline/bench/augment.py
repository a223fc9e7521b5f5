"""Pairs of views per second at 224 px from JPEGs of a megapixel: ViewAugmenter under Beam against a Pillow loop.

Each is measured on the same core in fresh processes of its own, half of the loop before ViewAugmenter and half after
it: `python -m pipeline.bench.augment pillow|augmenter FOLDER PAIRS_PER_IMAGE HALF`.
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

from pipeline.beam import BEAM_ARGUMENTS
from trainer_module import progress
from trainer_module.config import AugmentConfig, ImageConfig, Where

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "configs" / "demo_images"
_WIDTH, _HEIGHT = 1152, 896  # 1.03 megapixels
_SHARD_BYTES = 64 << 20  # ingest.shard_mb by default
_WARM_UP = 0.1  # share of the pairs that passes before the clock starts
_SEED = 0


def measure() -> Mapping[str, float]:
    """See `augment`."""
    return augment()


def augment(images: int = 1200, pairs_per_image: int = 1, sample: str = str(SAMPLE)) -> dict[str, float]:
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
        first = _measure("pillow", folder, pairs_per_image, 0)
        augmenter = _measure("augmenter", folder, pairs_per_image, 0)
        second = _measure("pillow", folder, pairs_per_image, 1)
    pillow = Rate(first.pairs + second.pairs, Seconds(*map(sum, zip(first.seconds, second.seconds, strict=True))))
    return {
        "pairs_per_second": round(augmenter.per_second.processor, 1),
        "pillow_pairs_per_second": round(pillow.per_second.processor, 1),
        "ratio": round(augmenter.per_second.processor / pillow.per_second.processor, 2),
        "wall_ratio": round(augmenter.per_second.wall / pillow.per_second.wall, 2),
        "images": images,
        "jpeg_kilobytes": round(size / images / 1000, 1),
    }


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


class Seconds(NamedTuple):
    """Processor time of this process, and the clock on the wall."""

    processor: float
    wall: float

    @staticmethod
    def now() -> "Seconds":
        """Reads both."""
        return Seconds(time.process_time(), time.perf_counter())

    def since(self, start: "Seconds") -> "Seconds":
        """What has passed."""
        return Seconds(self.processor - start.processor, self.wall - start.wall)


class Rate(NamedTuple):
    """So many pairs in so much time."""

    pairs: int
    seconds: Seconds

    @property
    def per_second(self) -> Seconds:
        """Pairs per second, by both clocks."""
        return Seconds(self.pairs / self.seconds.processor, self.pairs / self.seconds.wall)


def _measure(what: str, folder: pathlib.Path, pairs_per_image: int, half: int) -> Rate:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, "-m", "pipeline.bench.augment", what, str(folder), str(pairs_per_image), str(half)]
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    pairs, seconds = json.loads(done.stdout.splitlines()[-1])
    return Rate(pairs, Seconds(*seconds))


def _run_pillow(folder: pathlib.Path, config: AugmentConfig, half: int) -> Rate:
    """The loop over every second image."""
    encoded = [path.read_bytes() for path in sorted((folder / "images").iterdir())[half::2]]
    draw = random.Random(_SEED)
    warm_up = max(1, round(len(encoded) * _WARM_UP))
    for data in encoded[:warm_up]:
        _pillow_pairs(data, config, draw)
    start = Seconds.now()
    for data in encoded[warm_up:]:
        _pillow_pairs(data, config, draw)
    return Rate((len(encoded) - warm_up) * config.pairs_per_image, Seconds.now().since(start))


def _run_augmenter(folder: pathlib.Path, config: AugmentConfig) -> Rate:
    """ViewAugmenter over all images, from the end of the warm-up to the end of the pipeline."""
    import apache_beam as beam
    import tensorflow as tf

    from components.view_augmenter import files, stages

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    encoded = [path.read_bytes() for path in sorted((folder / "images").iterdir())]
    _write_examples(folder / "examples", encoded)
    job = stages.Job(str(folder / "views"), ImageConfig(), config, _SEED, len(encoded))
    pathlib.Path(job.split_folder).mkdir(parents=True)
    reports = _Reports()
    with beam.Pipeline(argv=[*BEAM_ARGUMENTS]) as pipeline:
        _ = pipeline | beam.Create(files.find_shards(str(folder / "examples"))) | stages.MakeViews(job)
    total = len(encoded) * config.pairs_per_image
    done, start = next((done, clock) for done, clock in reports.seen if done >= _WARM_UP * total)
    return Rate(total - done, Seconds.now().since(start))


class _Reports(logging.Handler):
    """Notes when how much was done."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Seconds]] = []
        logger = logging.getLogger(progress.LOGGER_NAME)
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one report."""
        self.seen.append((record.__dict__["progress"].done, Seconds.now()))


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
    """Entry of the measuring processes."""
    parser = argparse.ArgumentParser(description="One measurement of the augmentation benchmark.")
    parser.add_argument("what", choices=("pillow", "augmenter"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("pairs_per_image", type=int)
    parser.add_argument("half", type=int)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    config = AugmentConfig(pairs_per_image=options.pairs_per_image, where=Where.beam)
    run = {
        "pillow": lambda: _run_pillow(options.folder, config, options.half),
        "augmenter": lambda: _run_augmenter(options.folder, config),
    }
    sys.stdout.write(json.dumps(run[options.what]()) + "\n")


if __name__ == "__main__":
    _main()
