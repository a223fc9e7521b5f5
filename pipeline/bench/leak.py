"""What each key-BN mode does on the sample images: pretext top-1 and kNN over time, as a table and a picture (R = 8).

Without shuffling, a query and its positive are normalised with the same images, whose statistics betray the positive:
pretext accuracy rises and kNN does not follow. Takes more than an hour; the curves that are finished are kept in --out,
and the same command goes on from there. Of the curves that BUILD_NOTES.md shows it makes table and picture anew:

    ./moco bench leak --out pipeline/bench/measured/leak
"""

import dataclasses
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.cli import DEMO_IMAGES
from trainer_module import progress
from trainer_module.config import (
    AugmentConfig,
    EncoderConfig,
    Head,
    KeyBnConfig,
    KeyBnMode,
    Stem,
    TrainConfig,
)

MODES = ("none", "cross_replica_sum", "all_to_all", "split", "stored", "ema", "sync")
SEEDS = (0, 1, 2)
REPLICAS = 8


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the experiment is.

    Attributes:
        size: side of a view in pixels.
        width: of the ResNet-18.
        batch: global batch.
        queue: K.
        epochs: passes over the images.
        pairs: of views for each image; epoch e uses pair e modulo pairs.
        every: epochs between two measurements.
        learning_rate, momentum, temperature: see TrainConfig.
    """

    size: int = 32
    width: int = 8
    batch: int = 64
    queue: int = 512
    epochs: int = 30
    pairs: int = 6
    every: int = 3
    learning_rate: float = 0.03
    momentum: float = 0.99
    temperature: float = 0.1


class Data(NamedTuple):
    """views uint8[pairs, N, 2, size, size, 3]; centre views uint8[., size, size, 3] and labels of both splits."""

    views: NDArray[np.uint8]
    bank: NDArray[np.uint8]
    bank_labels: NDArray[np.int64]
    queries: NDArray[np.uint8]
    query_labels: NDArray[np.int64]


class Point(NamedTuple):
    """One measurement."""

    epoch: int
    pretext_top1: float
    loss: float
    knn_top1: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One line of the table.

    Attributes:
        name: in the table and the picture.
        mode: of train.key_bn.
        shuffled: False leaves keys with their queries; `split` then is `none` on as many replicas.
    """

    name: str
    mode: KeyBnMode
    shuffled: bool = True


def measure(out: str | None = None) -> Mapping[str, float]:
    """Trains every mode with every seed.

    Args:
        out: folder for the curves (curves.json) and the picture (leak.png); a new temporary one by default.

    Returns:
        For each mode pretext top-1 of the last epoch and kNN top-1 at the end, mean and spread over the seeds.
    """
    return compare([Run(mode, KeyBnMode[mode]) for mode in MODES], Scale(), out)


def compare(runs: Sequence[Run], scale: Scale, out: str | None) -> Mapping[str, float]:
    """Trains what is not in the folder yet, draws, and returns the table; see `measure`."""
    from pipeline import console

    folder = Path(out or tempfile.mkdtemp(prefix="moco-leak-"))
    folder.mkdir(parents=True, exist_ok=True)
    curves = load(folder / "curves.json", scale)
    unfinished = [run for run in runs if len(curves.get(run.name, [])) < len(SEEDS)]
    if unfinished:
        _train(unfinished, scale, curves, folder / "curves.json")
    in_order = {run.name: curves[run.name] for run in runs}
    draw(in_order, folder / "leak.png")
    console.line(f"curves and picture: {folder}")
    return table(in_order)


def _train(runs: Sequence[Run], scale: Scale, curves: dict[str, list[list[Point]]], kept: Path) -> None:
    from trainer_module.strategy import prepare_devices

    prepare_devices(REPLICAS)  # making the views starts TensorFlow, and later it is too late
    data = make_data(scale)
    for run in runs:
        done = curves.setdefault(run.name, [])
        for curve in train(run, scale, data, SEEDS[len(done) :]):
            done.append(curve)
            save(kept, scale, curves)


def make_data(scale: Scale) -> Data:
    """Reads the demo's images, splits them by content and makes all views by the demo's recipe."""
    import tensorflow as tf
    from PIL import Image

    from components.image_example_gen import sources
    from components.image_example_gen.config import IngestConfig
    from pipeline.config import load
    from trainer_module.views import view_pair

    found = [item for item in sources.read_images(str(DEMO_IMAGES), IngestConfig()) if isinstance(item, sources.Found)]
    unique = {hashlib.sha256(item.data).hexdigest(): item for item in found}
    names = sorted({str(item.ref.label) for item in unique.values()})
    augment: AugmentConfig = dataclasses.replace(load("demo").augment, size=scale.size)
    images: dict[bool, list[NDArray[np.uint8]]] = {True: [], False: []}
    labels: dict[bool, list[int]] = {True: [], False: []}
    ids: list[str] = []
    for identity, item in unique.items():
        train = int(identity[:8], 16) % 5 > 0
        images[train].append(np.asarray(Image.open(io.BytesIO(item.data)).convert("RGB")))
        labels[train].append(names.index(str(item.ref.label)))
        ids += [identity] * train

    @tf.function
    def pair(image: tf.Tensor, identity: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        return view_pair(image, identity, index, 0, augment)

    views = np.zeros((scale.pairs, len(ids), 2, scale.size, scale.size, 3), np.uint8)
    for row, (identity, image) in enumerate(zip(ids, images[True], strict=True)):
        progress.report("make views", row + 1, len(ids), "images")
        for index in range(scale.pairs):
            views[index, row] = pair(tf.constant(image), tf.constant(identity), tf.constant(index, tf.int64))

    def centre(many: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        return np.stack(
            [np.asarray(Image.fromarray(one).resize((scale.size,) * 2, Image.Resampling.BOX)) for one in many]
        )

    return Data(views, centre(images[True]), np.array(labels[True]), centre(images[False]), np.array(labels[False]))


def train(run: Run, scale: Scale, data: Data, seeds: Sequence[int] = SEEDS) -> Iterator[list[Point]]:
    """Trains one mode with each seed.

    `split` trains on one device with as many groups as the others have replicas; `sync` on one, too, where it is plain
    normalisation of the global batch, since as many sums as it needs take half an hour to trace for logical devices.

    A seed decides the weights, the queue and the order of the images. The loop is compiled once for all of them, and so
    the permutations are those of the first of SEEDS.

    Args:
        run: the mode.
        scale: of the experiment.
        data: images and views.
        seeds: of SEEDS, those to be trained.

    Yields:
        A curve for each seed.
    """
    from trainer_module.build import build, first_state
    from trainer_module.driver import Driver, learning_rate, named
    from trainer_module.shuffle import in_order
    from trainer_module.strategy import make_strategy

    config = TrainConfig(
        replicas=1 if run.mode in (KeyBnMode.split, KeyBnMode.sync) else REPLICAS,
        global_batch=scale.batch,
        epochs=scale.epochs,
        queue=scale.queue,
        momentum=scale.momentum,
        temperature=scale.temperature,
        learning_rate=scale.learning_rate,
        key_bn=KeyBnConfig(run.mode, groups=REPLICAS),
    )
    encoder_config = EncoderConfig("resnet18", Stem.imagenet, scale.width, Head.v2, 64)
    steps = data.views.shape[1] // scale.batch
    mean, std = (tuple(map(float, f(data.bank, axis=(0, 1, 2)))) for f in (np.mean, np.std))
    builds = {
        seed: build(encoder_config, config, scale.size, mean, std, learning_rate(config, steps), seed)
        for seed in {SEEDS[0], *seeds}
    }
    first = builds[SEEDS[0]].moco
    moco = first if run.shuffled else dataclasses.replace(first, encode_keys=in_order)
    strategy = make_strategy(config.replicas)
    driver = Driver(moco, config, strategy)
    step = driver.compiled_step()
    for seed in seeds:
        built = builds[seed]
        driver.restore({name: np.asarray(tensor) for name, tensor in named(first_state(built.moco, config)).items()})
        batches = iter(strategy.experimental_distribute_dataset(_batches(data, seed, scale)))
        points = []
        for epoch in range(1, scale.epochs + 1):
            metrics = [step(batches) for _ in range(steps)]
            if epoch % scale.every == 0 or epoch == 1:
                driver.copy_weights_to(built.encoder.model)
                top1, loss = (float(np.mean([float(getattr(m, n)) for m in metrics])) for n in ("pretext_top1", "loss"))
                points.append(Point(epoch, top1, loss, _knn(built.encoder.backbone, data, mean, std)))
            figures = {"pretext": points[-1].pretext_top1, "knn": points[-1].knn_top1}
            progress.report(f"{run.name}, seed {seed}", epoch, scale.epochs, "epochs", **figures)
        yield points


def _batches(data: Data, seed: int, scale: Scale) -> Any:
    import tensorflow as tf

    steps = data.views.shape[1] // scale.batch
    orders = [np.random.default_rng((seed, epoch)).permutation(data.views.shape[1]) for epoch in range(scale.epochs)]
    rows = np.stack([order[: steps * scale.batch] for order in orders]).reshape(-1, scale.batch)
    pairs = np.repeat(np.arange(scale.epochs) % scale.pairs, steps)
    views = tf.constant(data.views)

    def views_of(pair: tf.Tensor, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        both = tf.gather(views[pair], images)
        return both[:, 0], both[:, 1]

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    # No Python in it: TensorFlow may wait for a dataset's Python thread with the interpreter's lock in its hand.
    return tf.data.Dataset.from_tensor_slices((pairs, rows)).map(views_of).prefetch(4).with_options(options)


def _knn(backbone: Any, data: Data, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
    from trainer_module.knn import knn_top1, unit

    bank, queries = (
        unit(backbone.predict((views.astype(np.float32) - mean) / std, batch_size=256, verbose=0))
        for views in (data.bank, data.queries)
    )
    return knn_top1(bank, data.bank_labels, queries, data.query_labels, 20, 0.1)


def table(curves: Mapping[str, list[list[Point]]]) -> dict[str, float]:
    """The end of each curve: mean over the seeds and half the range."""
    figures: dict[str, float] = {}
    for mode in curves:
        ends = [Point(*curve[-1]) for curve in curves[mode]]
        for name in ("pretext_top1", "knn_top1"):
            values = [getattr(end, name) for end in ends]
            figures[f"{mode}_{name}"] = float(np.mean(values))
            figures[f"{mode}_{name}_half_range"] = float((max(values) - min(values)) / 2)
    return figures


def draw(curves: Mapping[str, list[list[Point]]], path: Path) -> None:
    """Pretext top-1 and kNN over the epochs, a line for each mode, its range over the seeds shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, name, title in zip(
        figure.subplots(1, 2), ("pretext_top1", "knn_top1"), ("pretext top-1", "kNN top-1 (k = 20)"), strict=True
    ):
        for number, mode in enumerate(curves):
            runs = [[Point(*point) for point in curve] for curve in curves[mode]]
            epochs = [point.epoch for point in runs[0]]
            values = np.array([[getattr(point, name) for point in run] for run in runs])
            axis.plot(epochs, values.mean(0), color=f"C{number}", label=mode, lw=2.4 if mode == "none" else 1.4)
            axis.fill_between(epochs, values.min(0), values.max(0), color=f"C{number}", alpha=0.12, lw=0)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def load(path: Path, scale: Scale) -> dict[str, list[list[Point]]]:
    """The curves that `save` wrote; none if there are none, or of another scale."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["curves"] if kept["scale"] == dataclasses.asdict(scale) else {}


def save(path: Path, scale: Scale, curves: Mapping[str, list[list[Point]]]) -> None:
    """Writes the curves that are finished, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"scale": dataclasses.asdict(scale), "curves": curves}), encoding="utf-8")
    temporary.replace(path)
